# The CPU kernels' parity tests under AddressSanitizer and UndefinedBehaviorSanitizer, on a copy of the tree.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/${PYTHON:-.venv/bin/python}
sanitizers="-fsanitize=address,undefined -fno-sanitize-recover=undefined"

rm -rf build/asan
mkdir -p build/asan
cp -r csrc fastcnn tests setup.py pyproject.toml README.md LICENSE build/asan
cd build/asan
rm -f fastcnn/*.so
FASTCNN_BUILD_CUDA=0 CFLAGS="$sanitizers -O1" LDFLAGS="$sanitizers" "$python" setup.py --quiet build_ext --inplace
# Python itself has no sanitizer: theirs must be loaded first. What it leaks at exit is not ours.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0
files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu bn_relu bn_relu_pool add_relu)
files=("${files[@]/#/tests/test_}")
PYTHONPATH=$PWD "$python" -m pytest -q -p no:cacheprovider -k cpu "${files[@]/%/.py}"
