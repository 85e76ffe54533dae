# The README's commands. Each makes the virtual environment that it needs and installs what is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Two files at a time, in the order of tests/conftest.py.
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
VLLM := .venv-vllm

.PHONY: quickstart test test-fast test-vllm lint clean

quickstart: $(STAMP)  ## train the embedded default and say where its results are
	$(BIN)/mispo train recipe=quickstart

test: $(STAMP)  ## all tests, the slow end-to-end ones last
	$(PYTEST)

test-fast: $(STAMP)  ## without the end-to-end tests
	$(PYTEST) -m "not slow"

test-vllm: $(STAMP) $(VLLM)/.installed  ## our checkpoints in vLLM, which has an environment of its own
	$(BIN)/python -m pytest tests/vllm

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

# vLLM needs another torch and transformers than we do. The torch companions it brings along are GPU builds, which break
# its import beside a CPU build of torch; nothing here uses them.
$(VLLM)/.installed: tests/vllm/requirements.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check -r tests/vllm/requirements.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) runs
