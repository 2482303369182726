# Everything a contributor runs. `make demo` and `make test` need nothing but a
# Python >= 3.12, which .ci/find-python looks for; PYTHON=/path/to/python names one.

SHELL := /bin/sh
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
DIST := dist
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST_ARGS := -n logical --maxprocesses 4 --dist worksteal

# This environment has the oldest JAX that pyproject.toml allows; CI tests the newest too.
OLDEST_JAX := $(shell sed -n 's/^ *"jax>=\([0-9.]*\)",$$/\1/p' pyproject.toml)

# pyright otherwise asks the network whether a newer pyright exists.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: $(VENV)/.package ## run attention on a protein complex and write demo-report/
	$(BIN)/jsparse run examples/data/3KPR.cif.gz --out demo-report
	@echo
	@echo "Open demo-report/report.html in a browser; demo-report/pattern.png is its picture."

.PHONY: test
test: $(VENV)/.dev ## run the tests; PYTEST_ARGS='-k window' picks some
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# XLA's compiler for CUDA, beside the environment: in it JAX would look for a GPU.
.PHONY: compiled
compiled: build/cuda-plugin/.installed ## compile programs for H100s, on a machine without one
	JAX_PLATFORMS=cpu JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 PYTHONPATH=build/cuda-plugin \
	    $(BIN)/python -m pytest $(PYTEST_ARGS) tests/compiled

.PHONY: lint
lint: $(VENV)/.dev ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(VENV)/.dev ## repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(VENV)/.dev ## check types
	$(BIN)/pyright

.PHONY: contracts
contracts: $(VENV)/.dev ## check which part imports which
	PYTHONPATH=. $(BIN)/lint-imports --no-logo

.PHONY: wheel
wheel: $(VENV)/.dev ## build the wheel into dist/
	$(BIN)/python -m build --wheel --outdir $(DIST)

# Needs a C++ compiler; nvcc, CUTLASS and jaxlib's headers come from PyPI. The library is
# removed, not overwritten: a process may have it loaded.
.PHONY: cuda
cuda: $(VENV)/.dev ## build a wheel with the CUDA kernels into dist/, and put the kernels into jsparse/_lib/
	JSPARSE_CUDA=1 $(BIN)/python -m build --wheel --outdir $(DIST)
	$(BIN)/python -m zipfile -e $(DIST)/jsparse-*-linux_$$(uname -m).whl build/cuda
	rm -rf jsparse/_lib && cp -R build/cuda/jsparse/_lib jsparse/_lib

build/cuda-plugin/.installed: $(VENV)/.dev
	@echo "Downloading XLA's compiler for CUDA into build/cuda-plugin"
	@$(PIP) install --no-deps --upgrade --target build/cuda-plugin \
	    jax-cuda13-plugin==$(OLDEST_JAX) jax-cuda13-pjrt==$(OLDEST_JAX)
	@touch $@

.PHONY: clean
clean: ## remove everything that make made, the environment too
	rm -rf $(VENV) build dist jsparse/_lib demo-report .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find jsparse tests examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@python=$$(.ci/find-python) && \
	    echo "Making $(VENV) with $$python" && \
	    "$$python" -m venv --clear $(VENV)
	@touch $@

# The package and what it needs to run: enough for the demo.
$(VENV)/.package: $(VENV)/.created pyproject.toml
	@echo "Installing jsparse and JAX $(OLDEST_JAX) into $(VENV): a minute or two the first time"
	@$(PIP) install jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX) --editable .
	@touch $@

# What testing and checking need on top.
$(VENV)/.dev: $(VENV)/.package
	@echo "Installing the tools for tests and checks into $(VENV)"
	@$(PIP) install jax==$(OLDEST_JAX) jaxlib==$(OLDEST_JAX) --editable '.[dev]'
	@touch $@
