# Everything from a fresh clone with python3 (3.11 or newer) and make: each target sets up .venv itself.

PYTHON ?= python3
JOBS ?= 2
MODEL ?=

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check --no-input

READY := $(VENV)/.ready
EXTRAS := $(VENV)/.extras

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test lint bench nodes models clean

help:  ## print this list
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-8s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) $(EXTRAS)  ## compile a model, run it, show what was stitched: make demo [MODEL=path.onnx]
	$(PY) -m benchmarks.demo --out build/demo $(if $(MODEL),"$(MODEL)")

test: $(READY)  ## run the tests: make test [JOBS=n]
	$(PY) -m pytest -n $(JOBS) --dist loadfile

lint: $(READY)  ## ruff and mypy --strict
	@failed=0; $(PY) -m ruff check || failed=1; $(PY) -m mypy || failed=1; exit $$failed

bench: $(READY) $(EXTRAS)  ## measure speed beside other runtimes
	$(PY) -m benchmarks

nodes: $(READY)  ## ONNX's own test suite, operator by operator
	$(PY) -m benchmarks.nodes

models: $(READY)  ## compare whole models with their reference outputs
	$(PY) -m benchmarks.models --check

clean:  ## remove the environment, caches and what was built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	find stitch codegen runtime tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "stitch needs Python 3.11 or newer: make PYTHON=python3.12")'
	@echo "setting up $(VENV), which takes a minute the first time"
	@$(PYTHON) -m venv $(VENV) || { echo "python3 cannot make virtual environments; on Debian: apt install python3-venv"; exit 1; }
	@$(PIP) install --editable '.[test]'
	@touch $@

# Comparisons and pictures need these; everything else works without.
$(EXTRAS): $(READY)
	@for package in matplotlib onnxruntime; do \
		$(PIP) install $$package || echo "continuing without $$package (make clean, then try again)"; \
	done
	@touch $@
