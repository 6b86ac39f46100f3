"""Cells: the methods that did the same work, and how fastcnn stands among them."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.report.text import natural
from benchmarks.rows import AGAIN, EAGER, FASTCNN, Row, Run, is_baseline, is_ours

GROUPS = ("ops", "alexnet", "vgg", "small")
SHOWN_FIRST = ("quick", "alexnet", "vgg", "small", "ops")
MODES = ("inference", "training", "forward", "forward+backward")
FASTER, SLOWER, EVEN = "faster", "slower", "even"


class Cell(NamedTuple):
    """The rows of one work on one device, measured in the same surroundings."""

    device: str
    group: str
    subject: str
    case: str
    mode: str
    dtype: str
    layout: str
    rows: dict[str, Row]

    @property
    def run(self) -> Run:
        """A run that measured it."""
        return next(iter(self.rows.values())).run

    @property
    def is_model(self) -> bool:
        """Whether a whole model ran, not one of its stages."""
        return self.mode in ("inference", "training")

    @property
    def model(self) -> str:
        """The model; of a stage, the one that its case begins with."""
        return self.subject if self.is_model else " ".join(self.case.split()[:1])

    @property
    def layer(self) -> str:
        """The first layer of a stage."""
        return "" if self.is_model else " ".join(self.case.split()[1:2])

    @property
    def shape(self) -> str:
        """The sizes and settings of a stage; of a model, its batch."""
        return self.case if self.is_model else " ".join(self.case.split()[2:])

    @property
    def name(self) -> str:
        """What it is, in one line."""
        return f"{self.subject}, {self.case}"

    @property
    def headline(self) -> bool:
        """Whether the suite put it first: such cells alone have stock measured twice."""
        return AGAIN in self.rows

    def median(self, method: str | None) -> float | None:
        """Return a method's median seconds; None where it was not measured or failed."""
        row = self.rows.get(method or "")
        return row.seconds.median if row and row.seconds else None

    def fastest(self, methods: Iterable[str]) -> str | None:
        """Return the fastest of the methods that have a time."""
        timed = {method: time for method in methods if (time := self.median(method)) is not None}
        return min(timed, key=lambda method: timed[method], default=None)

    @property
    def best_baseline(self) -> str | None:
        """The fastest method that does the same work without fastcnn."""
        return self.fastest(filter(is_baseline, self.rows))

    @property
    def best_ours(self) -> str | None:
        """The fastest method of fastcnn, be it one that must be asked for."""
        return self.fastest(filter(is_ours, self.rows))

    def speedup(self, method: str | None, over: str | None) -> float | None:
        """Return how many times as fast a method is as another."""
        time, base = self.median(method), self.median(over)
        return base / time if time and base else None

    def of_floor(self, method: str | None) -> float | None:
        """Return which part of a method's time the floor is, at the ceilings of its own run."""
        row = self.rows.get(method or "")
        return row.floor_seconds / row.seconds.median if row and row.seconds and row.floor_seconds else None

    @property
    def verdict(self) -> str | None:
        """`faster` or `slower` than the best baseline, `even` where the spreads (p20 to p80) overlap."""
        ours, best = self.rows.get(FASTCNN), self.rows.get(self.best_baseline or "")
        if not (ours and ours.seconds and best and best.seconds):
            return None
        if ours.seconds.p80 < best.seconds.p20:
            return FASTER
        return SLOWER if ours.seconds.p20 > best.seconds.p80 else EVEN

    @property
    def noise(self) -> float | None:
        """How far stock is from stock measured again, as a fraction."""
        ratio = self.speedup(AGAIN, EAGER)
        return None if ratio is None else abs(ratio - 1)


class Unit(NamedTuple):
    """Cells that share tables and charts: a group's models, or one model's stages, in one dtype."""

    device: str
    group: str
    stages_of: str | None
    dtype: str
    cells: list[Cell]

    @property
    def title(self) -> str:
        """What it holds."""
        what = {None: f"{self.group}: whole models", "": f"{self.group}: stages"}
        return f"{what.get(self.stages_of, f'stages of {self.stages_of}')}, {self.dtype}"

    def label(self, cell: Cell) -> tuple[str, str]:
        """Name a cell within the unit, in two parts: what it is, and its sizes."""
        model = "" if self.stages_of else f"{cell.model} "
        return (cell.model, cell.case) if cell.is_model else (f"{model}{cell.layer} {cell.subject}", cell.shape)

    @property
    def modes(self) -> list[str]:
        """The modes that occur, in the usual order."""
        found = {cell.mode for cell in self.cells}
        return [*(mode for mode in MODES if mode in found), *sorted(found - set(MODES))]


def compare(rows: Iterable[Row]) -> tuple[list[Cell], int]:
    """Return the cells of rows, and how many rows later ones replace.

    The last row of a cell decides in which surroundings (device, versions, commit, TF32) its methods are compared;
    rows from others are left out: times of two commits do not mix in one cell.
    """
    found: dict[tuple[str, str, str, str, str, str, str], dict[str, Row]] = {}
    given = list(rows)
    for row in given:
        key = (row.run.device, row.group, row.subject, row.case, row.mode, row.dtype, row.layout)
        methods = found.setdefault(key, {})
        if any(earlier.run.surroundings != row.run.surroundings for earlier in methods.values()):
            methods.clear()
        methods[row.method] = row
    cells = [Cell(*key, methods) for key, methods in found.items()]
    return _sorted(cells), len(given) - sum(len(cell.rows) for cell in cells)


def _sorted(cells: list[Cell]) -> list[Cell]:
    """Sort by device (GPUs first), group, model as it first came, place in the model, layout and mode."""
    models = {name: number for number, name in enumerate(dict.fromkeys(cell.model for cell in cells))}

    def place(cell: Cell) -> tuple[object, ...]:
        group = SHOWN_FIRST.index(cell.group) if cell.group in SHOWN_FIRST else len(SHOWN_FIRST)
        last = cell.subject.startswith("linear")  # a classifier follows the features, whatever its name
        within = (last, natural(cell.layer), natural(cell.shape), cell.subject)
        mode = MODES.index(cell.mode) if cell.mode in MODES else len(MODES)
        where = (not cell.run.is_gpu, cell.device, group, cell.group, not cell.is_model)
        return (*where, models[cell.model], *within, cell.dtype, cell.layout, mode)

    return sorted(cells, key=place)


def units(cells: Iterable[Cell]) -> list[Unit]:
    """Return the cells by what shares a table; the group `ops`, which is long, by model."""
    found: dict[tuple[str, str, str | None, str], list[Cell]] = {}
    for cell in cells:
        stages_of = None if cell.is_model else cell.model if cell.group == "ops" else ""
        found.setdefault((cell.device, cell.group, stages_of, cell.dtype), []).append(cell)
    return [Unit(*key, members) for key, members in found.items()]


def verdicts(cells: Iterable[Cell]) -> dict[str | None, int]:
    """Return how often each verdict fell; None: nothing to compare."""
    counts: dict[str | None, int] = {FASTER: 0, EVEN: 0, SLOWER: 0, None: 0}
    for cell in cells:
        counts[cell.verdict] += 1
    return counts


def typical(ratios: Iterable[float | None]) -> float | None:
    """Return the geometric mean of the ratios that there are."""
    logarithms = [math.log(ratio) for ratio in ratios if ratio]
    return math.exp(sum(logarithms) / len(logarithms)) if logarithms else None
