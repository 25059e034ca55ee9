# `make demo` and `make test` do all the set-up by themselves, in .venv.

# Python 3.11 or newer; used once, to make the environment.
PYTHON ?= python3
# The environment. One that exists already is used as it is, with its torch.
VENV ?= .venv
# All else is the newest that pyproject.toml allows; torch is one known version on purpose, because the
# newest wheel may bring gigabytes of CUDA. For the newest, the small CPU build, or a CUDA version of
# your choice, give pip's own words: make test TORCH="torch --index-url URL"
TORCH ?= torch==2.13.0
# The environment with the oldest versions that pyproject.toml allows, and its torch: that wheel does
# bring CUDA, and OLDEST_TORCH="torch==2.11.0 --index-url URL" the small one. The oldest numpy has
# wheels for Python 3.11 and 3.12.
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH ?= $(shell $(PYTHON) .ci/oldest.py | grep ^torch=)

# What `make train` trains on.
TEXT = --text README.md docs/architecture.md CONTRIBUTING.md

BIN = $(VENV)/bin
READY = $(VENV)/.ready
OLDEST_BIN = $(OLDEST_VENV)/bin
OLDEST_READY = $(OLDEST_VENV)/.ready
RUN_PYTEST = $(BIN)/python -m pytest -q
# Tests start hundreds of processes, each of which would compile all sources anew.
unexport PYTHONDONTWRITEBYTECODE
# Files side by side on two cores; one process runs the tests of a file, which share ranks.
SIDE_BY_SIDE = -n 2 --dist loadfile

.PHONY: help setup demo train test test-long test-oldest parsers notebooks test-all docs lint types bench
.DEFAULT_GOAL := help

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv and install everything into it

define CHECK_PYTHON
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
  { echo "$(PYTHON) is older than Python 3.11; name another: make setup PYTHON=python3.12"; exit 1; }
endef

$(READY): pyproject.toml
	$(CHECK_PYTHON)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

$(OLDEST_READY): pyproject.toml .ci/oldest.py
	$(CHECK_PYTHON)
	test -x $(OLDEST_BIN)/python || $(PYTHON) -m venv $(OLDEST_VENV)
	$(OLDEST_BIN)/python -c 'import torch' 2>/dev/null || $(OLDEST_BIN)/python -m pip install -q $(OLDEST_TORCH)
	$(PYTHON) .ci/oldest.py | grep -v ^torch= > $(OLDEST_VENV)/constraints.txt
	$(OLDEST_BIN)/python -m pip install -q -c $(OLDEST_VENV)/constraints.txt -e '.[test]'
	@touch $@

demo: $(READY) ## plan the Llama example for 2 CPU processes, check the plan, run a step of it
	$(BIN)/plan examples/llama.py --gpus 2 --cluster cpu --batch 4 --seq 256 --out plan_out
	$(BIN)/plan verify plan_out
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 plan_out/sharded_model.py

train: $(READY) ## train the Llama example for 200 steps, on two ranks and in one process: losses.png
	rm -rf run/alone run/sharded
	$(BIN)/plan examples/llama.py --gpus 2 --cluster cpu --batch 4 --seq 128 --out plan_out
	$(BIN)/python examples/train.py plan_out $(TEXT) --alone examples/llama.py --out run/alone
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/train.py plan_out $(TEXT) \
	  --weights run/alone/initial.safetensors --out run/sharded
	$(BIN)/python examples/losses.py run/sharded/losses.csv run/alone/losses.csv --out run/losses.png

test: $(READY) ## the tests, without long and slow ones: under 10 minutes on 2 cores
	$(RUN_PYTEST) $(SIDE_BY_SIDE) -m "not slow and not long"

test-long: $(READY) ## the long ones of the tests
	$(RUN_PYTEST) $(SIDE_BY_SIDE) -m "long and not slow"

test-oldest: $(OLDEST_READY) ## the same tests on the oldest versions that pyproject.toml allows
	$(OLDEST_BIN)/python -m pytest -q $(SIDE_BY_SIDE) -m "not slow and not long"

parsers: $(READY) ## parsers of tools that plans are exported to, which some tests run: 260 MB
	$(BIN)/python tests/targets/install.py $(VENV)/parsers

notebooks: $(READY) ## run the notebooks, which `make test` leaves out
	$(RUN_PYTEST) -n 2 --dist worksteal tests/notebooks

test-all: $(READY) ## all tests
	$(RUN_PYTEST)

docs: $(READY) ## the pages of docs/ as a site, in build/site; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build -q --strict --site-dir build/site

lint: $(READY) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## pyright, strict
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY) ## the measured comparisons, one after the other
	@set -e; for name in planning running attention moe; do echo "== $$name"; $(BIN)/python -m benchmarks.$$name; done
