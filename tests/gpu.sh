# On a CUDA GPU, in one call of under nine minutes: parity of every backend, tuning, the headline benchmarks, the report.
# Uses the python and torch that are there. RESULTS: where result files go (benchmarks/results).
set -u
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
results=${RESULTS:-benchmarks/results}

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
"$python" -c "import fastcnn; [print(name, status) for name, status in fastcnn.backends().items()]" || exit 1
commands=yes
"$python" -c "import typer, rich" 2>/dev/null || commands=
[ -n "$commands" ] || echo "make gpu: no typer and rich (pip install typer rich): no tuning, no report"

workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu implicit_gemm tma warp_specialized first_layers configurations cuda
    graphed autograd func compile sequential fuse)
files=("${files[@]/#/tests/test_}")
timeout 240 "$python" -m pytest -q "${workers[@]}" "${files[@]/%/.py}"
status=$?

if [ -n "$commands" ]; then
    for model in "vgg16 --batch-size 64" "alexnet --batch-size 128" "mnist_cnn --batch-size 100"; do
        # shellcheck disable=SC2086
        timeout 30 "$python" -m fastcnn tune $model --dtype bfloat16 --channels-last --output "$results/tuned.json" ||
            echo "make gpu: tuning $model did not finish (what was timed is stored)"
    done
fi
timeout 190 "$python" -m pytest benchmarks --quick --minutes 2.7 --results "$results"
[ -z "$commands" ] || "$python" -m fastcnn bench report "$results" --output "$results/report"

echo
if [ $status = 0 ]; then
    echo "make gpu: parity holds on $("$python" -c "import torch; print(torch.cuda.get_device_name())"); results in $results"
else
    echo "make gpu: PARITY FAILED (pytest's exit status $status; 124: out of time)"
fi
exit $status
