# The targets a newcomer needs. Everything runs in .venv, which is made when it is missing.
SHELL := /bin/bash
# A system interpreter first: one under a private home cannot be read by the ordinary users that tests run as.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11) python3)
# Named first and exactly: a bare `torch` may bring gigabytes of CUDA libraries to a machine without a GPU.
TORCH ?= torch==2.13.0
PIP_FLAGS ?=
BIN := .venv/bin

.PHONY: help install demo test test-fast test-long lint bench clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/.installed  ## make .venv with all that one machine needs

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) --upgrade pip
	$(BIN)/python -m pip install $(PIP_FLAGS) $(TORCH)
	$(BIN)/python -m pip install $(PIP_FLAGS) --editable '.[worker,client,local,dev]'
	touch $@
