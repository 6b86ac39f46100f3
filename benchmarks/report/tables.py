"""The tables of a report: overview, slower cells, memory, every row, noise, errors, surroundings."""

from collections.abc import Iterable

from benchmarks.report import text
from benchmarks.report.cells import EVEN, FASTER, SLOWER, Cell, Unit, typical, verdicts
from benchmarks.report.document import Strong, Table
from benchmarks.report.reading import CallCosts, Problem
from benchmarks.rows import AGAIN, EAGER, FASTCNN, Row, Run, is_ours

BEST = "best baseline"


def best_baseline(cell: Cell) -> str:
    """Name a cell's best baseline with its time."""
    name = cell.best_baseline
    return f"{name} {text.seconds(cell.median(name))}" if name else "none has a time"


def against(cell: Cell, method: str | None, over: str | None) -> str:
    """Write a speed-up; below 1 it stands out as what is slower."""
    ratio = cell.speedup(method, over)
    return Strong(text.times(ratio)) if ratio is not None and ratio < 1 else text.times(ratio)


def _against_best(cell: Cell) -> str:
    """Write the speed-up over the best baseline, and the verdict."""
    ratio = against(cell, FASTCNN, cell.best_baseline)
    return type(ratio)(f"{ratio} {cell.verdict}") if cell.verdict else ratio


def _ours(cell: Cell) -> str:
    row = cell.rows.get(FASTCNN)
    if row is None:
        return "not measured"
    return text.seconds(row.seconds.median) if row.seconds else Strong("error")


def _asked_for(cell: Cell) -> str:
    """Name the fastest method of fastcnn (forced, or in a CUDA graph) where it is another than what a user gets."""
    name = cell.best_ours
    return (
        text.NONE if name in (None, FASTCNN) else f"{str(name)[len(FASTCNN) + 1 :]} {text.seconds(cell.median(name))}"
    )


# The ratios stand before the times: on a narrow screen they are what is seen first.
NUMBERS = ["vs best", "vs eager", FASTCNN, BEST, EAGER]


def overview(unit: Unit) -> Table:
    """Build one line per cell: fastcnn, the best baseline, stock, and their ratios."""
    heads = [*_heads(unit), *NUMBERS, "of floor", "a faster way of fastcnn", "layout"]
    rows = [
        [*_labels(unit, cell), *_numbers(cell), text.share(cell.of_floor(FASTCNN)), _asked_for(cell), cell.layout]
        for cell in unit.cells
    ]
    return Table(heads, rows, texts=2)


def _heads(unit: Unit) -> list[str]:
    return ["model" if unit.stages_of is None else "stage", "mode"]


def _labels(unit: Unit, cell: Cell) -> list[str]:
    return [", ".join(unit.label(cell)), cell.mode]


def _numbers(cell: Cell) -> list[str]:
    ratios = [_against_best(cell), against(cell, FASTCNN, EAGER)]
    return [*ratios, _ours(cell), best_baseline(cell), text.seconds(cell.median(EAGER))]


def compact(cells: Iterable[Cell]) -> Table:
    """Build the same in fewer columns, for cells of many kinds; the device is named where there are several."""
    shown = list(cells)
    several = len({cell.device for cell in shown}) > 1
    rows = [
        [cell.name, cell.mode, *_numbers(cell), _types(cell), *([cell.device] if several else [])] for cell in shown
    ]
    return Table(["what", "mode", *NUMBERS, "dtype, layout", *(["device"] if several else [])], rows, texts=2)


def short(cells: Iterable[Cell]) -> Table:
    """Build the README's lines: the ratios, and how far stock is from stock measured again."""
    rows = [
        [
            f"{cell.name}, {cell.mode}" if cell.is_model else f"{cell.subject}, {cell.model} {cell.layer}",
            *_numbers(cell)[:2],
            text.NONE if cell.noise is None else text.share(cell.noise),
        ]
        for cell in cells
    ]
    return Table(["what", *NUMBERS[:2], "noise"], rows)


def _types(cell: Cell) -> str:
    return f"{cell.dtype}, {cell.layout}"


def slower(cells: Iterable[Cell]) -> Table | None:
    """Build the cells in which fastcnn takes longer than the best baseline, the worst first; None: there is none."""
    found = [(ratio, cell) for cell in cells if (ratio := cell.speedup(FASTCNN, cell.best_baseline)) and ratio < 1]
    found.sort(key=lambda pair: pair[0])
    return compact(cell for _, cell in found) if found else None


def counts(cells: list[Cell]) -> Table:
    """Build, for each device, group and mode, how often fastcnn is faster, even, slower."""
    parts: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        parts.setdefault((cell.device, cell.group, cell.mode), []).append(cell)
    heads = ["device", "group", "mode", "cells", FASTER, EVEN, SLOWER, "no verdict", "vs eager", "vs best"]
    return Table(heads, [[*key, *_counted(members)] for key, members in parts.items()], texts=3)


def _counted(cells: list[Cell]) -> list[str]:
    count = verdicts(cells)
    lost = Strong(str(count[SLOWER])) if count[SLOWER] else "0"
    eager = typical(cell.speedup(FASTCNN, EAGER) for cell in cells)
    best = typical(cell.speedup(FASTCNN, cell.best_baseline) for cell in cells)
    numbers = [str(count[FASTER]), str(count[EVEN]), lost, str(count[None])]
    return [str(len(cells)), *numbers, text.times(eager), text.times(best)]


def memory(unit: Unit) -> Table | None:
    """Build the peak memory of eager, of the leanest baseline and of fastcnn; None where none was measured."""
    rows: list[list[str]] = []
    for cell in unit.cells:
        peaks = {name: row.peak_bytes for name, row in cell.rows.items() if row.peak_bytes is not None}
        baselines = {name: peak for name, peak in peaks.items() if not is_ours(name) and name != AGAIN}
        ours, eager = peaks.get(FASTCNN), peaks.get(EAGER)
        least = min(baselines, key=lambda name: baselines[name], default=None)
        if not peaks:
            continue
        part = text.share(ours / eager) if ours is not None and eager else text.NONE
        more = ours is not None and eager is not None and ours > eager
        shown = f"{least} {text.size(baselines[least])}" if least else text.NONE
        ratio = Strong(part) if more else part
        rows.append([*_labels(unit, cell), ratio, text.size(ours), shown, text.size(eager), cell.layout])
    heads = [*_heads(unit), "of eager's", FASTCNN, "leanest baseline", EAGER, "layout"]
    return Table(heads, rows, texts=2) if rows else None


def every_row(cells: Iterable[Cell]) -> Table:
    """Build every method of cells, the fastest first and errors last."""
    heads = [
        "what",
        "mode",
        "method",
        "vs best",
        "vs eager",
        "median",
        "p20 to p80",
        "of floor",
        "peak memory",
        "layout",
    ]
    rows: list[list[str]] = []
    for cell in cells:
        best = cell.best_baseline
        for method, row in sorted(
            cell.rows.items(), key=lambda item: item[1].seconds.median if item[1].seconds else 1e9
        ):
            name = f"{method} ({BEST})" if method == best else method
            rows.append([cell.name, cell.mode, name, *_measured(cell, method, row, best), cell.layout])
    return Table(heads, rows, texts=3)


def _measured(cell: Cell, method: str, row: Row, best: str | None) -> list[str]:
    if row.seconds is None:
        return [Strong("error"), *[text.NONE] * 5]
    ratios = [against(cell, method, best), against(cell, method, EAGER)]
    spread = f"{text.seconds(row.seconds.p20)} to {text.seconds(row.seconds.p80)}"
    rest = [text.share(cell.of_floor(method)), text.size(row.peak_bytes)]
    return [*ratios, text.seconds(row.seconds.median), spread, *rest]


def noise(cells: Iterable[Cell]) -> Table | None:
    """Build stock against stock measured again; None where no cell has both."""
    rows: list[list[str]] = []
    for cell in cells:
        if cell.noise is not None:
            measured = [text.seconds(cell.median(EAGER)), text.seconds(cell.median(AGAIN)), text.share(cell.noise)]
            rows.append([cell.name, cell.mode, _types(cell), *measured])
    return Table(["what", "mode", "dtype, layout", EAGER, AGAIN, "apart by"], rows, texts=3) if rows else None


def errors(cells: Iterable[Cell]) -> Table | None:
    """Build the methods that failed; None where none did."""
    rows: list[list[str]] = []
    for cell in cells:
        for method, row in cell.rows.items():
            if row.error is not None:
                rows.append([cell.name, cell.mode, _types(cell), method, row.error])
    return Table(["what", "mode", "dtype, layout", "method", "error"], rows, texts=5) if rows else None


def surroundings(cells: Iterable[Cell]) -> Table:
    """Build what the rows were measured on: a column for each set of versions, with its runs and their ceilings."""
    runs: dict[tuple[tuple[str, object], ...], dict[Run, int]] = {}
    for cell in cells:
        for row in cell.rows.values():
            found = runs.setdefault(row.run.surroundings, {})
            found[row.run] = found.get(row.run, 0) + 1
    columns = [_described(key, found) for key, found in runs.items()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    rows: list[list[str]] = [[name, *(column.get(name, text.NONE) for column in columns)] for name in names]
    titles = [f"set {number}" if len(columns) > 1 else "" for number in range(1, len(columns) + 1)]
    return Table(["", *titles], rows, texts=1 + len(columns))


def _described(key: tuple[tuple[str, object], ...], runs: dict[Run, int]) -> dict[str, str]:
    shown = {name: text.NONE if value is None else str(value) for name, value in key}
    ceilings: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.ceilings:
            ceilings.setdefault(name, []).append(value)
    measured = {f"ceiling: {name.rsplit(' ', 1)[0]}": _range(name, values) for name, values in ceilings.items()}
    starts = f"{len(runs)}: {', '.join(sorted(run.id for run in runs))}"
    return {**shown, **measured, "rows": str(sum(runs.values())), "runs": starts}


def _range(name: str, values: list[float]) -> str:
    low, high = text.rate(name, min(values)), text.rate(name, max(values))
    return low if low == high else f"{low} to {high}"


def call_costs(found: CallCosts) -> Table:
    """Build what a call costs the processor, by the stock layers, by the front, and by the path through Python."""
    rows = []
    for row in found.rows:
        share = f"{row['front'] / row['stock']:.2f}"
        times = [text.seconds(row[way] * 1e-6) for way in ("stock", "front", "python")]
        labels = [row["what"], f"{row['mode']}, {row['backend']}"]
        rows.append([*labels, Strong(share) if row["front"] > row["stock"] else share, *times])
    return Table(["what", "mode, backend", "front / stock", "stock", "front", "Python path"], rows, texts=2)


def skipped(problems: Iterable[Problem]) -> Table:
    """Build the lines that could not be read."""
    return Table(["file and line", "reason"], [[f"{each.path}:{each.line}", each.reason] for each in problems], texts=2)
