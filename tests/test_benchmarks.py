"""The benchmark suite: its shapes and floors, and runs of it on the smallest cells."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("pytest_benchmark", reason="the benchmarks need pytest-benchmark")

import torch
from tables import operators
from torch import nn

import fastcnn
import fastcnn.functional as FF
from benchmarks import cells, networks, roofline, sgd, work
from benchmarks.operations import OPERATIONS, WORK
from benchmarks.rows import ENDED, FIELDS, ROW_KEY
from benchmarks.shapes import ENTRIES, distinct, stages, tiny

ROOT = Path(__file__).parents[1]
H200 = {"bfloat16 matmul FLOP/s": 790e12, "copy B/s": 4.3e12}
FUNCTIONS = {
    "conv2d_relu": "conv_relu",
    "conv2d_relu_max_pool2d": "conv_relu_pool",
    "max_pool2d": "max_pool",
    "local_response_norm": "lrn",
    "local_response_norm_max_pool2d": "lrn_pool",
    "linear_relu": "linear_relu",
    "linear_relu_dropout": "linear_relu",
    "add_relu": "add_relu",
}
BROKEN_LRN = """
import torch.nn.functional as F
stock = F.local_response_norm
def fail(input, *settings, **named):
    if input.is_meta:  # where the shapes are looked up
        return stock(input, *settings, **named)
    raise RuntimeError("out of\\norder")
F.local_response_norm = fail
"""
# The tests read no times: rows take a fiftieth of theirs, and ceilings are of small matrices.
BRIEF = """
from benchmarks import measure
plan, rate = measure.plan, measure._matmul_rate
measure.plan = lambda work, device, seconds: plan(work, device, seconds / 50)
measure.ROUND_SECONDS["cpu"] /= 50
measure._matmul_rate = lambda device, dtype, side: rate(device, dtype, 64)
"""


def run_suite(results, *arguments, plugin=None):
    results.mkdir(exist_ok=True)
    (results / "brief_rows.py").write_text(BRIEF)
    folders = [str(folder) for folder in (ROOT, results, plugin) if folder]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    environment |= {"OMP_NUM_THREADS": "1", "FASTCNN_BACKEND": "auto", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER"):  # pytest-benchmark does not time in xdist's workers
        environment.pop(name, None)
    options = ["--device", "cpu", "--group", "ops", "--op", "lrn", "--results", str(results), *arguments]
    plugins = ["-p", "pytest_benchmark.plugin", "-p", "brief_rows"]
    command = [sys.executable, "-m", "pytest", *plugins, "benchmarks", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def lines_of(results):
    return [json.loads(line) for line in (results / "cpu" / "ops.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def broken_run(tmp_path_factory):
    """A run in which stock LRN raises, on the tiny cells of one op."""
    folder = tmp_path_factory.mktemp("benchmarks")
    (folder / "broken_lrn.py").write_text(BROKEN_LRN)
    finished = run_suite(folder / "results", "-p", "broken_lrn", "-k", "tiny", plugin=folder)
    return folder / "results", finished


def test_a_failing_cell_is_a_row_and_the_run_goes_on(broken_run):
    results, finished = broken_run
    rows = [line for line in lines_of(results) if line["kind"] == "row"]
    failed = {(row["method"], row["mode"]): row["error"] for row in rows if row["error"]}
    assert finished.returncode == 1, finished.stdout + finished.stderr
    assert failed == {("eager", mode): "RuntimeError: out of order" for mode in ("forward", "forward+backward")}
    assert {row["method"] for row in rows if not row["error"]} >= {"copy", "fastcnn"}
    assert "RuntimeError: out of order" in finished.stdout
    assert "| vs best" in finished.stdout


def test_rows_have_the_documented_keys(broken_run):
    run, *rows = lines_of(broken_run[0])
    assert run["kind"] == "run"
    assert set(run) == {"kind", *FIELDS["run"]}
    assert set(run["ceilings"]) == {"float32 matmul FLOP/s", "bfloat16 matmul FLOP/s", "copy B/s"}
    for row in rows:
        assert set(row) == {"kind", *FIELDS["row"]}
        assert (row["kind"], row["run"], row["group"], row["subject"]) == ("row", run["id"], "ops", "lrn")
        assert row["floor_seconds"] > 0
        if not row["error"]:
            seconds = row["seconds"]
            assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"]
            assert row["rounds"] >= 5


def test_a_run_skips_what_the_file_holds_but_a_half_written_line(broken_run):
    results = broken_run[0]
    path = results / "cpu" / "ops.jsonl"
    before = path.read_text().splitlines()
    lost = json.loads(before[-1])
    path.write_text("\n".join(before[:-1]) + "\n" + before[-1][:20])  # as a killed run leaves it
    finished = run_suite(results, "-k", "tiny")
    after = lines_of(results)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert after[: len(before) - 1] == [json.loads(line) for line in before[:-1]]
    assert [line["kind"] for line in after[len(before) - 1 :]] == ["run", "row"]
    assert all(after[-1][key] == lost[key] for key in ("subject", "case", "mode", "dtype", "layout", "method"))


def test_a_row_that_ends_the_process_is_an_error_of_the_next_run(tmp_path):
    (tmp_path / "ended_lrn.py").write_text(
        BROKEN_LRN.replace('raise RuntimeError("out of\\norder")', "os._exit(7)") + "import os"
    )
    options = ("-p", "ended_lrn", "-k", "tiny and forward+backward and eager")
    assert run_suite(tmp_path / "results", *options, plugin=tmp_path).returncode == 7
    assert [line["kind"] for line in lines_of(tmp_path / "results")] == ["run"]
    finished = run_suite(tmp_path / "results", *options, plugin=tmp_path)
    assert "1 of them errors" in finished.stdout, finished.stdout + finished.stderr
    row = lines_of(tmp_path / "results")[1]
    assert (row["method"], row["error"]) == ("eager", ENDED)


def key(row):
    return tuple(row[name] for name in ROW_KEY)


def test_again_measures_every_row_and_the_shorter_time_counts(broken_run):
    results = broken_run[0]
    path = results / "cpu" / "ops.jsonl"
    slow, quick, *_ = (row for row in lines_of(results) if row["kind"] == "row" and not row["error"])
    changed = {key(slow): {"median": 3600.0, "p20": 3600.0, "p80": 3600.0}}
    changed[key(quick)] = {"median": 1e-12, "p20": 1e-12, "p80": 1e-12}
    earlier = [
        line if line["kind"] == "run" else line | {"seconds": changed.get(key(line), line["seconds"])}
        for line in lines_of(results)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in earlier))
    finished = run_suite(results, "-k", "tiny", "--again")
    added = {key(line): line for line in lines_of(results)[len(earlier) :] if line["kind"] == "row"}
    held = {key(line): line for line in earlier if line["kind"] == "row"}
    assert f"{len(held)} passed" in finished.stdout, finished.stdout + finished.stderr
    assert key(slow) in added
    assert key(quick) not in added
    assert {name for name, row in held.items() if row["error"]} <= set(added)
    for name, row in added.items():
        assert held[name]["error"] or row["seconds"]["median"] < held[name]["seconds"]["median"]


@pytest.mark.parametrize(
    ("model", "batch", "inference", "training"), [("alexnet", 128, 0.241, 0.752), ("vgg16", 64, 2.631, 8.71)]
)
def test_floors_on_an_h200(model, batch, inference, training):
    found = [roofline.floor(stages(model, batch), "bfloat16", H200, training=each) for each in (False, True)]
    assert found[0] * 1e3 == pytest.approx(inference, abs=5e-4)
    assert found[1] * 1e3 == pytest.approx(training, rel=1e-3)


@pytest.mark.parametrize(("mode", "passes"), [(False, 2), (True, 5)], ids=["forward", "forward+backward"])
def test_lrn_is_bound_by_so_many_passes_over_its_input(mode, passes):
    (stage, *_) = distinct({"alexnet2012": 16}, "lrn")
    assert roofline.least_bytes([stage], 4, training=mode) == passes * 4 * 16 * 96 * 55 * 55
    ceilings = {"float32 matmul FLOP/s": 1e12, "copy B/s": 1e9}
    seconds = roofline.floor([stage], "float32", ceilings, training=mode)
    assert seconds == pytest.approx(passes * 4 * 16 * 96 * 55 * 55 / 1e9)


def test_a_dtype_without_a_ceiling_has_no_floor():
    assert roofline.floor(stages("mnist_cnn", 1), "float16", H200, training=False) is None


def test_batch_norm_is_free_in_inference_alone():
    times = {
        (model, training): roofline.floor(stages(model, 64), "bfloat16", H200, training=training)
        for model in ("vgg16", "vgg16_bn")
        for training in (False, True)
    }
    assert times["vgg16_bn", False] == times["vgg16", False]
    assert times["vgg16_bn", True] > times["vgg16", True]


def test_stages_of_alexnet():
    found = stages("alexnet", 128)
    assert [(stage.stem, stage.input, stage.weight, stage.output) for stage in found] == [
        ("conv_relu_pool", (128, 3, 224, 224), (64, 3, 11, 11), (128, 64, 27, 27)),
        ("conv_relu_pool", (128, 64, 27, 27), (192, 64, 5, 5), (128, 192, 13, 13)),
        ("conv_relu", (128, 192, 13, 13), (384, 192, 3, 3), (128, 384, 13, 13)),
        ("conv_relu", (128, 384, 13, 13), (256, 384, 3, 3), (128, 256, 13, 13)),
        ("conv_relu_pool", (128, 256, 13, 13), (256, 256, 3, 3), (128, 256, 6, 6)),
        ("linear_relu", (128, 9216), (4096, 9216), (128, 4096)),
        ("linear_relu", (128, 4096), (4096, 4096), (128, 4096)),
        ("linear", (128, 4096), (1000, 4096), (128, 1000)),
    ]
    assert [stage.first for stage in found] == [True, *[False] * 7]
    assert found[0].activation == (128, 64, 55, 55)
    assert found[0].case == "alexnet features.0 128x3x224x224 -> 64, 11x11/4 pad 2, pool 3/2"


def test_stages_of_vgg16():
    found = [stage for stage in stages("vgg16", 64) if stage.convolution]
    sides = [224] * 2 + [112] * 2 + [56] * 3 + [28] * 3 + [14] * 3
    channels = [64, 64, 128, 128, *[256] * 3, *[512] * 6]
    assert [stage.input[2] for stage in found] == sides
    assert [stage.weight for stage in found] == [(k, c, 3, 3) for c, k in zip([3, *channels], channels)]
    assert [number for number, stage in enumerate(found) if stage.pool] == [1, 3, 6, 9, 12]
    assert math.prod(found[-1].output[1:]) == 25088


@pytest.mark.parametrize("model", sorted(ENTRIES))
def test_stages_are_those_that_run_fused(model):
    """Without batch norm, which the model runs by itself between a convolution and a ReLU."""
    seen = []
    with torch.device("meta"):
        network = fastcnn.fuse(ENTRIES[model].build()).eval()
        image = torch.empty(1, *ENTRIES[model].input_size)

    def recorder(stem, function):
        return lambda input, *rest, **settings: (
            seen.append((stem, tuple(input.shape))) or function(input, *rest, **settings)
        )

    patches = {name: recorder(stem, getattr(FF, name)) for name, stem in FUNCTIONS.items()}
    with mock.patch.multiple(FF, **patches), torch.no_grad():
        network(image)
    found = [(stage.stem, stage.input) for stage in stages(model, 1) if stage.stem in FUNCTIONS.values()]
    assert [each for each in seen if each[0] != "max_pool"] == [each for each in found if each[0] != "max_pool"]


@pytest.mark.parametrize(
    ("stem", "frozen", "forward", "both"),
    [("bn_relu", False, 3, 8), ("bn_relu", True, 2, 5), ("add_relu", False, 3, 6)],
    ids=["statistics of the batch", "running statistics", "addition"],
)
def test_norms_and_sums_are_bound_by_so_many_passes(stem, frozen, forward, both):
    stage = next(each for each in distinct({"resnet_cifar": 32}, stem) if each.frozen == frozen)
    once = 4 * 32 * 16 * 32 * 32
    assert [roofline.least_bytes([stage], 4, training=each) for each in (False, True)] == [forward * once, both * once]


def test_a_pooled_norm_reads_gradients_and_codes_of_what_it_wrote():
    stage, frozen = distinct({"convnet": 16}, "bn_relu_pool")[:2]
    whole, pooled, codes = 4 * 16 * 32 * 55 * 55, 4 * 16 * 32 * 27 * 27, 16 * 32 * 27 * 27
    assert (stage.frozen, frozen.frozen, frozen.activation) == (False, True, (16, 32, 55, 55))
    assert frozen.case == "convnet layer1.1 16x32x55x55, running statistics, pool 2/2"
    back = pooled + codes + 2 * whole
    assert roofline.least_bytes([frozen], 4, training=True) == whole + pooled + codes + back
    assert roofline.least_bytes([stage], 4, training=True) == 2 * whole + 2 * (pooled + codes) + whole + back


def test_stages_of_a_residual_network():
    found = [(stage.stem, stage.layers[0].name) for stage in stages("resnet_cifar", 32)]
    assert found[:4] == [
        ("conv_bn_relu", "stem.0"),
        ("conv_bn_relu", "blocks.0.layers.0"),
        ("conv_bn", "blocks.0.layers.3"),
        ("add_relu", "blocks.0"),
    ]
    assert ("conv_bn", "blocks.2.shortcut.0") in found
    assert found[-2:] == [("add_relu", "blocks.5"), ("linear", "fc")]


@pytest.mark.parametrize("stem", ["bn_relu", "bn_relu_pool", "add_relu", *cells.ON_GPUS[:-1]])
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_methods_do_the_same_work(stem, mode):
    """Stock and ours give equal results on equal tensors, with equal random numbers, and equal running statistics."""
    if (stem, mode) == ("normalize", "forward+backward"):
        pytest.skip("bytes have no gradient")
    op, models = OPERATIONS[stem], {"resnet_cifar": 2, "convnet": 2, "mnist_cnn": 2, "alexnet": 1, "vgg16": 1}
    if stem == "linear_relu_dropout":
        del models["vgg16"]  # a hundred million weights more
    for stage in distinct(models, stem)[:2]:
        row = (stem, stage.case, mode, "float32", "nchw", "eager", (stage,), 2, False, 0)
        outcomes = []
        for run in (op.stock(stage), op.fused(stage)):
            torch.manual_seed(0)
            tensors = work.tensors(stage, cells.Cell(*row), torch.device("cpu"))
            with torch.set_grad_enabled(mode != "forward"):
                output = run(*tensors)
            leaves = [tensor for tensor in tensors if tensor.requires_grad]
            assert bool(leaves) == (mode != "forward")
            gradients = torch.autograd.grad(output.mean(), leaves) if leaves else ()
            outcomes.append([output, *(each for each in tensors if not each.requires_grad), *gradients])
        for mine, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_joined_kernel_is_what_a_forced_algorithm_runs(dtype):
    (stage,) = distinct({"mnist_cnn": 1}, "normalize_conv_relu_pool")
    row = (stage.stem, stage.case, "forward", dtype, "nchw", "fastcnn", (stage,), 1, False, 0)
    with (
        WORK[stage.stem](cells.Cell(*row), torch.device("cpu")) as run,
        fastcnn.use_backend("triton", algorithm="packed"),
    ):
        ran = operators(run)
    assert list(ran) == ["fastcnn.normalize_conv_relu_pool.triton"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_optimizers_do_the_same_step(dtype, monkeypatch):
    monkeypatch.setitem(sgd.SETTINGS, "lr", 0.1)
    (stage,) = distinct({"alexnet": 1}, "sgd")
    outcomes = {}
    for method in ("eager", "fused", "fastcnn"):
        torch.manual_seed(0)
        network = tiny()
        monkeypatch.setitem(ENTRIES, "tiny", ENTRIES["tiny"]._replace(build=lambda it=network: it))
        row = ("sgd", stage.case, "step", dtype, "contiguous", method, (stage._replace(model="tiny"),), 1, False, 0)
        with sgd.sgd_work(cells.Cell(*row), torch.device("cpu")) as step:
            step()
            step()
        outcomes[method] = list(network.parameters())
    torch.manual_seed(0)
    before = tiny().to(getattr(torch, dtype)).parameters()
    assert not any(torch.equal(mine, first) for mine, first in zip(outcomes["eager"], before, strict=True))
    for method in ("fused", "fastcnn"):
        torch.testing.assert_close(outcomes[method], outcomes["eager"])


def test_bytes_dropout_and_optimizers_have_floors():
    batches = {"alexnet": 128}
    images = 128 * 3 * 224 * 224
    (normalize,), (sgd,) = distinct(batches, "normalize"), distinct(batches, "sgd")
    assert (normalize.case, sgd.input) == ("alexnet images 128x3x224x224, bytes", (61100840,))
    assert roofline.least_bytes([normalize], 2, training=False) == 3 * images
    assert [roofline.least_bytes([sgd], item, training=False) for item in (4, 2)] == [20 * 61100840, 22 * 61100840]
    (joined,), conv = distinct(batches, "normalize_conv_relu_pool"), distinct(batches, "conv_relu_pool")[0]
    both = [roofline.least_bytes([each], 2, training=False) for each in (conv, joined)]
    assert both[0] - both[1] == images
    (dropout,), (linear, _) = distinct(batches, "linear_relu_dropout"), distinct(batches, "linear_relu")
    assert dropout.case.startswith("alexnet classifier.1 128x9216")
    both = [roofline.least_bytes([each], 2, training=True) for each in (linear, dropout)]
    assert both[0] == both[1]


def test_kernels_of_triton_alone_are_timed_on_gpus(every_backend):
    found = {stem: {cell.method for cell in cells.op_cells(stem, "cuda")} for stem in cells.ON_GPUS}
    assert all(found[stem] >= {"eager", "copy", "fastcnn"} for stem in found)
    assert {"fastcnn triton-packed", "fastcnn triton-space_to_depth"} <= found["normalize_conv_relu_pool"]
    assert "fastcnn triton" in found["linear_relu_dropout"]
    assert found["sgd"] == {"eager", "copy", "fused", "fastcnn", "fastcnn triton"}
    assert found["normalize"] == {"eager", "copy", "compile", "fastcnn", "fastcnn triton"}
    assert not any(list(cells.op_cells(stem, "cpu")) for stem in cells.ON_GPUS)


def test_equal_work_is_measured_once():
    both = distinct({"vgg16": 64, "vgg19": 64}, "conv_relu")
    assert [stage.key for stage in both] == [stage.key for stage in distinct({"vgg16": 64}, "conv_relu")]
    assert {stage.model for stage in both} == {"vgg16"}


@pytest.fixture
def every_backend():
    available = {name: mock.Mock(available=True) for name in fastcnn.backends()}
    with mock.patch.object(fastcnn, "backends", return_value=available):
        yield


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_every_row_is_measured_once_and_every_headline_exists(device, every_backend):
    ops = [cell for stem in WORK for cell in cells.op_cells(stem, device)]
    models = [cell for group in cells.GROUPS for cell in cells.model_cells(group, device)]
    names = [str(cell) for cell in (*ops, *models)]
    assert len(names) == len(set(names))
    profile = cells.PROFILES[device]
    assert len({(cell.subject, cell.batch) for cell in models if cell.headline}) == len(profile.model_headlines)
    assert len({(cell.subject, cell.case) for cell in ops if cell.headline}) == len(profile.op_headlines)


def test_headline_cells_of_a_gpu_have_every_baseline(every_backend):
    for cell in cells.model_cells("vgg", "cuda"):
        if cell.headline:
            methods = {each.method for each in cells.model_cells("vgg", "cuda") if each[:5] == cell[:5]}
            assert methods >= {"eager", "eager channels_last autocast", "compile max-autotune", "cuda graph"}
            assert methods >= {"fastcnn", "fastcnn cuda graph", "fastcnn triton-epilogue", "fastcnn cuda-implicit_gemm"}
            assert ("cudnn fused" in methods) == (cell.mode == "inference")
            assert ("fastcnn shadow weights" in methods) <= (cell.mode == "training")
            assert not any(name.endswith(cells.OF_SOME_LAYERS) for name in methods)


def test_the_model_of_cudnn_has_each_convolution_with_its_relu():
    model = networks._with_cudnn(fastcnn.AlexNet())
    assert [type(layer).__name__ for layer in model.features[:3]] == ["_CudnnConvReLU", "Identity", "MaxPool2d"]
    assert not any(type(layer) in (nn.Conv2d, nn.ReLU) for layer in model.features)


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension")
def test_methods_that_share_a_model_run_what_their_names_say():
    rows = {cell.method: cell for cell in cells.model_cells("small", "cpu") if str(cell).startswith("mnist_cnn")}
    ran = {}
    for method in ("eager", "fastcnn", "eager channels_last", "fastcnn cpu"):
        cell = rows[method]._replace(batch=2)
        with networks.model_work(cell, torch.device("cpu")) as step:
            ran[method] = [name for name in operators(step) if name.startswith("fastcnn.")]
    assert not ran["eager"]
    assert not ran["eager channels_last"]
    assert any("conv_relu_pool" in name for name in ran["fastcnn"])
    assert any("conv_relu_pool" in name for name in ran["fastcnn cpu"])
