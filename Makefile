# `make demo` and `make test` do all the set-up by themselves, in .venv.

# Python 3.11 or newer; used once, to make the environment.
PYTHON ?= python3
# The environment. One that exists already is used as it is, with its torch.
VENV ?= .venv
# One known version: the newest wheel may bring gigabytes of CUDA. For the small CPU build, or for a
# CUDA version of your choice, give pip's own words: make test TORCH="torch --index-url URL"
TORCH ?= torch==2.13.0

BIN = $(VENV)/bin
READY = $(VENV)/.ready
RUN_PYTEST = $(BIN)/python -m pytest -q
# Files side by side on two cores; one process runs the tests of a file, which share ranks.
SIDE_BY_SIDE = -n 2 --dist loadfile

.PHONY: help setup demo test test-all lint types bench
.DEFAULT_GOAL := help

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv and install everything into it

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is older than Python 3.11; name another: make setup PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

demo: $(READY) ## plan the Llama example for 2 CPU processes, check the plan, run a step of it
	$(BIN)/plan examples/llama.py --gpus 2 --cluster cpu --batch 4 --seq 256 --dtype float32 --out plan_out
	$(BIN)/plan verify plan_out
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 plan_out/sharded_model.py

test: $(READY) ## the tests, without the slow ones: under 10 minutes on 2 cores
	$(RUN_PYTEST) $(SIDE_BY_SIDE) -m "not slow"

test-all: $(READY) ## all tests
	$(RUN_PYTEST)

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright, strict
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY) ## the measured comparisons, one after the other
	@set -e; for name in planning running attention moe; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done
