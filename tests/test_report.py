"""``python -m benchmarks.report``: what is read and skipped, numbers and verdicts, the page, the README's tables."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jinja2", reason="the report needs the extra report")
pytest.importorskip("markdown", reason="the report needs the extra report")
pytest.importorskip("matplotlib", reason="the report needs the extra report")

from typer.testing import CliRunner

from benchmarks.report import content, readme, tables
from benchmarks.report.__main__ import app
from benchmarks.report.cells import compare, units
from benchmarks.report.reading import ReportError, Results, read

ROOT = Path(__file__).parents[1]
CPU = {
    "kind": "run",
    "id": "2026-01-02T03:04:05Z-ab12",
    "device": "Some CPU",
    "driver": None,
    "torch": "2.14.1",
    "triton": None,
    "cuda": None,
    "fastcnn": "0.1.0",
    "commit": "0123456789ab",
    "tuning": None,
    "python": "3.11.7",
    "threads": 2,
    "tf32": "ieee",
    "ceilings": {"float32 matmul FLOP/s": 2e11, "copy B/s": 1e10},
}
GPU = CPU | {"id": "2026-01-02T03:04:05Z-cd34", "device": "NVIDIA H200", "driver": "580", "cuda": "13.0"}
# Seconds of each method. AlexNet wins; VGG-16 loses against the graph, but neither against eager nor against the copy.
TIMES = {
    "alexnet": {"eager": 0.004, "eager again": 0.00404, "compile": 0.003, "fastcnn": 0.002, "fastcnn cpu": 0.0015},
    "vgg16": {"eager": 0.010, "eager channels_last": 0.009, "cuda graph": 0.004, "copy": 0.001, "fastcnn": 0.005},
}


def row(method: str, time: float | None, *, run: dict[str, Any] = CPU, **changes: Any) -> dict[str, Any]:
    spread = time and {"median": time, "p20": 0.99 * time, "p80": 1.01 * time}
    line = {"kind": "row", "run": run["id"], "group": "alexnet", "subject": "alexnet", "case": "batch 16"}
    line |= {"mode": "training", "dtype": "float32", "layout": "nchw", "method": method, "seconds": spread}
    line |= {"iterations": 1, "rounds": 5, "peak_bytes": 2**20, "floor_seconds": 0.001}
    return {**line, "error": None if time else "RuntimeError: no | luck <here>", **changes}


def rows_of(model: str, run: dict[str, Any] = CPU, **changes: Any) -> list[dict[str, Any]]:
    group = {"alexnet": "alexnet", "vgg16": "vgg"}[model]
    return [row(name, time, run=run, subject=model, group=group, **changes) for name, time in TIMES[model].items()]


def write(path: Path, *lines: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of two models' results with one failed method."""
    write(tmp_path / "in" / "cpu" / "alexnet.jsonl", CPU, *rows_of("alexnet"), row("compile max-autotune", None))
    write(tmp_path / "in" / "cpu" / "vgg.jsonl", CPU, *rows_of("vgg16"))
    return tmp_path / "in"


def main(*arguments: object) -> tuple[int, str, str]:
    """Run the command; return its exit status and what it wrote to both streams."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.stdout, result.stderr


def markdown_of(place: Path) -> str:
    return content.report(read([place]))


def line_with(text: str, *parts: str) -> list[str]:
    """Return the cells of the only table line that begins with the parts; what stands out is bold."""
    found = [line for line in text.splitlines() if line.startswith("| " + " | ".join(parts) + " |")]
    assert len(found) == 1, found
    return [cell.strip() for cell in found[0].strip("|").split("|")]


def section(text: str, heading: str) -> str:
    """Return what stands under a heading, up to the next of its level or above."""
    level = heading.split()[0]
    return re.split(rf"^#{{1,{len(level)}}} ", text.split(f"{heading}\n")[1], flags=re.MULTILINE)[0]


def test_line_of_a_win(folder: Path) -> None:
    overview = section(markdown_of(folder), "### alexnet: whole models, float32")
    cells = line_with(overview.split("Peak memory")[0], "alexnet, batch 16", "training")
    assert cells[2:] == [
        "1.50x faster",
        "2.00x",
        "2.00 ms",
        "compile 3.00 ms",
        "4.00 ms",
        "50 %",
        "cpu 1.50 ms",
        "nchw",
    ]


def test_loss_is_shown_as_plainly(folder: Path) -> None:
    text = markdown_of(folder)
    cells = ["vgg16, batch 16", "training", "**0.80x slower**", "2.00x", "5.00 ms", "cuda graph 4.00 ms", "10.0 ms"]
    assert line_with(section(text, "## Where fastcnn is slower than the best baseline"), "vgg16, batch 16")[:7] == cells
    assert line_with(section(text, "### vgg: whole models, float32").split("Peak")[0], "vgg16, batch 16")[:7] == cells
    assert "faster than the best baseline in 1, even with it in 0, and slower in 1." in text


def test_copy_and_repetition_are_no_baselines(tmp_path: Path) -> None:
    again = row("eager again", 0.0001)
    (cell,), _ = compare(read([write(tmp_path / "a.jsonl", CPU, *rows_of("alexnet"), again)]).rows)
    assert cell.best_baseline == "compile"
    (cell,), _ = compare(read([write(tmp_path / "b.jsonl", CPU, *rows_of("vgg16"))]).rows)
    assert cell.best_baseline == "cuda graph"


def test_every_method_has_its_row(folder: Path) -> None:
    text = section(markdown_of(folder), "## Every row: Some CPU")
    for model, times in TIMES.items():
        shown = [line.split(" | ")[2] for line in text.splitlines() if line.startswith(f"| {model}, batch 16 |")]
        failed = ["compile max-autotune"] if model == "alexnet" else []
        assert [name.removesuffix(" (best baseline)") for name in shown] == sorted(
            times, key=lambda m: times[m]
        ) + failed
        assert sum(name.endswith("(best baseline)") for name in shown) == 1


def test_overlapping_spreads_are_even(tmp_path: Path) -> None:
    lines = [row("eager", 0.001), row("fastcnn", 0.00101)]
    (cell,), _ = compare(read([write(tmp_path / "a.jsonl", CPU, *lines)]).rows)
    assert cell.verdict == "even"
    assert tables.slower([cell]) is not None, "even cells with a ratio below 1 are listed too"


def test_errors_are_listed(folder: Path) -> None:
    text = markdown_of(folder)
    assert "11 rows in 2 cells, 1 of them errors." in text
    assert "| compile max-autotune | RuntimeError: no \\| luck &lt;here> |" in section(text, "### Errors")


def test_what_is_unmeasured_is_said(folder: Path, tmp_path: Path) -> None:
    assert content.NO_GPU in markdown_of(folder).split("## ")[0], "at the top"
    unmeasured = section(markdown_of(folder), "## What is not measured")
    assert "Some CPU: the groups ops, small are not measured as a whole." in unmeasured
    gpu = write(tmp_path / "h200.jsonl", GPU, row("eager", 0.001, run=GPU), row("fastcnn", None, run=GPU))
    text = markdown_of(gpu)
    assert content.NO_GPU not in text
    assert "NVIDIA H200: without a time of fastcnn: alexnet, batch 16, training, float32, nchw." in text


def test_surroundings_noise_and_memory(folder: Path) -> None:
    text = markdown_of(folder)
    for name, value in {"commit": "0123456789ab", "tf32": "ieee", "ceiling: copy": "10.0 GB/s"}.items():
        assert line_with(text, name)[1] == value
    assert "Noise: stock measured twice in 1 cells differs by 1.0 % in the median" in text
    memory = section(text, "### alexnet: whole models, float32").split("Peak memory")[1]
    assert line_with(memory, "alexnet, batch 16")[2:] == ["100 %", "1.00 MiB", "eager 1.00 MiB", "1.00 MiB", "nchw"]


def test_times_of_two_commits_do_not_mix(tmp_path: Path) -> None:
    later = CPU | {"id": "2026-02-02T03:04:05Z-ef56", "commit": "ba9876543210"}
    lines = [CPU, *rows_of("alexnet"), later, row("eager", 0.006, run=later), row("fastcnn", 0.003, run=later)]
    (cell,), replaced = compare(read([write(tmp_path / "a.jsonl", *lines)]).rows)
    assert set(cell.rows) == {"eager", "fastcnn"}
    assert (cell.best_baseline, cell.speedup("fastcnn", "eager"), replaced) == ("eager", 2.0, 5)


def test_stages_stand_in_the_order_of_the_model(tmp_path: Path) -> None:
    names = ["classifier.1 8x4 -> 4", "features.10 8x4x6x6, pool 2/2", "features.2 8x4x9x9, pool 2/2"]
    subjects = ["linear_relu", "max_pool", "max_pool"]
    lines = [
        row("fastcnn", 0.001, group="ops", mode="forward", subject=subject, case=f"alexnet {name}")
        for subject, name in zip(subjects, names)
    ]
    cells, _ = compare(read([write(tmp_path / "ops.jsonl", CPU, *lines)]).rows)
    (unit,) = units(cells)
    assert [cell.layer for cell in unit.cells] == ["features.2", "features.10", "classifier.1"]


def test_call_costs_have_a_table(folder: Path) -> None:
    found = {"torch": "2.14.1", "python": "3.11.7", "rows": []}
    for front in (8.0, 12.5):
        found["rows"].append(
            {"what": "lrn", "backend": "cpu", "mode": "graph", "stock": 10.0, "front": front, "python": 30.0}
        )
    write(folder / "cpu" / "call_cost.json", found)
    table = section(markdown_of(folder), "## What a call costs the processor")
    assert "| lrn | graph, cpu | 0.80 | 10.0 µs | 8.00 µs | 30.0 µs |" in table
    assert "| lrn | graph, cpu | **1.25** | 10.0 µs | 12.5 µs | 30.0 µs |" in table
    del found["rows"][0]["front"]
    write(folder / "cpu" / "call_cost.json", found)
    assert "KeyError: 'front'" in section(markdown_of(folder), "## Skipped lines")


BAD_LINES: dict[str, tuple[object, str]] = {
    "cut off": ('{"kind": "row", "run": ', "not JSON"),
    "no object": ("[1, 2]", "kind: expected 'run' or 'row', got [1, 2]"),
    "another schema": ({"benchmarks": []}, "kind: expected 'run' or 'row', got None"),
    "unhashable kind": ({"kind": []}, "kind: expected 'run' or 'row', got []"),
    "unknown run": (row("eager", 1.0, run={"id": "else"}), "run: expected one that this file opens, got 'else'"),
    "no method": ({key: value for key, value in row("eager", 1.0).items() if key != "method"}, "method: expected"),
    "text for a number": (row("eager", 1.0, rounds="5"), "rounds: expected int, got '5'"),
    "no time, no error": (row("eager", None, error=None), "seconds, error: expected one of them, got none"),
    "negative time": (row("eager", -1.0), "seconds.p20: expected a positive number, got -0.99"),
    "no size": (json.dumps(row("eager", 1.0, peak_bytes=float("nan"))), "peak_bytes: expected a positive number"),
    "endless time": (json.dumps(row("eager", float("inf"))), "seconds.p20: expected a positive number, got inf"),
    "percentiles the wrong way": (
        row("eager", 1.0, seconds={"median": 1.0, "p20": 2.0, "p80": 3.0}),
        "seconds: expected p20 <= median <= p80",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_bad_line_is_told_with_its_place_and_skipped(name: str, tmp_path: Path) -> None:
    line, reason = BAD_LINES[name]
    path = write(tmp_path / "a.jsonl", CPU, row("eager", 0.1), line, row("fastcnn", 0.1))
    results = read([path])
    assert [each.method for each in results.rows] == ["eager", "fastcnn"]
    assert [str(problem).startswith(f"{path}:3: {reason}") for problem in results.problems] == [True]
    text = content.report(results)
    assert "1 lines of the result files could not be read" in text
    assert f"{path}:3" in section(text, "## Skipped lines")


class Loads(HTMLParser):
    """Collects what a page would load, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "iframe", "object")
        self.loaded += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_command_writes_markdown_charts_and_a_page_that_loads_nothing(folder: Path, tmp_path: Path) -> None:
    status, said, _ = main(folder, "--output", tmp_path / "out")
    assert status == 0
    assert f"wrote {tmp_path / 'out' / 'report.html'}" in said
    names = {path.name for path in (tmp_path / "out").iterdir()}
    charts = {name for name in names if name.endswith(".png")}
    assert names - charts == {"report.html", "report.md"}
    for kind in ("speedups", "methods", "memory"):
        assert any(name.endswith(f"{kind}.png") for name in charts)
    text = (tmp_path / "out" / "report.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert set(linked) == charts
    html = (tmp_path / "out" / "report.html").read_text()
    page = Loads()
    page.feed(html)
    assert sum(each.startswith("data:image/png;base64,") for each in page.loaded) == len(charts)
    assert all(each.startswith(("data:image/png;base64,", "#")) for each in page.loaded)
    assert "url(" not in html
    assert "@import" not in html
    assert "no | luck <here>" in page.text
    assert html.count("<table>") == len(re.findall(r"^\| -", text, flags=re.MULTILINE))


MISTAKES = {
    "missing folder": (["nowhere"], "nowhere: no such file or folder of benchmark results"),
    "empty folder": (["empty"], "no benchmark rows in empty: expected *.jsonl"),
    "output is a file": (["good", "--output", "file"], "--output file: cannot be written"),
    "README without the comments": (["good", "--readme", "file"], "--readme file: expected the comments"),
    "missing README": (["good", "--readme", "nowhere"], "--readme nowhere: cannot be read"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("text\n")
    write(tmp_path / "good" / "a.jsonl", CPU, row("eager", 0.1))
    arguments, message = MISTAKES[name]
    status, _, said = main(*arguments)
    assert status == 1
    (line,) = said.splitlines()
    assert line.startswith(f"error: {message}")
    assert (tmp_path / "file").read_text() == "text\n"


def test_help_has_an_example() -> None:
    status, said, _ = main("--help")
    assert status == 0
    assert "Example: python -m benchmarks.report" in said


def test_readme_holds_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text()
    folder = ROOT / "benchmarks" / "results"
    results = read([folder] if folder.exists() else [])
    fresh = readme.replaced(text, readme.block(results), "README.md")
    assert text == fresh, "run: python -m benchmarks.report --readme README.md"


def test_stale_readme_is_rewritten(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n\n{readme.block(Results([], [], []))}\n\nafter\n")
    assert "Nothing has been measured yet" in path.read_text()
    assert main(folder, "--readme", path)[0] == 0
    text = path.read_text()
    assert "Nothing has been measured yet" not in text
    assert line_with(text, "alexnet, batch 16, training")[1:3] == ["1.50x faster", "2.00x"]
    assert text.count("\n| alexnet") == 1, "headline cells are those with eager twice"
    assert "slower in 1." in text
    assert text.startswith("before\n\n<!--")
    assert text.endswith("-->\n\nafter\n")
    assert "tables are up to date" in main(folder, "--readme", path)[1]
    assert path.read_text() == text


def test_quick_cells_give_way_to_those_of_whole_groups(tmp_path: Path) -> None:
    quick = write(
        tmp_path / "quick.jsonl", CPU, row("eager", 0.003, group="quick"), row("fastcnn", 0.001, group="quick")
    )
    whole = write(tmp_path / "alexnet.jsonl", CPU, *rows_of("alexnet"))
    assert line_with(readme.block(read([quick])), "alexnet, batch 16, training")[1] == "3.00x faster"
    assert line_with(readme.block(read([quick, whole])), "alexnet, batch 16, training")[1] == "1.50x faster"


def test_readme_comments_must_be_there_once() -> None:
    with pytest.raises(ReportError, match="once each and in this order"):
        readme.replaced(f"{readme.END}\n{readme.BEGIN}", "", "README.md")
