# The CUDA kernels' own source, compiled for the CPU with AddressSanitizer and UndefinedBehaviorSanitizer, through the
# parity tests. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
FASTCNN_HOST_CUDA=$("$python" tests/host_cuda/build.py --sanitize)
export FASTCNN_HOST_CUDA
# Python itself has no sanitizer: theirs must be loaded first. What it leaks at exit is not ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0
files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu implicit_gemm first_layers bn_relu bn_relu_pool add_relu strided_operands)
files=("${files[@]/#/tests/test_}")
"$python" -m pytest -q -p no:cacheprovider -k "cuda" "${files[@]/%/.py}" "$@"
