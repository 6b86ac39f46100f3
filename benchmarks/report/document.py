"""Documents: Jinja's templates in this folder write Markdown, and python-markdown makes one HTML page of it."""

import base64
import functools
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup


class Strong(str):
    """Text of a table's cell that stands out: what is slower, or has failed."""


class Table(NamedTuple):
    """Heads and rows; the columns after the first `texts` hold numbers."""

    heads: list[str]
    rows: list[list[str]]
    texts: int = 1


class Image(NamedTuple):
    """A chart: the name of its PNG file, and what it shows in words."""

    name: str
    alt: str


def rendered(template: str, **names: object) -> str:
    """Write Markdown from a template of this folder; what it shows is escaped, and tables and images are written out.

    Args:
        template: the name of its file, less `.md.jinja`.
        names: what it shows.
    """
    return _environment().get_template(f"{template}.md.jinja").render(names).strip() + "\n"


@functools.cache
def _environment() -> jinja2.Environment:
    loader = jinja2.PackageLoader("benchmarks.report", ".")
    return jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, finalize=_finalized)


def _finalized(value: Any) -> str:
    match value:
        case None:
            return ""
        case Markup():
            return value
        case Table():
            return table(value)
        case Image():
            return f"![{_escaped(value.alt)}]({value.name})"
    return _escaped(str(value))


def _escaped(text: str) -> str:
    for sign, escaped in (("\\", "\\\\"), ("|", "\\|"), ("<", "&lt;"), ("*", "\\*"), ("`", "\\`")):
        text = text.replace(sign, escaped)
    return " ".join(text.split())


def table(each: Table, *, aligned: bool = False) -> str:
    """Write a table as Markdown; `aligned`: with columns of one width, for terminals.

    Example:
        >>> print(table(Table(["what", "time"], [["lrn", Strong("2 ms")]])))
        | what | time |
        | --- | ---: |
        | lrn | **2 ms** |
    """
    heads = [_escaped(head) for head in each.heads]
    rows = [
        [f"**{_escaped(cell)}**" if isinstance(cell, Strong) else _escaped(cell) for cell in row] for row in each.rows
    ]
    rule = ["---" if index < each.texts else "---:" for index in range(len(heads))]
    lines = [heads, rule, *rows]
    if aligned:
        widths = [max(map(len, column)) for column in zip(*lines)]
        lines = [
            [
                cell.ljust(width) if index < each.texts else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(line, widths))
            ]
            for line in lines
        ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(text: str, images: Mapping[str, bytes]) -> str:
    """Make one HTML page of Markdown that loads nothing: its style and its images are within it.

    Args:
        text: Markdown whose first line is the title.
        images: PNG files by name.

    Example:
        >>> "<h1" in page("# Times", {})
        True
    """
    from markdown import Markdown  # the benchmarks themselves, which write tables too, do without

    title, _, rest = text.partition("\n")
    converter = Markdown(extensions=["tables", "toc"], extension_configs={"toc": {"toc_depth": "2-3"}})
    body = converter.convert(rest)
    body = re.sub(r"<table>.*?</table>", r'<div class="table">\g<0></div>', body, flags=re.DOTALL)
    for name, png in images.items():
        body = body.replace(f'src="{name}"', f'src="data:image/png;base64,{base64.b64encode(png).decode()}"')
    frame = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks.report", "."), autoescape=True)
    contents = Markup(converter.toc)
    return frame.get_template("page.html.jinja").render(
        title=title.removeprefix("# "), contents=contents, body=Markup(body)
    )
