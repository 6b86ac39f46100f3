"""What a report says, as blocks: what is measured and what is not, then device by device."""

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

from fastcnn.bench import tables, text
from fastcnn.bench.cells import EVEN, FASTCNN, FASTER, GROUPS, SLOWER, Cell, Unit, compare, units, verdicts
from fastcnn.bench.document import Block, Heading, Image, Mark, Note, Paragraph, Table
from fastcnn.bench.reading import Results

NO_GPU = (
    "No GPU has been measured: nothing here says how fast fastcnn is on one. GPU times, baselines and memory are "
    "unmeasured."
)
HOW_TO_READ = (
    "A cell is one work: a model or a stage, at one batch, mode, dtype and layout. Its methods are compared in the "
    "same surroundings. The best baseline is the fastest method without fastcnn that was measured in the cell; each "
    'line names it. "vs eager" and "vs best" tell how many times as fast fastcnn is as stock torch and as the best '
    "baseline: below 1.00x it is slower. It is called faster or slower where the spreads (20th to 80th percentile) "
    'of the two do not overlap, else even. "of floor" is the part of the time that the arithmetic and the fewest bytes '
    "would take at the ceilings of the device; above 100 %, a cache was faster than the measured copy."
)
MEMORY = "The most memory that tensors take during a call, beyond what was held before it."
STAGES = (
    "Each distinct stage once: work that a model repeats, or shares with a model listed before it, is timed at its "
    "first place. A pool or LRN alone may be part of a longer stage, so that the lines do not add up to the model."
)


class Charts(NamedTuple):
    """Where a report takes its charts from: each draws one and returns its block, or None where there is nothing."""

    speedups: Callable[[Unit], Image | None]
    methods: Callable[[Unit], Image | None]
    stages: Callable[[Unit], Image | None]
    memory: Callable[[Unit], Image | None]
    floor: Callable[[str, list[Cell]], Image | None]


def _no_chart(*_: object) -> None:
    return None


NO_CHARTS = Charts(_no_chart, _no_chart, _no_chart, _no_chart, _no_chart)


def report(results: Results, charts: Charts = NO_CHARTS) -> list[Block]:
    """Build the whole report of results.

    Example:
        >>> blocks = report(Results([], []))
        >>> blocks[1].text[:27]
        'No GPU has been measured: n'
    """
    cells, replaced = compare(results.rows)
    devices = list(dict.fromkeys(cell.device for cell in cells))
    found = [*_opening(cells, replaced, len(results.problems)), *_results(cells)]
    for device in devices:
        found.extend(_device(device, [cell for cell in cells if cell.device == device], charts))
    for device in devices:
        found.extend(_every_row(device, [cell for cell in cells if cell.device == device]))
    return [*found, *_skipped(results)]


def _opening(cells: list[Cell], replaced: int, skipped: int) -> Iterator[Block]:
    yield Heading(1, "fastcnn: benchmarks")
    if not any(cell.run.is_gpu for cell in cells):
        yield Note(NO_GPU)
    if skipped:
        yield Note(f"{skipped} lines of the result files could not be read; they are listed at the end.")
    rows = [row for cell in cells for row in cell.rows.values()]
    failed = sum(row.error is not None for row in rows)
    parts = [f"{len(rows)} rows in {len(cells)} cells, {failed} of them errors."]
    if replaced:
        parts.append(f"{replaced} earlier rows are left out: later runs measured their cells anew.")
    yield Paragraph(" ".join(parts))
    yield Paragraph(HOW_TO_READ)


def _results(cells: list[Cell]) -> Iterator[Block]:
    yield Heading(2, "Faster, even, slower")
    yield Paragraph(sentence(cells))
    if cells:
        yield tables.counts(cells)
        yield Paragraph("Ratios are geometric means over the cells; no verdict: fastcnn or every baseline has no time.")
    yield Heading(2, "Where fastcnn is slower than the best baseline")
    worst = tables.slower(cells)
    yield worst or Paragraph("In no cell that was measured.")
    yield Heading(2, "What is not measured")
    for line in unmeasured(cells):
        yield Paragraph(line)


def sentence(cells: list[Cell]) -> str:
    """Say in one sentence how often fastcnn is faster than the best baseline, and how often it is not."""
    count = verdicts(cells)
    compared = sum(count.values()) - count[None]
    if not compared:
        return "Nothing has been compared yet."
    return (
        f"Of {compared} cells, fastcnn is faster than the best baseline in {count[FASTER]}, even with it in "
        f"{count[EVEN]}, and slower in {count[SLOWER]}."
    )


def unmeasured(cells: list[Cell]) -> list[str]:
    """Say what has no time: GPUs, groups of a device, fastcnn or the baselines in a cell."""
    found = [] if any(cell.run.is_gpu for cell in cells) else [NO_GPU]
    for device in dict.fromkeys(cell.device for cell in cells):
        here = [cell for cell in cells if cell.device == device]
        missing = [group for group in GROUPS if group not in {cell.group for cell in here}]
        if missing:
            quick = (
                " (the headline cells are, in the group quick)" if any(cell.group == "quick" for cell in here) else ""
            )
            found.append(f"{device}: the groups {', '.join(missing)} are not measured as a whole{quick}.")
        found.extend(_cells_without(device, here))
    return found or ["Every cell of the result files has times of fastcnn and of a baseline."]


def _cells_without(device: str, cells: list[Cell]) -> Iterator[str]:
    lacking = {
        "a time of fastcnn": [cell for cell in cells if cell.median(FASTCNN) is None],
        "a time of eager stock": [cell for cell in cells if cell.median("eager") is None],
        "a time of any baseline": [cell for cell in cells if cell.best_baseline is None],
    }
    for what, without in lacking.items():
        if without:
            names = "; ".join(f"{cell.name}, {cell.mode}, {cell.dtype}, {cell.layout}" for cell in without)
            yield f"{device}: without {what}: {names}."


def _device(device: str, cells: list[Cell], charts: Charts) -> Iterator[Block]:
    yield Heading(2, device)
    yield Paragraph(sentence(cells))
    yield tables.surroundings(cells)
    yield Paragraph(_noise(cells))
    chart = charts.floor(device, cells)
    if chart:
        yield Heading(3, "Distance from the floor")
        yield chart
    for unit in units(cells):
        yield from _unit(unit, charts)
    repeated = tables.noise(cells)
    if repeated:
        yield Heading(3, "Noise: eager, and eager again")
        yield repeated
    failed = tables.errors(cells)
    yield Heading(3, "Errors")
    yield failed or Paragraph("No method failed.")


def _noise(cells: list[Cell]) -> str:
    apart = [cell.noise for cell in cells if cell.noise is not None]
    if not apart:
        return "The noise is not measured: no cell has eager twice."
    return (
        f"Noise: stock measured twice in {len(apart)} cells differs by {text.share(statistics.median(apart))} in the "
        f"median, at most by {text.share(max(apart))}. Differences of that size mean nothing."
    )


def _unit(unit: Unit, charts: Charts) -> Iterator[Block]:
    yield Heading(3, unit.title)
    if unit.stages_of is not None:
        yield Paragraph(STAGES)
    yield from _there(charts.speedups(unit))
    yield tables.overview(unit)
    yield from _there(charts.methods(unit))
    if unit.stages_of is not None:
        yield from _there(charts.stages(unit))
    table = tables.memory(unit)
    if table:
        yield Heading(4, "Peak memory")
        yield Paragraph(MEMORY)
        if unit.stages_of is None:
            yield from _there(charts.memory(unit))
        yield table


def _there(chart: Image | None) -> list[Block]:
    return [chart] if chart else []


def _every_row(device: str, cells: list[Cell]) -> Iterator[Block]:
    yield Heading(2, f"Every row: {device}")
    for unit in units(cells):
        yield Heading(4, unit.title)
        yield tables.every_row(unit.cells)


def _skipped(results: Results) -> Iterator[Block]:
    if results.problems:
        yield Heading(2, "Skipped lines")
        rows: list[list[str | Mark]] = [[f"{each.path}:{each.line}", each.reason] for each in results.problems]
        yield Table(["file and line", "reason"], rows, texts=2)
