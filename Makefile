# The first call installs everything into .venv; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint types bench docs clean

demo: $(INSTALLED)
	$(BIN)/qinvert demo

test: $(INSTALLED)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy
	cd export/runtimes/programs && ../../../$(BIN)/mypy --explicit-package-bases --config-file ../../../pyproject.toml *.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/calibration.py
	$(BIN)/python benchmarks/runtimes.py --write

docs: $(INSTALLED)
	$(BIN)/python docs/tables.py

clean:
	rm -rf $(VENV) build dist *.egg-info

# torch comes first: its CPU build must be in place before anything asks for torch.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@
