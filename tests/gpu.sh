# Parity on a CUDA GPU, for each backend that has kernels, and a summary. Uses the python and torch that are there.
set -u
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."

if ! "$python" -c "import torch, sys; sys.exit(not torch.cuda.is_available())" 2>/dev/null; then
    echo "make gpu: no CUDA GPU that this torch can use; nothing was run (make test checks all that needs none)"
    exit 1
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # this tree, installed or not

built() { "$python" -c "import fastcnn, sys; sys.exit(not fastcnn.backends()['cuda'].available)"; }
if ! built; then # for this GPU alone
    TORCH_CUDA_ARCH_LIST=$("$python" -c "import torch; a, b = torch.cuda.get_device_capability(); print(f'{a}.{b}' + 'a' * (a == 9))")
    export TORCH_CUDA_ARCH_LIST
    FASTCNN_BUILD_CUDA=1 "$python" setup.py --quiet build_ext --inplace >build.log 2>&1 || tail -20 build.log
    built || echo "make gpu: the CUDA extension could not be built (build.log); backend cuda is not tested"
fi
"$python" -m fastcnn doctor || exit 1

workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu implicit_gemm first_layers configurations cuda autograd func compile sequential fuse)
files=("${files[@]/#/tests/test_}")
timeout 500 "$python" -m pytest -q "${workers[@]}" "${files[@]/%/.py}"
status=$?
echo
if [ $status = 0 ]; then
    echo "make gpu: parity holds on $("$python" -c "import torch; print(torch.cuda.get_device_name())")"
else
    echo "make gpu: FAILED (pytest's exit status $status; 124: out of time)"
fi
exit $status
