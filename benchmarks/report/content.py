"""What a report says: the sentences, and the names that its templates show."""

import statistics
from collections.abc import Callable, Iterator

from benchmarks.report import tables, text
from benchmarks.report.cells import EVEN, FASTER, GROUPS, SLOWER, Cell, Unit, compare, units, verdicts
from benchmarks.report.document import Image, rendered
from benchmarks.report.reading import Results
from benchmarks.rows import FASTCNN

NO_GPU = (
    "No GPU has been measured: nothing here says how fast fastcnn is on one. GPU times, baselines and memory are "
    "unmeasured."
)
Chart = Callable[[str, Unit], Image | None]


def report(results: Results, chart: Chart = lambda kind, unit: None) -> str:
    """Write the whole report of results as Markdown.

    Args:
        results: what was measured.
        chart: draws a chart of a kind, where there is anything to draw.

    Example:
        >>> "No GPU has been measured" in report(Results([], [], []))
        True
    """
    cells, replaced = compare(results.rows)
    rows = [row for cell in cells for row in cell.rows.values()]
    return rendered(
        "report",
        **names(cells),
        chart=chart,
        rows=len(rows),
        failed=sum(row.error is not None for row in rows),
        replaced=replaced,
        problems=results.problems,
        call_costs=results.call_costs,
    )


def names(cells: list[Cell]) -> dict[str, object]:
    """Return what every template may show of cells."""
    devices = {
        device: [cell for cell in cells if cell.device == device] for device in dict.fromkeys(c.device for c in cells)
    }
    functions = {each.__name__: each for each in (sentence, unmeasured, noise, units, headlines, chosen, versions)}
    return {"cells": cells, "devices": devices, "tables": tables, "NO_GPU": NO_GPU, **functions}


def headlines(cells: list[Cell]) -> list[Cell]:
    """Return the headline cells, where there are any."""
    return [cell for cell in cells if cell.headline] or cells


def chosen(cells: list[Cell]) -> list[Cell]:
    """Return the README's cells: headline cells of whole models, and each op's first one that has a backward."""
    found = headlines(cells)
    ops: dict[str, Cell] = {}
    for cell in found:
        if cell.mode == "forward+backward":
            ops.setdefault(cell.subject, cell)
    return [*(cell for cell in found if cell.is_model), *ops.values()]


def versions(cells: list[Cell]) -> str:
    """Say in one line what cells were measured with."""
    found: dict[str, list[str]] = {name: [] for name in ("torch", "triton", "cuda", "fastcnn", "commit", "tf32")}
    for cell in cells:
        for name, value in cell.run.surroundings:
            if name in found and value is not None and value not in found[name]:
                found[name].append(value)
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items() if values) + "."


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


def noise(cells: list[Cell]) -> str:
    """Say how far stock is from stock measured again."""
    apart = [cell.noise for cell in cells if cell.noise is not None]
    if not apart:
        return "The noise is not measured: no cell has eager twice."
    return (
        f"Noise: stock measured twice in {len(apart)} cells differs by {text.share(statistics.median(apart))} in the "
        f"median, at most by {text.share(max(apart))}. Differences of that size mean nothing."
    )
