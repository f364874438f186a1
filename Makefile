# One command for each chore. Every target makes or completes the virtual environment it needs.

PYTHON ?= python3
# Test processes. Each computes on one thread, so that they do not fight for cores.
JOBS ?= 2
# A file's tests share fixtures, so one process has them all; those that take longest come first.
BY_FILE := --dist loadfile --no-loadscope-reorder
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Python compiles a file when it is first imported; compiling all of them takes a minute more. What
# is compiled has to be kept then, or each of the many processes that tests start spends 5 s on it.
export PYTHONDONTWRITEBYTECODE :=
LOUD_PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check -c constraints.txt

# A venv of its own for `make bench`.
BENCH := .venv-bench
BENCH_STAMP := $(BENCH)/.installed
BENCH_PIP := $(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# And one for `make leaderboard`.
BOARD := .venv-leaderboard
BOARD_STAMP := $(BOARD)/.installed
BOARD_PIP := $(BOARD)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

# And one for `make trl`.
TRL := .venv-trl
TRL_STAMP := $(TRL)/.installed
TRL_PIP := $(TRL)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test fuzz docs release-check torch-range lint format bench bench-gpu bench-check leaderboard trl clean

help: ## List the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "Variables: PYTHON=$(PYTHON) (makes $(VENV)), JOBS=$(JOBS) (test processes),"
	@echo "ARGS (passed on by demo, test, fuzz, bench, leaderboard, e.g. make test ARGS='-k norm')."

install: $(STAMP) ## Make or complete .venv with everything that is pinned in constraints.txt.

# torch goes first: a build that is already there and satisfies the pin (one for CPU, say) stays.
# hatchling and editables come from constraints.txt too, hence no build isolation.
# pip shows what it downloads: the installation takes minutes.
$(STAMP): pyproject.toml constraints.txt
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "1 of 2: PyTorch, the largest part"
	$(LOUD_PIP) torch hatchling editables
	@echo "2 of 2: ghostfunc and what examples, docs and tests need, about 150 packages"
	$(LOUD_PIP) --no-build-isolation -e ".[cli,curvature,hf,store,faiss,examples,docs,dev]"
	@touch $@
	@echo "Done: try $(BIN)/ghostfunc --help, or make demo."

demo: $(STAMP) ## Run examples/demo.py.
	$(BIN)/python examples/demo.py $(ARGS)

test: lint ## Lint, then run the tests.
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) $(ARGS)

fuzz: $(STAMP) ## Random programs beside a loop, e.g. ARGS="--count 10000 --seed 0" (25 min on 2 cores).
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 PYTHONPATH=tests $(BIN)/python tests/fuzz/run.py --jobs $(JOBS) $(ARGS)

docs: $(STAMP) ## Build the documentation site into site/; a warning is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

release-check: $(STAMP) ## Build sdist and wheel, install each alone on every Python here, run it.
	$(BIN)/python -m tests.release $(ARGS)

torch-range: $(STAMP) ## Install beside the oldest and the newest supported torch, and try both.
	$(BIN)/python -m tests.release --torch oldest newest $(ARGS)

lint: $(STAMP) ## ruff check, ruff format --check, mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP) ## Let ruff fix and format what it can.
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The peers' own environment: what they need must not decide what the tests run with.
$(BENCH_STAMP): pyproject.toml constraints.txt benchmarks/requirements.txt
	$(BENCH)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(BENCH)
	$(BENCH_PIP) torch
	$(BENCH_PIP) hatchling editables
	$(BENCH_PIP) --no-build-isolation -e . -r benchmarks/requirements.txt
	@touch $@

bench: $(BENCH_STAMP) ## Time everything beside plain PyTorch and peers; writes docs/benchmarks (35 min).
	$(BENCH)/bin/python benchmarks/run.py $(ARGS)

bench-gpu: $(STAMP) ## Tests marked gpu, then a table: docs/benchmarks/gpu.md (one CUDA device, 8 min).
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu.py $(ARGS)

bench-check: $(BENCH_STAMP) ## Fail if a ratio is 10 % above this processor's in benchmarks/recorded.json.
	$(BENCH)/bin/python benchmarks/run.py --check $(ARGS)

$(BOARD_STAMP): pyproject.toml constraints.txt benchmarks/leaderboard/requirements.txt benchmarks/leaderboard/peers.txt
	$(BOARD)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(BOARD)
	$(BOARD_PIP) torch
	$(BOARD_PIP) hatchling editables
	$(BOARD_PIP) --no-build-isolation -e ".[curvature]" -r benchmarks/leaderboard/requirements.txt
	$(BOARD_PIP) --no-deps -r benchmarks/leaderboard/peers.txt
	@touch $@

leaderboard: $(BOARD_STAMP) ## Attribution scores against retrained models and peers (60 min; ARGS=--quick: 5).
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BOARD)/bin/python benchmarks/leaderboard/run.py $(ARGS)

$(TRL_STAMP): pyproject.toml constraints.txt tests/hf/trl.txt
	$(TRL)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(TRL)
	$(TRL_PIP) torch
	$(TRL_PIP) hatchling editables
	$(TRL_PIP) --no-build-isolation -e ".[hf,dev]" -r tests/hf/trl.txt
	@touch $@

trl: $(TRL_STAMP) ## Fifty steps of TRL's trainers with scores, beside plain ones (10 min).
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(TRL)/bin/python -m pytest tests/hf/test_trl.py $(ARGS)

clean: ## Remove .venv, caches, builds and outputs.
	rm -rf $(VENV) $(BENCH) $(BOARD) $(TRL) build dist outputs site .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -type d -name __pycache__ -prune -exec rm -rf {} +
