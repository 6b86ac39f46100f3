"""The charts of a report, as PNGs: speed-ups, every method, stage times, memory, and the distance from the floor."""

import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import matplotlib
import PIL.Image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from fastcnn.bench import text
from fastcnn.bench.cells import EAGER, FASTCNN, FASTER, SLOWER, Cell, Unit, is_ours
from fastcnn.bench.content import Charts
from fastcnn.bench.document import Image

WIDTH, DOTS_PER_INCH, COLOURS = 8.0, 140, 256
LINE_HEIGHT, FRAME_HEIGHT = 0.5, 1.5  # inches: of a cell's line, and of what stands around the lines
GREY, ORANGE, BLUE, LIGHT_BLUE, RED, LIGHT_RED = "#76808a", "#e08a1e", "#1b5f9e", "#9cc4e6", "#b23a12", "#eeb09a"
# A ratio and its colours when faster, when slower: the two bars of a cell.
BARS = (("vs eager", LIGHT_BLUE, LIGHT_RED), ("vs best baseline", BLUE, RED))
BASELINE_COLOURS = ("#3b3f44", "#e08a1e", "#7a4fa3", "#2a8f57", "#a8842c", "#c2457f", "#6b7f94", "#9a5b3c")
BASELINE_MARKERS = "osPX*^vh"
OUR_MARKERS = "dH8p<>^v"
# Leading digits of the ticks of a logarithmic axis, the closest first, and how many ticks fit.
DIGITS, MOST_TICKS = ((1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 7), (1, 1.5, 2, 3, 5), (1, 2, 5), (1, 3), (1,)), 5


def drawn(images: dict[str, bytes]) -> Charts:
    """Return the charts of a report; each one that is asked for is drawn and put into `images` by its file name."""

    def of_unit(kind: str, draw: Callable[[Unit], Figure | None], alt: str) -> Callable[[Unit], Image | None]:
        def chart(unit: Unit) -> Image | None:
            name = text.slug(f"{unit.device} {unit.group} {unit.title} {kind}")
            return _kept(images, name, draw(unit), f"{alt}; {unit.title}")

        return chart

    def floor(device: str, cells: list[Cell]) -> Image | None:
        alt = f"Part of each cell's time that its floor is; {device}"
        return _kept(images, text.slug(f"{device} floor"), _draw_floor(cells), alt)

    return Charts(
        speedups=of_unit("speedups", _draw_speedups, "Bars: fastcnn against eager and against the best baseline"),
        methods=of_unit("methods", _draw_methods, "Each method against eager"),
        stages=of_unit("times", _draw_times, "Bars: time of eager, the best baseline and fastcnn by stage"),
        memory=of_unit("memory", _draw_memory, "Bars: peak memory of eager and of fastcnn"),
        floor=floor,
    )


def _kept(images: dict[str, bytes], name: str, figure: Figure | None, alt: str) -> Image | None:
    if figure is None:
        return None
    png = io.BytesIO()
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):  # which matplotlib brings along
        figure.savefig(png, format="png", dpi=DOTS_PER_INCH)
    small = io.BytesIO()
    PIL.Image.open(png).convert("RGB").quantize(COLOURS).save(small, format="png", optimize=True)  # far smaller
    images[f"{name}.png"] = small.getvalue()
    return Image(f"{name}.png", alt)


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


def _ratio_axis(axes: Axes, ratios: Iterable[float]) -> None:
    """Make x a logarithmic axis of ratios: twice as fast and half as fast are equally far from 1."""
    found = [*ratios, 0.8, 1.25]
    low, high = min(found) / 1.15, max(found) * 1.15
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(_log_ticks(low, high))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes.minorticks_off()
    axes.axvline(1, color="#3b3f44", linewidth=1.2)


def _log_ticks(low: float, high: float) -> list[float]:
    """Return the closest round ticks between two values of which not too many fit."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in DIGITS:
        inside = [tick for power in powers for digit in digits if low <= (tick := digit * 10.0**power) <= high]
        if len(inside) <= MOST_TICKS:
            return inside
    return inside[:: -(-len(inside) // MOST_TICKS)]


def _draw_speedups(unit: Unit) -> Figure | None:
    if all(cell.median(FASTCNN) is None for cell in unit.cells):
        return None
    figure, panels, lines = _panels(unit, f"fastcnn: how many times as fast\n{unit.title}, {unit.device}")
    for axes, mode in zip(panels, unit.modes):
        shown: list[float] = []
        for number, cells in enumerate(lines.values()):
            if mode in cells:
                shown += _speedup_bars(axes, number, cells[mode])
        _ratio_axis(axes, _with_room(shown))
    _legend(figure, [(f"{name}, {how}", colour) for name, *pair in BARS for how, colour in zip((FASTER, SLOWER), pair)])
    return figure


def _speedup_bars(axes: Axes, number: int, cell: Cell) -> list[float]:
    """Draw the two bars of a cell, from 1 to the ratio, with the number at the end; return the ratios."""
    shown = []
    for place, (_, faster, slower) in enumerate(BARS):
        ratio = cell.speedup(FASTCNN, cell.best_baseline if place else EAGER)
        if ratio is None:
            continue
        y, colour = number + 0.36 * (place - 0.5), faster if ratio >= 1 else slower
        axes.barh(y, ratio - 1, left=1, height=0.34, color=colour)
        side, offset = ("left", 3) if ratio >= 1 else ("right", -3)
        _annotate(axes, text.times(ratio), ratio, y, side, offset, bold=place == 1)
        shown.append(ratio)
    if not shown:
        _annotate(axes, "no time", 1, number, "left", 4)
    return shown


def _with_room(ratios: Iterable[float]) -> list[float]:
    """Return the ratios and what makes room for the numbers at the ends of the longest bars."""
    found = [*ratios, 1.0]
    low, high = min(found), max(found)
    room = (max(high, 1.25) / min(low, 0.8)) ** 0.22
    return [*found, high * room, *([low / room] if low < 1 else [])]


def _annotate(axes: Axes, label: str, x: float, y: float, side: str, offset: float, *, bold: bool = False) -> None:
    weight = "bold" if bold else "normal"
    place: dict[str, Any] = {"xytext": (offset, 0), "textcoords": "offset points", "ha": side, "va": "center"}
    axes.annotate(label, (x, y), fontsize=7.5, fontweight=weight, **place)


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
        ratios = []
        for number, cells in enumerate(lines.values()):
            axes.axhline(number, color="#e3e6e9", linewidth=0.7, zorder=0)
            if mode in cells and cells[mode].median(EAGER) is None:
                _annotate(axes, "no time of eager", 1, number, "left", 4)
            for method, style in styles.items() if mode in cells else ():
                ratio = cells[mode].speedup(method, EAGER)
                if ratio is not None:
                    ratios.append(ratio)
                    handles[method] = axes.scatter([ratio], [number], label=method, **style)
        _ratio_axis(axes, ratios)
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
        values = [0.0]
        for number, cells in enumerate(lines.values()):
            for place, (method, value_of) in enumerate(of_method.items()):
                value = value_of(cells[mode]) if mode in cells else None
                if value is None:
                    continue
                y = number + 0.8 / len(of_method) * (place - (len(of_method) - 1) / 2)
                axes.barh(y, value / scale, height=0.76 / len(of_method), color=colours[method])
                _annotate(axes, written(value), value / scale, y, "left", 3)
                values.append(value / scale)
        axes.set_xlim(0, (max(values) or 1) * 1.35)
        axes.set_xlabel(unit_name, fontsize=8)
        longest = max(longest, *values)
    _legend(figure, [(method, colours[method]) for method in of_method])
    return figure if longest else None


def _draw_floor(cells: list[Cell]) -> Figure | None:
    """Draw each cell at its floor (x) and the part of its time that the floor is (y): eager, best baseline, fastcnn."""
    modes = list(dict.fromkeys(cell.mode for cell in cells if cell.floor))
    if not modes:
        return None
    columns = min(2, len(modes))
    down = -(-len(modes) // columns)
    figure = Figure(figsize=(WIDTH, 1.0 + 3.0 * down), layout="constrained")
    figure.suptitle(f"part of the time that the floor is\n{cells[0].device}", fontsize=11, fontweight="bold")
    grid = figure.subplots(down, columns, squeeze=False)
    for axes in grid.flat[len(modes) :]:
        axes.set_visible(False)
    for axes, mode in zip(grid.flat, modes):
        _floor_panel(axes, mode, [cell for cell in cells if cell.mode == mode])
    for row in grid:
        row[0].set_ylabel("floor / time", fontsize=8)
    handles, _ = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def _floor_panel(axes: Axes, mode: str, cells: list[Cell]) -> None:
    chosen: dict[str, Callable[[Cell], str | None]] = {
        EAGER: lambda cell: EAGER,
        "best baseline": lambda cell: cell.best_baseline,
        FASTCNN: lambda cell: FASTCNN,
    }
    styles = ((GREY, "o", 15), (ORANGE, "s", 15), (BLUE, "D", 17))
    top = 1.0
    for (name, method_of), (colour, marker, size) in zip(chosen.items(), styles):
        points = [(floor, part) for cell in cells if (floor := cell.floor) and (part := cell.of_floor(method_of(cell)))]
        axes.scatter(
            [x for x, _ in points], [y for _, y in points], s=size, c=colour, marker=marker, label=name, alpha=0.7
        )
        top = max([top, *(y for _, y in points)])
    axes.axhline(1, color="#3b3f44", linewidth=1.2, label="the floor")
    floors = [floor for cell in cells if (floor := cell.floor)]
    low, high = min(floors) / 1.5, max(floors) * 1.5
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.set_xticks(_log_ticks(low, high))
    axes.minorticks_off()
    axes.set_ylim(0, top * 1.08)
    axes.set_title(mode, fontsize=10)
    axes.set_xlabel("floor of the cell", fontsize=8)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_seconds(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color="#e3e6e9", linewidth=0.7)
    axes.set_axisbelow(True)


def _short_seconds(value: float) -> str:
    scale, name = next((unit for unit in text.TIME_UNITS if value >= 0.999 * unit[0]), text.TIME_UNITS[-1])
    return f"{value / scale:.3g} {name}"
