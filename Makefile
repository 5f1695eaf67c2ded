# The first call installs everything into .venv; later calls reuse it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLD_VENV := .venv-transformers-5.14
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-gpu test-transformers-5.14 lint types bench bench-npu docs measure verify-npu soak coverage clean

demo: $(INSTALLED)
	$(BIN)/qinvert demo

# One process per core: a test computes on one thread. Workers that are done take tests from the others.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal --quiet

# On a machine with a CUDA device.  Kernels compile on the CPU, each of them alone for seconds: in as many
# processes as there are cores, but no more than share one device well.
GPU_PROCESSES ?= $(shell n=$$(nproc); test $$n -lt 12 && echo $$n || echo 12)

test-gpu: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,gpu]"
	$(MAKE) test-gpu-installed PYTHON_GPU=$(BIN)/python

# The same with any Python that has torch for CUDA, Triton and pytest-xdist.
PYTHON_GPU ?= $(BIN)/python
.PHONY: test-gpu-installed
test-gpu-installed:
	$(PYTHON_GPU) -c "import torch; torch.cuda.is_available() or exit('there is no CUDA device here')"
	OMP_NUM_THREADS=1 $(PYTHON_GPU) -m pytest -p no:benchmark -n $(GPU_PROCESSES) --dist worksteal -q -rs --durations=10 \
		tests/kernels/test_device.py tests/execution/test_cuda.py

# By itself: tracing every line doubles the time of the tests that export whole models.
coverage: $(INSTALLED)
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

# Models as they were before 5.15: layers hold the function that is replaced.
test-transformers-5.14: $(OLD_VENV)/.installed
	$(OLD_VENV)/bin/python -m pytest tests/calibration/test_families.py tests/calibration/test_patching.py

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

# Hours, with these numbers; each fault is printed with its seed.
FILES ?= 20000
VALUES ?= 200000000
STEP_VALUES ?= 20000000
KILLS ?= 300
SEED ?= 0
PROCESSES ?= $(shell nproc)

soak: $(INSTALLED)
	$(BIN)/python benchmarks/soak.py files --count $(FILES) --seed $(SEED) --processes $(PROCESSES)
	$(BIN)/python benchmarks/soak.py values --count $(VALUES) --seed $(SEED) --processes $(PROCESSES)
	$(BIN)/python benchmarks/soak.py steps --count $(STEP_VALUES) --seed $(SEED) --processes $(PROCESSES)
	$(BIN)/python benchmarks/soak.py kills --count $(KILLS) --seed $(SEED) --processes $(PROCESSES) --whole

# An hour; what was compiled is kept in npu.jsonl and step.jsonl.
bench-npu: $(INSTALLED) .venv-qnn/.tried .venv-vela/.tried
	for name in qnn vela; do \
		if test -f .venv-$$name/.installed; then \
			export QINVERT_$$(echo $$name | tr a-z A-Z)_PYTHON=$(CURDIR)/.venv-$$name/bin/python; \
		else echo "$$name does not install here: left out"; fi; \
	done; \
	$(BIN)/python benchmarks/npu.py --write && $(BIN)/python benchmarks/step.py --write

# The site, in build/site; nothing is measured, and no network is asked.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/picture.py
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet --builder html docs build/site
	@echo open build/site/index.html

$(VENV)/.installed-docs: $(INSTALLED)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[docs]"
	@touch $@

# The numbers of the pages that are computed here, anew.
measure: $(INSTALLED)
	$(BIN)/python docs/tables.py
	$(BIN)/python docs/runtimes.py

# Each runtime in an environment of its own; one that has no wheel for this platform is left out.
LIGHT := openvino qnn vela
openvino_PACKAGES := openvino
qnn_PACKAGES := onnxruntime onnxruntime-qnn onnx
vela_PACKAGES := ethos-u-vela ai-edge-litert onnx

verify-npu: $(INSTALLED) $(LIGHT:%=.venv-%/.tried)
	for name in $(LIGHT); do \
		if test -f .venv-$$name/.installed; then \
			export QINVERT_$$(echo $$name | tr a-z A-Z)_PYTHON=$(CURDIR)/.venv-$$name/bin/python; \
		else echo "$$name does not install here: left out"; fi; \
	done; \
	$(BIN)/python -m pytest -q -rs tests/export/runtimes tests/test_guides.py

.venv-%/.tried: Makefile
	$(PYTHON) -m venv .venv-$*
	if .venv-$*/bin/pip install --quiet --disable-pip-version-check --only-binary :all: $($*_PACKAGES); \
		then touch .venv-$*/.installed; fi
	@touch $@

clean:
	rm -rf $(VENV) $(OLD_VENV) $(LIGHT:%=.venv-%) build dist *.egg-info

# torch comes first: its CPU build must be in place before anything asks for torch.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

# The rest of constraints.txt belongs to newer transformers.
$(OLD_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLD_VENV)
	grep -E '^(torch|numpy|onnx|onnxruntime|scipy|pytest|hypothesis)==' constraints.txt > $(OLD_VENV)/constraints.txt
	$(OLD_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLD_VENV)/constraints.txt torch
	$(OLD_VENV)/bin/pip install --quiet --disable-pip-version-check --constraint $(OLD_VENV)/constraints.txt \
		--editable . transformers==5.14.1 click rich hypothesis pytest
	@touch $@
