"""The command ``fastcnn``: train, predict, tune, explain, summary, doctor."""

import codecs
import io
import os
import re
import sys
import traceback
import unicodedata
from typing import Annotated

import torch
import typer

import fastcnn
from fastcnn import front
from fastcnn.console import environment
from fastcnn.console.errors import Interrupted, OptionError, UserError, require
from fastcnn.console.models import build_model, default_input_size, score_shape
from fastcnn.console.options import Debug, InputSize, Options, parse_input_size, parse_options
from fastcnn.explain.command import explain
from fastcnn.predict.command import predict
from fastcnn.train.command import train
from fastcnn.train.distributed import Silenced
from fastcnn.tune.command import tune

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(train)
app.command()(predict)
app.command()(tune)
app.command()(explain)


@app.callback(invoke_without_command=True)
def fastcnn_command(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Classic CNNs through fused kernels: train them, look at them, see what runs here.

    Example: fastcnn train mnist --compare
    """
    if version:
        typer.echo(f"fastcnn {fastcnn.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def summary(
    model: Annotated[str, typer.Argument(help="mnist_cnn, alexnet, alexnet2012, vgg16, …")],
    input_size: InputSize = None,
    option: Options = None,
    debug: Debug = False,
) -> None:
    """Print a network layer by layer: output shapes and parameters.

    Example: fastcnn summary alexnet2012 --input-size 3,227,227 --option lrn=False
    """
    require("train", "torchinfo")
    import torchinfo

    size, options = parse_input_size(input_size) or default_input_size(model), parse_options(option)
    score_shape(model, options, size)  # raises for a size that does not fit
    with torch.device("meta"):  # shapes alone: no memory, no arithmetic
        network = build_model(model, options=options)
    table = torchinfo.summary(
        network,
        input_size=(1, *size),
        col_names=("output_size", "num_params"),
        col_width=18,
        depth=9,  # of nested layers: more than any network here has
        device="meta",
        verbose=0,
    )
    typer.echo(str(table))


@app.command()
def doctor(debug: Debug = False) -> None:
    """Print versions, hardware, and which backends run here.

    Where one does not, it says why.

    Example: fastcnn doctor
    """
    rows = [*environment.versions().items(), *environment.hardware().items(), ("", "")]
    for name, status in fastcnn.backends().items():
        built = f" (built with {status.build})" if status.build else ""
        state = "available" if status.available else f"not available: {status.reason}"
        rows.append((f"backend {name}", state + built))
    choice = os.environ.get("FASTCNN_BACKEND")
    origin = "set by FASTCNN_BACKEND" if choice else "the default"
    rows += [("", ""), *environment.tables_and_proofs(), ("", ""), ("backend in use", f"{choice or 'auto'} ({origin})")]
    rows.append(("front", f"left out: {front.problem}" if front.problem else "runs planned calls"))
    for key, value in rows:
        typer.echo(f"{key:16}{value}".rstrip())


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C."""
    _show_anything()
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return app(arguments, prog_name="fastcnn", standalone_mode=False) or 0
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        return 130
    except Silenced:
        return 1
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; nothing was written", err=True)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        text, code = _explained(error)
        typer.echo(f"error: {' '.join(text.split())}", err=True)
        return code


def _explained(error: Exception) -> tuple[str, int]:
    """Return what is said of an error, and its exit code."""
    if format_message := getattr(error, "format_message", None):  # what typer raises for wrong usage
        text = " ".join(format_message().split())
        for pattern, plain in PLAIN_WORDS:
            text = re.sub(pattern, plain, text)
        return f"{text} (see --help)", 2
    text = "; ".join([str(error), *getattr(error, "__notes__", ())])
    if isinstance(error, UserError):
        return text, 2 if isinstance(error, OptionError) else 1
    return f"{type(error).__name__}: {text}", 1


def _show_anything() -> None:
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


DRAWN = str.maketrans("─━│┃├└┌┐┘┤╴╸╺•✓\u00d7µ→►", "--||++++++---**xu>>")  # the nearest of ASCII
# typer reports wrong values in the words of its validation library.
PLAIN_WORDS = (
    (r"Value error, ", ""),
    (r"Input should be a valid integer.*", "expected a whole number"),
    (r"Input should be a valid number.*", "expected a number"),
    (r"Input should be greater than or equal to (\S+)", r"expected \1 or more"),
    (r"Input should be less than or equal to (\S+)", r"expected \1 or less"),
    (r"^Invalid value: (--)", r"\1"),
    (r"\.$", ""),
)
