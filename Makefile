# Every target works from a fresh clone: the environment is built on first use
# and rebuilt when pyproject.toml changes. Extra flags go through ARGS:
#   make test ARGS="-m slow"        make mixer ARGS="--port 7861"
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
CONFIG ?=

.DEFAULT_GOAL := help
.PHONY: help mixer test lint docs train bench gpu demos clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

mixer: .venv/.installed  ## Open the mixer, the browser app
	$(BIN)/composable-ebm mixer $(ARGS)

test: .venv/.installed  ## Run the tests
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.installed  ## Check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/.installed  ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

train: .venv/.installed  ## Train one expert: make train CONFIG=configs/faces/smile.toml
	$(if $(CONFIG),,$(error say which expert: make train CONFIG=configs/FAMILY/NAME.toml))
	$(BIN)/composable-ebm train $(CONFIG) $(ARGS)

bench: .venv/.installed  ## Run every benchmark
	@set -e; for script in $(filter-out benchmarks/gpu.py,$(sort $(wildcard benchmarks/*.py))); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); done

gpu: .venv/.installed  ## Run the tests and the benchmark that need a card, into one file
	$(BIN)/python benchmarks/gpu.py $(ARGS)

demos: .venv/.installed  ## Run every demo script
	@set -e; for script in $(sort $(wildcard demos/*.py)); do \
		echo "== $$script"; $(BIN)/python $$script $(ARGS); done

clean:  ## Remove the environment, caches and build products
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
