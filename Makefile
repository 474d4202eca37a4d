# make demo: evaluate and time the shipped miniature, write a report.   make test: all tests.
# make bench: the engine beside what it replaces; make bench BENCH_ARGS="engine --full" for the published sizes.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More options for pip where torch is installed, e.g. --index-url https://download.pytorch.org/whl/cpu
TORCH_PIP_ARGS ?=
TORCH := $(shell grep '^torch==' constraints.txt)
# CUDA builds of torch bring their own; beside a CPU build its interpreter runs the GPU kernels in tests.
TRITON := triton==3.9.0
INSTALLED := $(VENV)/.installed
INSTALLED_REAL := $(VENV)/.installed-real
DEMO_LIMIT ?= 24
# Files of tests on so many cores; PYTEST_ARGS come after them.
PYTEST_WORKERS ?= -n auto --maxprocesses 8 --dist loadfile
EVAL := $(BIN)/twotower-eval
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet

export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: install demo test test-real bench lint clean

install: $(INSTALLED)

# torch alone and first: resolved together with the rest, pip may fetch gigabytes of CUDA.
$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH_PIP_ARGS) "$(TORCH)"
	$(PIP) -c constraints.txt -e '.[test]'
	test "$$(uname -sm)" != "Linux x86_64" || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) "$(TRITON)"
	touch $@

$(INSTALLED_REAL): $(INSTALLED)
	$(PIP) -c constraints.txt -e '.[test,real]'
	touch $@

demo: $(INSTALLED)
	$(EVAL) verify
	$(EVAL) run --tasks miniature --limit $(DEMO_LIMIT) --thresholds 0.99,0.9
	$(EVAL) speed --tasks miniature --thresholds 0.99,0.9 --threads 1 --num-prompts 24 --min-rounds 12
	$(EVAL) report --html
	@sed -n '/^## Verdict/,/^- /p' "$$(ls -t reports/*/report.md | head -1)"

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_WORKERS) $(PYTEST_ARGS)

bench: $(INSTALLED)
	PYTHONPATH=tests $(BIN)/python -m bench $(BENCH_ARGS)

test-real: $(INSTALLED_REAL)
	$(BIN)/python -m pytest -m real $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
