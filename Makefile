# make demo | test | lint | gpu | sanitize | bench-cpu: each installs what it needs into .venv, at the versions of constraints.txt.
# make gpu and make sanitize use the python that is there (PYTHON=...), with its own torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Test processes side by side.
JOBS ?= 2

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
# The architectures whose code the tests look at; warnings are errors.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0a;10.0
export NVCC_APPEND_FLAGS ?= -Werror=all-warnings

.PHONY: demo test lint gpu sanitize codegen bench-cpu asan clean

demo: $(VENV)/demo.stamp
	$(BIN)/fastcnn train mnist --compare

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	bash tests/host_cuda/run.sh -n $(JOBS) --dist worksteal

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

gpu:
	PYTHON="$(PYTHON)" bash tests/gpu.sh

sanitize:
	PYTHON="$(PYTHON)" bash tests/sanitize.sh

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
	$(INSTALL) setuptools wheel ninja torch
	touch $@

# What the demo runs has no CUDA kernels of the extension; where the tests' build is, it serves the demo too.
$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	if [ -e $(VENV)/dev.stamp ]; then $(MAKE) $(VENV)/dev.stamp; \
	else FASTCNN_BUILD_CUDA=0 $(INSTALL) --no-build-isolation --editable '.[demo]'; fi
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastcnn/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
