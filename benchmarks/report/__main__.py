"""``python -m benchmarks.report``: reads result files, writes the report and the README's tables."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.report import content, readme
from benchmarks.report.charts import Drawn
from benchmarks.report.document import page
from benchmarks.report.reading import ReportError, Results, read
from benchmarks.results import RESULTS

OUTPUT = Path("runs/report")
SHOWN_PROBLEMS = 10

app = typer.Typer(add_completion=False)


@app.command()
def main(
    places: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FOLDER|FILES", help="Result files, or folders of them.", show_default="the committed"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the report goes.", show_default=str(OUTPUT)),
    ] = None,
    into_readme: Annotated[
        Path | None,
        typer.Option("--readme", metavar="FILE", help="Rewrite the tables in this file; without --output, only that."),
    ] = None,
) -> None:
    """Turn benchmark results into report.md, charts and report.html.

    Lines that cannot be read are told and skipped.

    Example: python -m benchmarks.report benchmarks/results/h200 --output report

    Example: python -m benchmarks.report --readme README.md
    """
    try:
        results = _read(places, may_be_empty=into_readme is not None and output is None)
        if into_readme is not None:
            changed = readme.rewrite(into_readme, results)
            typer.echo(f"{into_readme}: {'tables written' if changed else 'tables are up to date'}")
        if into_readme is None or output is not None:
            _write(results, output or OUTPUT)
    except ReportError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _read(places: list[Path] | None, *, may_be_empty: bool) -> Results:
    """Read results; tell which lines were skipped."""
    chosen = places or [RESULTS]
    results = Results([], [], []) if may_be_empty and not places and not RESULTS.exists() else read(chosen)
    for problem in results.problems[:SHOWN_PROBLEMS]:
        typer.echo(f"skipped {problem}", err=True)
    if results.problems:
        typer.echo(f"skipped {len(results.problems)} lines, read {len(results.rows)} rows", err=True)
    if not results.rows and not may_be_empty:
        names = ", ".join(map(str, chosen))
        raise ReportError(f"no benchmark rows in {names}: expected *.jsonl files of the benchmarks")
    return results


def _write(results: Results, folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)  # before drawing, which takes a while
        charts = Drawn()
        markdown = content.report(results, charts)
        for name, data in charts.images.items():
            (folder / name).write_bytes(data)
        (folder / "report.md").write_text(markdown, encoding="utf-8")
        (folder / "report.html").write_text(page(markdown, charts.images), encoding="utf-8")
    except OSError as error:
        raise ReportError(f"--output {folder}: cannot be written: {error.strerror}") from error
    typer.echo(f"wrote {folder / 'report.html'}, {folder / 'report.md'} and {len(charts.images)} charts")


if __name__ == "__main__":
    sys.exit(app(prog_name="python -m benchmarks.report"))
