"""The floor of a time: what the arithmetic and the fewest bytes cost at the two ceilings measured on this device.

A kernel takes at least max(FLOPs / matrix product's rate, bytes / copy's rate); a stage's kernels are added, without
gaps between launches and without reuse of the cache from one kernel to the next. Fused counting: a stage writes only
its pooled output and, where gradients are asked for, one byte a pooled value; its backward is one pass that masks and
unpools the gradient (and sums the bias gradient on the way), then the two convolutions of the gradient. A batch norm
in training adds one pass forward (its statistics come from the convolution's own pass) and two backward, as it needs
sums before it can give a gradient; in evaluation it is folded into the convolution. By itself it takes a pass for its
statistics, too; where these are the running ones, neither that nor the second pass backward. Images that a stage
normalizes are read as bytes, and dropout costs nothing beside the ReLU before it. Of whole models, optimizer, loss and
the casts of autocast are left out.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from benchmarks.shapes import Stage

ITEM_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
COPY = "copy B/s"


def matmul(dtype: str) -> str:
    """Return the name under which a dtype's matrix product stands among the ceilings."""
    return f"{dtype} matmul FLOP/s"


class Kernel(NamedTuple):
    """What one kernel must at least do: floating-point operations, and bytes read plus bytes written."""

    flops: int
    bytes: int


class _Sizes(NamedTuple):
    """A stage's tensors in bytes: `output` after the pool, `activation` before it; `codes` of the winners."""

    input: int
    weight: int
    activation: int
    output: int
    codes: int
    flops: int

    @classmethod
    def of(cls, stage: Stage, item: int) -> "_Sizes":
        weight = math.prod(stage.weight) if stage.weight else 0
        activation, output = math.prod(stage.activation), math.prod(stage.output)
        # Every weight meets every place of its channel's output once: 2 FLOPs each, per image and pixel.
        flops = 2 * weight * math.prod(stage.activation) // stage.weight[0] if stage.weight else 0
        codes = output if stage.pool else 0
        read = math.prod(stage.input) * (1 if stage.bytes else item)
        return cls(read, weight * item, activation * item, output * item, codes, flops)


def forward(stage: Stage, item: int, *, training: bool) -> list[Kernel]:
    """Return the kernels of a forward pass; `item`: bytes of an element."""
    s = _Sizes.of(stage, item)
    codes = s.codes if training else 0
    if stage.stem == "sgd":  # all but the gradient is read and written; a float32 parameter is its own master
        parameters = s.input // item
        return [Kernel(0, parameters * (4 * 4 + item + (2 * item if item < 4 else 0)))]
    if stage.stem == "add_relu":
        return [Kernel(0, 2 * s.input + s.output)]
    if stage.batch_norm:
        statistics = [] if stage.frozen else [Kernel(0, s.input)]
        return [*statistics, Kernel(0, s.input + s.output + codes)]
    if training and "_bn" in stage.stem:
        return [Kernel(s.flops, s.input + s.weight + s.activation), Kernel(0, s.activation + s.output + codes)]
    return [Kernel(s.flops, s.input + s.weight + s.output + codes)]


def backward(stage: Stage, item: int) -> list[Kernel]:
    """Return the kernels of a backward pass."""
    s = _Sizes.of(stage, item)
    gradient = s.output + s.codes
    if stage.stem == "add_relu":  # the output's sign is the mask; both inputs get one and the same gradient
        return [Kernel(0, 2 * s.output + s.input)]
    if stage.batch_norm:
        sums = [] if stage.frozen else [Kernel(0, gradient + s.input)]
        return [*sums, Kernel(0, gradient + 2 * s.input)]
    if stage.weight is None:  # LRN reads its input once more; a pool reads codes alone
        reread = s.input if stage.norm else 0
        return [Kernel(0, gradient + reread + s.input)]
    if "_bn" in stage.stem:
        passes = [Kernel(0, gradient + s.activation), Kernel(0, gradient + 2 * s.activation)]
    elif stage.pool:
        passes = [Kernel(0, gradient + s.activation)]
    else:  # the output's sign is the mask; without a ReLU there is nothing to mask
        passes = [Kernel(0, 3 * s.activation)] if "relu" in stage.stem else []
    product = Kernel(s.flops, s.activation + s.input + s.weight)  # weight's gradient; as much again for the input's
    return [*passes, *([product] if stage.first else [product, product])]


def kernels(stages: Iterable[Stage], item: int, *, training: bool) -> list[Kernel]:
    """Return the kernels of stages in a row, with their backward if `training`."""
    return [
        kernel
        for stage in stages
        for kernel in (*forward(stage, item, training=training), *(backward(stage, item) if training else ()))
    ]


def least_bytes(stages: Iterable[Stage], item: int, *, training: bool) -> int:
    """Return the fewest bytes that stages read and write."""
    return sum(kernel.bytes for kernel in kernels(stages, item, training=training))


def floor(stages: Iterable[Stage], dtype: str, ceilings: Mapping[str, float], *, training: bool) -> float | None:
    """Return the floor in seconds; None where the dtype's matrix product was not measured.

    Example:
        >>> from benchmarks.shapes import stages
        >>> h200 = {"bfloat16 matmul FLOP/s": 790e12, "copy B/s": 4.3e12}
        >>> round(floor(stages("vgg16", 64), "bfloat16", h200, training=False) * 1e3, 3)
        2.631
    """
    if matmul(dtype) not in ceilings:
        return None
    work = kernels(stages, ITEM_SIZE[dtype], training=training)
    return sum(max(each.flops / ceilings[matmul(dtype)], each.bytes / ceilings[COPY]) for each in work)
