"""A call as tuning tables see it: a hashable summary, cheap enough for every call, and the entry's key made of it."""

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcnn.parameters import ACTIVATION, BIAS, CONSTANT, FREE, PAIR, RECORDS, RUNNING, WEIGHT
from fastcnn.shapes import memory_format
from fastcnn.tuning.device import versions


class Operand(NamedTuple):
    """A tensor argument."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool


def call_of(op: str, arguments: tuple[Any, ...], setting: int | str | None) -> tuple[Any, ...]:
    """Summarize a call of an op's function in this process's present state; equal calls get the same winner.

    A plain tuple, which is faster to make than a named one, and which Dynamo accepts as a constant. Tensors are the
    fields of an `Operand`.
    """
    device = arguments[0].device
    autocast = torch.is_autocast_enabled(device.type)
    given = [
        (each.shape, each.stride(), each.dtype, each.requires_grad) if isinstance(each, Tensor) else each
        for each in arguments
    ]
    return (
        op,
        device,
        tuple(given),
        torch.is_grad_enabled(),
        torch._C._are_functorch_transforms_active(),
        torch.get_autocast_dtype(device.type) if autocast else None,
        setting,
    )


def setting_of(op: str, device_type: str) -> int | str:
    """Return the setting that the time depends on: the number of threads, or how a GPU multiplies float32."""
    if device_type == "cpu":
        return torch.get_num_threads()
    backends: Any = torch.backends
    switches = {"conv": backends.cudnn.conv, "matmul": backends.cuda.matmul}
    switch = switches.get(RECORDS[op].product)
    return switch.fp32_precision if switch else "ieee"


def describe(summary: tuple[Any, ...]) -> dict[str, Any]:
    """Return the key of a call's entry: everything that its time depends on but the device, in JSON's types."""
    op, device, given, grad, transformed, autocast, setting = summary
    record = RECORDS[op]
    arguments = dict(zip(record.names, given, strict=True))
    tensors = record.named(ACTIVATION, WEIGHT, BIAS)
    operands = {name: Operand(*arguments[name]) for name in tensors if arguments[name] is not None}
    key: dict[str, Any] = {"op": op}
    for name, kind, stands_for in record.parameters:
        if kind in (BIAS, RUNNING):
            key[name] = arguments[name] is not None
        elif kind in (ACTIVATION, WEIGHT):
            key[name] = list(operands[name].shape) if name in operands else []
        elif kind not in (CONSTANT, FREE):
            value = arguments[name]
            key[name] = _plain(kind, arguments[stands_for] if value is None and stands_for else value)
    dtype = operands["input"].dtype
    if record.normalizes:  # images, whose normalized values have the weight's dtype
        key["images"], dtype = str(dtype).removeprefix("torch."), operands["weight"].dtype
    if record.product and autocast and dtype.is_floating_point and dtype != torch.float64:
        dtype = autocast
    key["dtype"] = "tf32" if dtype == torch.float32 and setting == "tf32" else str(dtype).removeprefix("torch.")
    # That of the input, and of a second input or a weight where it has another one.
    formats = [_format(each) for name, each in operands.items() if name != "bias" and len(each.shape) != 1]
    key["layout"] = "/".join(dict.fromkeys(formats))
    training = transformed or (grad and any(each.requires_grad for each in operands.values()))
    key["mode"] = "training" if training else "inference"
    if device.type == "cpu":
        key["threads"] = setting
    return key | {"versions": versions(device.type)}


def key_of(op: str, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the key of the entry of a call in this process's present state."""
    return describe(call_of(op, arguments, setting_of(op, arguments[0].device.type)))


def text(key: dict[str, Any]) -> str:
    """Return a key as text, by which entries are found and sorted."""
    return json.dumps(key, sort_keys=True, default=str)


def batch_of(key: dict[str, Any]) -> int:
    """Return how many images or rows a call has, by its key; 0 if its first axis is not a batch."""
    axes = len(key["input"])
    has_batch = axes == 4 if RECORDS[key["op"]].takes_images else axes > 1
    return int(key["input"][0]) if has_batch else 0


def without_batch(key: dict[str, Any]) -> str:
    """Return a key as text but for the batch of its activations."""
    activations = {name: ["batch", *key[name][1:]] for name in ("input", "other") if name in key}
    return text(key | activations)


def _plain(kind: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value) * (2 if len(value) == 1 else 1)
    return [value, value] if kind == PAIR and isinstance(value, int) else value


def _format(operand: Operand) -> str:
    if len(operand.shape) != 4:
        return "rows"
    like = torch.empty_strided(operand.shape, operand.strides, device="meta")
    format = memory_format(like)
    if not like.is_contiguous(memory_format=format):
        return "strided"
    return "channels_last" if format == torch.channels_last else "nchw"
