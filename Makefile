# make demo | test | lint | bench-cpu | wheel: each installs what it needs into .venv, at the versions of constraints.txt.
# make gpu, sanitize, bench and bench-quick use the python that is there (PYTHON=...), with its own torch.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Test processes side by side.
JOBS ?= 2

SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/*/*.*)
# The architectures whose code the tests look at; warnings are errors.
export TORCH_CUDA_ARCH_LIST ?= 8.0;9.0;10.0
export NVCC_APPEND_FLAGS ?= -Werror=all-warnings

.PHONY: demo test zoo docs lint gpu sanitize codegen bench bench-quick bench-cpu asan wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/fastcnn train mnist --compare

test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal
	bash tests/host_cuda/run.sh -n $(JOBS) --dist worksteal

zoo: $(VENV)/dev.stamp
	FASTCNN_ZOO=1 $(BIN)/python -m pytest tests/test_zoo.py -v

# The site, into build/site.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.* tests/host_cuda/*.h)

gpu:
	"$(PYTHON)" tests/gpu/run.py

sanitize:
	PYTHON="$(PYTHON)" bash tests/sanitize.sh

codegen: $(VENV)/dev.stamp
	env -u TRITON_INTERPRET $(BIN)/python tests/codegen.py
	$(BIN)/python tests/extension_codegen.py

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# On a GPU: a group takes up to nine minutes, the headline cells of all five; what is measured already is not again.
GROUPS ?= ops alexnet vgg small
bench:
	status=0; for group in $(GROUPS); do \
	PYTHONPATH="$(CURDIR)" "$(PYTHON)" -m pytest benchmarks --group $$group || status=1; done; exit $$status

bench-quick:
	PYTHONPATH="$(CURDIR)" "$(PYTHON)" -m pytest benchmarks --quick

bench-cpu: $(VENV)/dev.stamp
	$(BIN)/python -m pytest benchmarks --device cpu

asan: $(VENV)/dev.stamp
	bash tests/asan.sh

# WITH: the torch beside which the wheel is tested.
WITH ?= 2.11.0
wheel: $(VENV)/dev.stamp
	bash tests/wheel.sh $(WITH)

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
