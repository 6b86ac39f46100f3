"""Errors that a command shows as one line instead of a traceback."""

import importlib.util


class UserError(Exception):
    """Something that the user can correct; the message is one line that names it."""


class OptionError(UserError):
    """The value of an option or argument is wrong; the exit code is 2."""


class Interrupted(Exception):
    """Training was stopped by Ctrl-C after a complete checkpoint was written; the message says how to go on."""


def require(extra: str, *packages: str) -> None:
    """Raise a UserError that names a missing package and the extra which brings it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the package {package} is not installed: pip install 'fastcnn[{extra}]'")


def said(error: Exception) -> str:
    """Return the message of an error in one line, or its class where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__
