# Everything from a fresh clone with python3 (3.11 or newer) and make: each target sets up .venv itself.

PYTHON ?= python3
JOBS ?= 2
MODEL ?=
EXPORTER ?= $(firstword $(wildcard ../shared/models/export_models.py) build/export_models.py)

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check --no-input

READY := $(VENV)/.ready
EXTRAS := $(VENV)/.extras
EXPORTING := .venv-exports/.ready
PEERS := .venv-bench/.ready

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test fuzz lint bench bench-setup chains exports exporter nodes models clean

help:  ## print this list
	@echo "usage: make TARGET"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-13s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) $(EXTRAS)  ## compile a model, run it, show what was stitched: make demo [MODEL=path.onnx]
	$(PY) -m benchmarks.demo --out build/demo $(if $(MODEL),"$(MODEL)")

test: $(READY)  ## run the tests: make test [JOBS=n]
	$(PY) -m pytest -n $(JOBS) --dist loadfile

fuzz: $(READY)  ## random graphs and kernels, fifty times as many as the tests try
	$(PY) -m pytest -n $(JOBS) --hypothesis-profile=fuzz tests/test_random_graphs.py tests/test_stitching.py

lint: $(READY)  ## ruff and mypy --strict
	@failed=0; $(PY) -m ruff check || failed=1; $(PY) -m mypy || failed=1; exit $$failed

bench: $(READY) $(EXTRAS)  ## a quick measurement beside the peers that are there, and how to get the full ones
	$(PY) -m benchmarks --quick

bench-setup: $(PEERS)  ## install what stitch is compared with: onnxruntime, openvino, torch, jax and others

chains: $(READY) $(EXTRAS) $(PEERS)  ## chains of memory-bound operators beside all peers, which takes 40 minutes
	$(PY) -m benchmarks.chains --json build/chains.json --plot build/chains.png

exports: $(EXPORTING)  ## export large architectures for bench and models: make exports [EXPORTER=script.py]
	$(EXPORTING:/.ready=/bin/python) "$(EXPORTER)" --out build/exports

nodes: $(READY)  ## ONNX's own test suite, operator by operator
	$(PY) -m benchmarks.nodes

models: $(READY)  ## compare whole models with their reference outputs
	$(PY) -m benchmarks.models --check

clean:  ## remove the environment, caches and what was built
	rm -rf $(VENV) $(dir $(EXPORTING)) $(dir $(PEERS)) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
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

# Exporting needs torch, in an environment of its own. The script that exports is not part of this repository.
$(EXPORTING): | exporter
	@echo "setting up $(@D) with torch, which takes some minutes and 2 GB"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --quiet --disable-pip-version-check install torch --index-url https://download.pytorch.org/whl/cpu \
		|| $(@D)/bin/python -m pip --quiet --disable-pip-version-check install torch
	@$(@D)/bin/python -m pip --quiet --disable-pip-version-check install transformers onnxscript onnx onnxruntime
	@touch $@

# The peers of `make bench` and `make chains`, in an environment of their own; a package that cannot be had is left out.
$(PEERS):
	@echo "setting up $(@D) with torch, jax, openvino and others, which takes some minutes and 3 GB"
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/python -m pip --quiet --disable-pip-version-check install torch --index-url https://download.pytorch.org/whl/cpu \
		|| $(@D)/bin/python -m pip --quiet --disable-pip-version-check install torch || echo "continuing without torch"
	@$(@D)/bin/python -m pip --quiet --disable-pip-version-check install numpy onnx ml_dtypes
	@for package in onnxruntime openvino jax numexpr numba; do \
		$(@D)/bin/python -m pip --quiet --disable-pip-version-check install $$package || echo "continuing without $$package"; \
	done
	@touch $@

exporter:
	@test -f "$(EXPORTER)" || { \
		echo "make exports: there is no $(EXPORTER)."; \
		echo "The script that exports is not part of this repository: it lies in ../shared/models/export_models.py when"; \
		echo "that folder exists beside the repository. Another one is taken with EXPORTER=script.py; it is called with"; \
		echo "--out build/exports and writes NAME.onnx and NAME.json, as benchmarks/models.py reads them."; \
		exit 1; }
