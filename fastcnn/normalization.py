"""The layer `fastcnn.nn.Normalize`, and whether a graph of layers is being recorded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, compiler, nn
from torch.fx import Proxy

from fastcnn import functional as FF

_tracing_state = torch._C._get_tracing_state  # of torch.jit.trace


def is_recorded(input: Any) -> bool:
    """Whether a graph of the layers is being recorded; it is to hold torch's operators only, and need no fastcnn."""
    # The flag, as torch.compiler.is_exporting() is true under any torch.compile of torch 2.11.
    return _tracing_state() is not None or compiler._is_exporting_flag or isinstance(input, Proxy)


class Normalize(nn.Module):
    """Normalize images, bytes from 0 to 255 or floats from 0 to 1: ``(x - mean) / std`` in one pass.

    `mean` and `std` are a number or one for each channel, `dtype` that of the output; see
    `fastcnn.functional.normalize`. In front of the first convolution of a `fastcnn.nn.Sequential` it joins the
    convolution's stage. State dicts do not hold its constants, which stay in float32.

    Raises ValueError for a `std` of 0.

    Shapes: input (N, C, H, W) or (C, H, W); output the same.

    Example:
        >>> import torch, fastcnn
        >>> from collections import OrderedDict
        >>> model = fastcnn.AlexNet()  # in front of its layers, whose keys stay as they are
        >>> layers = OrderedDict(normalize=fastcnn.nn.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
        >>> layers.update(model.features.named_children())
        >>> model.features = fastcnn.nn.Sequential(layers)
        >>> model(torch.randint(256, (2, 3, 224, 224), dtype=torch.uint8)).shape
        torch.Size([2, 1000])
    """

    __module__ = "fastcnn.nn"  # where users find it
    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: float | Sequence[float], std: float | Sequence[float], dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.constants = {"mean": _numbers(mean), "std": _numbers(std)}
        if 0 in self.constants["std"]:
            raise ValueError(f"Normalize: argument 'std': expected no 0, as images are divided by it, got {std!r}")
        self.dtype = dtype
        for name, values in self.constants.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "Normalize":
        super()._apply(fn, recurse)
        for name, values in self.constants.items():  # .half() would round them, to_empty() forget them
            setattr(self, name, torch.tensor(values, dtype=torch.float32, device=getattr(self, name).device))
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalize `input`: (N, C, H, W) or (C, H, W)."""
        if is_recorded(input):
            return _stock_normalize(input, self.mean, self.std, self.dtype)
        return FF.normalize(*self.arguments(input))

    def arguments(self, input: Tensor) -> tuple[Any, ...]:
        """Return the arguments of `fastcnn.functional.normalize` for `input`."""
        mean, std = self.mean, self.std
        if input.dtype == torch.float64:  # the buffers hold float32
            mean, std = (torch.tensor(each, dtype=input.dtype) for each in self.constants.values())
        return input, mean, std, self.dtype

    def extra_repr(self) -> str:
        """Give the constants."""
        return ", ".join(f"{name}={values}" for name, values in (*self.constants.items(), ("dtype", self.dtype)))


def _numbers(values: Any) -> list[float]:
    return [float(each) for each in (values if isinstance(values, (Sequence, Tensor)) else [values])]


@torch.fx.wrap
def _stock_normalize(input: Tensor, mean: Tensor, std: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Normalize in torch's operators alone; a graph of torch.fx, which knows no dtypes, holds the call."""
    unit = input / 255 if input.dtype == torch.uint8 else input
    return ((unit - mean[:, None, None]) / std[:, None, None]).to(dtype or unit.dtype)
