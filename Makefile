# `make` lists what there is to make.
#
# PyPI's torch for Linux brings several gigabytes of CUDA libraries. Where there is no NVIDIA GPU,
# take the CPU build from PyTorch's own index:
#   make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON   ?= python3
VENV     ?= .venv
PIP_ARGS ?=

# Where the prompt files of the committed tables lie, for make paper-table.
DATA_ROOT ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.adaspec-installed
PIP    = $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# Tests never ask the hub for anything: what they need comes from the package index or the cache.
PYTEST = HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs

# A process a core, each with its share of the threads; a file's tests stay together, and the files
# with slow tests come first (tests/conftest.py).
SPREAD = -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo paper-table test test-all lint clean check-python

help:
	@echo "make demo      train a reference head and a draft head on the default target, then measure"
	@echo "make paper-table DATA_ROOT=DIR   measure the tables of README and docs again, compare tau"
	@echo "make test      tier 0 (seconds to minutes) and the slow tier (the real small target)"
	@echo "make test-all  make test, and the long and gpu tiers (up to 90 minutes)"
	@echo "make lint      ruff check, ruff format --check, mypy"
	@echo "make install   only the virtual environment that the others use"
	@echo "make clean     remove .venv, build products and tool caches; runs/ and the user's cache stay"
	@echo
	@echo "Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  PIP_ARGS=$(PIP_ARGS)"
	@echo "CPU only:  make demo PIP_ARGS=\"--extra-index-url https://download.pytorch.org/whl/cpu\""

install: $(STAMP)

$(STAMP): setup.cfg constraints.txt
	@$(MAKE) --no-print-directory check-python
	$(PYTHON) -m venv "$(VENV)"
	@if [ "$$(uname -s)" = Linux ] && [ -z "$(strip $(subst ",,$(PIP_ARGS)))" ] && ! command -v nvidia-smi >/dev/null; then \
	  echo "note: no NVIDIA GPU seen. If pip starts to fetch CUDA packages, the smaller CPU build is at hand:"; \
	  echo "      make PIP_ARGS=\"--extra-index-url https://download.pytorch.org/whl/cpu\" $(or $(MAKECMDGOALS),install)"; \
	fi
	$(PIP) torch
	$(PIP) -e ".[dev]"
	@touch "$@"

check-python:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "error: no program '$(PYTHON)'; install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$("$(PYTHON)" -V 2>&1), but Python 3.11 or newer is needed; name one: make PYTHON=/path/to/python3.11" >&2; exit 2; }
	@"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) cannot make virtual environments (no ensurepip); on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

# Up to an hour a record on two cores; exit status 1 if an acceptance length leaves its recorded interval.
paper-table: $(STAMP)
	@[ -n "$(DATA_ROOT)" ] || { \
	  echo "error: name the folder with EAGLE's question files: make paper-table DATA_ROOT=DIR" >&2; exit 2; }
	$(BIN)/python eval/reproduce.py --data-root "$(DATA_ROOT)" --out runs/paper-table

test: $(STAMP)
	$(PYTEST) $(SPREAD) -m "not long and not gpu"
	@echo "Not run here: the tests marked long or gpu (make test-all)."

test-all: test
	$(PYTEST) -m "long or gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy adaspec_eagle

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
