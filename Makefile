# Every target makes its own virtual environment in .venv; nothing else needs to be installed but Python 3.11 and bash.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Processes that run tests.
WORKERS ?= 2

.PHONY: demo test quick-test lint clean

demo: $(VENV)/installed  ## generate ten videos of the miniature world and a contact sheet
	$(RUN) inference.py --config_path configs/shapes.yaml --data_path data/shapes_prompts.txt \
		--output_folder outputs/demo --num_output_frames 21 --seed 7
	$(RUN) scripts/contact_sheet.py outputs/demo

test: $(VENV)/installed-dev  ## the whole test suite, on the CPU, without network
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal

quick-test: $(VENV)/installed-dev  ## without the slow tests
	$(RUN) -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(VENV)/installed-dev  ## style and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/installed-dev: requirements-dev.txt $(VENV)/installed
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
