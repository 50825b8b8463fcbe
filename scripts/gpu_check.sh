#!/usr/bin/env bash
# Run everything that only a GPU can show, within ten minutes; see gpu_check.py for the options.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[[ -x $python ]] || python=python3
exec "$python" scripts/gpu_check.py "$@"
