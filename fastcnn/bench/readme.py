"""The README's tables: a block between two comments, written from the committed results."""

from pathlib import Path

from fastcnn.bench import tables
from fastcnn.bench.cells import Cell, compare
from fastcnn.bench.content import NO_GPU, sentence
from fastcnn.bench.document import Block, Heading, Note, Paragraph, markdown
from fastcnn.bench.reading import Results
from fastcnn.console.errors import UserError
from fastcnn.console.files import atomic_write

BEGIN = "<!-- benchmarks: begin; `fastcnn bench report --readme README.md` writes this block -->"
END = "<!-- benchmarks: end -->"
NOTHING = "Nothing has been measured yet: there are no results of the benchmarks, neither of a GPU nor of a CPU."
LEGEND = (
    "The best baseline is the fastest method without fastcnn that was measured in the same run: eager, channels_last, "
    "torch.compile, cuDNN's fusion, a CUDA graph. Below 1.00x fastcnn is slower; even: the spreads (20th to 80th "
    "percentile) overlap."
)


def block(results: Results) -> str:
    """Return the block with its two comments.

    Example:
        >>> "Nothing has been measured yet" in block(Results([], []))
        True
    """
    cells, _ = compare(results.rows)
    # What the quick run measured counts only where no run of a whole group did; `quick` comes first.
    once = {cell._replace(group="", rows={})[:-1]: cell for cell in cells}
    return f"{BEGIN}\n\n{markdown(_blocks(list(once.values())))}\n{END}"


def _blocks(cells: list[Cell]) -> list[Block]:
    if not cells:
        return [Note(NOTHING)]
    found: list[Block] = [] if any(cell.run.is_gpu for cell in cells) else [Note(NO_GPU)]
    found.append(Paragraph(LEGEND))
    for device in dict.fromkeys(cell.device for cell in cells):
        found.extend(_device(device, [cell for cell in cells if cell.device == device]))
    return found


def _device(device: str, cells: list[Cell]) -> list[Block]:
    """Return the headline cells of a device, where there are any, and the count of all."""
    shown = [cell for cell in cells if cell.headline] or cells
    count = f"{sentence(cells)} The table holds {len(shown)} of the {len(cells)} cells measured."
    return [Heading(3, device), Paragraph(_versions(shown)), tables.compact(shown), Paragraph(count)]


def _versions(cells: list[Cell]) -> str:
    found: dict[str, list[str]] = {name: [] for name in ("torch", "triton", "cuda", "fastcnn", "commit", "tf32")}
    for cell in cells:
        for name, value in cell.run.surroundings:
            if name in found and value is not None and value not in found[name]:
                found[name].append(value)
    return ", ".join(f"{name} {' and '.join(values)}" for name, values in found.items() if values) + "."


def rewrite(path: Path, results: Results) -> bool:
    """Write the block into a file, and return whether that changed it.

    Raises:
        UserError: the file cannot be read, or does not have the two comments once each, in order.
    """
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--readme {path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    after = replaced(before, block(results), str(path))
    if after != before:
        atomic_write(path, lambda file: file.write(after.encode()))
    return after != before


def replaced(content: str, new: str, name: str) -> str:
    """Return a text with its block replaced."""
    begin, end = content.find(BEGIN), content.find(END)
    if not 0 <= begin < end or content.count(BEGIN) != 1 or content.count(END) != 1:
        raise UserError(f"--readme {name}: expected the comments {BEGIN} and {END}, once each and in this order")
    return content[:begin] + new + content[end + len(END) :]
