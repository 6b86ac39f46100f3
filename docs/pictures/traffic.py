"""The bytes that a convolution, its ReLU and its pool move: stock's kernels against the fused ones."""

import math

from matplotlib.figure import Figure

from benchmarks.shapes import Stage
from benchmarks.shapes import stages as stages_of
from docs.pictures.canvas import NORMAL, SMALL, Theme

MODEL, LAYER, BATCH, ITEM = "vgg16", "features.2", 64, 2  # 16-bit values
INDEX, CODE = 8, 1  # bytes of an int64 index, of a code

Kernels = list[tuple[str, float]]  # each kernel's name and bytes


def example() -> Stage:
    """Return the stage that is drawn."""
    return next(stage for stage in stages_of(MODEL, BATCH) if stage.layers[0].name == LAYER)


def bytes_moved(stage: Stage) -> dict[str, dict[str, Kernels]]:
    """Return what each way's kernels read and write, each tensor once: mode, way, kernels."""
    x, w, y, p = (
        math.prod(shape or ()) * ITEM for shape in (stage.input, stage.weight, stage.activation, stage.output)
    )
    index, code = p // ITEM * INDEX, p // ITEM * CODE
    gradients: Kernels = [("dgrad", y + w + x), ("wgrad", y + x + w)]
    return {
        "forward": {
            "stock": [("convolution", x + w + y), ("ReLU", 2 * y), ("pool", y + p + index)],
            "epilogue": [("convolution", x + w + y), ("bias, ReLU,\npool", y + p + code)],
            "pool in the kernel": [("all in one", x + w + p + code)],
        },
        "backward": {
            "stock": [("pool", p + index + y), ("ReLU", 3 * y), ("bias", y), *gradients],
            "epilogue": [("pool, ReLU,\nbias", p + code + y), *gradients],
            "+dgrad+wgrad": [("dgrad", p + code + w + x), ("wgrad", p + code + x + w)],
        },
        "kept for the backward": {
            "stock": [("input", x), ("output\nof ReLU", y), ("int64\nindices", index)],
            "fused": [("input", x), ("codes", code)],
        },
    }


def traffic(theme: Theme) -> Figure:
    """Draw a bar for each way, cut by kernel."""
    figure = Figure((7.6, 4.7))
    groups = bytes_moved(example())
    sizes = [len(ways) for ways in groups.values()]
    panels = figure.subplots(len(groups), 1, sharex=True, gridspec_kw={"height_ratios": sizes})
    palette = (theme.blue, theme.orange, theme.green, theme.violet)
    for axes, (mode, ways) in zip(panels, groups.items()):
        for row, kernels in enumerate(ways.values()):
            left = 0.0
            for i, (name, size) in enumerate(kernels):
                width = size / 1e9
                axes.barh(row, width, left=left, height=0.62, color=palette[i % 4], alpha=0.55, ec=theme.paper, lw=1.5)
                if width > 0.045 * max(map(len, name.splitlines())):
                    axes.text(left + width / 2, row, name, ha="center", va="center", size=SMALL - 0.5, color=theme.ink)
                left += width
            axes.text(left + 0.04, row, f"{left:.2f} GB", va="center", size=SMALL, color=theme.ink, weight="bold")
        axes.set_yticks(range(len(ways)), list(ways), size=SMALL, color=theme.ink)
        axes.set_title(mode, loc="left", size=NORMAL, color=theme.ink, weight="bold")
        axes.invert_yaxis()
        axes.tick_params(length=0, colors=theme.quiet, labelsize=SMALL)
        axes.spines[:].set_visible(False)
    for label in (label for axes in panels for label in axes.get_yticklabels()):
        label.set_color(theme.ink)
    panels[0].set_xlim(0, 4.8)
    panels[-1].set_xlabel("GB", size=SMALL, color=theme.quiet)
    figure.subplots_adjust(left=0.17, right=0.99, top=0.94, bottom=0.10, hspace=0.42)
    return figure
