"""``fastcnn bench report``: reads result files, writes the report and the README's tables."""

import functools
import importlib.util
from pathlib import Path
from typing import Annotated, BinaryIO

import typer

from fastcnn.bench import content, document, readme
from fastcnn.bench.content import NO_CHARTS, Charts
from fastcnn.bench.reading import Results, read
from fastcnn.console.errors import UserError
from fastcnn.console.files import atomic_write
from fastcnn.console.options import Debug

RESULTS = Path("benchmarks/results")
OUTPUT = Path("runs/report")
SHOWN_PROBLEMS = 10

bench = typer.Typer(no_args_is_help=True)


@bench.callback()
def bench_command() -> None:
    """What the benchmarks measured, as tables and charts.

    Example: fastcnn bench report
    """


@bench.command()
def report(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER|FILES", help="Result files, or folders of them.", show_default=str(RESULTS)),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the report goes.", show_default=str(OUTPUT)),
    ] = None,
    into_readme: Annotated[
        Path | None,
        typer.Option("--readme", metavar="FILE", help="Rewrite the tables in this file; without --output, only that."),
    ] = None,
    debug: Debug = False,
) -> None:
    """Turn benchmark results into report.md, charts and report.html.

    Lines that cannot be read are told and skipped.

    Example: fastcnn bench report

    Example: fastcnn bench report benchmarks/results/h200 --output report

    Example: fastcnn bench report --readme README.md
    """
    results = _read(places, may_be_empty=into_readme is not None and output is None)
    if into_readme is not None:
        changed = readme.rewrite(into_readme, results)
        typer.echo(f"{into_readme}: {'tables written' if changed else 'tables are up to date'}")
    if into_readme is None or output is not None:
        _write(results, output or OUTPUT)


def _read(places: list[Path] | None, *, may_be_empty: bool) -> Results:
    """Read results; tell which lines were skipped."""
    chosen = places or [RESULTS]
    results = Results([], []) if may_be_empty and not places and not RESULTS.exists() else read(chosen)
    for problem in results.problems[:SHOWN_PROBLEMS]:
        typer.echo(f"skipped {problem}", err=True)
    if results.problems:
        typer.echo(f"skipped {len(results.problems)} lines, read {len(results.rows)} rows", err=True)
    if not results.rows and not may_be_empty:
        raise UserError(f"no benchmark rows in {', '.join(map(str, chosen))}: expected *.jsonl files of the benchmarks")
    return results


def _write(results: Results, folder: Path) -> None:
    images: dict[str, bytes] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before drawing, which takes a while
        blocks = content.report(results, _charts(images))
        texts = {"report.md": document.markdown(blocks), "report.html": document.page(blocks, images)}
        for name, data in (images | {name: each.encode() for name, each in texts.items()}).items():
            atomic_write(folder / name, functools.partial(_put, data))
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {folder / 'report.html'}, {folder / 'report.md'} and {len(images)} charts")


def _put(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def _charts(images: dict[str, bytes]) -> Charts:
    """Return what draws charts, or nothing where matplotlib is missing: the tables do without."""
    if importlib.util.find_spec("matplotlib") is None:
        typer.echo("note: no charts: matplotlib is not installed: pip install 'fastcnn[train]'", err=True)
        return NO_CHARTS
    from fastcnn.bench.charts import drawn

    return drawn(images)
