"""The README's tables: a block between two comments, written from the committed results."""

from pathlib import Path

from benchmarks.report.cells import compare
from benchmarks.report.content import names
from benchmarks.report.document import rendered
from benchmarks.report.reading import ReportError, Results

BEGIN = "<!-- benchmarks: begin; `python -m benchmarks.report --readme README.md` writes this block -->"
END = "<!-- benchmarks: end -->"


def block(results: Results) -> str:
    """Return the block with its two comments.

    Example:
        >>> "Nothing has been measured yet" in block(Results([], [], []))
        True
    """
    cells, _ = compare(results.rows)
    # What the quick run measured counts only where no run of a whole group did; `quick` comes first.
    once = {cell._replace(group="", rows={})[:-1]: cell for cell in cells}
    return f"{BEGIN}\n\n{rendered('readme', **names(list(once.values())))}\n{END}"


def rewrite(path: Path, results: Results) -> bool:
    """Write the block into a file, and return whether that changed it.

    Raises:
        ReportError: the file cannot be read, or does not have the two comments once each, in order.
    """
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"--readme {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    after = replaced(before, block(results), str(path))
    if after != before:
        path.write_text(after, encoding="utf-8")
    return after != before


def replaced(content: str, new: str, name: str) -> str:
    """Return a text with its block replaced."""
    begin, end = content.find(BEGIN), content.find(END)
    if not 0 <= begin < end or content.count(BEGIN) != 1 or content.count(END) != 1:
        raise ReportError(f"--readme {name}: expected the comments {BEGIN} and {END}, once each and in this order")
    return content[:begin] + new + content[end + len(END) :]
