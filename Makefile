# The README's two commands are `make demo` and `make test`; each sets up what it needs.

PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
# Two workers of one thread each: tiny models, as most tests have them, gain nothing by a second one.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# Two spinning thread pools on two cores collapse: one pool, as wide as the machine.
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-oldest check lint engines assets format clean

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed
	$(PYTEST)

# Format, style, types, and that no room of the package imports from one above it.
lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint
	$(PYTEST) -m "not slow and not engines"

# Every family, what PEFT promises, training, measuring and merging, with the oldest versions that
# pyproject.toml allows. `make test-oldest OLDEST=tests` runs the whole fast suite.
OLDEST ?= $(addprefix tests/, adapters models/test_document_attention.py gates/test_peft_promises.py \
	export/test_travelling_code.py export/test_merge.py recipe/test_bundled_recipes.py \
	measure/test_evaluator.py training/test_run.py)
test-oldest:
	$(MAKE) VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt .venv-oldest/installed
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadfile \
		-m "not slow and not engines" $(OLDEST)

# vLLM has an environment of its own, of 3.5 GB. `make engines ONLY="-k smollm2"` takes one model.
engines: $(VENV)/installed
	$(BIN)/python scripts/vllm_env.py $(VENV)/vllm
	RETROFIT_VLLM=$(VENV)/vllm/bin/python $(BIN)/python -m pytest -m engines -s $(ONLY)

assets: $(VENV)/installed
	$(BIN)/python scripts/assets.py

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-oldest build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The constraints name the tested versions. On Linux, PyPI's torch brings CUDA along, gigabytes of
# it, unless a build for the CPU is installed first.
$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: retrofit needs Python 3.11 or newer; set PYTHON=python3.12, say" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	touch $@
