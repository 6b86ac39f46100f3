# make demo | test | lint | gpu: each installs what it needs into .venv, at the versions of constraints.txt.
# make gpu uses the python that is there (PYTHON=...), with its own torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Test processes side by side.
JOBS ?= 2

.PHONY: demo test lint gpu codegen clean

demo: $(VENV)/demo.stamp
	$(BIN)/fastcnn train mnist --compare

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu:
	PYTHON="$(PYTHON)" bash tests/gpu.sh

codegen: $(VENV)/dev.stamp
	env -u TRITON_INTERPRET $(BIN)/python tests/codegen.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
