# The GPU parity tests of the CUDA kernels under compute-sanitizer: memcheck, racecheck, initcheck.
set -u
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
sanitizer=$(command -v compute-sanitizer || echo "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer")

if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "make sanitize: no CUDA GPU that this torch can use; nothing was run"
    exit 1
fi
if ! [ -x "$sanitizer" ]; then
    echo "make sanitize: no compute-sanitizer: install the CUDA toolkit, or set CUDA_HOME"
    exit 1
fi
# An allocation of its own for every tensor, not filled beforehand: else neither tool could see past the cache.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTORCH_NO_CUDA_MEMORY_CACHING=1 FASTCNN_TEST_POISON=0
files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu implicit_gemm first_layers bn_relu bn_relu_pool add_relu)
files=("${files[@]/#/tests/test_}")
status=0
for tool in memcheck racecheck initcheck; do
    echo "== $tool"
    "$sanitizer" --tool "$tool" --kernel-name kernel_substring=fastcnn --error-exitcode 1 --print-limit 20 \
        "$python" -m pytest -q -x -k "cuda and not triton" "${files[@]/%/.py}" || status=1
done
exit $status
