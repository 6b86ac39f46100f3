"""How a benchmark run goes: what it selects, skips, measures and writes.

    python -m pytest benchmarks --group ops          # or alexnet, vgg, small; several, or all where none is named
    python -m pytest benchmarks --group ops --op lrn # the stages of one operation
    python -m pytest benchmarks --quick              # the headline cells of all groups
    python -m pytest benchmarks --again              # what is measured already too: the shorter median counts

A row is appended to `benchmarks/results/<device>/<group>.jsonl` as soon as it is measured. Running again goes on where
the last run stopped, as long as versions and sources are the same. A failing method gives a row with its error, and
the run goes on.
"""

import contextlib
import faulthandler
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cells, measure, roofline
from benchmarks.cells import GROUPS, PROFILES, Cell
from benchmarks.operations import WORK
from benchmarks.report.cells import Cell as Cells
from benchmarks.report.cells import compare
from benchmarks.report.document import table
from benchmarks.report.reading import read
from benchmarks.report.tables import compact
from benchmarks.results import RESULTS, Results, folder_name, surroundings
from benchmarks.rows import ENDED, OUTCOME, SURROUNDINGS
from fastcnn.tuning.attempts import is_lost

STARTED = "FASTCNN_BENCH_STARTED"  # when a run began that had to start its process anew
QUICK_MINUTES = 4.5
HANGS = 60  # seconds of a row beyond its compilation
MEASURED_SECONDS = {"cuda": (0.06, 0.3), "cpu": (0.3, 1.0)}  # of a row; of a headline row


class Session:
    """One run: the device, the groups, the time it may take, and the results."""

    def __init__(self, config: pytest.Config) -> None:
        default = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(config.getoption("--device") or default)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device: expected a device that is here, got 'cuda' without a usable GPU")
        self.groups: list[str] = config.getoption("--group") or list(GROUPS)
        self.stems: list[str] = config.getoption("--op") or list(WORK)
        self.quick: bool = config.getoption("--quick")
        self.again: bool = config.getoption("--again")
        usual = QUICK_MINUTES if self.quick else PROFILES[self.device.type].minutes
        self.limit = 60 * (config.getoption("--minutes") or usual)
        self.began = float(os.environ.get(STARTED, time.time()))
        self.left = 0
        self.lost = False
        folder = Path(config.getoption("--results")) / folder_name(self.device)
        names = ["quick"] if self.quick else self.groups
        self.results = Results(folder, surroundings(self.device), names)

    def group(self, cell: Cell) -> str:
        """Return the group whose file a row goes to."""
        if self.quick:
            return "quick"
        return next((name for name, models in GROUPS.items() if cell.is_model and cell.subject in models), "ops")

    def is_due(self, cell: Cell) -> bool:
        """Whether to measure a row: it is not there yet, or another time was asked for."""
        return self.again or not self.results.has(self.group(cell), cell)

    def prepare(self) -> None:
        """Set what holds for every row, and measure the ceilings, once."""
        if self.results.ceilings:
            return
        gc.freeze()  # what is imported by now stays: collections between rows need not look at it
        torch.manual_seed(0)
        if self.device.type == "cpu":
            measure.keep_freed_memory()
        if self.device.type == "cuda":  # convolutions have TF32 by default, matrix products only so
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        self.results.ceilings = measure.ceilings(self.device, cells.dtypes(self.device.type))

    def seconds_left(self) -> float:
        """Return how long new work may still be begun."""
        return self.began + self.limit - time.time()


SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    options = parser.getgroup("fastcnn")
    options.addoption(
        "--group", action="append", choices=list(GROUPS), help="a group (several: repeat); all by default"
    )
    options.addoption("--op", action="append", choices=list(WORK), help="an operation of the group ops; all by default")
    options.addoption("--quick", action="store_true", help="the headline cells of all groups")
    options.addoption(
        "--again", action="store_true", help="measure also what is measured already; the shorter median counts"
    )
    options.addoption("--device", choices=["cpu", "cuda"], help="by default the GPU, if there is one")
    options.addoption("--results", default=str(RESULTS), metavar="FOLDER", help="default: benchmarks/results")
    options.addoption("--minutes", type=float, help="begin no new work after so long; running again goes on")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SESSION] = Session(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[SESSION]
    device = session.device.type
    if metafunc.function.__name__ == "bench_models":
        found = [cell for group in session.groups for cell in cells.model_cells(group, device)]
    else:
        stems = session.stems if "ops" in session.groups else []
        found = [cell for stem in stems for cell in cells.op_cells(stem, device)]
    chosen = [cell for cell in found if cell.headline or not session.quick]
    metafunc.parametrize("cell", chosen, ids=str)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what the files hold already, and put first what is due first."""
    session = config.stash[SESSION]
    cells_of = {item: item.callspec.params["cell"] for item in items}  # type: ignore[attr-defined]
    chosen = [item for item, cell in cells_of.items() if isinstance(cell, Cell)]  # else: a file without any
    todo = [item for item in chosen if session.is_due(cells_of[item])]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(todo)])
    items[:] = sorted(todo, key=lambda item: (cells_of[item].due, not cells_of[item].is_model))
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=measure.clock, disable_gc=True))


@pytest.fixture
def row(benchmark: Any, cell: Cell, pytestconfig: pytest.Config) -> Callable[[Any], None]:
    """Return a function that measures the work which a context manager makes of (cell, device), and writes the row."""
    session = pytestconfig.stash[SESSION]

    def measured(prepare: Callable[[Cell, torch.device], contextlib.AbstractContextManager[measure.Work]]) -> None:
        session.prepare()
        if cell.compiling_seconds > session.seconds_left():
            session.left += 1
            pytest.skip("out of time")
        outcome, error = _outcome(benchmark, prepare, cell, session)
        _let_go(cell, session.device)
        if error and _is_refusal(cell, session.device, error):
            pytest.skip(error)
        session.results.add(session.group(cell), cell, outcome)
        if error:  # failed outside the except block: a traceback would keep the tensors of its frames
            session.lost = is_lost(session.device)
            pytest.fail(error, pytrace=False)

    return measured


def _outcome(benchmark: Any, prepare: Any, cell: Cell, session: Session) -> tuple[dict[str, Any], str | None]:
    """Return the measured part of a row, and the error if there was one."""
    floor = roofline.floor(cell.stages, cell.dtype, session.results.ceilings, training=cell.training)
    empty = {**dict.fromkeys(OUTCOME), "iterations": 0, "rounds": 0, "floor_seconds": floor}
    ended = {**empty, "error": ENDED}
    try:
        with (
            session.results.under_way(session.group(cell), cell, ended),
            _watched(cell, session.device),
            prepare(cell, session.device) as work,
        ):
            found = _measured(benchmark, work, cell, session.device)
    except Exception as problem:
        error = " ".join(f"{type(problem).__name__}: {problem}".split())[:300]
        return {**empty, "error": error}, error
    return {**empty, **found}, None


@contextlib.contextmanager
def _watched(cell: Cell, device: torch.device) -> Iterator[None]:
    """End the process where a GPU does not return; the row then is an error of the next run."""
    if device.type == "cuda":
        faulthandler.dump_traceback_later(HANGS + 3 * cell.compiling_seconds, exit=True)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _measured(benchmark: Any, work: measure.Work, cell: Cell, device: torch.device) -> dict[str, Any]:
    seconds = MEASURED_SECONDS[device.type][cell.headline]
    plan = measure.plan(work, device, seconds)
    peak = measure.peak_bytes(work, device) if _has_peak(cell, device) else None
    benchmark.pedantic(work, rounds=plan.rounds, iterations=plan.iterations)
    times = benchmark.stats.stats.data
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    spread = {"median": statistics.median(times), "p20": fifths[0], "p80": fifths[-1]}
    return {"seconds": spread, "iterations": plan.iterations, "rounds": plan.rounds, "peak_bytes": peak}


def _has_peak(cell: Cell, device: torch.device) -> bool:
    """Whether the allocator tells a call's memory: a replayed graph allocates none, and a copy's means nothing.

    On the CPU it takes a profile of the call, which pays for whole models alone.
    """
    graphed = "graph" in cell.method or "max-autotune" in cell.method
    return not graphed and cell.method != "copy" and (device.type == "cuda" or cell.is_model)


def _let_go(cell: Cell, device: torch.device) -> None:
    """Free what a compiled or captured call holds, so that the next row has the memory."""
    if cell.method.startswith("compile"):
        torch._dynamo.reset()
    if cell.is_model or cell.method.startswith("compile"):
        gc.collect()
        if device.type == "cuda":
            with contextlib.suppress(RuntimeError):  # a lost context is noticed after the row is written
                torch.cuda.empty_cache()


def _is_refusal(cell: Cell, device: torch.device, error: str) -> bool:
    """Whether a forced backend said that it does not serve this work, which is no failure."""
    choice = cells.forced(device.type, convolutions=True).get(cell.method) or ("",)
    return f"backend '{choice[0]}'" in error


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Stop after an error that no further row could survive; the run goes on in a new process."""
    session = item.config.stash[SESSION]
    if session.lost:
        item.session.shouldstop = "the GPU is unusable after an error: the run goes on in a new process"


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Call it a success where the files held every row already."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    names = {"quick"} if session.quick else set(session.groups)
    rows = [row for row in session.results.rows.values() if row["group"] in names]
    terminalreporter.section("times")
    for line in table(compact(_cells(session, names)), aligned=True).splitlines():
        terminalreporter.write_line(line)
    failed = sum(row["error"] is not None for row in rows)
    terminalreporter.write_line(f"{len(rows)} rows in {session.results.folder}, {failed} of them errors")
    if session.left:
        terminalreporter.write_line(f"out of time with {session.left} methods left: run again to go on")


def _cells(session: Session, groups: set[str]) -> list[Cells]:
    """Return what the files hold of the groups, measured in this run's surroundings."""
    files = [file for group in sorted(groups) if (file := session.results.folder / f"{group}.jsonl").exists()]
    found, _ = compare(read(files).rows)
    current = tuple((name, session.results.current[name]) for name in SURROUNDINGS)
    return [cell for cell in found if cell.run.surroundings == current]


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """Start the run anew where the GPU was lost: it goes on after the row that failed, within the same time."""
    session = config.stash.get(SESSION, None)  # None where the options were wrong
    if session and session.lost:
        os.environ[STARTED] = str(session.began)
        capture = config.pluginmanager.getplugin("capturemanager")
        if capture:
            capture.stop_global_capturing()
        arguments = [sys.executable, "-m", "pytest", *config.invocation_params.args]
        os.execv(sys.executable, arguments)
