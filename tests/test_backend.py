"""Which backend a call gets: environment variables, refusals and fallbacks."""

import importlib
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
import fastcnn.functional as FF
from fastcnn import front

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEMS = ("conv_relu", "conv_relu_pool", "max_pool", "lrn", "lrn_pool", "linear_relu")


@pytest.fixture(autouse=True)
def _leave_the_backend_as_it_was():
    with fastcnn.use_backend("auto"):
        yield


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)


class Recorder(TorchDispatchMode):
    """Records the operators that run, with their arguments."""

    takes_any_operator = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append((str(func), args))
        return func(*args, **(kwargs or {}))


def recorded(call):
    with Recorder() as recorder:
        call()
    return recorder.calls


def runs_kernels():
    """Whether a max-pool that Triton's kernels can serve runs on them now."""
    calls = recorded(lambda: FF.max_pool2d(randn(1, 2, 5, 5), 2))
    return any(name == "fastcnn.max_pool.triton" for name, _ in calls)


def algorithm():
    """Return the algorithm that a convolution stage is given now, under the backend triton."""
    calls = recorded(lambda: FF.conv2d_relu(randn(1, 2, 5, 5), randn(2, 2, 3, 3)))
    (args,) = [args for name, args in calls if name == "fastcnn.conv_relu.triton"]
    return args[-1]


# The environment variables are read once, at import: each case is a process of its own.
CPU_ONLY = {"CUDA_VISIBLE_DEVICES": ""}
INTERPRETED = {**CPU_ONLY, "TRITON_INTERPRET": "1"}
CALL = "FF.max_pool2d(torch.ones(1, 1, 4, 4, dtype=torch.float64), 2)"


def python(code, **variables):
    """Run statements after the imports in a new process and return what they print."""
    unset = ("FASTCNN_BACKEND", "FASTCNN_ALGORITHM", "TRITON_INTERPRET")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment["PYTHONPATH"] = str(Path(fastcnn.__file__).parents[1])
    code = f"import torch, fastcnn, fastcnn.functional as FF\n{code}"
    process = subprocess.run([sys.executable, "-c", code], env=environment | variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def caught(call):
    body = f"try:\n    {call}\nexcept Exception as error:\n    print(type(error).__name__, error)\n"
    return body + "else:\n    print('ran')\n"


def test_environment_sets_the_backend_for_a_process():
    printed = python(caught(CALL), FASTCNN_BACKEND="triton", **INTERPRETED)
    assert printed.startswith("RuntimeError max_pool2d: backend 'triton'")


def test_environment_sets_the_algorithm_for_a_process():
    code = (
        "with torch.profiler.profile(record_shapes=True) as profile:\n"
        "    FF.conv2d_relu(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3))\n"
        "print(sorted(e.key for e in profile.key_averages() if 'conv' in e.key))"
    )
    printed = python(code, FASTCNN_BACKEND="triton", FASTCNN_ALGORITHM="implicit_gemm", **INTERPRETED)
    assert "'fastcnn::conv_relu'" in printed
    assert "convolution'" not in printed  # the front tells of an aten::conv2d around the kernel; none of torch's runs


BAD_ENVIRONMENTS = pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"FASTCNN_BACKEND": "cudnn"}, ("FASTCNN_BACKEND", "cudnn", "expected one of")),
        ({"FASTCNN_BACKEND": "triton", **CPU_ONLY}, ("FASTCNN_BACKEND", "triton", "no CUDA device")),
        ({"FASTCNN_ALGORITHM": "winograd"}, ("FASTCNN_ALGORITHM", "winograd", "expected one of")),
        ({"FASTCNN_ALGORITHM": "tma"}, ("'tma'", "one of 'triton' (use_backend, FASTCNN_BACKEND)", "'auto'")),
    ],
    ids=["unknown", "unavailable", "algorithm", "no backend"],
)


@BAD_ENVIRONMENTS
def test_bad_environment_leaves_importing_alone_and_the_call_explains(variables, words):
    scope = f'with fastcnn.use_backend("torch"):\n    {CALL}\n'
    explained, after_a_choice = python(caught(CALL) + scope + caught(CALL), **variables).splitlines()
    assert explained.startswith("RuntimeError")
    assert all(word in explained for word in words)
    assert after_a_choice == explained  # the choice is over, the mistake is not


def conv(input, weight):
    return F.relu(F.conv2d(input, weight))


def conv_pool(input, weight, *, pool_size):
    return F.max_pool2d(F.relu(F.conv2d(input, weight)), pool_size)


def lrn_pool(input, *norm, pool_size):
    return F.max_pool2d(F.local_response_norm(input, *norm), pool_size)


def linear(input, weight):
    return F.relu(F.linear(input, weight))


STOCK = {
    "conv2d_relu": conv,
    "conv2d_relu_max_pool2d": conv_pool,
    "max_pool2d": F.max_pool2d,
    "local_response_norm": F.local_response_norm,
    "local_response_norm_max_pool2d": lrn_pool,
    "linear_relu": linear,
}


def typed_call(function, dtype):
    """Return the arguments of a small call in a dtype."""
    image = (randn(2, 4, 6, 7) * 4).to(dtype)
    weight = (randn(3, 4, 3, 3) * 4).to(dtype)
    return {
        "conv2d_relu": ((image, weight), {}),
        "conv2d_relu_max_pool2d": ((image, weight), {"pool_size": 2}),
        "max_pool2d": ((image, 2), {}),
        "local_response_norm": ((image, 3), {}),
        "local_response_norm_max_pool2d": ((image, 3), {"pool_size": 2}),
        "linear_relu": ((image[0, 0], weight[0, 0, :1].expand(5, 3).repeat(1, 3)[:, :7]), {}),
    }[function]


def refused_calls():
    """Yield id, function, arguments, and words of the refusal."""
    for dtype in (torch.float64, torch.complex64, torch.int64):
        for function in STOCK:
            yield f"{function} {dtype}", function, *typed_call(function, dtype), ("'input'", str(dtype))
    big = randn(1, 2, 18, 18)
    places = ("254 places", "(16, 16)")
    yield "large window", "max_pool2d", (big, 16), {}, ("'kernel_size'", *places)
    yield "large fused window", "local_response_norm_max_pool2d", (big, 3), {"pool_size": 16}, ("'pool_size'", *places)
    weight = randn(3, 2, 3, 3)
    yield (
        "large window after conv",
        "conv2d_relu_max_pool2d",
        (big, weight),
        {"pool_size": 16},
        ("'pool_size'", *places),
    )
    wide = randn(1, 20, 3, 3)
    yield "negative alpha", "local_response_norm", (wide, 5, -0.1), {}, ("'alpha'", "-0.1")
    yield "negative k", "local_response_norm", (wide, 5, 1e-4, 1.0, -1.0), {}, ("'k'", "-1.0")
    yield "tensor alpha", "local_response_norm", (wide, 5, torch.tensor(0.1)), {}, ("'alpha'", "number")
    meta = torch.empty(1, 2, 5, 5, device="meta")
    yield "other device", "max_pool2d", (meta, 2), {}, ("'input'", DEVICE, "meta")


REFUSED = list(refused_calls())
refused = pytest.mark.parametrize(
    ("function", "args", "kwargs", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)


@pytest.fixture
def lent_kernels(monkeypatch):
    """Lend `auto` kernels for everything: the table of measured ones may be empty for this device."""
    entry = importlib.import_module("fastcnn.route").Fastest("triton", (torch.float32, torch.float16, torch.bfloat16))
    monkeypatch.setattr("fastcnn.route.FASTEST", {(DEVICE, stem): entry for stem in STEMS})
    monkeypatch.setattr("fastcnn.route._said", set())


def outcome(function, args, kwargs):
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return type(error)


@refused
def test_explicit_backend_refuses_by_name(function, args, kwargs, words):
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        getattr(FF, function)(*args, **kwargs)
    message = str(caught.value)
    assert message.startswith(f"{function}: backend 'triton' ")
    assert all(word in message for word in words), message


@refused
def test_auto_does_what_stock_does(lent_kernels, function, args, kwargs, words):
    expected = outcome(STOCK[function], args, kwargs)
    actual = outcome(getattr(FF, function), args, kwargs)
    if isinstance(expected, type):  # stock has no such operation either
        assert isinstance(actual, type)
        assert issubclass(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", list(STOCK))
def test_auto_takes_the_kernels_it_is_given(lent_kernels, function):
    args, kwargs = typed_call(function, torch.float32)
    calls = recorded(lambda: getattr(FF, function)(*args, **kwargs))
    assert any(name.startswith("fastcnn.") for name, _ in calls)


def test_auto_says_each_reason_once(lent_kernels, caplog):
    caplog.set_level(logging.INFO, logger="fastcnn")
    double, wide = randn(1, 2, 5, 5).double(), randn(1, 2, 18, 18)
    for _ in range(3):
        FF.max_pool2d(double, 2)
        FF.max_pool2d(wide, 16)
        FF.local_response_norm(double, 3)
        FF.max_pool2d(wide, 2)
    messages = [record.getMessage() for record in caplog.records if record.name == "fastcnn"]
    assert len(messages) == 3
    assert "max_pool2d" in messages[0]
    assert "float64" in messages[0]
    assert "254 places" in messages[1]
    assert messages[2].startswith("local_response_norm")


def test_chosen_torch_says_nothing(monkeypatch, caplog):
    monkeypatch.setattr("fastcnn.route._said", set())
    caplog.set_level(logging.INFO, logger="fastcnn")
    with fastcnn.use_backend("torch"):
        FF.max_pool2d(randn(1, 2, 5, 5).double(), 2)
    assert not caplog.records


@pytest.mark.parametrize("function", list(STOCK))
def test_explicit_backend_refuses_forward_mode(function):
    (input, *args), kwargs = typed_call(function, torch.float32)
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError, match=rf"^{function}: backend 'triton' .*forward"):
        torch.func.jvp(lambda x: getattr(FF, function)(x, *args, **kwargs), (input,), (input,))


@pytest.mark.parametrize("function", list(STOCK))
def test_auto_runs_forward_mode_as_stock(lent_kernels, function):
    (input, *args), kwargs = typed_call(function, torch.float32)
    tangent = torch.ones_like(input)
    actual = torch.func.jvp(lambda x: getattr(FF, function)(x, *args, **kwargs), (input,), (tangent,))
    expected = torch.func.jvp(lambda x: STOCK[function](x, *args, **kwargs), (input,), (tangent,))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def extension_reason(code):
    """Return why a process that runs `code` first has no compiled kernels."""
    code = f"import sys\n{code}\nimport fastcnn\nprint(fastcnn.backends()['cpu'].reason)"
    environment = os.environ | {"PYTHONPATH": str(Path(fastcnn.__file__).parents[1])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    ).stdout


def test_extension_that_was_not_built_is_a_reason():
    reason = extension_reason("sys.modules['fastcnn._C'] = None")
    assert "fastcnn._C" in reason
    assert "pip install" in reason


def test_extension_that_does_not_load_is_a_reason(tmp_path):
    (tmp_path / "broken.py").write_text("raise ImportError('undefined symbol: torch_parallel_for')")
    find = "importlib.util.spec_from_file_location('fastcnn._C', PATH)".replace(
        "PATH", repr(str(tmp_path / "broken.py"))
    )
    finder = f"type('F', (), {{'find_spec': staticmethod(lambda name, *_: {find} if name == 'fastcnn._C' else None)}})"
    reason = extension_reason(f"import importlib.util\nsys.meta_path.insert(0, {finder})")
    assert "undefined symbol" in reason
    assert "pip install" in reason


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="the extension is not built")
def test_cpu_backend_has_one_algorithm():
    with pytest.raises(ValueError, match="implicit_gemm"):
        fastcnn.use_backend("cpu", algorithm="implicit_gemm")


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available or DEVICE != "cpu", reason="needs the extension and a CPU")
@pytest.mark.parametrize("function", list(STOCK))
def test_cpu_backend_runs_its_own_operators(function):
    args, kwargs = typed_call(function, torch.float32)
    with fastcnn.use_backend("cpu"):
        calls = recorded(lambda: getattr(FF, function)(*args, **kwargs))
    assert any(name.startswith("fastcnn.") and name.endswith(".cpu") for name, _ in calls)


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension")
def test_auto_takes_the_cpu_kernels_only_where_they_were_faster():
    def kernels(input, **settings):
        calls = recorded(lambda: FF.max_pool2d(input, 2, **settings))
        return [name for name, _ in calls if name.startswith("fastcnn.")]

    large = torch.randn(8, 32, 32, 32)
    small, turned = large[:1, :8], large.to(memory_format=torch.channels_last)
    assert kernels(large)
    assert kernels(turned)
    assert bool(kernels(small)) is not bool(front.problem)  # a call through Python costs more than it saves
    assert not kernels(small.clone().requires_grad_())
    assert not kernels(turned[:2].clone().requires_grad_())
    assert kernels(large[:2].clone().requires_grad_())
    assert kernels(large.bfloat16())
    assert not kernels(large.half())
    assert not kernels(large, return_indices=True)


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension")
def test_auto_counts_the_dtype_that_autocast_gives():
    def kernels():
        call = lambda: FF.conv2d_relu_max_pool2d(torch.randn(8, 8, 32, 32), torch.randn(8, 8, 3, 3), pool_size=2)  # noqa: E731
        return [name for name, _ in recorded(call) if name.startswith("fastcnn.")]

    assert kernels()
    with torch.autocast("cpu", torch.bfloat16):
        assert kernels()
    with torch.autocast("cpu", torch.float16):
        assert not kernels()


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_the_extension_was_built_where_it_can_be():
    assert fastcnn.backends()["cpu"].reason == ""


@pytest.mark.skipif(DEVICE != "cpu" or not torch.backends.mkldnn.is_available(), reason="MKL-DNN is of the CPU")
def test_a_tensor_that_is_not_strided_runs_the_stock_layers(caplog, monkeypatch):
    monkeypatch.setattr("fastcnn.route._said", set())
    x = randn(8, 64, 40, 40)  # so large that auto takes a kernel
    with caplog.at_level(logging.INFO, logger="fastcnn"):
        actual = FF.max_pool2d(x.to_mkldnn(), 2)
    torch.testing.assert_close(actual.to_dense(), F.max_pool2d(x, 2))
    assert "max_pool2d runs the stock layers: no kernel takes torch._mkldnn (cpu)" in caplog.text


@pytest.mark.skipif(DEVICE != "cpu" or not torch.backends.mkldnn.is_available(), reason="MKL-DNN is of the CPU")
def test_an_explicit_backend_names_the_layout_that_it_does_not_take():
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError, match=r"as a strided tensor, got torch\._mkldnn"):
        FF.max_pool2d(randn(1, 2, 4, 4).to_mkldnn(), 2)


def test_an_extension_of_another_python_is_said(tmp_path):
    """In a process of its own, from a copy of the package whose extension bears another Python's name."""
    package = tmp_path / "fastcnn"
    shutil.copytree(Path(fastcnn.__file__).parent, package, ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    (package / "_C.cpython-399-other.so").touch()
    code = """import sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in str(finder)]  # it knows the built extension
import fastcnn
print(fastcnn.__file__)
print(fastcnn.backends()["cpu"].reason)"""
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[0] == str(package / "__init__.py")
    assert said[1].startswith("the compiled extension was built for another Python (_C.cpython-399-other.so); build it")
