# The targets a newcomer needs. Everything runs in .venv, which is made when it is missing.
SHELL := /bin/bash
# A system interpreter first: one under a private home cannot be read by the ordinary users that tests run as.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11) python3)
# The first of these that pip can find: the CPU build, else the plain one, which brings gigabytes of CUDA libraries. PyTorch
# keeps its CPU builds in an index of its own, which its install page names: make install PIP_FLAGS="--extra-index-url ..."
TORCH ?= torch==2.13.0+cpu torch==2.13.0
PIP_FLAGS ?=
BIN := .venv/bin
# Test processes side by side. Tests that share servers stay together: those of a file, or of a group that they name. On two
# cores three took 27 minutes, and four were too many for the handovers of two-minute allocations.
WORKERS ?= 2
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
# Which ones `make notebooks` runs; all where none is named.
NOTEBOOKS ?=

.PHONY: help install demo test test-fast test-long chaos test-gpu notebooks lint bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/.installed  ## make .venv with all that one machine needs

.venv/.installed: pyproject.toml
	@echo "Making .venv with $(PYTHON) ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --upgrade pip
	@for build in $(TORCH); do \
	  echo "Installing $$build ..."; \
	  $(BIN)/python -m pip install --quiet $(PIP_FLAGS) $$build && exit 0; \
	  echo "pip does not find it."; \
	done; exit 1
	@echo "Installing edif_hpc and all it needs on one machine; this takes one to three minutes ..."
	@$(BIN)/python -m pip install --quiet $(PIP_FLAGS) --editable '.[worker,client,local,plot,dev]'
	@touch $@

demo: install  ## bring the stack up, run examples/first_trace.py on a real model, take it down
	bash examples/demo.sh

test: lint  ## lint, types, rooms, and every test but the long ones
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder -m "not long" $(PYTEST_FLAGS)

test-fast: install  ## what needs no server and no model
	$(BIN)/python -m pytest -n $(WORKERS) -m fast $(PYTEST_FLAGS)

test-long: install  ## failures of many kinds, one after the other; writes its result into the README
	$(BIN)/python -m pytest -m long -p tests.support.long_report $(PYTEST_FLAGS)

chaos: install  ## 700 requests in ten minutes while something is killed every ten seconds; writes the README's table
	$(BIN)/python -m tests.faults.chaos

test-gpu: install  ## equality, gradients, fresh executors, placement and restarts on a CUDA or ROCm machine
	$(BIN)/python -m pytest -m gpu --device=cuda $(PYTEST_FLAGS) tests

notebooks: install  ## run examples/notebooks against a service of their own, and keep what they say and draw
	$(BIN)/python -m tests.notebooks.write $(NOTEBOOKS)

lint: install  ## ruff, mypy and the contracts between the rooms
	$(BIN)/ruff check edif_hpc tests examples
	$(BIN)/ruff format --check edif_hpc tests examples
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install  ## latency, throughput and memory beside a bare floor, downloads, reductions, Slurm; prints tables, writes JSON
	$(BIN)/python -m tests.bench.run $(BENCH_FLAGS)
	$(BIN)/python -m tests.bench.downloads
	$(BIN)/python -m tests.bench.reductions
	$(BIN)/python -m tests.bench.cluster

clean:  ## stop the demo and remove what was built; the downloaded model stays
	if [ -x $(BIN)/edif-hpc ] && [ -d .edif-hpc ]; then $(BIN)/edif-hpc down --home .edif-hpc; fi
	rm -rf .venv build dist bench-results examples/notebooks/results .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
