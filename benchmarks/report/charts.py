"""The charts of a report, as PNGs: speed-ups, every method, stage times and memory."""

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import matplotlib
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.report import text
from benchmarks.report.cells import FASTER, SLOWER, Cell, Unit
from benchmarks.report.document import Image
from benchmarks.rows import EAGER, FASTCNN, is_ours

WIDTH, DOTS_PER_INCH, COLOURS = 8.0, 140, 256
LINE_HEIGHT, FRAME_HEIGHT = 0.5, 1.5  # inches: of a cell's line, and of what stands around the lines
GREY, ORANGE, BLUE, LIGHT_BLUE, RED, LIGHT_RED = "#76808a", "#e08a1e", "#1b5f9e", "#9cc4e6", "#b23a12", "#eeb09a"
# A ratio and its colours when faster, when slower: the two bars of a cell.
BARS = (("vs eager", LIGHT_BLUE, LIGHT_RED), ("vs best baseline", BLUE, RED))
BASELINE_COLOURS = ("#3b3f44", "#e08a1e", "#7a4fa3", "#2a8f57", "#a8842c", "#c2457f", "#6b7f94", "#9a5b3c")
BASELINE_MARKERS = "osPX*^vh"
OUR_MARKERS = "dH8p<>^v"


class Drawn:
    """The charts of a report: each that is asked for is drawn and kept.

    Attributes:
        images: PNG files by name.
    """

    def __init__(self) -> None:
        self.images: dict[str, bytes] = {}

    def __call__(self, kind: str, unit: Unit) -> Image | None:
        """Draw a chart of `CHARTS`; None where there is nothing to draw."""
        draw, alt = CHARTS[kind]
        figure = draw(unit)
        if figure is None:
            return None
        png = io.BytesIO()
        with matplotlib.rc_context({"font.family": "DejaVu Sans"}):  # which matplotlib brings along
            figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
        small = io.BytesIO()  # far smaller
        PIL.Image.open(png).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)
        name = f"{text.slug(f'{unit.device} {unit.group} {unit.title} {kind}')}.png"
        self.images[name] = small.getvalue()
        return Image(name, f"{alt}; {unit.title}")


def _lines(unit: Unit) -> dict[str, dict[str, Cell]]:
    """Return the cells by line of a chart and by mode."""
    layouts = {cell.layout for cell in unit.cells} - {"contiguous"}
    lines: dict[str, dict[str, Cell]] = {}
    for cell in unit.cells:
        layout = f" {cell.layout}" if len(layouts) > 1 and cell.layout in layouts else ""
        first, second = unit.label(cell)
        lines.setdefault(f"{first}{layout}\n{second}".strip(), {})[cell.mode] = cell
    return lines


def _panels(unit: Unit, title: str) -> tuple[Figure, list[Axes], dict[str, dict[str, Cell]]]:
    """Return a figure with a panel for each mode beside each other, and its lines from top to bottom."""
    lines = _lines(unit)
    figure = Figure(figsize=(WIDTH, FRAME_HEIGHT + LINE_HEIGHT * len(lines)), layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold")
    panels = list(figure.subplots(1, len(unit.modes), sharey=True, squeeze=False)[0])
    for axes, mode in zip(panels, unit.modes):
        axes.set_title(mode, fontsize=10)
        axes.set_yticks(range(len(lines)), list(lines), fontsize=8)
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        _tidy(axes)
    return figure, panels, lines


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(visible=True, axis="x", color="#e3e6e9", linewidth=0.7)
    axes.set_axisbelow(True)


def _ratio_axis(axes: Axes) -> None:
    """Make x a logarithmic axis of ratios: twice as fast and half as fast are equally far from 1."""
    axes.set_xscale("log")
    axes.margins(x=0.25)  # the numbers at the ends of the bars
    low, high = axes.get_xlim()
    low, high = min(low, 0.7), max(high, 1.4)
    axes.set_xlim(low, high)
    subs = (1, 1.5, 2, 3, 5, 7) if high / low < 6 else (1, 2, 5) if high / low < 100 else (1, 3)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.axvline(1, color="#3b3f44", linewidth=1.2)


def _draw_speedups(unit: Unit) -> Figure | None:
    if all(cell.median(FASTCNN) is None for cell in unit.cells):
        return None
    figure, panels, lines = _panels(unit, f"fastcnn: how many times as fast\n{unit.title}, {unit.device}")
    for axes, mode in zip(panels, unit.modes):
        for number, cells in enumerate(lines.values()):
            if mode in cells:
                _speedup_bars(axes, number, cells[mode])
        _ratio_axis(axes)
    _legend(figure, [(f"{name}, {how}", colour) for name, *pair in BARS for how, colour in zip((FASTER, SLOWER), pair)])
    return figure


def _speedup_bars(axes: Axes, number: int, cell: Cell) -> None:
    """Draw the two bars of a cell, from 1 to the ratio, with the number at the end."""
    for place, (_, faster, slower) in enumerate(BARS):
        ratio = cell.speedup(FASTCNN, cell.best_baseline if place else EAGER)
        if ratio is None:
            continue
        y, colour = number + 0.36 * (place - 0.5), faster if ratio >= 1 else slower
        bars = axes.barh(y, ratio - 1, left=1, height=0.34, color=colour)
        weight = "bold" if place else "normal"
        axes.bar_label(bars, [text.times(ratio)], padding=3, fontsize=7.5, fontweight=weight)


def _legend(figure: Figure, entries: list[tuple[str, str]]) -> None:
    patches = [Patch(color=colour, label=name) for name, colour in entries]
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), 4), fontsize=8, frameon=False)


def _draw_methods(unit: Unit) -> Figure | None:
    """Draw a marker for each method: baselines in colours of their own, fastcnn blue, forced backends hollow."""
    styles = _styles(unit)
    if not styles:
        return None
    figure, panels, lines = _panels(unit, f"every method: how many times as fast as eager\n{unit.title}, {unit.device}")
    handles = {}
    for axes, mode in zip(panels, unit.modes):
        for number, cells in enumerate(lines.values()):
            axes.axhline(number, color="#e3e6e9", linewidth=0.7, zorder=0)
            for method, style in styles.items() if mode in cells else ():
                ratio = cells[mode].speedup(method, EAGER)
                if ratio is not None:
                    handles[method] = axes.scatter([ratio], [number], label=method, **style)
        _ratio_axis(axes)
    named = [handles[method] for method in styles if method in handles]
    figure.legend(handles=named, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _styles(unit: Unit) -> dict[str, dict[str, Any]]:
    methods = list(dict.fromkeys(method for cell in unit.cells for method in cell.rows if method != EAGER))
    ours = [method for method in methods if is_ours(method) and method != FASTCNN]
    styles: dict[str, dict[str, Any]] = {}
    for number, method in enumerate(method for method in methods if not is_ours(method)):
        colour = BASELINE_COLOURS[number % len(BASELINE_COLOURS)]
        marker = BASELINE_MARKERS[number % len(BASELINE_MARKERS)]
        styles[method] = {"color": colour, "marker": marker, "s": 34, "zorder": 3}
    for number, method in enumerate(ours):
        marker = OUR_MARKERS[number % len(OUR_MARKERS)]
        styles[method] = {"facecolor": "white", "edgecolor": BLUE, "marker": marker, "s": 44, "zorder": 4}
    if FASTCNN in methods:
        styles[FASTCNN] = {"color": BLUE, "marker": "D", "s": 48, "zorder": 5}
    return styles


def _draw_times(unit: Unit) -> Figure | None:
    """Draw where a model's time goes: eager, the best baseline and fastcnn, stage by stage, on a linear axis."""
    of_method: dict[str, Callable[[Cell], float | None]] = {
        EAGER: lambda cell: cell.median(EAGER),
        "best baseline": lambda cell: cell.median(cell.best_baseline),
        FASTCNN: lambda cell: cell.median(FASTCNN),
    }
    return _three_bars(unit, f"time of each stage\n{unit.title}, {unit.device}", of_method, 1e-3, "ms", text.seconds)


def _draw_memory(unit: Unit) -> Figure | None:
    def peak(method: str, cell: Cell) -> float | None:
        return cell.rows[method].peak_bytes if method in cell.rows else None

    of_method = {name: functools.partial(peak, name) for name in (EAGER, FASTCNN)}
    return _three_bars(unit, f"peak memory of a call\n{unit.title}, {unit.device}", of_method, 2**20, "MiB", text.size)


def _three_bars(
    unit: Unit,
    title: str,
    of_method: Mapping[str, Callable[[Cell], float | None]],
    scale: float,
    unit_name: str,
    written: Callable[[float], str],
) -> Figure | None:
    """Draw bars of up to three quantities for each cell, in units of `scale`, with the number at each end."""
    figure, panels, lines = _panels(unit, title)
    colours = dict(zip((EAGER, "best baseline", FASTCNN), (GREY, ORANGE, BLUE)))
    longest = 0.0
    for axes, mode in zip(panels, unit.modes):
        for number, cells in enumerate(lines.values()):
            for place, (method, value_of) in enumerate(of_method.items()):
                value = value_of(cells[mode]) if mode in cells else None
                if value is None:
                    continue
                y = number + 0.8 / len(of_method) * (place - (len(of_method) - 1) / 2)
                bars = axes.barh(y, value / scale, height=0.76 / len(of_method), color=colours[method])
                axes.bar_label(bars, [written(value)], padding=3, fontsize=7.5)
                longest = max(longest, value)
        axes.margins(x=0.35)
        axes.set_xlim(left=0)
        axes.set_xlabel(unit_name, fontsize=8)
    _legend(figure, [(method, colours[method]) for method in of_method])
    return figure if longest else None


CHARTS: dict[str, tuple[Callable[[Unit], Figure | None], str]] = {
    "speedups": (_draw_speedups, "Bars: fastcnn against eager and against the best baseline"),
    "methods": (_draw_methods, "Each method against eager"),
    "times": (_draw_times, "Bars: time of eager, the best baseline and fastcnn by stage"),
    "memory": (_draw_memory, "Bars: peak memory of eager and of fastcnn"),
}
