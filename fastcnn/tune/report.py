"""What ``fastcnn tune`` shows: the candidates of each stage with their times and parity, the winners, and a summary."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from fastcnn.tune.run import MODES, Result
from fastcnn.tuning.candidates import STOCK
from fastcnn.tuning.parity import Trial
from fastcnn.tuning.timing import MARGIN

NAME_WIDTH, TIME_WIDTH = 36, 17  # both modes fit into 80 columns


def table(results: Sequence[Result]) -> Group:
    """Build the tables: one for each stage, with a row for each candidate and a column for each mode."""
    groups = [list(group) for _, group in groupby(results, key=lambda result: id(result.stage))]
    legend = ["parity: the largest error as a part of what is allowed; *: the winner, which auto takes"]
    fastest = [min(trial.seconds for trial in result.trials if trial.seconds) for result in results]
    if any(seconds != result.winner.seconds and not result.too_noisy for seconds, result in zip(fastest, results)):
        legend.append(f"a candidate that is faster by less than {MARGIN:.0%} does not take stock's place")
    return Group(*(part for group in groups for part in _stage(group)), *(f"[dim]{line}[/]" for line in legend))


def _stage(group: list[Result]) -> Iterator[RenderableType]:
    stage, trials = group[0].stage, group[0].trials
    yield f"[bold]{stage.op}[/] {stage}"
    shown = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    shown.add_column("", min_width=NAME_WIDTH, overflow="fold")
    for result in group:
        shown.add_column(result.mode, justify="right", no_wrap=True, min_width=TIME_WIDTH)
    shown.add_column("parity", justify="right", no_wrap=True)
    for index, trial in enumerate(trials):
        shown.add_row(f"  {trial.candidate}", *(_time(result, index) for result in group), _parity(trial))
    shown.add_row("  [dim]noise[/]", *(f"[dim]{result.noise:.1%}  [/]" for result in group), "")
    yield shown
    for result in group:
        if result.too_noisy:
            yield f"  [yellow]{result.mode}: too noisy, stock kept[/]"
    for trial in trials:
        if said := trial.refused or trial.problem:
            style = "bold red" if trial.refused else "dim"
            yield f"  [{style}]{trial.candidate}: {escape(said)}[/]"
    yield ""


def _time(result: Result, index: int) -> str:
    trial = result.trials[index]
    if trial.seconds is None:
        return ""
    star = " *" if trial.candidate == result.winner.candidate else "  "
    return f"{duration(trial.seconds)} {result.stock / trial.seconds:5.2f}x{star}"


def _parity(trial: Trial) -> str:
    if trial.candidate == STOCK:
        return ""
    if trial.refused:
        return "[bold red]FAILED[/]"
    return "n/a" if trial.problem else f"{trial.parity:.2f}"


def duration(seconds: float) -> str:
    """Write a time in milliseconds or microseconds."""
    return f"{seconds * 1e3:.4g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.4g} µs"


def summary(results: Sequence[Result]) -> list[str]:
    """Return the closing lines: what was gained, and which candidates were refused."""
    lines = []
    for mode in MODES:
        mine = [result for result in results if result.mode == mode]
        if not mine:
            continue
        stock, tuned = sum(result.stock for result in mine), sum(result.winner.seconds or 0.0 for result in mine)
        won = sum(result.winner.candidate != STOCK for result in mine)
        lines.append(
            f"{mode}: kernels win {won} of {len(mine)} stages; all stages {duration(stock)} stock, "
            f"{duration(tuned)} tuned ({stock / tuned:.2f}x)"
        )
    if noisy := sum(result.too_noisy for result in results):
        lines.append(f"{noisy} of {len(results)} too noisy, stock kept: tune again while the machine is idle")
    refused = {
        (result.stage.op, str(result.stage), trial.candidate)
        for result in results
        for trial in result.trials
        if trial.refused
    }
    if refused:
        lines.append(f"{len(refused)} candidates FAILED: they are not stored, and the table says why")
    return lines
