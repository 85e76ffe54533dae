# The README's two commands. Both make the virtual environment and install what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two files at a time, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: quickstart test test-fast lint clean

quickstart: $(STAMP)  ## train the embedded default and say where its results are
	$(BIN)/mispo train recipe=quickstart

test: $(STAMP)  ## all tests, the slow end-to-end ones last
	$(PYTEST)

test-fast: $(STAMP)  ## without the end-to-end tests
	$(PYTEST) -m "not slow"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mispo needs Python 3.11 or newer; give one with make PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) runs
