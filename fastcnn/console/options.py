"""Options that several commands share, and how they are read."""

import ast
from typing import Annotated, Any

import torch
import typer

import fastcnn
from fastcnn.console.errors import OptionError

InputSize = Annotated[
    str | None, typer.Option(metavar="C,H,W", help="Size of one input; by default what the model is made for.")
]
Options = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="Argument of the model's builder, a Python literal: lrn=False. Repeatable.",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1, …", show_default="cuda where there is one")
]
Backend = Annotated[
    str,
    typer.Option("--backend", envvar="FASTCNN_BACKEND", help="What runs fastcnn's layers; fastcnn doctor lists them."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")]


def parse_input_size(text: str | None) -> tuple[int, int, int] | None:
    """Return (C, H, W) of a text such as 3,224,224."""
    if text is None:
        return None
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"--input-size: expected three sizes C,H,W such as 3,224,224, got {text!r}")
    channels, height, width = map(int, parts)
    return channels, height, width


def parse_options(texts: list[str] | None) -> dict[str, Any]:
    """Return the keyword arguments of texts such as lrn=False."""
    options: dict[str, Any] = {}
    for text in texts or []:
        key, _, value = text.partition("=")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise typer.BadParameter(f"--option: expected KEY=VALUE such as lrn=False, got {text!r}") from error
    return options


def default_device() -> str:
    """Return the device that is used without ``--device``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_backend(name: str) -> None:
    """Raise an OptionError that tells why a backend cannot be chosen here, if so."""
    known = fastcnn.backends()
    if name not in known:
        raise OptionError(f"--backend {name}: expected one of {', '.join(known)}")
    if reason := known[name].reason:
        raise OptionError(f"--backend {name} is not available here: {reason}")


def device_named(name: str) -> torch.device:
    """Return the device of a name, which may not be here; raise an OptionError for one that torch does not know.

    Example:
        >>> device_named("cuda:1").index
        1
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: not a device of torch, for example cpu, cuda or cuda:1") from error


def usable_device(name: str) -> torch.device:
    """Return the device of a name, once it has held a tensor; raise an OptionError for one that is not here."""
    device = device_named(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
