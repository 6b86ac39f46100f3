"""What a line of a result file holds, and what its method is: described here for those who write and who read."""

from types import NoneType
from typing import Any, NamedTuple

TEXT, OPTIONAL_TEXT, OPTIONAL_NUMBER = (str,), (str, NoneType), (int, float, NoneType)
Kinds = dict[str, tuple[type, ...]]

# What rows were measured on. Rows whose runs differ in any of these are neither compared, nor stand for each other.
SURROUNDINGS: Kinds = {
    "device": TEXT,
    "driver": OPTIONAL_TEXT,
    "torch": TEXT,
    "triton": OPTIONAL_TEXT,
    "cuda": OPTIONAL_TEXT,
    "fastcnn": TEXT,
    "commit": TEXT,
    "tuning": OPTIONAL_TEXT,
    "python": TEXT,
    "threads": (int,),
    "tf32": TEXT,
}
CELL = ("subject", "case", "mode", "dtype", "layout")
ROW_KEY = (*CELL, "method")
OUTCOME: Kinds = {
    "seconds": (dict, NoneType),
    "iterations": (int,),
    "rounds": (int,),
    "peak_bytes": OPTIONAL_NUMBER,
    "floor_seconds": OPTIONAL_NUMBER,
    "error": OPTIONAL_TEXT,
}
# By the kind of a line: its keys and their types.
FIELDS: dict[str, Kinds] = {
    "run": {"id": TEXT, **SURROUNDINGS, "ceilings": (dict,)},
    "row": {**dict.fromkeys(("run", "group", *ROW_KEY), TEXT), **OUTCOME},
}
QUANTILES = ("p20", "median", "p80")
ENDED = "it ended the process, or hung"  # the error of a row during which a run ended

EAGER, AGAIN, FASTCNN = "eager", "eager again", "fastcnn"
# A copy does other work, and the repetition is there to show the noise.
NOT_BASELINES = ("copy", AGAIN)


def is_ours(method: str) -> bool:
    """Whether a method runs fastcnn.

    Example:
        >>> is_ours("fastcnn triton-epilogue"), is_ours("cuda graph")
        (True, False)
    """
    return method.split()[:1] == [FASTCNN]


def is_baseline(method: str) -> bool:
    """Whether a method does the same work without fastcnn.

    Example:
        >>> is_baseline("cuda graph"), is_baseline("copy")
        (True, False)
    """
    return not is_ours(method) and method not in NOT_BASELINES


class Run(NamedTuple):
    """One start of the benchmarks: what was measured on, and the ceilings measured then."""

    id: str
    surroundings: tuple[tuple[str, Any], ...]
    ceilings: tuple[tuple[str, float], ...]

    @property
    def device(self) -> str:
        """The name of the GPU or CPU."""
        return dict(self.surroundings)["device"]

    @property
    def is_gpu(self) -> bool:
        """Whether it ran on a GPU: only there does torch's CUDA version count."""
        return dict(self.surroundings)["cuda"] is not None


class Seconds(NamedTuple):
    """The time of a call: 20th percentile, median and 80th percentile over the rounds."""

    p20: float
    median: float
    p80: float


class Row(NamedTuple):
    """One method of one cell: a time or an error."""

    run: Run
    group: str
    subject: str
    case: str
    mode: str
    dtype: str
    layout: str
    method: str
    seconds: Seconds | None
    peak_bytes: float | None
    floor_seconds: float | None
    error: str | None
