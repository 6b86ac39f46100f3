"""Ctrl-C while the command ``fastcnn`` imports torch, which takes seconds, ends it with one line."""

import sys
from pathlib import PurePath
from types import TracebackType


def _say_stopped(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; nothing was written", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


_program = getattr(sys, "argv", [""])[0]  # "-m" while Python looks for the module, of which this is a part
if PurePath(_program).stem == "fastcnn" or (_program == "-m" and "fastcnn" in sys.orig_argv):
    sys.excepthook = _say_stopped
