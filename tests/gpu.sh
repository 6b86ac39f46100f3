# On a CUDA GPU, in one call of under ten minutes: parity of every backend, tuning, the headline benchmarks, the report.
# Uses the python and torch that are there. RESULTS: where result files go (benchmarks/results). PARTS: what to do, where
# that is not all: parity tune bench report.
set -u
python=${PYTHON:-python3}
cd "$(dirname "$0")/.."
results=${RESULTS:-benchmarks/results}
parts=" ${PARTS:-parity tune bench report} "
asked() { [[ $parts == *" $1 "* ]]; }

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

status=0
if asked parity; then # a process a file, eight at a time
    files=(max_pool conv_relu conv_relu_pool lrn lrn_pool linear_relu linear_relu_dropout normalize normalize_conv_relu
        normalize_conv_relu_pool bn_relu bn_relu_pool add_relu batch_norm_stages implicit_gemm tma warp_specialized
        gradients first_layers first_layers_triton configurations optim cuda graphed autograd func compile sequential fuse)
    printf 'tests/test_%s.py\n' "${files[@]}" | timeout 250 xargs -P 8 -n 1 "$python" -m pytest -q
    status=$?
fi
if [ -n "$commands" ] && asked tune; then
    for model in "vgg16 --batch-size 64" "alexnet --batch-size 128" "mnist_cnn --batch-size 100"; do
        # shellcheck disable=SC2086
        timeout "${TUNE_SECONDS:-40}" "$python" -m fastcnn tune $model --dtype bfloat16 --channels-last --output "$results/tuned.json" ||
            echo "make gpu: tuning $model did not finish (what was timed is stored)"
    done
fi
if asked bench; then
    timeout 160 "$python" -m pytest benchmarks --quick --minutes 2.4 --results "$results"
fi
if [ -n "$commands" ] && asked report; then
    "$python" -m fastcnn bench report "$results" --output "$results/report"
fi

echo
if [ $status = 0 ]; then
    echo "make gpu: done ($parts) on $("$python" -c "import torch; print(torch.cuda.get_device_name())"); results in $results"
else
    echo "make gpu: PARITY FAILED (exit status $status; 124: out of time)"
fi
exit $status
