"""How much arithmetic VGG-16's stages do for each byte they move: stock's kernels and fused ones, from shapes alone."""

import math

from matplotlib.figure import Figure

from benchmarks.roofline import forward
from benchmarks.shapes import Stage
from benchmarks.shapes import stages as stages_of
from docs.pictures.canvas import SMALL, Theme

MODEL, BATCH, ITEM = "vgg16", 64, 2  # 16-bit values
H200 = 989e12 / 4.8e12  # NVIDIA's data sheet: dense 16-bit FLOP/s, bytes of memory a second


def stock_bytes(stage: Stage) -> int:
    """Return what a convolution or linear layer, its ReLU and its pool read and write, a kernel each, in inference."""
    x, w, y, p = (math.prod(shape or ()) for shape in (stage.input, stage.weight, stage.activation, stage.output))
    relu = 2 * y if "relu" in stage.stem else 0
    return (x + w + y + relu + (y + p if stage.pool else 0)) * ITEM


def intensity(theme: Theme) -> Figure:
    """Draw a line for each stage, from stock's FLOPs a byte to the fused stage's."""
    figure = Figure((7.6, 4.4))
    axes = figure.subplots()
    found = list(stages_of(MODEL, BATCH))
    for row, stage in enumerate(found):
        [(flops, least)] = forward(stage, ITEM, training=False)
        stock, fused = flops / stock_bytes(stage), flops / least
        axes.plot([stock, fused], [row, row], color=theme.quiet, lw=1)
        axes.plot(stock, row, "s", color=theme.orange, ms=5, label="stock" if row == 0 else None)
        axes.plot(fused, row, "o", color=theme.blue, ms=5, label="fused" if row == 0 else None)
    axes.axvline(H200, color=theme.ink, lw=1, ls="--")
    axes.text(H200 * 1.04, len(found) - 0.4, f"{H200:.0f}: H200, by its data sheet", size=SMALL, color=theme.ink)
    names = [f"{stage.layers[0].name}  {stage.stem}" for stage in found]
    axes.set_yticks(range(len(found)), names)
    axes.invert_yaxis()
    axes.set(xscale="log", ylim=(len(found), -1))
    axes.set_xlabel("FLOPs for each byte read or written", size=SMALL, color=theme.ink)
    axes.tick_params(colors=theme.ink, which="both", labelsize=SMALL, length=0)
    axes.spines[:].set_visible(False)
    axes.legend(loc="upper right", frameon=False, fontsize=SMALL, labelcolor=theme.ink)
    figure.subplots_adjust(left=0.27, right=0.98, top=0.99, bottom=0.10)
    return figure
