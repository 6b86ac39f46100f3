"""Tuning tables: what `auto` runs by them, and how they are read, merged and reported."""

import json
import logging
import multiprocessing
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from tables import NAME, cache, operators
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import fastcnn
import fastcnn.functional as FF
from fastcnn import tuning
from fastcnn.tuning import Winner, call, table

STOCK, KERNEL = Winner("torch", None), Winner("cpu", "epilogue")

__all__ = ["cache"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]


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
    "batch": {"input": torch.randn(5, 3, 8, 8)},
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
    assert args[-1] == algorithm
    torch.testing.assert_close(FF.conv2d_relu(**arguments), torch.relu(torch.conv2d(*list(arguments.values()))))


# Configurations by name.


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_a_configuration_can_be_forced():
    with fastcnn.use_backend("triton", algorithm="implicit_gemm:64x32x32w4s3"):
        arguments = conv_arguments()
        ((name, args),) = operators(lambda: FF.conv2d_relu(**arguments)).items()
    assert (name, args[-1]) == ("fastcnn.conv_relu.triton", "implicit_gemm:64x32x32w4s3")


@pytest.mark.parametrize(
    ("backend", "algorithm", "words"),
    [
        ("triton", "implicit_gemm:7x7", "one of 128x64x32w8s3, "),
        ("triton", "epilogue:128x64x32w8s3", "has no configurations"),
        ("cpu", "epilogue:", "has no configurations"),
        ("auto", "implicit_gemm:7x7", "one of 'triton', 'cuda'"),
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


@pytest.mark.parametrize("backend", ["nowhere", "auto", ""])
def test_an_entry_of_an_unknown_backend_is_left_out(backend, caplog):
    store_conv(Winner(backend, None))
    assert conv_runs() == []
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"has no backend {backend!r}" in record.getMessage()


def test_an_entry_of_a_backend_without_kernels_of_the_op_is_left_out(caplog):
    model = fastcnn.nn.Sequential(fastcnn.nn.Normalize(0.5, 0.25), nn.Conv2d(3, 4, 3), nn.ReLU()).requires_grad_(False)
    x = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    weight, settings = model[1].weight, ((1, 1), (0, 0), (1, 1), 1)
    arguments = (x, 0.5, 0.25, None, weight, model[1].bias, *settings)
    store(entry(key_of("normalize_conv_relu", arguments), Winner("cpu", "epilogue")))
    assert not operators(lambda: model(x))
    assert "has no backend 'cpu'" in caplog.text


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
