# From the sdist a wheel without CUDA, built against the torch that is here; installed beside another torch (argument 1;
# the oldest that is supported, if none) it must load, and pass tests of the CPU's kernels outside the source tree.
set -eu
cd "$(dirname "$0")/.."
python=$PWD/${PYTHON:-.venv/bin/python}
torch=${1:-2.11.0}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

"$python" setup.py --quiet sdist --dist-dir "$folder"
FASTCNN_BUILD_CUDA=0 "$python" -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir "$folder" "$folder"/*.tar.gz
"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "$folder"/*.whl "torch==$torch" pytest hypothesis

cp -r tests "$folder/tests"
cd "$folder/tests"
"$folder/venv/bin/python" -c "
import fastcnn, torch
assert torch.__version__.split('+')[0] == '$torch' and '$folder' in fastcnn.__file__, (torch.__version__, fastcnn.__file__)
assert fastcnn.backends()['cpu'].available, fastcnn.backends()['cpu'].reason
print('torch', torch.__version__, 'loads', fastcnn._C.__file__)"
"$folder/venv/bin/python" -m pytest -q -p no:cacheprovider -k cpu test_lrn.py test_max_pool.py
