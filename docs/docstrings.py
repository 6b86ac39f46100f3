"""Reads the package's docstrings as Markdown: a griffe extension."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|class|meth|mod):`([^`]+)`")
EXAMPLE = re.compile(r"^(\s*)Example:$", flags=re.MULTILINE)


class Docstrings(griffe.Extension):
    """Makes ``:func:`name` `` plain code, and of "Example:" the section that shows its lines as Python."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of each module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(r"\1Examples:", ROLE.sub(r"`\1`", obj.docstring.value))
