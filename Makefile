# Every target creates the virtual environment .venv first. It needs bash and Python 3.11, 3.12 or 3.13.
SHELL := bash
VENV := .venv
RUN := $(VENV)/bin/python
# Processes that run tests.
WORKERS ?= 2
# Mutants per group of modules in `make mutation`; 0 tests all.
SAMPLE ?= 30
# Port of `make live`.
PORT ?= 7860

# The newest suitable Python on the PATH, unless PYTHON names one: make demo PYTHON=/opt/python3.12/bin/python
SUITABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3.13 python3.12 python3.11 python3; do \
	$$python -c "$(SUITABLE)" 2> /dev/null && echo $$python && break; done)

.PHONY: help demo live test quick-test kills full-disk mutation lint clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

demo: $(VENV)/installed  ## make ten videos of the miniature world and a contact sheet
	$(RUN) inference.py --config_path configs/shapes.yaml --data_path data/shapes_prompts.txt \
		--output_folder outputs/demo --num_output_frames 21 --seed 7
	$(RUN) scripts/contact_sheet.py outputs/demo

live: $(VENV)/installed-demo  ## serve live video of the miniature at http://127.0.0.1:7860; PORT=8000 for another port
	$(RUN) demo.py --config_path configs/shapes.yaml --port $(PORT)

test: $(VENV)/installed-dev  ## run all tests, on the CPU and without network; WORKERS=8 uses 8 processes
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

quick-test: $(VENV)/installed-dev  ## run all tests but the slow ones
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

kills: $(VENV)/installed-dev  ## kill commands at 30 random moments and compare their results bit for bit
	$(RUN) tests/kills/run.py

full-disk: $(VENV)/installed-dev  ## fill a small disk during every kind of write; needs root on Linux
	$(RUN) tests/kills/full_disk.py

mutation: $(VENV)/installed-dev requirements-mutation.txt  ## change 30 expressions per group of modules and count what the tests notice; SAMPLE=0 changes all
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-mutation.txt
	$(RUN) tests/mutation/run.py --sample $(SAMPLE)

lint: $(VENV)/installed-dev  ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

clean:  ## delete .venv and the caches
	rm -rf $(VENV) mutation .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/installed: requirements.txt
	@[ -n "$(PYTHON)" ] && $(PYTHON) -c "$(SUITABLE)" 2> /dev/null || \
		{ echo "Python 3.11, 3.12 or 3.13 with its venv module is missing; install it or name it: make $(MAKECMDGOALS) PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-demo: requirements-demo.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-demo.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
