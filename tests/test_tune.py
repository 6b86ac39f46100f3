"""Tuning: which candidates are timed and win, the tables, and that `auto` runs what they say."""

import io
import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from rich.console import Console
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import tune as tuner
from fastcnn import tuning
from fastcnn.cli import main
from fastcnn.tune import candidates, parity, report, run, timing
from fastcnn.tuning import Winner, call, device, table

CPU = torch.device("cpu")
NAME = device.device_name(CPU)
STOCK = candidates.STOCK
KERNEL = Winner("cpu", "epilogue")

pytestmark = pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test a cache folder of its own, and tables read anew."""
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "shipped_path", lambda name: tmp_path / "shipped.json")
    tuning.forget()
    with fastcnn.use_backend("auto"):
        yield tmp_path
    tuning.forget()


def operators(function):
    """Return the names of fastcnn's operators that a function runs, with their arguments."""

    class Recorder(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func).startswith("fastcnn."):
                self.calls[str(func)] = args
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        function()
    return recorder.calls


def conv_arguments(**changes):
    """Return the arguments of a small convolution, by name, with some in place of others."""
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(*size, generator=generator) for size in ((2, 3, 8, 8), (4, 3, 3, 3), (4,)))
    return {"input": x, "weight": w, "bias": b, "stride": 1, "padding": 1, "dilation": 1, "groups": 1} | changes


def key_of(op, arguments):
    return call.describe(call.call_of(op, tuple(arguments), call.setting_of(op, "cpu")))


def entry(key, winner):
    return {"key": key, "backend": winner.backend, "algorithm": winner.algorithm}


def store(*entries):
    table.merge(table.user_path(NAME), NAME, list(entries))
    tuning.forget()


def store_conv(winner=KERNEL, **changes):
    store(entry(key_of("conv_relu", conv_arguments(**changes).values()), winner))


def conv_runs(**changes):
    arguments = conv_arguments(**changes)
    return list(operators(lambda: FF.conv2d_relu(**arguments)))


# What `auto` does with a table.


def test_an_entry_routes_the_call():
    assert conv_runs() == []  # without a table: stock
    store_conv()
    assert conv_runs() == ["fastcnn.conv_relu.cpu"]


def test_an_entry_of_stock_keeps_stock_where_the_heuristic_would_not():
    x = torch.randn(8, 32, 32, 32)
    assert operators(lambda: FF.max_pool2d(x, 2))
    store(entry(key_of("max_pool", (x, 2, None, 0, 1, False, False)), STOCK))
    assert not operators(lambda: FF.max_pool2d(x, 2))
    assert operators(lambda: FF.max_pool2d(x, 3))


CHANGES = {
    "batch": {"input": torch.randn(3, 3, 8, 8)},
    "size": {"input": torch.randn(2, 3, 9, 8)},
    "dtype": {name: tensor.bfloat16() for name, tensor in conv_arguments().items() if isinstance(tensor, torch.Tensor)},
    "layout": {"input": torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)},
    "weight's layout": {"weight": torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last)},
    "training": {"weight": torch.randn(4, 3, 3, 3).requires_grad_()},
    "bias": {"bias": None},
    "padding": {"padding": 0},
    "stride": {"stride": (1, 2)},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
def test_another_call_misses(changes):
    store_conv()
    assert conv_runs(**changes) == []
    store_conv(**changes)
    assert conv_runs(**changes) == ["fastcnn.conv_relu.cpu"]
    assert conv_runs() == ["fastcnn.conv_relu.cpu"]


def test_equal_calls_hit_however_they_are_written():
    store_conv()
    assert conv_runs(padding=(1, 1), stride=(1,)) == ["fastcnn.conv_relu.cpu"]


@pytest.mark.parametrize("version", ["torch", "kernels"])
def test_other_versions_miss(version):
    key = key_of("conv_relu", conv_arguments().values())
    store(entry(key | {"versions": key["versions"] | {version: "0"}}, KERNEL))
    assert conv_runs() == []


def test_another_number_of_threads_misses():
    store_conv()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert conv_runs() == []
    finally:
        torch.set_num_threads(before)


def test_the_dtype_after_autocast_counts():
    half = {name: CHANGES["dtype"][name] for name in ("input", "weight", "bias")}
    store_conv(**half)
    assert conv_runs() == []
    with torch.autocast("cpu", torch.bfloat16):
        assert conv_runs() == ["fastcnn.conv_relu.cpu"]


def test_an_explicit_backend_asks_no_table():
    store_conv()
    with fastcnn.use_backend("torch"):
        assert conv_runs() == []


def test_stages_of_a_sequential_ask_the_table():
    model = fastcnn.nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    store_conv(weight=model[0].weight, bias=model[0].bias)
    assert list(operators(lambda: model(x))) == ["fastcnn.conv_relu.cpu"]
    with torch.no_grad():
        assert not operators(lambda: model(x))


def compiled(function):
    """Compile a function; return it and the list of the operators of fastcnn in its forward graphs."""
    traced = []

    def note(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("fastcnn."))
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=note)), traced


def padded(input, weight, bias):
    return FF.conv2d_relu(input, weight, bias, padding=1)


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_calls_ask_the_table(grad):
    arguments = conv_arguments()
    input, weight, bias = arguments["input"], arguments["weight"].requires_grad_(grad), arguments["bias"]
    store_conv(weight=weight)
    function, traced = compiled(padded)
    function(input, weight, bias)
    assert traced == ["fastcnn.conv_relu.cpu"]
    function(torch.randn(5, 3, 8, 8), weight, bias)
    assert traced == ["fastcnn.conv_relu.cpu"]


def test_compiled_stages_ask_the_table_under_autocast():
    model = fastcnn.nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).requires_grad_(False)
    store_conv(**CHANGES["dtype"])
    function, traced = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        function(torch.randn(2, 3, 8, 8))
    assert traced == ["fastcnn.conv_relu.cpu"]


def test_compiled_sizes_that_vary_have_no_entry():
    store_conv()
    arguments = conv_arguments()
    torch._dynamo.maybe_mark_dynamic(arguments["input"], 0)
    function, traced = compiled(padded)
    function(*(arguments[name] for name in ("input", "weight", "bias")))
    assert traced == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_a_configuration_reaches_the_operator():
    algorithm = "implicit_gemm:64x16x32w4s3"
    store_conv(Winner("triton", algorithm))
    arguments = conv_arguments()
    (args,) = operators(lambda: FF.conv2d_relu(**arguments)).values()
    assert args[7] == algorithm
    torch.testing.assert_close(FF.conv2d_relu(**arguments), torch.relu(torch.conv2d(*list(arguments.values()))))


# Configurations by name.


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_a_configuration_can_be_forced():
    with fastcnn.use_backend("triton", algorithm="implicit_gemm:64x32x32w4s3"):
        arguments = conv_arguments()
        ((name, args),) = operators(lambda: FF.conv2d_relu(**arguments)).items()
    assert (name, args[7]) == ("fastcnn.conv_relu.triton", "implicit_gemm:64x32x32w4s3")


@pytest.mark.parametrize(
    ("backend", "algorithm", "words"),
    [
        ("triton", "implicit_gemm:7x7", "one of 128x64x32w8s3, "),
        ("triton", "epilogue:128x64x32w8s3", "has no configurations"),
        ("cpu", "epilogue:", "has no configurations"),
        ("auto", "implicit_gemm:128x64x32w8s3", "has no configurations"),
        ("triton", "winograd:1", "expected one of epilogue"),
    ],
)
def test_an_unknown_configuration_is_a_value_error(backend, algorithm, words):
    if not fastcnn.backends()[backend].available:
        pytest.skip("not available here")
    with pytest.raises(ValueError, match=f"algorithm: .*{words}") as caught:
        fastcnn.use_backend(backend, algorithm=algorithm)
    assert repr(algorithm) in str(caught.value)


def test_an_entry_of_an_unknown_algorithm_is_left_out(caplog):
    store_conv(Winner("cpu", "winograd"))
    assert conv_runs() == []
    assert conv_runs() == []
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "winograd" in caplog.text


# Tables as files.

SPOILED = {
    "corrupt": '{"format": 1, "dev',
    "foreign": json.dumps({"format": 1, "device": "another", "entries": []}),
    "newer": json.dumps({"format": 2, "device": NAME, "entries": []}),
    "a list": "[]",
    "entry without key": json.dumps({"format": 1, "device": NAME, "entries": [{"backend": "cpu", "algorithm": None}]}),
}


@pytest.mark.parametrize("content", SPOILED.values(), ids=SPOILED)
def test_a_spoiled_table_is_reported_once_ignored_and_moved_aside(content, caplog):
    path = table.user_path(NAME)
    path.parent.mkdir()
    path.write_text(content)
    assert conv_runs() == []
    assert conv_runs() == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path) in record.getMessage()
    store_conv()
    assert conv_runs() == ["fastcnn.conv_relu.cpu"]
    (aside,) = path.parent.glob("*.unreadable")
    assert aside.read_text() == content


def test_merging_keeps_what_was_not_retimed_and_sorts():
    store_conv()
    store_conv(STOCK, padding=0)
    store_conv(STOCK)
    lines = table.user_path(NAME).read_text().splitlines()
    entries = json.loads("\n".join(lines))["entries"]
    assert [(each["key"]["padding"], each["backend"]) for each in entries] == [([0, 0], "torch"), ([1, 1], "torch")]
    assert len(lines) == len(entries) + 2


def test_the_users_entry_comes_before_the_shipped():
    shipped = entry(key_of("conv_relu", conv_arguments().values()), KERNEL)
    table.merge(table.shipped_path(NAME), NAME, [shipped])
    tuning.forget()
    assert conv_runs() == ["fastcnn.conv_relu.cpu"]
    store_conv(STOCK)
    assert conv_runs() == []


def write_some(path, first):
    for number in range(first, first + 10):
        table.merge(
            Path(path), "a device", [{"key": {"op": "lrn", "input": [number]}, "backend": "b", "algorithm": None}]
        )


def test_two_processes_may_write_at_once(cache):
    path = cache / "table.json"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_some, args=(str(path), first)) for first in (0, 10)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert len(table.read(path, "a device")) == 20
    assert sorted(file.name for file in cache.iterdir()) == ["table.json", "table.json.lock"]


def test_the_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE", "/a")
    assert table.user_path("NVIDIA H200") == Path("/a/tuning/nvidia-h200.json")
    monkeypatch.delenv("FASTCNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert table.user_path("x") == Path("/b/fastcnn/tuning/x.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table.user_path("x") == Path.home() / ".cache/fastcnn/tuning/x.json"


# Tuning.


def small_model():
    return fastcnn.nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(3), nn.MaxPool2d(2), nn.MaxPool2d(2)
    )


def laid_out(channels_last):
    format = torch.channels_last if channels_last else torch.contiguous_format
    return small_model().to(memory_format=format), torch.randn(6, 2, 12, 12).to(memory_format=format)


def small_stages(channels_last=False):
    return tuner.stages_of(*laid_out(channels_last))


def stub_timer(monkeypatch, seconds, again=None):
    """Let each candidate take the seconds of its backend, and stock, timed again, those of `again`."""

    def take_turns(offered, run, device):
        *first, last = [seconds[each.backend] for each in offered]
        return [*first, again or last]

    monkeypatch.setattr(timing, "take_turns", take_turns)


def winners(**options):
    return [str(result.winner.candidate) for result in tuner.tune(small_stages(), CPU, **options)]


def test_stages_are_those_of_the_model():
    stages = small_stages()
    assert [stage.op for stage in stages] == ["conv_relu", "lrn_pool", "max_pool"]
    assert [str(stage) for stage in stages] == ["6x2x12x12 * 4x2x3x3", "6x4x12x12", "6x4x6x6"]


@pytest.mark.parametrize("channels_last", [False, True])
def test_stages_have_the_keys_of_the_real_calls(channels_last, monkeypatch):
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    list(tuner.tune(small_stages(channels_last), CPU))
    model, x = laid_out(channels_last)
    ran = {"fastcnn.conv_relu.cpu", "fastcnn.lrn_pool_codes.cpu", "fastcnn.max_pool_codes.cpu"}
    assert set(operators(lambda: model(x))) == ran


def test_the_fastest_wins_and_is_stored(monkeypatch):
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    results = list(tuner.tune(small_stages(), CPU))
    assert [(result.stage.op, result.mode) for result in results] == [
        (op, mode) for op in ("conv_relu", "lrn_pool", "max_pool") for mode in ("inference", "training")
    ]
    assert {str(result.winner.candidate) for result in results} == {"cpu epilogue", "cpu"}
    assert all(result.speedup == 2 for result in results)
    entries = table.read(table.user_path(NAME), NAME).values()
    assert len(entries) == 6
    x = torch.randn(6, 4, 12, 12)
    assert list(operators(lambda: FF.local_response_norm_max_pool2d(x, 3, pool_size=2))) == ["fastcnn.lrn_pool.cpu"]


@pytest.mark.parametrize(
    ("seconds", "again"),
    [({"torch": 1.0, "cpu": 2.0}, None), ({"torch": 1.0, "cpu": 0.99}, None), ({"torch": 2.0, "cpu": 1.5}, 1.6)],
    ids=["slower", "within the margin", "within the noise"],
)
def test_stock_wins_unless_it_is_clearly_beaten(monkeypatch, seconds, again):
    stub_timer(monkeypatch, seconds, again)
    assert set(winners()) == {"torch"}


def test_modes_and_output(monkeypatch, tmp_path):
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    assert len(winners(modes=["training"], path=tmp_path / "mine.json")) == 3
    assert {each["key"]["mode"] for each in table.read(tmp_path / "mine.json", NAME).values()} == {"training"}
    assert not table.user_path(NAME).exists()


def breaking(name, spoil):
    """Return `Stage.call` with one thing wrong under the backend cpu."""
    call_stage = tuner.Stage.call

    def call(self, tensors):
        output = call_stage(self, tensors)
        return spoil(output) if run_by_kernel() else output

    def run_by_kernel():
        return bool(operators(lambda: FF.max_pool2d(torch.zeros(1, 1, 2, 2), 2)))

    return call


BREAKS = {
    "wrong value": lambda output: output * 1.001,
    "wrong gradient": lambda output: output.detach() * 2 - output if output.requires_grad else output,
    "unwritten": lambda output: torch.where(
        torch.arange(output[0].numel()).view(output[0].shape) == 5, torch.nan, output
    ),
    "last image": lambda output: torch.cat([output[:-1], output[-1:] * 1.5]),
    "layout": lambda output: output.to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("spoil", BREAKS.values(), ids=BREAKS)
def test_a_broken_candidate_is_refused_and_never_stored(monkeypatch, spoil):
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    monkeypatch.setattr(tuner.Stage, "call", breaking("cpu", spoil))
    for result in tuner.tune(small_stages(), CPU):
        assert result.winner.candidate == STOCK
        (trial,) = result.trials[1:]
        assert trial.refused
        assert trial.seconds is None
    assert {each["backend"] for each in table.read(table.user_path(NAME), NAME).values()} == {"torch"}


def test_a_candidate_that_does_not_serve_is_left_out(monkeypatch):
    def refuse(self, candidate):
        raise RuntimeError("takes no such window")

    monkeypatch.setattr(parity.Reference, "compare", refuse)
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    results = list(tuner.tune(small_stages(), CPU))
    assert {result.trials[1].problem for result in results} == {"takes no such window"}
    assert {result.winner.candidate for result in results} == {STOCK}


def test_a_stage_that_stock_cannot_run_is_reported_and_left_out(monkeypatch, caplog):
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    integers = tuner.Stage(
        "max_pool",
        "max_pool2d",
        {"input": call.Operand((2, 2, 4, 4), (32, 16, 4, 1), torch.bool, False)},
        {"kernel_size": 2},
    )
    assert [result.stage.op for result in tuner.tune([integers, small_stages()[2]], CPU)] == ["max_pool"] * 2
    assert "max_pool 2x2x4x4 is left out: stock torch cannot run it" in caplog.text


def test_every_configuration_is_a_candidate(monkeypatch):
    monkeypatch.setitem(candidates.ON, "cpu", ("triton",))
    offered = [str(each) for each in candidates.candidates("conv_relu", CPU)]
    assert offered[:3] == ["torch", "triton epilogue", "triton implicit_gemm:128x64x32w8s3"]
    assert len(set(offered)) == len(offered) == 6
    assert [str(each) for each in candidates.candidates("lrn", CPU)] == ["torch", "triton"]


def test_real_times_give_a_table_that_auto_reads(monkeypatch, capsys):
    monkeypatch.setitem(timing.SECONDS, "cpu", 1e-4)
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["tune", "mnist_cnn", "--batch-size", "4", "--inference", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 80
    assert "conv_relu_pool 4x1x28x28 * 32x1x3x3" in " ".join(printed.split())
    for words in ("cpu epilogue", "torch", "parity", f"wrote {table.user_path(NAME)}"):
        assert words in printed
    assert "FAILED" not in printed
    stored = table.read(table.user_path(NAME), NAME)
    assert [(each["key"]["op"], each["key"]["mode"]) for each in stored.values()] == [
        (op, "inference") for op in ("conv_relu_pool", "conv_relu_pool", "linear_relu")
    ]
    assert all(0 < each["seconds"] <= each["stock_seconds"] for each in stored.values())
    first = next(each for each in stored.values() if each["key"]["input"] == [4, 1, 28, 28])
    ran = operators(lambda: fastcnn.MnistCNN().eval().requires_grad_(False).layer1(torch.randn(4, 1, 28, 28)))
    assert bool(ran) == (first["backend"] == "cpu")


MISTAKES = {
    "no batch size": ("tune mnist_cnn", 2, "--batch-size"),
    "unknown model": ("tune vgg61 --batch-size 2", 1, "no model is named 'vgg61'"),
    "unknown backend": ("tune mnist_cnn --batch-size 2 --backend cudnn", 1, "expected one of triton, cuda, cpu"),
    "device": ("tune mnist_cnn --batch-size 2 --device tpu", 1, "--device: expected cpu"),
    "too small": (
        "tune alexnet --batch-size 2 --input-size 3,7,7",
        1,
        "alexnet does not run in float32 on an input of 2x3x7x7",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, capsys):
    command, code, words = MISTAKES[name]
    assert main(command.split()) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_table_says_what_failed():
    stage = small_stages()[0]
    long = Winner("triton", "implicit_gemm:128x64x32w8s3")
    trials = [run.Trial(STOCK, 2e-3, 0.0), run.Trial(KERNEL, None, 9.0, refused="output: error 9, allowed 1")]
    trials.append(run.Trial(long, 0.12345, 0.42))
    results = [run.Result(stage, mode, trials, 0.01, trials[0], {}) for mode in run.MODES]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(report.table(results))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "FAILED" in text
    assert "0.42" in text
    assert "error 9" in " ".join(text.split())
    assert "PARITY FAILED for 1" in " ".join(report.summary(results))
