# Needs Python 3.11, pip, make and a C compiler; `make PYTHON=python3.12 demo` takes another Python.
PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test lint
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest

lint: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

$(VENV)/demo.stamp: EXTRAS = demo
$(VENV)/dev.stamp: EXTRAS = demo,dev

# A stamp is as new as the environment; dev holds all that demo needs.
$(VENV)/%.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $(VENV)/demo.stamp $@
