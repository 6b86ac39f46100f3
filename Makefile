# make demo | check | test | test-all | lint | bench-cpu | wheel: each installs what it needs into .venv, at the versions of constraints.txt.
# make parity, gpu, sanitize, bench and bench-quick use the python that is there (PYTHON=...), with its own torch.
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

# The tests whose numbers depend on the processor's widest instructions, by torch's and oneDNN's choice of them.
NUMERIC := $(patsubst %,tests/test_%.py,add_relu autograd batch_norm_stages bn_relu bn_relu_pool compile conv_relu \
	conv_relu_pool equal_values first_layers func linear_relu linear_relu_dropout lrn lrn_pool max_pool models \
	normalize normalize_conv_relu resnet sequential swapped_in)
# Those that run over both paths besides.
BOTH_PATHS := tests/test_gradients.py tests/test_errors.py
PARALLEL := -n $(JOBS) --dist worksteal
# A thread that waits for others leaves its core to another process: by turning round it would take most of the time.
check test test-all test-avx2: export OMP_WAIT_POLICY := passive

.PHONY: demo check test test-all test-avx2 parity zoo docs lint gpu sanitize codegen bench bench-quick bench-cpu asan wheel clean

demo: $(VENV)/demo.stamp
	$(BIN)/fastcnn train mnist --compare

# With the extension as it was built last: building takes minutes.
check:
	@[ -e $(VENV)/dev.stamp ] || $(MAKE) $(VENV)/dev.stamp
	@$(BIN)/python tests/changed.py --announce
	$(LINT)
	@tests=$$($(BIN)/python tests/changed.py); \
	[ -z "$$tests" ] || PYTHONPATH=tests $(BIN)/python -m pytest -q -x -p changed -m "not sweep" $$tests

test: $(VENV)/dev.stamp
	@echo "make test: all tests but the sweeps, then the played CUDA kernels: 10 minutes on two idle cores"
	$(BIN)/python -m pytest $(PARALLEL) -m "not sweep"
	SANITIZE=0 bash tests/host_cuda/run.sh $(PARALLEL) -m "not sweep"

test-all: $(VENV)/dev.stamp
	@echo "make test-all: all tests, then the played CUDA kernels under AddressSanitizer and UBSan: 30 minutes on two idle cores"
	$(BIN)/python -m pytest $(PARALLEL)
	$(BIN)/python -m pytest --path python $(PARALLEL) $(NUMERIC) $(BOTH_PATHS)
	bash tests/host_cuda/run.sh $(PARALLEL)

test-avx2: $(VENV)/dev.stamp
	@echo "make test-avx2: the numeric tests but the sweeps, as on a processor without AVX-512: 5 minutes on two idle cores"
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest $(PARALLEL) -m "not sweep" $(NUMERIC)

parity:
	FASTCNN_BUILD_CUDA=0 "$(PYTHON)" setup.py -q build_ext --inplace
	"$(PYTHON)" -m pytest $(PARALLEL) -m "not sweep" $(NUMERIC) $(BOTH_PATHS) tests/test_front*.py
	"$(PYTHON)" -m pytest --path python $(PARALLEL) -m "not sweep" $(NUMERIC) $(BOTH_PATHS)

zoo: $(VENV)/dev.stamp
	FASTCNN_ZOO=1 $(BIN)/python -m pytest tests/test_zoo.py -v

# The site, into build/site.
docs: $(VENV)/dev.stamp
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

define LINT
$(BIN)/ruff format --check .
$(BIN)/ruff check .
$(BIN)/mypy
$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.* csrc/*/*.* tests/host_cuda/*.h)
endef

lint: $(VENV)/dev.stamp
	$(LINT)

gpu:
	"$(PYTHON)" tests/gpu/run.py

sanitize:
	PYTHON="$(PYTHON)" bash tests/sanitize.sh

codegen: $(VENV)/dev.stamp
	env -u TRITON_INTERPRET $(BIN)/python tests/codegen.py
	env -u TRITON_INTERPRET $(BIN)/python tests/headline.py
	$(BIN)/python tests/extension_codegen.py
	$(BIN)/python tests/cuda_headline.py

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

# With a GPU and nvcc the CUDA kernels are built for that GPU alone; where the tests' build is, it serves the demo too.
$(VENV)/demo.stamp: $(VENV)/torch.stamp $(SOURCES)
	if [ -e $(VENV)/dev.stamp ]; then $(MAKE) $(VENV)/dev.stamp; \
	elif nvidia-smi -L >/dev/null 2>&1; then \
	env -u TORCH_CUDA_ARCH_LIST -u NVCC_APPEND_FLAGS $(INSTALL) --no-build-isolation --editable '.[demo]'; \
	else FASTCNN_BUILD_CUDA=0 $(INSTALL) --no-build-isolation --editable '.[demo]'; fi
	touch $@

$(VENV)/dev.stamp: $(VENV)/torch.stamp $(SOURCES)
	$(INSTALL) --no-build-isolation --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastcnn/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
