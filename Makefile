# `make` lists the targets. All of them use the .venv in this folder and make it first where it is missing.

PYTHON ?= python3
TORCH ?=
ARGS ?=
PIP_RETRIES ?= 2
PIP_DISABLE_PIP_VERSION_CHECK = 1
export TORCH PIP_RETRIES PIP_DISABLE_PIP_VERSION_CHECK

BIN := .venv/bin
READY := .venv/.ready
# A PYTHON that was asked for is taken or refused; otherwise the first of these that is new enough.
PYTHONS := $(if $(filter file,$(origin PYTHON)),$(PYTHON) python3.13 python3.12 python3.11,$(PYTHON))
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
fail = { echo "make: $(1)" >&2; exit 1; }
NO_PIP := pip could not install (its own words are above). Is there a network, and does pip reach its index?

.PHONY: help setup train test lint types docs wheel wheel-test clean again

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  PYTHON=python3.12 chooses the Python, TORCH='torch --index-url URL' the build of torch."

setup: $(READY) ## make .venv with all that the other targets need
	@echo "== .venv: ready"

train: $(READY) ## run the main job; ARGS='...' goes to automodel-fn train
	$(BIN)/automodel-fn train $(ARGS)

test: $(READY) ## run tests, properties and all doctests; ARGS='...' goes to pytest
	$(BIN)/python -m pytest --doctest-modules automodel_fn tests properties $(ARGS)

lint: $(READY) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## check the types of the package
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

docs: $(READY) ## build the documentation into docs/_build
	$(BIN)/python -m sphinx -W -b html docs docs/_build

wheel: $(READY) ## build the wheel into dist
	rm -rf dist
	$(BIN)/python -m build --wheel

wheel-test: wheel ## install the wheel into a new environment outside this folder and test it there
	.ci/wheel_test

clean: ## remove .venv and all that was built
	rm -rf .venv build dist docs/_build .pytest_cache .ruff_cache .hypothesis

# Touched last, so that an interrupted set-up is done again. A TORCH given to make is looked at even when all is ready.
$(READY): pyproject.toml .ci/torch_build.py .ci/peers.txt $(if $(findstring command,$(origin TORCH)),again)
	@rm -f $@
	@$(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null || { \
	  for python in $(PYTHONS) ''; do "$$python" -c '$(NEW_ENOUGH)' 2>/dev/null && break; done; \
	  test "$$python" || $(call fail,no Python 3.11 or newer found (tried: $(PYTHONS)). Install one or name it: make PYTHON=/path/to/python3); \
	  echo "== .venv: making it with $$python"; \
	  "$$python" -m venv --clear .venv || $(call fail,$$python could not make .venv (its own words are above). On Debian and Ubuntu install python3-venv); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip || $(call fail,.venv has no pip. Run make clean and try again)
	@echo "== .venv: installing what the project needs for $$($(BIN)/python --version) (make clean removes it)"
	@$(BIN)/python -m pip install --quiet 'pip>=25.1' || $(call fail,$(NO_PIP))
	@$(BIN)/python .ci/torch_build.py .venv/torch.txt
	@$(BIN)/python -m pip install -c .venv/torch.txt -e '.[config,plots,testing]' --group dev || $(call fail,$(NO_PIP))
	@$(BIN)/python -m pip install --quiet --no-deps -r .ci/peers.txt || $(call fail,$(NO_PIP))
	@touch $@
