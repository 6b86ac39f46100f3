"""Which parts of a network run fused: a table of its stages, what runs each, and why other layers run by themselves."""

import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import wrap
from typing import Any

from torch import Tensor, nn

from fastcnn.explain.layers import Row, alone, stages, stages_run
from fastcnn.fuse import fused

MOST_OF_NAMES, LEAST_OF_REASONS = 26, 12  # columns of the table

__all__ = ["Explanation", "Row", "explain"]


class Explanation(Sequence[Row]):
    """The rows of :func:`explain`; ``str`` gives a table of at most 80 columns.

    Example:
        >>> import fastcnn
        >>> [row.stage for row in fastcnn.explain(fastcnn.MnistCNN()) if row.stage]
        ['conv+relu+pool', 'conv+relu+pool', 'linear+relu']
    """

    def __init__(self, rows: list[Row]) -> None:
        self._rows = tuple(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    def __str__(self) -> str:
        width = min(shutil.get_terminal_size((80, 24)).columns, 80)
        return "\n".join(line.rstrip() for line in _lines(self._rows, width))

    __repr__ = __str__


def explain(model: nn.Module, input: Tensor | Sequence[Any] | None = None) -> Explanation:
    """Tell how a model runs through fastcnn: its stages, what runs each, and why other layers run by themselves.

    A model that is not fused is explained as if `fastcnn.fuse` had been called; `model` stays unchanged. With an input
    the model runs once without arithmetic: on tensors without data, in its present mode, under the present backend,
    autocast and gradient mode.

    Args:
        model: any network.
        input: an example input; or its sizes, such as (1, 3, 224, 224), in the dtype and on the device of the model;
            or a tuple of example inputs. Without it shapes, backends and algorithms stay empty.

    Returns:
        A sequence of :class:`Row`: stages, then layers that run by themselves; ``print`` it.

    Raises:
        TypeError: as :func:`fastcnn.fuse`; or `input` is none of these.
        RuntimeError: the model does not run on that input.

    Example:
        >>> import torch, fastcnn
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> with fastcnn.use_backend("torch"):
        ...     print(fastcnn.explain(model, (1, 3, 9, 9)))
        layers  stage      input    runs   why
        0, 1    conv+relu  1x3x9x9  torch  the backend asked for
        2                                  Conv2d last of its row
    """
    with fused(model):
        rows, layers = stages(model) if input is None else stages_run(model, input)
        return Explanation([*rows, *alone(model, layers)])


def _lines(rows: tuple[Row, ...], width: int) -> Iterator[str]:
    """Yield the lines of a table; long names and reasons go on in the next line, shared ones below the table."""
    from rich.console import Console  # only what is printed needs it
    from rich.table import Table
    from rich.text import Text

    alike = Counter((row.layers, row.reason) for row in rows if not row.stage)  # one line for all of a class and reason
    counted = [(row, 1 if row.stage else alike.pop((row.layers, row.reason), 0)) for row in rows]
    cells = [_cells(row, count) for row, count in counted if count]
    ran = any(row.shape for row in rows)
    shown = [0, 1, 2, 3, 4] if ran else [0, 1, 4]
    header = ("layers", "stage", "input", "runs", "why")
    widest = [max(len(row[i]) for row in (header, *cells)) for i in shown[:-1]]
    widest[0] = min(widest[0], MOST_OF_NAMES)
    left = width - sum(widest) - 2 * len(widest)
    cells, notes = _noted(cells, max(left, LEAST_OF_REASONS))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for i in shown:  # in a narrow terminal all columns fold
        table.add_column(header[i], overflow="fold", no_wrap=i < 4 and left >= LEAST_OF_REASONS)
    for row in cells:
        folded = ("\n".join(wrap(row[0], MOST_OF_NAMES)), *row[1:])
        table.add_row(*(Text(folded[i]) for i in shown))
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    yield from capture.get().splitlines()
    for number, note in enumerate(notes, 1):
        yield from ("", *wrap(f"note {number}: {note}", width))


def _noted(cells: list[tuple[str, ...]], width: int) -> tuple[list[tuple[str, ...]], list[str]]:
    """Return the rows with a number for each reason that several share and that does not fit, and those reasons."""
    count = Counter(row[-1] for row in cells)
    notes = [reason for reason, rows in count.items() if rows > 1 and len(reason) > width]
    return [(*row[:-1], f"note {notes.index(row[-1]) + 1}" if row[-1] in notes else row[-1]) for row in cells], notes


def _cells(row: Row, count: int) -> tuple[str, ...]:
    parent, dot, _ = row.names[0].rpartition(".")
    names = ", ".join([row.names[0], *(name.removeprefix(parent + dot) for name in row.names[1:])])
    if count > 1:
        names += f" and {count - 1} more"
    reason = row.reason if row.stage else f"{row.layers[0]} {row.reason}"
    return names, row.stage, "x".join(map(str, row.shape)), row.runs, reason
