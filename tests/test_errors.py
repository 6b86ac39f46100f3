"""Mistakes: each raises what the stock layers raise for it, and the message names argument, expected and got."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastcnn
import fastcnn.functional as FF

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("torch", "triton")


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)


IMAGE, WEIGHT, BIAS = randn(2, 4, 8, 7), randn(6, 4, 3, 3), randn(6)
ROWS, MATRIX = randn(3, 5), randn(4, 5)


def conv_relu(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    return F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups))


def conv_relu_pool(*, pool_size, pool_stride=None, pool_padding=0, pool_ceil_mode=False, **conv):
    return F.max_pool2d(conv_relu(**conv), pool_size, pool_stride, pool_padding, ceil_mode=pool_ceil_mode)


def lrn_pool(*, pool_size, pool_stride=None, pool_padding=0, pool_ceil_mode=False, **lrn):
    norm = F.local_response_norm(**lrn)
    return F.max_pool2d(norm, pool_size, pool_stride, pool_padding, ceil_mode=pool_ceil_mode)


def linear_relu(input, weight, bias=None):
    return F.relu(F.linear(input, weight, bias))


STOCK = {
    "conv2d_relu": conv_relu,
    "conv2d_relu_max_pool2d": conv_relu_pool,
    "max_pool2d": F.max_pool2d,
    "local_response_norm": F.local_response_norm,
    "local_response_norm_max_pool2d": lrn_pool,
    "linear_relu": linear_relu,
}
RIGHT = {
    "conv2d_relu": {"input": IMAGE, "weight": WEIGHT, "bias": BIAS},
    "conv2d_relu_max_pool2d": {"input": IMAGE, "weight": WEIGHT, "bias": BIAS, "pool_size": 2},
    "max_pool2d": {"input": IMAGE, "kernel_size": 2},
    "local_response_norm": {"input": IMAGE, "size": 3},
    "local_response_norm_max_pool2d": {"input": IMAGE, "size": 3, "pool_size": 2},
    "linear_relu": {"input": ROWS, "weight": MATRIX, "bias": BIAS[:4]},
}
CONV = ("conv2d_relu", "conv2d_relu_max_pool2d")
LRN = ("local_response_norm", "local_response_norm_max_pool2d")
POOL = ("max_pool2d", "conv2d_relu_max_pool2d", "local_response_norm_max_pool2d")
LINEAR = ("linear_relu",)
PREFIXED = {
    "kernel_size": "pool_size",
    "stride": "pool_stride",
    "padding": "pool_padding",
    "ceil_mode": "pool_ceil_mode",
}

# What is changed of a right call, and the argument that the message must name.
CONV_MISTAKES = {
    "array for input": ({"input": IMAGE.cpu().numpy()}, "input"),
    "array for weight": ({"weight": WEIGHT.cpu().numpy()}, "weight"),
    "array for bias": ({"bias": BIAS.cpu().numpy()}, "bias"),
    "None for weight": ({"weight": None}, "weight"),
    "image without channels": ({"input": IMAGE[0, 0]}, "input"),
    "five axes": ({"input": IMAGE[None]}, "input"),
    "weight of three axes": ({"weight": WEIGHT[0]}, "weight"),
    "weight of five axes": ({"weight": WEIGHT[None]}, "weight"),
    "wrong channels": ({"input": IMAGE[:, :3]}, "input"),
    "wrong channels unbatched": ({"input": IMAGE[0, :3]}, "input"),
    "no output channels": ({"weight": WEIGHT[:0], "bias": None}, "weight"),
    "kernel without rows": ({"weight": WEIGHT[:, :, :0]}, "weight"),
    "kernel too large": ({"weight": randn(6, 4, 9, 3)}, "weight"),
    "dilated kernel too large": ({"dilation": 4}, "weight"),
    "image without rows": ({"input": IMAGE[:, :, :0]}, "weight"),
    "padded image without rows": ({"input": IMAGE[:, :, :0], "padding": 2}, "input"),
    "groups against channels": ({"groups": 2}, "input"),
    "groups against output channels": ({"weight": randn(6, 1, 3, 3), "groups": 4}, "weight"),
    "groups 0": ({"groups": 0}, "groups"),
    "negative groups": ({"groups": -1}, "groups"),
    "float groups": ({"groups": 1.0}, "groups"),
    "bool groups": ({"groups": True}, "groups"),
    "stride 0": ({"stride": 0}, "stride"),
    "negative stride": ({"stride": (1, -1)}, "stride"),
    "float stride": ({"stride": 1.5}, "stride"),
    "float in stride": ({"stride": (1.0, 1)}, "stride"),
    "bool stride": ({"stride": True}, "stride"),
    "None for stride": ({"stride": None}, "stride"),
    "text for stride": ({"stride": "2"}, "stride"),
    "three strides": ({"stride": (1, 1, 1)}, "stride"),
    "no strides": ({"stride": ()}, "stride"),
    "stride over an int64": ({"stride": 2**63}, "stride"),
    "one of two strides over an int64": ({"stride": (1, 2**63)}, "stride"),
    "padding over an int64": ({"padding": 2**63}, "padding"),
    "dilation over an int64": ({"dilation": (2**63, 1)}, "dilation"),
    "dilation under an int64": ({"dilation": -(2**63) - 1}, "dilation"),
    "groups over an int64": ({"groups": 2**63}, "groups"),
    "negative padding": ({"padding": -1}, "padding"),
    "three paddings": ({"padding": (1, 1, 1)}, "padding"),
    "None for padding": ({"padding": None}, "padding"),
    "unknown padding": ({"padding": "full"}, "padding"),
    "same with stride": ({"padding": "same", "stride": 2}, "stride"),
    "dilation 0": ({"dilation": 0}, "dilation"),
    "same with dilation 0": ({"padding": "same", "dilation": 0}, "dilation"),
    "negative dilation": ({"dilation": (-1, 1)}, "dilation"),
    "three dilations": ({"dilation": (1, 1, 1)}, "dilation"),
    "short bias": ({"bias": BIAS[:5]}, "bias"),
    "bias of one": ({"bias": BIAS[:1]}, "bias"),
    "bias of two axes": ({"bias": BIAS[:, None]}, "bias"),
    "double weight": ({"weight": WEIGHT.double()}, "weight"),
    "double bias": ({"bias": BIAS.double()}, "bias"),
    "half input": ({"input": IMAGE.half()}, "weight"),
}
POOL_MISTAKES = {
    "window 0": ({"kernel_size": 0}, "kernel_size"),
    "negative window": ({"kernel_size": (2, -1)}, "kernel_size"),
    "float window": ({"kernel_size": 1.5}, "kernel_size"),
    "bool window": ({"kernel_size": True}, "kernel_size"),
    "None for window": ({"kernel_size": None}, "kernel_size"),
    "three windows": ({"kernel_size": (2, 2, 2)}, "kernel_size"),
    "no windows": ({"kernel_size": ()}, "kernel_size"),
    "window too large": ({"kernel_size": 9}, "kernel_size"),
    "stride 0": ({"stride": 0}, "stride"),
    "negative stride": ({"stride": -1}, "stride"),
    "float stride": ({"stride": 2.0}, "stride"),
    "stride over an int": ({"stride": (2, 2**31), "ceil_mode": True}, "stride"),
    "stride near the largest number": ({"stride": 2**62, "ceil_mode": True}, "stride"),
    "window over an int64": ({"kernel_size": 2**63}, "kernel_size"),
    "one of two strides over an int64": ({"stride": (2**63, 1)}, "stride"),
    "padding over an int64": ({"padding": 2**63}, "padding"),
    "window over an int": ({"kernel_size": (2, 2**62)}, "kernel_size"),
    "three strides": ({"stride": (2, 2, 2)}, "stride"),
    "negative padding": ({"padding": -1}, "padding"),
    "padding over half": ({"padding": 2}, "padding"),
    "padding over half of an odd window": ({"kernel_size": 3, "padding": (1, 2)}, "padding"),
    "text for padding": ({"padding": "same"}, "padding"),
    "three paddings": ({"padding": (0, 0, 0)}, "padding"),
    "number for ceil_mode": ({"ceil_mode": 1}, "ceil_mode"),
    "None for ceil_mode": ({"ceil_mode": None}, "ceil_mode"),
}
LONE_POOL_MISTAKES = {
    "array for input": ({"input": IMAGE.cpu().numpy()}, "input"),
    "image without channels axis": ({"input": IMAGE[0, 0]}, "input"),
    "five axes": ({"input": IMAGE[None]}, "input"),
    "no channels": ({"input": IMAGE[:, :0]}, "input"),
    "no channels unbatched": ({"input": IMAGE[0, :0]}, "input"),
    "no rows": ({"input": IMAGE[:, :, :0]}, "input"),
    "dilation 0": ({"dilation": 0}, "dilation"),
    "negative dilation": ({"dilation": -1}, "dilation"),
    "dilation over an int": ({"dilation": 2**31}, "dilation"),
    "dilation over an int64": ({"dilation": 2**63}, "dilation"),
    "dilation of one place over an int": ({"kernel_size": 1, "dilation": 2**62}, "dilation"),
    "dilated window too large": ({"kernel_size": 3, "dilation": 4}, "kernel_size"),
    "padding over half of a dilated window": ({"kernel_size": 3, "dilation": 2, "padding": 2}, "padding"),
}
LRN_MISTAKES = {
    "two axes": ({"input": IMAGE[0, 0]}, "input"),
    "size 0": ({"size": 0}, "size"),
    "negative size": ({"size": -1}, "size"),
    "size over an int64": ({"size": 2**63}, "size"),
    "float size": ({"size": 3.0}, "size"),
    "bool size": ({"size": True}, "size"),
    "None for size": ({"size": None}, "size"),
    "two sizes": ({"size": (3, 3)}, "size"),
    "text for alpha": ({"alpha": "1e-4"}, "alpha"),
    "None for alpha": ({"alpha": None}, "alpha"),
    "None for beta": ({"beta": None}, "beta"),
    "text for k": ({"k": "1"}, "k"),
}
LRN_POOL_MISTAKES = {
    "five axes": ({"input": IMAGE[None]}, "input"),
    "no channels": ({"input": IMAGE[:, :0]}, "input"),
}
LINEAR_MISTAKES = {
    "array for input": ({"input": ROWS.cpu().numpy()}, "input"),
    "array for weight": ({"weight": MATRIX.cpu().numpy()}, "weight"),
    "array for bias": ({"bias": np.zeros(4)}, "bias"),
    "wrong features": ({"input": ROWS[:, :4]}, "input"),
    "input without axes": ({"input": ROWS[0, 0]}, "input"),
    "weight without axes": ({"weight": MATRIX[0, 0], "bias": None}, "weight"),
    "weight of three axes": ({"weight": MATRIX[None]}, "weight"),
    "weight of one axis with bias": ({"weight": MATRIX[0], "bias": BIAS[:1]}, "bias"),
    "long bias": ({"bias": BIAS[:5]}, "bias"),
    "bias of three axes": ({"bias": randn(2, 3, 4)}, "bias"),
    "double weight": ({"weight": MATRIX.double()}, "weight"),
    "double bias": ({"bias": BIAS[:4].double()}, "bias"),
}

# What could be taken for a mistake, and stock accepts.
ACCEPTED = {
    CONV: {
        "numpy stride": {"stride": np.int64(2)},
        "tensor stride": {"stride": torch.tensor(2)},
        "list of one stride": {"stride": [2]},
        "size for padding": {"padding": torch.Size((1, 0))},
        "padding beyond the image": {"padding": 12},
        "same with an even kernel": {"padding": "same", "weight": randn(6, 4, 2, 4)},
        "valid with stride": {"padding": "valid", "stride": 2},
        "kernel as large as the image": {"weight": randn(6, 4, 7, 6)},
        "no images": {"input": IMAGE[:0]},
        "no bias": {"bias": None},
        "unbatched": {"input": IMAGE[0]},
    },
    ("conv2d_relu",): {"no input channels": {"input": IMAGE[:, :0], "weight": WEIGHT[:, :0]}},
    POOL: {
        "empty stride": {"stride": ()},
        "empty list stride": {"stride": []},
        "numpy window": {"kernel_size": np.int64(3)},
        "tensor window": {"kernel_size": torch.tensor(3)},
        "list of one window": {"kernel_size": [3]},
        "stride over the window": {"stride": 5},
        "half padding": {"kernel_size": (3, 2), "padding": 1},
        "window larger than the image, padded": {"kernel_size": (6, 5), "padding": (3, 2), "ceil_mode": True},
        "no images": {"input": IMAGE[:0]},
    },
    ("max_pool2d",): {"number for return_indices": {"return_indices": 1}, "unbatched": {"input": IMAGE[0]}},
    LRN: {
        "numpy size": {"size": np.int64(3)},
        "tensor size": {"size": torch.tensor(3)},
        "size over the channels": {"size": 9},
        "int alpha": {"alpha": 1},
        "bool alpha": {"alpha": True},
        "numpy alpha": {"alpha": np.float32(0.5)},
        "no images": {"input": IMAGE[:0]},
        "negative beta": {"beta": -0.5},
    },
    ("local_response_norm",): {
        "no channels": {"input": IMAGE[:, :0]},
        "no rows": {"input": IMAGE[:, :, :0]},
        "three axes": {"input": IMAGE[0]},
        "five axes": {"input": IMAGE[None].transpose(1, 2)},
    },
    LINEAR: {
        "one row": {"input": ROWS[0]},
        "many axes": {"input": randn(2, 1, 3, 5)},
        "no rows": {"input": ROWS[:0]},
        "no features": {"input": ROWS[:, :0], "weight": MATRIX[:, :0]},
        "no outputs": {"weight": MATRIX[:0], "bias": None},
    },
}
# Stock takes these too; kernels need not.
ACCEPTED_BY_TORCH = {
    ("local_response_norm_max_pool2d",): {"three axes": {"input": IMAGE[0]}},
    LINEAR: {
        "bias of one": {"bias": BIAS[:1]},
        "bias without axes": {"bias": BIAS[0]},
        "bias row": {"bias": BIAS[None, :4]},
        "bias column": {"bias": BIAS[:3, None]},
        "bias a row": {"bias": randn(3, 4)},
        "weight of one axis": {"weight": MATRIX[0], "bias": None},
    },
}


def prefixed(function, change):
    """Name a pool's arguments as the fused functions do."""
    if function == "max_pool2d":
        return change
    return {PREFIXED.get(name, name): value for name, value in change.items()}


def mistakes():
    tables = (
        (CONV, CONV_MISTAKES),
        (("max_pool2d",), LONE_POOL_MISTAKES),
        (LRN, LRN_MISTAKES),
        (("local_response_norm_max_pool2d",), LRN_POOL_MISTAKES),
        (LINEAR, LINEAR_MISTAKES),
    )
    for functions, table in tables:
        for name, (change, argument) in table.items():
            for function in functions:
                yield pytest.param(function, change, argument, id=f"{function}: {name}")
    for name, (change, argument) in POOL_MISTAKES.items():
        for function in POOL:
            argument_name = next(iter(prefixed(function, {argument: None})))
            yield pytest.param(function, prefixed(function, change), argument_name, id=f"{function}: pool {name}")


def accepted(tables):
    for functions, table in tables.items():
        for name, change in table.items():
            for function in functions:
                changed = prefixed(function, change) if functions is POOL else change
                yield pytest.param(function, changed, id=f"{function}: {name}")


def outcome(function, arguments):
    try:
        return function(**arguments)
    except Exception as error:
        return error


def assert_names(error, function, argument):
    message = str(error)
    assert message.startswith(f"{function}: "), message
    assert f"argument {argument!r}" in message, message
    assert "expected" in message, message
    assert "got" in message, message


@pytest.mark.parametrize(("function", "change", "argument"), list(mistakes()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_mistake_raises_what_stock_raises_and_says_more(backend, function, change, argument):
    arguments = {**RIGHT[function], **change}
    expected = outcome(STOCK[function], arguments)
    assert isinstance(expected, Exception), "stock accepts this: it belongs to the accepted ones"
    with fastcnn.use_backend(backend), pytest.raises(type(expected)) as caught:
        getattr(FF, function)(**arguments)
    assert_names(caught.value, function, argument)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # stock's own
@pytest.mark.parametrize(("function", "change"), list(accepted(ACCEPTED)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_stock_accepts_is_accepted(backend, function, change):
    arguments = {**RIGHT[function], **change}
    with fastcnn.use_backend(backend):
        actual = getattr(FF, function)(**arguments)
    torch.testing.assert_close(actual, STOCK[function](**arguments))


@pytest.mark.parametrize(("function", "change"), list(accepted(ACCEPTED_BY_TORCH)))
def test_what_only_stock_can_run_is_accepted(function, change):
    arguments = {**RIGHT[function], **change}
    torch.testing.assert_close(getattr(FF, function)(**arguments), STOCK[function](**arguments))


@pytest.mark.parametrize("function", LRN)
@pytest.mark.parametrize("backend", BACKENDS)
def test_lrn_of_an_array_is_a_type_error(backend, function):
    # Stock asks the array for its dim() and raises an AttributeError, which speaks of no argument.
    with fastcnn.use_backend(backend), pytest.raises(TypeError) as caught:
        getattr(FF, function)(**{**RIGHT[function], "input": IMAGE.cpu().numpy()})
    assert_names(caught.value, function, "input")


@pytest.mark.parametrize("function", [*CONV, *LINEAR])
@pytest.mark.parametrize("argument", ["weight", "bias"])
def test_parameter_on_another_device_is_a_runtime_error(argument, function):
    # So it is in stock between real devices; some meta tensors stock takes, and returns values that nobody computed.
    arguments = {**RIGHT[function], argument: RIGHT[function][argument].to("meta")}
    with fastcnn.use_backend("triton"), pytest.raises(RuntimeError) as caught:
        getattr(FF, function)(**arguments)
    assert_names(caught.value, function, argument)
    assert "meta" in str(caught.value)
