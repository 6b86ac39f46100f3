"""The README's picture: the bytes that a stage moves, and how fast whole models ran, from the committed results."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.report.cells import Cell, compare
from benchmarks.report.content import chosen
from benchmarks.report.reading import read
from benchmarks.results import RESULTS
from benchmarks.rows import EAGER, FASTCNN
from docs.pictures.canvas import NORMAL, SMALL, Theme
from docs.pictures.traffic import bytes_moved, example

FUSED = {"forward": "pool in the kernel", "backward": "+dgrad+wgrad", "kept for the backward": "fused"}
WIDTH = 0.36


def gain(theme: Theme) -> Figure:
    """Draw both panels, one above the other: side by side they would be too small to read on a telephone."""
    figure = Figure((5.0, 4.9))
    above, below = figure.subplots(2, 1)
    _bytes(above, theme)
    _speed(below, theme)
    for axes in (above, below):
        axes.invert_yaxis()
        axes.tick_params(length=0, colors=theme.quiet, labelsize=SMALL)
        axes.spines[:].set_visible(False)
        axes.set_xticks([])
        for label in axes.get_yticklabels():
            label.set_color(theme.ink)
    figure.subplots_adjust(left=0.17, right=0.99, top=0.9, bottom=0.02, hspace=0.36)
    return figure


def _bytes(axes: Axes, theme: Theme) -> None:
    moved = bytes_moved(example())
    for row, (mode, ways) in enumerate(moved.items()):
        for side, way, colour in ((-1, "stock", theme.quiet), (1, FUSED[mode], theme.blue)):
            size = sum(bytes for _, bytes in ways[way]) / 1e9
            _bar(axes, theme, row + side * WIDTH / 2, size, f"{size:.2f} GB", colour)
    axes.set_yticks(range(len(moved)), ["forward", "backward", "kept"], size=NORMAL)
    axes.set_xlim(0, 4.9)
    _title(
        axes, theme, "Bytes moved, computed", "VGG-16 conv 2 + ReLU + pool, batch 64, bf16; grey: stock, blue: fused"
    )


def _speed(axes: Axes, theme: Theme) -> None:
    cells = [cell for cell in chosen(compare(read([RESULTS]).rows)[0]) if cell.is_model]
    device = cells[0].device
    names = list(dict.fromkeys(cell.subject for cell in cells if cell.device == device))
    for cell in (cell for cell in cells if cell.device == device):
        side, colour = (1, theme.blue) if cell.mode == "training" else (-1, theme.green)
        ratio = cell.speedup(FASTCNN, EAGER) or 0.0
        _bar(axes, theme, names.index(cell.subject) + side * WIDTH / 2, ratio, f"{ratio:.2f}x", colour, 1)
    axes.axvline(1, color=theme.ink, lw=0.8)
    axes.set_yticks(range(len(names)), [_label(name, cells) for name in names], size=NORMAL)
    axes.set_xlim(0, 1.25 * max(cell.speedup(FASTCNN, EAGER) or 1 for cell in cells))
    _title(
        axes,
        theme,
        "Speed against eager PyTorch, measured",
        f"{device.split(',')[0]}; green: inference, blue: training",
    )


def _label(name: str, cells: list[Cell]) -> str:
    batch = next(cell.case for cell in cells if cell.subject == name)
    return f"{name}\n{batch}"


def _bar(axes: Axes, theme: Theme, row: float, size: float, text: str, colour: str, line: float = 0) -> None:
    """Draw a bar with its size in words, right of the bar and of a vertical line."""
    axes.barh(row, size, height=WIDTH * 0.9, color=colour, alpha=0.6)
    axes.text(max(size, line), row, f" {text}", va="center", size=SMALL, color=theme.ink)


def _title(axes: Axes, theme: Theme, title: str, what: str) -> None:
    axes.text(0, 1.13, title, transform=axes.transAxes, size=NORMAL + 1, color=theme.ink, weight="bold")
    axes.text(0, 1.04, what, transform=axes.transAxes, size=SMALL - 0.5, color=theme.quiet)
