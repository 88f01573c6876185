# make demo: sweep, rank, recommend and report on the embedded model. make test: all tests but the slow ones, which
# make slow runs: further families of what is tested on some, long runs with kills. make docs: the documentation, into build/site.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
TESTED = $(VENV)/.tested

# Tests and workers are processes that import torch and transformers. Where the environment forbids bytecode, as many container
# images do, each would compile both from source: `import sensitivity.models.loading` takes 16 seconds of CPU time, not 7.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test slow lint types docs check install clean

demo: $(READY)
	$(BIN)/sensitivity demo

test: $(TESTED)
	$(BIN)/python -m pytest -m "not slow"

slow: $(TESTED)
	$(BIN)/python -m pytest -m slow

lint: $(TESTED)
	$(BIN)/ruff check .

types: $(TESTED)
	$(BIN)/mypy

docs: $(VENV)/.docs
	$(BIN)/zensical build --strict --clean

check: lint types docs test

install: $(TESTED)

# torch on its own and first: asked for by another package, pip may fetch a build with gigabytes of CUDA. Nothing is
# compiled beforehand: Python compiles what is imported, a sixth of it.
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(TESTED): $(READY)
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/.docs: $(READY)
	$(PIP) --editable '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
