# make demo | test | lint | gpu | bench-cpu: each installs what it needs into .venv, at the versions of constraints.txt.
# make gpu uses the python that is there (PYTHON=...), with its own torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Test processes side by side.
JOBS ?= 2

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)

.PHONY: demo test lint gpu codegen bench-cpu asan clean

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

bench-cpu: $(VENV)/demo.stamp
	$(BIN)/python benchmarks/bench_cpu.py

asan: $(VENV)/dev.stamp
	bash tests/asan.sh

# Built against the torch that is then there, not in an isolated environment with a torch of its own.
$(VENV)/torch.stamp: $(BIN)/python constraints.txt
	$(INSTALL) setuptools wheel torch
	touch $@

$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastcnn/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
