# The project's commands: `make help`. A fresh machine needs Python 3.11+, make and a package index.
#
#   make train PYTHON=python3.12 NPROC=4 ARGS="--steps 50"
#
# Everything is installed into $(VENV), and again only when pyproject.toml changes.

PYTHON ?= python3
VENV   ?= .venv
NPROC  ?= 2
ROUNDS ?= 10
MINUTES ?= 10
ARGS   ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train test check bench stress clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 10

train: $(VENV)/.installed ## train a small GPT with two processes
	$(BIN)/dtrun --standalone --nproc-per-node $(NPROC) examples/train_gpt.py $(ARGS)

test: $(VENV)/.installed-test ## run the whole test suite
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev ## format, lint, types, compose file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

bench: $(VENV)/.installed ## time collectives, ops and whole training steps
	$(BIN)/python benchmarks/collectives.py
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/step.py

stress: $(VENV)/.installed-test ## kill jobs for MINUTES, repeat tests of processes ROUNDS times
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)
	@for round in $$(seq $(ROUNDS)); do \
	  echo "round $$round of $(ROUNDS)"; \
	  DTRAIN_TEST_CALLS=100000 \
	  $(BIN)/python -m pytest -q -x tests/comm tests/distributed tests/dtrun $(ARGS) || exit 1; \
	done

clean: ## remove the virtual environment and the caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "dtrain needs Python 3.11 or newer, and $(PYTHON) is not:" \
	    "name one with  make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml | $(VENV)/.made
	$(PIP) install --quiet --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(VENV)/.made
	$(PIP) install --quiet --editable '.[$*]'
	@touch $@
