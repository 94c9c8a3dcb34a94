# make demo     everything from nothing: set-up, data, a CoCoMix student and its control, a report (ten minutes on two cores)
# make check    style and the fast tests, for everyday work (two minutes on two cores)
# make test     set-up and the test-suite (ten minutes on two cores)
# make nightly  the full products of layouts, methods and resumptions
# make lint     style
# make bench    measure what docs/benchmarks.md shows, and write it there
# make teacher  train the shipped teacher and autoencoder again, from nothing (about an hour on two cores)

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: setup demo check test nightly lint bench teacher docs clean

setup: $(VENV)/.installed

# torch first: asked for by another package it may come as a build for GPUs, several gigabytes of it. Where there is no
# GPU, a CPU build is taken from wherever pip finds one, or from PyTorch's own index, which uv knows.
$(VENV)/.installed: setup.cfg constraints.txt pyproject.toml
	@echo "== setting up $(VENV): torch, DeepSpeed and the rest, a few minutes"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then \
	  $(BIN)/pip install --quiet --no-compile torch==$(TORCH); \
	else \
	  $(BIN)/pip install --quiet --no-compile torch==$(TORCH)+cpu 2>/dev/null || \
	  { $(BIN)/pip install --quiet uv && $(BIN)/uv pip install --python $(BIN)/python --torch-backend cpu torch==$(TORCH); }; \
	fi
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev,tensorboard]'
	@touch $@

demo: setup
	@bash launcher/demo.sh

check: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow'

test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile

nightly: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m nightly

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: setup
	$(BIN)/python benchmarks/labelling.py --write docs/benchmarks.md
	$(BIN)/python benchmarks/sae_precision.py --write docs/benchmarks.md

teacher: setup
	@bash launcher/teacher.sh

docs: setup
	$(BIN)/python tools/document_options.py --out docs/options.md

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
