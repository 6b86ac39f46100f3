"""Shape arithmetic: windows, output sizes, padding, memory formats, the argmax code. It imports nothing of fastcnn."""

import operator
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

Pair: TypeAlias = tuple[int, int]
Size: TypeAlias = int | Sequence[int]

LARGEST = 2**63 - 1  # number that torch's operators take

# The argmax code of a pooled value is one byte: the place of the largest value in its window, row-major, 0 to 253; 254
# is unused; 255 says that ReLU is off here, so that no gradient flows.
MAX_WINDOW_PLACES = 254
RELU_OFF = 255


def pair(function: str, name: str, value: Size) -> Pair:
    """Return a size as (rows, columns); one number stands for both, and errors are of the classes that torch raises."""
    if type(value) is int and -LARGEST <= value <= LARGEST:
        return value, value
    if type(value) is tuple and len(value) == 2 and type(value[0]) is int and type(value[1]) is int and _fits(value):
        return value  # as layers hold it
    values = value if isinstance(value, (tuple, list)) else (value,)
    if not all(is_integer(each) for each in values):
        raise TypeError(f"{function}: argument {name!r}: expected an int or two of them, got {value!r}")
    if len(values) not in (1, 2):
        raise RuntimeError(f"{function}: argument {name!r}: expected an int or two of them, got {value!r}")
    sizes = operator.index(values[0]), operator.index(values[-1])
    if not _fits(sizes):
        kind = TypeError if isinstance(value, (tuple, list)) else ValueError  # as torch's own arguments do
        raise kind(f"{function}: argument {name!r}: expected 64-bit integers, got {value!r}")
    return sizes


def is_integer(value: object) -> bool:
    """Whether torch takes a value as an integer: an int, which Dynamo's symbols are too, or another type's; no bool."""
    return type(value) is int or (hasattr(value, "__index__") and not isinstance(value, bool))


def _fits(sizes: Pair) -> bool:
    return -LARGEST <= sizes[0] <= LARGEST and -LARGEST <= sizes[1] <= LARGEST


class Window(NamedTuple):
    """A sliding window over rows and columns: of a pool, or of a convolution's kernel. All in pixels."""

    size: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    ceil_mode: bool

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Window":
        """Return the window of an operator's argument, which `numbers` gave; Triton's constants must be hashable."""
        rows, columns, down, right, top, left, row_step, column_step, ceil_mode = numbers
        return cls((rows, columns), (down, right), (top, left), (row_step, column_step), bool(ceil_mode))

    def numbers(self) -> tuple[int, ...]:
        """Return size, stride, padding, dilation and ceil_mode in one row, as operators take a window."""
        return (*self.size, *self.stride, *self.padding, *self.dilation, int(self.ceil_mode))

    def operands(self) -> tuple[tuple[int, ...]]:
        """Return an operator's argument."""
        return (self.numbers(),)

    def fits(self, height: int, width: int) -> bool:
        """Whether every number is in its range, the image has pixels, and a window fits into the padded image."""
        (rows, columns), (down, right), (top, left), (row_step, column_step), _ = self
        return (
            (rows > 0 and columns > 0 and down > 0 and right > 0)
            and (top >= 0 and left >= 0 and row_step > 0 and column_step > 0 and height > 0 and width > 0)
            and (height + 2 * top > row_step * (rows - 1) and width + 2 * left > column_step * (columns - 1))
        )

    def span(self, axis: int) -> int:
        """Return how many pixels a window covers along an axis, gaps included."""
        return self.dilation[axis] * (self.size[axis] - 1) + 1

    def output_size(self, height: int, width: int) -> Pair:
        """Return rows and columns of the output, by torch's rule.

        Under ceil_mode a last partial window counts only if it starts inside the input or its left padding.
        """
        return self._windows(0, height), self._windows(1, width)

    def _windows(self, axis: int, length: int) -> int:
        stride, padding = self.stride[axis], self.padding[axis]
        rest = length + 2 * padding - self.span(axis) + (stride - 1 if self.ceil_mode else 0)
        count = rest // stride + 1
        if self.ceil_mode and (count - 1) * stride >= length + padding:
            count -= 1
        return count


memory_format = suggest_memory_format  # of a tensor; torch's pooling gives its output the input's


def conv_memory_format(input: Tensor, weight: Tensor) -> torch.memory_format:
    """Return the memory format of a convolution's output: channels_last if input or weight is."""
    either = torch.channels_last in (memory_format(input), memory_format(weight))
    return torch.channels_last if either else torch.contiguous_format


class LRN(NamedTuple):
    """Local response normalization over `size` channels: y = x / (k + alpha / size * sum of x**2) ** beta."""

    size: int
    alpha: float
    beta: float
    k: float

    def operands(self) -> tuple[int, float, float, float]:
        """Return an operator's arguments, in Python's own numbers."""
        return int(self.size), float(self.alpha), float(self.beta), float(self.k)


class BatchNorm(NamedTuple):
    """The settings of a batch norm; `training`: whether mean and variance are the input's own."""

    training: bool
    momentum: float
    eps: float

    def operands(self) -> tuple[float]:
        """Return the forward operators' argument."""
        return (self.eps,)
