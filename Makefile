# One command for each chore. Every target makes or completes the virtual environment it needs.

PYTHON ?= python3
# Test processes. Each computes on one thread, so that they do not fight for cores.
JOBS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format bench clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) (makes $(VENV)), JOBS=$(JOBS) (test processes),"
	@echo "ARGS (passed on by demo, test and bench, e.g. make test ARGS='-k norm')."

install: $(STAMP) ## Make or complete .venv with everything that is pinned in constraints.txt.

# torch goes first: a build that is already there and satisfies the pin (one for CPU, say) stays.
# hatchling and editables come from constraints.txt too, hence no build isolation.
$(STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) hatchling editables
	$(PIP) --no-build-isolation -e ".[hf,store,faiss,examples,dev]"
	@touch $@

demo: $(STAMP) ## Run examples/demo.py.
	$(BIN)/python examples/demo.py $(ARGS)

test: lint ## Lint, then run the tests.
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff fix and format what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP) ## Time a step against plain PyTorch (benchmarks/step.py).
	$(BIN)/python benchmarks/step.py $(ARGS)

clean: ## Remove .venv, caches, builds and outputs.
	rm -rf $(VENV) build dist outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
