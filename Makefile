# Needs Python 3.11, pip, make and a C++ compiler; `make PYTHON=python3.12 demo` takes another Python.
PYTHON = python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: demo test lint hf-tests cases sanitize bench
.NOTPARALLEL:
.DELETE_ON_ERROR:

demo: $(VENV)/demo.stamp
	$(BIN)/python examples/demo.py

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/dev.stamp
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

# 100,000 random products against plain integers, a quarter as many rows of ghost features against torch, on every path.
cases: $(VENV)/dev.stamp
	QBERT_CASES=100000 $(BIN)/python -m pytest tests/native -k random

# The native engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/dev.stamp
	tests/native/sanitize.sh $(BIN)/python

bench: $(VENV)/bench.stamp
	$(BIN)/qbert bench --figure benchmarks/results/bench.png

# Transformers' own model tests, half an hour on one core; HF_TESTS="-k TernaryBert" runs some. Counts: COUNTS.md beside them.
hf-tests: $(VENV)/dev.stamp
	$(BIN)/python tests/ecosystem/transformers_common/fetch.py .cache/transformers-tests
	$(BIN)/python -m pytest -o addopts= -q -W ignore --tb=short --show-capture=no $(HF_TESTS) \
		tests/ecosystem/transformers_common/common.py

$(VENV)/demo.stamp: EXTRAS = demo
$(VENV)/dev.stamp: EXTRAS = demo,dev,onnx
$(VENV)/bench.stamp: EXTRAS = demo,dev,onnx,bench

# A stamp is as new as the environment; dev holds all that demo needs.
$(VENV)/%.stamp: pyproject.toml constraints.txt CMakeLists.txt $(wildcard native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[$(EXTRAS)]"
	touch $(VENV)/demo.stamp $@
