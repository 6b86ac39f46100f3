"""Normalization of images: the reference, the operator ``normalize``, and autograd."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcnn.backend import device_type
from fastcnn.ops import autograd, checks
from fastcnn.ops.record import IMAGES, Op
from fastcnn.shapes import memory_format

Constants = float | Sequence[float] | Tensor


def reference(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (x - mean) / std, with bytes taken as 0 to 1; computed in the dtype of the constants."""
    if input.dtype == torch.uint8:  # two passes, as exact as the three that first scale bytes to 0 to 1
        return torch.sub(input, 255 * mean[:, None, None]).div_(255 * std[:, None, None]).to(dtype)
    return ((input.to(mean.dtype) - mean[:, None, None]) / std[:, None, None]).to(dtype)


def _fake(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(input, dtype=dtype, memory_format=memory_format(input))


def refuse(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype) -> str:
    """Say why no kernel normalizes these, or return an empty string."""
    if input.dtype not in (torch.uint8, *checks.KERNEL_DTYPES):
        return f"takes argument 'input' in uint8, float32, float16 or bfloat16, got {input.dtype}"
    if dtype not in checks.KERNEL_DTYPES:
        return f"takes argument 'dtype' as float32, float16 or bfloat16, got {dtype}"
    if mean.requires_grad or std.requires_grad:
        return "takes arguments 'mean' and 'std' as constants, got tensors that require gradients"
    return ""


OP = Op("normalize", "normalize", IMAGES, refuse=refuse, backends=("triton",), tuned=False)
OP.forward(_fake, more=", ScalarType dtype")


def input_gradient(grad: Tensor, std: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of floating-point images; differentiable."""
    return (grad.to(std.dtype) / std[:, None, None]).to(dtype)


def _saves(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> tuple[Tensor, ...]:
    input, _, std, *_ = inputs
    ctx.dtype = input.dtype
    return (std,)


@OP.differentiable("Normalize", "output_dtype", saves=_saves)
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """(N, C, H, W) -> the same in another dtype; saves the constants."""
    return input_gradient(grad, ctx.saved_tensors[0], ctx.dtype), None, None


def normalize(input: Tensor, mean: Constants, std: Constants, dtype: torch.dtype | None) -> Tensor:
    """Run ``fastcnn.functional.normalize``."""
    arguments = input, *prepare(OP.function, input, mean, std, dtype)
    route, _ = OP.route(arguments)
    if route.backend == "torch":
        return reference(*arguments)
    return autograd.with_batch(OP.run, *arguments, route.backend)


def prepare(
    function: str, input: Tensor, mean: Constants, std: Constants, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor, torch.dtype]:
    """Check a normalization's arguments; return mean and std as vectors on the input's device, and the output's dtype.

    The vectors are float32, or float64 where input or output are.
    """
    checks.check_tensor(function, "input", input)
    checks.check_image(function, input)
    if not (input.is_floating_point() or input.dtype == torch.uint8):
        raise checks.wrong(function, "input", "uint8 or a floating dtype", input.dtype, TypeError)
    if dtype is None:
        dtype = _default_dtype(input)
    elif not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise checks.wrong(function, "dtype", "a floating dtype or None", dtype, TypeError)
    wide = torch.float64 if torch.float64 in (input.dtype, dtype) else torch.float32
    vectors = []
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, Tensor):
            row = tuple(values) if isinstance(values, (list, tuple)) else (values,)
            if not row or not all(isinstance(each, (int, float)) for each in row):
                raise checks.wrong(function, name, "a number or a sequence of them", repr(values), TypeError)
            if name == "std" and not all(row):  # as torchvision raises
                raise checks.wrong(function, name, "no 0, as images are divided by it", repr(values), ValueError)
        vector = torch.as_tensor(values, dtype=wide, device=input.device)
        if vector.dim() > 1 or vector.numel() not in (1, input.shape[-3]):
            expected = f"1 value or {input.shape[-3]}, as 'input' has channels"
            raise checks.wrong(function, name, expected, f"shape {tuple(vector.shape)}")
        vectors.append(vector.reshape(-1))
    return vectors[0], vectors[1], dtype


def _default_dtype(input: Tensor) -> torch.dtype:
    device = device_type(input)
    if input.dtype != torch.float64 and device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return input.dtype if input.is_floating_point() else torch.float32
