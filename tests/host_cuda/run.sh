# The CUDA kernels' own source, compiled for the CPU, through the parity tests: with AddressSanitizer and
# UndefinedBehaviorSanitizer, or without and faster where SANITIZE=0. Arguments go to pytest.
set -eu
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}
FASTCNN_HOST_CUDA=$("$python" tests/host_cuda/build.py $([ "${SANITIZE:-1}" = 0 ] || echo --sanitize))
export FASTCNN_HOST_CUDA
if [ "${SANITIZE:-1}" != 0 ]; then
  # Python itself has no sanitizer: theirs must be loaded first. What it leaks at exit is not ours.
  export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0
fi
files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu implicit_gemm first_layers bn_relu bn_relu_pool add_relu)
files=("${files[@]/#/tests/test_}")
"$python" -m pytest -q -p no:cacheprovider -k "cuda" "${files[@]/%/.py}" "$@"
