# Every target sets up its environment; a fresh machine needs only Python >= 3.11, git and make.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo docs test matrix fuzz fuzz-state check lint types bench bench-kernels bench-gpu clean

PYTHON ?= python3
ARGS ?=
# The torch to test with; TORCH=torch takes the newest, which is a larger download.
TORCH ?= torch==2.13.*
N ?= 1000
SEED ?= 0
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install -qq
TEST_READY := $(VENV)/.test-installed
DEV_READY := $(VENV)/.dev-installed
LINKED := build/types

# Waiting threads should sleep: on shared cores, spinning ones slow a training step down many times over.
export OMP_WAIT_POLICY := passive

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 24

demo: $(TEST_READY)  ## run the demo; ARGS="..." is passed on
	@$(RUN) -m ecospa_fx demo $(ARGS)

test: $(TEST_READY)  ## run the tests, the long sweeps left out; ARGS="..." goes to pytest
	$(RUN) -m pytest -n auto $(ARGS)

matrix:  ## run the tests with each Python and torch, in clean environments; ARGS="..." chooses
	$(PYTHON) bench/matrix.py $(ARGS)

fuzz: $(TEST_READY)  ## check the first N random programs of SEED against masking and smaller ones
	$(RUN) -m ecospa_fx.testing.fuzz $(N) --seed $(SEED) $(ARGS)

fuzz-state: $(TEST_READY)  ## check N stateful modules in loops of SEED beside the plain ones
	$(RUN) -m ecospa_fx.testing.fuzz_state $(N) --seed $(SEED) $(ARGS)

check: lint types test  ## everything that must pass before a push

lint: $(DEV_READY)  ## ruff: lint and format
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# mypy wants a package in one folder: links to the three that make it up. Paths in its report are put back.
types: $(DEV_READY)  ## mypy --strict on the source tree
	rm -rf $(LINKED) && mkdir -p $(LINKED)/ecospa_fx
	ln -s "$(CURDIR)"/ecospa_fx/* "$(CURDIR)/passes" "$(CURDIR)/kernels" $(LINKED)/ecospa_fx/
	cd $(LINKED) && "$(CURDIR)/$(RUN)" -m mypy --config-file "$(CURDIR)/pyproject.toml" \
	    --cache-dir "$(CURDIR)/.mypy_cache" -p ecospa_fx | sed -E 's#^ecospa_fx/(passes|kernels)/#\1/#'

docs: $(TEST_READY)  ## build the documentation site in build/site
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict
	@echo "build/site/index.html; with its search: $(RUN) -m http.server -d build/site, then http://localhost:8000"

bench: $(TEST_READY)  ## run the benchmarks; ARGS="..." goes to bench/rewrite.py
	PYTHONPATH=bench $(RUN) bench/perf.py
	PYTHONPATH=bench $(RUN) bench/first_call.py
	PYTHONPATH=bench $(RUN) bench/explain.py
	PYTHONPATH=bench $(RUN) bench/coverage.py
	PYTHONPATH=bench $(RUN) bench/rewrite.py $(ARGS)

bench-kernels: $(TEST_READY)  ## kernels and the estimator on the CPU, and the compiler output of the kernels for GPUs
	PYTHONPATH=bench $(RUN) bench/aot.py
	PYTHONPATH=bench $(RUN) bench/estimator.py
	PYTHONPATH=bench $(RUN) bench/kernels.py --device cpu $(ARGS)

bench-gpu: $(TEST_READY)  ## kernels against every alternative on a GPU, at most 8 minutes
	PYTHONPATH=bench timeout 480 $(RUN) bench/kernels.py --device cuda $(ARGS)

clean:  ## remove caches and build output (the environment in .venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# Nobody asked for the 200 lines that pip prints; its errors are shown.
$(TEST_READY): pyproject.toml
	@echo "setting up $(VENV) (once; some minutes, 3 GB)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -e '.[test]' '$(TORCH)'
	@touch $@

$(DEV_READY): $(TEST_READY)
	@$(PIP) -e '.[dev]' '$(TORCH)'
	@touch $@
