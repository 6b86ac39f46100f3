"""A document as a list of blocks, written as Markdown or as one HTML page."""

import base64
import html
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from fastcnn.bench.style import PAGE
from fastcnn.bench.text import slug


class Heading(NamedTuple):
    """A heading of level 1 (the title) to 4."""

    level: int
    text: str


class Paragraph(NamedTuple):
    """Running text."""

    text: str


class Note(NamedTuple):
    """What a reader must not miss."""

    text: str


class Mark(NamedTuple):
    """A table cell that stands out; `kind` is a class of the style sheet."""

    text: str
    kind: str


class Table(NamedTuple):
    """Heads and rows; the columns after the first `texts` hold numbers."""

    heads: list[str]
    rows: list[list[str | Mark]]
    texts: int = 1


class Image(NamedTuple):
    """A chart: the name of its PNG file, and what it shows in words."""

    name: str
    alt: str


Block = Heading | Paragraph | Note | Table | Image


def markdown(blocks: Iterable[Block]) -> str:
    """Write Markdown; images are links to files beside it.

    Example:
        >>> print(markdown([Heading(2, "Times"), Paragraph("of a call")]), end="")
        ## Times
        <BLANKLINE>
        of a call
    """
    return "\n\n".join(_MARKDOWN[type(block)](block) for block in blocks) + "\n"


def _markdown_text(text: str) -> str:
    for sign, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


def _markdown_table(table: Table) -> str:
    rule = ["---" if index < table.texts else "---:" for index in range(len(table.heads))]
    heads = [_markdown_text(head) for head in table.heads]
    rows = [[_markdown_text(_text(cell)) for cell in row] for row in table.rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in (heads, rule, *rows))


def _text(cell: str | Mark) -> str:
    return cell.text if isinstance(cell, Mark) else cell


_MARKDOWN: Mapping[type, Callable[..., str]] = {
    Heading: lambda block: f"{'#' * block.level} {_markdown_text(block.text)}",
    Paragraph: lambda block: _markdown_text(block.text),
    Note: lambda block: f"**{_markdown_text(block.text)}**",
    Table: _markdown_table,
    Image: lambda block: f"![{_markdown_text(block.alt)}]({block.name})",
}


def page(blocks: list[Block], images: Mapping[str, bytes]) -> str:
    """Write one HTML page that loads nothing: its style and its images are within it.

    Args:
        blocks: what it says; the first is its title.
        images: PNG files by name.

    Example:
        >>> "<h1" in page([Heading(1, "Times")], {})
        True
    """
    anchors = _anchors(blocks)
    title, *rest = (_html(block, index, anchors, images) for index, block in enumerate(blocks))
    name = html.escape(_first_heading(blocks))
    return PAGE.substitute(name=name, title=title, contents=_contents(blocks, anchors), body="\n".join(rest))


def _first_heading(blocks: list[Block]) -> str:
    return next((block.text for block in blocks if isinstance(block, Heading)), "")


def _anchors(blocks: list[Block]) -> dict[int, str]:
    """Return an anchor for each heading by its place; headings of equal text get different ones."""
    taken: dict[str, int] = {}
    anchors = {}
    for index, block in enumerate(blocks):
        if isinstance(block, Heading):
            name = slug(block.text)
            taken[name] = taken.get(name, 0) + 1
            anchors[index] = name if taken[name] == 1 else f"{name}-{taken[name]}"
    return anchors


def _contents(blocks: list[Block], anchors: Mapping[int, str]) -> str:
    links = []
    for index, anchor in anchors.items():
        block = blocks[index]
        if isinstance(block, Heading) and block.level in (2, 3):
            links.append(f'<li class="level{block.level}"><a href="#{anchor}">{html.escape(block.text)}</a></li>')
    return "\n".join(links)


def _html(block: Block, index: int, anchors: Mapping[int, str], images: Mapping[str, bytes]) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{anchors[index]}">{html.escape(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Note(text):
            return f'<p class="note">{html.escape(text)}</p>'
        case Image(name, alt):
            data = base64.b64encode(images[name]).decode()
            return f'<div class="chart"><img alt="{html.escape(alt)}" src="data:image/png;base64,{data}"></div>'
        case Table():
            return _html_table(block)


def _html_table(table: Table) -> str:
    heads = "".join(
        f"<th{_text_class(index, table)}>{html.escape(head)}</th>" for index, head in enumerate(table.heads)
    )
    rows = "\n".join(
        "<tr>" + "".join(_html_cell(cell, index, table) for index, cell in enumerate(row)) + "</tr>"
        for row in table.rows
    )
    return f'<div class="table"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>'


def _text_class(index: int, table: Table) -> str:
    return ' class="text"' if index < table.texts else ""


def _html_cell(cell: str | Mark, index: int, table: Table) -> str:
    kinds = " ".join([*(["text"] if index < table.texts else []), *([cell.kind] if isinstance(cell, Mark) else [])])
    return f"<td{f' class={chr(34)}{kinds}{chr(34)}' if kinds else ''}>{html.escape(_text(cell))}</td>"
