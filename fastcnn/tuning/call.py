"""A call as tuning tables see it: a hashable summary, cheap enough for every call, and the entry's key made of it."""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.shapes import memory_format
from fastcnn.tuning.device import versions

_CONV = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_POOL = ("pool_size", "pool_stride", "pool_padding", "pool_ceil_mode")
_NORMALIZED = ("input", "mean", "std", "dtype", *_CONV[1:])
_LRN = ("input", "size", "alpha", "beta", "k")
_BN = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
# The arguments of an op's function in fastcnn/ops, in order.
ARGUMENTS = {
    "add_relu": ("input", "other"),
    "bn_relu": _BN,
    "bn_relu_pool": (*_BN, *_POOL),
    "conv_relu": _CONV,
    "conv_relu_pool": (*_CONV, *_POOL),
    "linear_relu": ("input", "weight", "bias"),
    "lrn": _LRN,
    "lrn_pool": (*_LRN, *_POOL),
    "normalize_conv_relu": _NORMALIZED,
    "normalize_conv_relu_pool": (*_NORMALIZED, *_POOL),
    "max_pool": ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
}
_CONVOLVES = ("conv_relu", "conv_relu_pool", "normalize_conv_relu", "normalize_conv_relu_pool")
_MULTIPLIES = (*_CONVOLVES, "linear_relu")  # torch casts their arguments under autocast
_UNBATCHED_TOO = (*_CONVOLVES, "max_pool")  # they take (C, H, W) too
_OPERANDS = ("input", "other", "weight", "bias")
_GIVEN_OR_NOT = ("bias", "running_mean", "running_var")  # tensors whose shape follows from the others'
# Constants that no time depends on, and the dtype of normalised images, which is the weight's.
_NO_MATTER = ("alpha", "k", "momentum", "eps", "mean", "std", "dtype")
_PAIRS = ("stride", "padding", "dilation", "kernel_size", "pool_size", "pool_stride", "pool_padding")
_STRIDE_OF = {"stride": "kernel_size", "pool_stride": "pool_size"}  # None means the window's size


class Operand(NamedTuple):
    """A tensor argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


class Call(NamedTuple):
    """A call of an op's function; equal calls get the same winner."""

    op: str
    device: torch.device
    arguments: tuple[Any, ...]
    grad: bool  # whether grad mode is on
    transformed: bool  # by torch.func
    autocast: torch.dtype | None
    setting: int | str | None  # the number of threads on the CPU, how float32 is multiplied on a GPU


def call_of(op: str, arguments: tuple[Any, ...], setting: int | str | None) -> tuple[Any, ...]:
    """Summarise a call of an op's function in this process's present state: the fields of a `Call`.

    In plain tuples: they are quicker to make, and all that Dynamo takes for constants.
    """
    device = arguments[0].device
    autocast = torch.is_autocast_enabled(device.type)
    return (
        op,
        device,
        tuple(
            [
                (each.shape, each.stride(), each.dtype, each.requires_grad) if isinstance(each, Tensor) else each
                for each in arguments
            ]
        ),
        torch.is_grad_enabled(),
        torch._C._are_functorch_transforms_active(),
        torch.get_autocast_dtype(device.type) if autocast else None,
        setting,
    )


def setting_of(op: str, device_type: str) -> int | str:
    """Return what else the time depends on: the number of threads, or how a GPU multiplies float32."""
    return torch.get_num_threads() if device_type == "cpu" else _precision(op)


def _precision(op: str) -> str:
    if op not in _MULTIPLIES:
        return "ieee"
    backends: Any = torch.backends
    return (backends.cuda.matmul if op == "linear_relu" else backends.cudnn.conv).fp32_precision


def describe(summary: tuple[Any, ...]) -> dict[str, Any]:
    """Return the key of a call's entry: everything that its time depends on but the device, in JSON's types."""
    call = Call(*summary)
    arguments = dict(zip(ARGUMENTS[call.op], call.arguments, strict=True))
    operands = {name: Operand(*arguments[name]) for name in _OPERANDS if arguments.get(name) is not None}
    key: dict[str, Any] = {"op": call.op}
    for name, value in arguments.items():
        if name in _GIVEN_OR_NOT:
            key[name] = value is not None
        elif name in _OPERANDS:
            key[name] = list(operands[name].shape) if name in operands else []
        elif name not in _NO_MATTER:
            key[name] = _plain(name, value)
    for stride, size in _STRIDE_OF.items():
        if stride in key and key[stride] is None:
            key[stride] = key[size]
    training = call.transformed or (call.grad and any(each.requires_grad for each in operands.values()))
    of = "input"
    if call.op.startswith("normalize"):
        of = "weight"
        key["images"] = str(operands["input"].dtype).removeprefix("torch.")
    key |= {"dtype": _dtype(call, operands[of].dtype), "layout": _layout(operands)}
    key["mode"] = "training" if training else "inference"
    if call.device.type == "cpu":
        key["threads"] = call.setting
    return key | {"versions": versions(call.device.type)}


def text(key: dict[str, Any]) -> str:
    """Return a key as text, by which entries are found and sorted."""
    return json.dumps(key, sort_keys=True, default=str)


def batch_of(key: dict[str, Any]) -> int:
    """Return how many images or rows a call has, by its key; 0 where its first axis is no batch.

    Example:
        >>> batch_of({"op": "max_pool", "input": [64, 3, 8, 8]}), batch_of({"op": "max_pool", "input": [3, 8, 8]})
        (64, 0)
    """
    axes = len(key["input"])
    has_batch = axes == 4 if key["op"] in _UNBATCHED_TOO else axes > 1
    return int(key["input"][0]) if has_batch else 0


def without_batch(key: dict[str, Any]) -> str:
    """Return a key as text but for the batch of its activations."""
    activations = {name: ["batch", *key[name][1:]] for name in ("input", "other") if name in key}
    return text(key | activations)


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value) * (2 if len(value) == 1 else 1)
    return [value, value] if name in _PAIRS and isinstance(value, int) else value


def _dtype(call: Call, dtype: torch.dtype) -> str:
    if call.op in _MULTIPLIES and call.autocast and dtype.is_floating_point and dtype != torch.float64:
        dtype = call.autocast
    if dtype == torch.float32 and call.setting == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def _layout(operands: dict[str, Operand]) -> str:
    """Name the memory format of the input, and of a second input or a weight where it has another one."""
    formats = [_format(each) for name, each in operands.items() if name != "bias" and len(each.shape) != 1]
    return "/".join(dict.fromkeys(formats))


def _format(operand: Operand) -> str:
    if len(operand.shape) != 4:
        return "rows"
    like = torch.empty_strided(operand.shape, operand.strides, device="meta")
    format = memory_format(like)
    if not like.is_contiguous(memory_format=format):
        return "strided"
    return "channels_last" if format == torch.channels_last else "nchw"
