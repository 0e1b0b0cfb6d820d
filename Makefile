# Two commands, each with its own set-up:  make train  ·  make test
# Needs python3 >= 3.11 with its venv module, and the package index that pip is set up for.
# Another interpreter:  make test PYTHON=python3.12  (in an environment of its own)

PYTHON ?= python3
VENV ?= .venv$(if $(filter-out python3,$(PYTHON)),-$(notdir $(PYTHON)))
CONFIG ?= configs/synthetic.py
WORKDIR ?= runs/synthetic
ARGS ?=
# Test processes. The tests of a file share what they compile, and so a process.
JOBS ?= 2

BIN := $(VENV)/bin
READY := $(VENV)/.ready
PARITY := $(VENV)/.parity
PEERS := $(VENV)/.peers
EXPORT := $(VENV)/.export

# Large pages for large arrays: on a processor they save a sixth of the time of a training step, which
# else goes into mapping memory. Only glibc reads this.
train bench-input bench-peers bench-parts: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

.PHONY: help setup train test test-all bench-input bench-peers bench-parts lint format clean
.DEFAULT_GOAL := help

help:
	@echo "make train     train, evaluate and draw the embedded synthetic job (in $(WORKDIR))"
	@echo "make test      the test suite; make test-all adds the tests that take minutes"
	@echo "make bench-input  samples/s of the input pipeline against the plain way"
	@echo "make bench-peers  time and memory beside the other OneFormers"
	@echo "make bench-parts  time of each part of the model and of a training step"
	@echo "make lint      ruff check, ruff format --check and mypy; make format applies the first two"
	@echo "make setup     only the virtual environment ($(VENV)); the targets above do it themselves"
	@echo "make clean     removes $(VENV) and caches; runs/ and data/ stay"
	@echo
	@echo "Options: PYTHON=python3.12 VENV=.venv JOBS=2 CONFIG=... WORKDIR=... ARGS='--config.train.steps=100'"

setup: $(READY)

# uv installs in seconds what takes pip minutes. Where it is not available or cannot reach the index
# (it does not read pip's configuration), pip does the same.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is not a Python of 3.11 or newer: name one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  echo "error: '$(PYTHON) -m venv' failed: install its venv module (Debian: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up $(VENV) ..."
	@$(BIN)/python -m pip install --quiet uv || echo "uv is not available; installing with pip"
	@if ! { test -x $(BIN)/uv && $(BIN)/uv pip install --python $(BIN)/python -e '.[dev]'; }; then \
	  $(BIN)/python -m pip install -e '.[dev]'; fi
	@touch $@

$(PARITY) $(PEERS) $(EXPORT): $(VENV)/.%: $(READY)
	@if test -x $(BIN)/uv && $(BIN)/uv pip install --python $(BIN)/python -e '.[$*]'; then :; \
	  else $(BIN)/python -m pip install -e '.[$*]'; fi
	@touch $@

train: setup
	$(BIN)/python main.py --config=$(CONFIG) --workdir=$(WORKDIR) --mode=train $(ARGS)

test: setup
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow" $(ARGS)

# Also PyTorch and transformers, which the parity tests compare with, and what runs exported files.
test-all: $(PARITY) $(EXPORT)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

bench-input: setup
	$(BIN)/python -m tests.bench.input $(ARGS)

bench-peers: $(PEERS)
	$(BIN)/python -m tests.bench.peers $(ARGS)

# The weights that it reads are those of transformers.
bench-parts: $(PARITY)
	$(BIN)/python -m tests.bench.parts $(ARGS)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
