"""What mkdocs adds to the pages in this folder: pictures, the benchmark report, the command line's reference."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from docs.pictures import drawn

RESULTS = Path("benchmarks/results")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated files."""
    for generated in (pictures(), report(), command_line()):
        for name, content in generated:
            files.append(File.generated(config, name, content=content))
    return files


def pictures() -> Iterator[tuple[str, str | bytes]]:
    """Yield every picture, for light and dark pages."""
    for name, svg in drawn():
        yield f"pictures/{name}.svg", svg


def report() -> Iterator[tuple[str, str | bytes]]:
    """Yield what ``fastcnn bench report`` makes of the committed results: the page `benchmarks.md` and its charts."""
    with tempfile.TemporaryDirectory() as folder:
        run("-m", "fastcnn", "bench", "report", str(RESULTS), "--output", folder)
        for file in sorted(Path(folder).iterdir()):
            if file.suffix == ".png":
                yield file.name, file.read_bytes()
        page = (Path(folder) / "report.md").read_text(encoding="utf-8")
    yield "benchmarks.md", page


def command_line() -> Iterator[tuple[str, str | bytes]]:
    """Yield the reference of the command line, which typer writes."""
    yield "api/command-line.md", run("-m", "typer", "fastcnn.cli", "utils", "docs", "--name", "fastcnn")


def run(*arguments: str) -> str:
    """Return what a Python command prints."""
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True).stdout
