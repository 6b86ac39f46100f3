"""Terminals and logs of whatever encoding."""

import codecs
import io
import sys
import unicodedata

DRAWN = str.maketrans("─━│┃├└┌┐┘┤╴╸╺•✓\u00d7µ→►", "--||++++++---**xu>>")  # the nearest of ASCII


def show_anything() -> None:
    """Let stdout and stderr replace what their encoding does not have, instead of raising UnicodeEncodeError."""
    codecs.register_error("fastcnn.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastcnn.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    missing = error.object[error.start : error.end].translate(DRAWN)
    ascii = unicodedata.normalize("NFKD", missing).encode("ascii", "replace").decode()
    return ascii, error.end
