# `make demo` and `make test` need Python 3.11 or newer, make and git; they set up the rest in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
N_WORKERS ?= 2

# Twice quiet: errors only.
PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-cuda check docs bench bench-full clean-bench format clean

help:  ## say what the targets do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## fine-tune ten small networks, soup them, print who wins
	@$(BIN)/streamsoup demo

test: $(VENV)/.dev  ## run the tests, except those that need a CUDA device
	@$(BIN)/python -m pytest -n $(N_WORKERS)

test-cuda: $(VENV)/.dev  ## run the tests that need a CUDA device, on the one that is here
	@$(BIN)/python -m pytest -m cuda

check: $(VENV)/.dev  ## check format, lint and types
	@$(BIN)/ruff format --check
	@$(BIN)/ruff check
	@$(BIN)/mypy

docs: $(VENV)/.docs  ## build the documentation into build/docs
	@$(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo build/docs/index.html

format: $(VENV)/.dev  ## format the code and sort its imports
	@$(BIN)/ruff check --select I --fix
	@$(BIN)/ruff format

bench: $(VENV)/.dev  ## measure against peers and this machine's limits: ten minutes, 3 GB
	@$(BIN)/python -m benchmarks quick
	@$(BIN)/python -m benchmarks report

bench-full: $(VENV)/.dev  ## measure everything: about an hour, 40 GB
	@$(BIN)/python -m benchmarks full
	@$(BIN)/python -m benchmarks report

clean-bench:  ## remove the checkpoints and environments of the benchmarks
	rm -rf "$${STREAMSOUP_BENCH:-$$HOME/.cache/streamsoup-bench}"

clean:  ## remove .venv, caches and what the demo wrote
	rm -rf $(VENV) build dist streamsoup-demo .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find streamsoup benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# A stamp is touched last, so an interrupted set-up is taken up again.
$(VENV)/.dev $(VENV)/.docs: $(VENV)/.demo
$(VENV)/.dev $(VENV)/.docs $(VENV)/.demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("streamsoup needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; try: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	@echo 'Setting up $(VENV) for $(@F:.%=%); the first time takes some minutes.'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) hatchling editables
	@$(PIP) --no-build-isolation --editable '.[$(@F:.%=%)]'
	@touch $@
