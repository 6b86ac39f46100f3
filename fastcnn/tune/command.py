"""The command ``fastcnn tune``."""

from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from rich.console import Console

from fastcnn.available import KERNEL_BACKENDS
from fastcnn.console.errors import OptionError, UserError
from fastcnn.console.images import STATISTICS
from fastcnn.console.models import build_model, default_input_size, normalize_first
from fastcnn.console.options import (
    Debug,
    Device,
    InputSize,
    Options,
    check_backend,
    default_device,
    parse_input_size,
    parse_options,
    usable_device,
)
from fastcnn.tune.report import summary, table
from fastcnn.tune.run import MODES
from fastcnn.tune.run import tune as run_tuning
from fastcnn.tuning.attempts import Lost
from fastcnn.tuning.candidates import ON
from fastcnn.tuning.device import device_name
from fastcnn.tuning.table import user_path
from fastcnn.warm_up import stages_of

DtypeName = Literal["float32", "bfloat16", "float16"]  # those that kernels take


def tune(
    model: Annotated[str, typer.Argument(help="mnist_cnn, alexnet, alexnet2012, vgg16, …")],
    batch_size: Annotated[int, typer.Option(min=1, help="Images per step; winners serve half to double that.")],
    input_size: InputSize = None,
    option: Options = None,
    dtype: Annotated[DtypeName, typer.Option(help="Dtype of layers and images; for autocast, its dtype.")] = "float32",
    channels_last: Annotated[bool, typer.Option("--channels-last", help="Layers and images in channels_last.")] = False,
    bytes: Annotated[bool, typer.Option("--bytes", help="Images are bytes, which the network normalizes.")] = False,
    backend: Annotated[str | None, typer.Option(help="Time only this backend against stock torch.")] = None,
    train: Annotated[
        bool | None, typer.Option("--train/--inference", help="Forward and backward, or forward.", show_default="both")
    ] = None,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(help="Table to add to.", show_default="the user's, which auto reads")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Skip stages that the table has already.")] = False,
    debug: Debug = False,
) -> None:
    """Time every algorithm for each stage, and store the winners.

    Each candidate is checked against float64 first; stock torch is always one of
    them, so that auto is never slower. Entries for other shapes stay. A candidate
    that ended the process, or hung a GPU for two minutes, is left out next time.

    Example: fastcnn tune vgg16 --batch-size 64 --dtype bfloat16 --channels-last
    """
    size = parse_input_size(input_size) or default_input_size(model)
    place = _device(device or default_device())
    if backend is not None:
        _check_backend(backend, place)
    with place:
        network = build_model(model, options=parse_options(option))
        images = torch.randn(batch_size, *size)
    format = torch.channels_last if channels_last else torch.contiguous_format
    kind: torch.dtype = getattr(torch, dtype)
    if bytes:
        normalize_first(network, STATISTICS[size[0]], kind)
    images = images.to(torch.uint8 if bytes else kind, memory_format=format)
    try:
        stages = stages_of(network.to(place, kind).to(memory_format=format), images)
    except (RuntimeError, ValueError) as error:
        shape = "x".join(map(str, (batch_size, *size)))
        raise OptionError(f"{model} does not run in {dtype} on an input of {shape}: {error}") from error
    del network, images
    modes = MODES if train is None else (MODES[train],)
    console, path = Console(highlight=False), output or user_path(device_name(place))
    console.print(f"{model}, {dtype}, on {device_name(place)}: {len(stages)} stages", soft_wrap=True)
    try:
        with console.status("checking parity, then timing"):
            results = [*run_tuning(stages, place, modes=modes, only=backend, path=path, resume=resume)]
    except Lost as error:
        raise UserError(f"{error}; continue with --resume") from error
    if resume:
        wanted = sum(stage.occurs(mode) for stage in stages for mode in modes)
        console.print(f"{wanted - len(results)} of {wanted} stages and modes were done already")
    console.print(table(results))
    for line in summary(results):
        console.print(line, markup=False)
    console.print(f"wrote {path}", soft_wrap=True, markup=False)


def _device(name: str) -> torch.device:
    device = usable_device(name)
    if device.type not in ON:
        raise OptionError(f"--device {name}: nothing is timed there, expected {' or '.join(ON)}")
    return torch.device("cuda", device.index or 0) if device.type == "cuda" else device


def _check_backend(name: str, device: torch.device) -> None:
    if name not in KERNEL_BACKENDS:
        raise OptionError(f"--backend {name}: expected one of {', '.join(KERNEL_BACKENDS)}")
    check_backend(name)
    if name not in ON[device.type]:
        raise OptionError(f"--backend {name}: is not timed on {device.type}, expected {' or '.join(ON[device.type])}")
