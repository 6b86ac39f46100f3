"""What mkdocs adds to the pages in this folder: pictures, the benchmark report, the command line's reference."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from docs.pictures import drawn

# Tables of ten columns need the whole window; on a telephone they scroll, and their first column does not break apart.
WIDE = """---
hide: [navigation, toc]
---

<style>
.md-grid { max-width: 96rem; }
.md-typeset table:not([class]) td:first-child { min-width: 8rem; }
</style>

"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated files."""
    with tempfile.TemporaryDirectory() as folder:
        reporting = start("-m", "benchmarks.report", config.extra["results"], "--output", folder)
        # Drawn while the report is.
        generated = [*pictures(), ("api/command-line.md", command_line())]
        output_of(reporting)
        generated += report(Path(folder))
    for name, content in generated:
        files.append(File.generated(config, name, content=content))
    return files


def pictures() -> Iterator[tuple[str, str | bytes]]:
    """Yield every picture, for light and dark pages."""
    for name, svg in drawn():
        yield f"pictures/{name}.svg", svg


def report(folder: Path) -> Iterator[tuple[str, str | bytes]]:
    """Yield what `benchmarks.report` made of the results: the page `benchmarks.md` and its charts."""
    for chart in sorted(folder.glob("*.png")):
        yield chart.name, chart.read_bytes()
    yield "benchmarks.md", WIDE + (folder / "report.md").read_text(encoding="utf-8")


def command_line() -> str:
    """Return the reference of the command line, which typer writes."""
    return output_of(start("-m", "typer", "fastcnn.cli", "utils", "docs", "--name", "fastcnn"))


def start(*arguments: str) -> subprocess.Popen[str]:
    """Start Python on a command."""
    return subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for a process and return what it printed."""
    printed, problem = process.communicate()
    if process.returncode:
        raise PluginError(f"{process.args}: {problem}")
    return printed
