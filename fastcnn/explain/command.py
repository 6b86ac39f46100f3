"""The command ``fastcnn explain``."""

import importlib
import inspect
import logging
import sys
import warnings
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from torch import nn

from fastcnn.console.errors import OptionError, UserError, require
from fastcnn.console.models import build_model, default_input_size
from fastcnn.console.options import Debug, InputSize, Options, parse_input_size, parse_options, usable_device
from fastcnn.explain import explain as explain_model

TRIED = logging.getLogger("torch._subclasses.fake_tensor")  # logs a traceback of each error that is raised as well


def explain(
    model: Annotated[
        str, typer.Argument(help="alexnet, vgg16, …; torchvision:resnet18; or package.module:callable of your own.")
    ],
    input_size: InputSize = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in the input.")] = 1,
    option: Options = None,
    device: Annotated[str, typer.Option(help="Where the model would run: cpu, cuda, …")] = "cpu",
    train: Annotated[bool, typer.Option("--train", help="In training mode, not in inference.")] = False,
    debug: Debug = False,
) -> None:
    """Print which layers run fused, and why others do not.

    It also tells which backend and algorithm would run each stage here. For that,
    the network runs once on tensors without data. A model of your own is called
    without arguments but for --option; without --input-size it is not run.

    Example: fastcnn explain alexnet2012 --batch-size 16

    Example: fastcnn explain torchvision:resnet18 --input-size 3,64,64 --train
    """
    network, default = _build(model, parse_options(option))
    size = parse_input_size(input_size) or default
    network.train(train).to(usable_device(device))
    try:
        with torch.set_grad_enabled(train), patch.object(TRIED, "disabled", True):
            rows = explain_model(network, (batch_size, *size) if size else None)
    except (RuntimeError, TypeError) as error:
        raise OptionError(f"{model}: {str(error).splitlines()[0]}") from error
    typer.echo(str(rows))


def _build(name: str, options: dict[str, Any]) -> tuple[nn.Module, tuple[int, ...] | None]:
    """Return the network of a name, and the input size that it is made for, where that is known."""
    source, colon, member = name.rpartition(":")
    if not colon:
        return build_model(name, options=options), default_input_size(name)
    if source == "torchvision":
        require("train", "torchvision")
        from torchvision import models

        if member not in models.list_models():
            raise OptionError(f"torchvision has no model {member!r}; torchvision.models.list_models() names them")
        build = models.get_model_builder(member)
        without = {key: None for key in inspect.signature(build).parameters if key in ("weights", "weights_backbone")}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The default weight initialization", FutureWarning)
            return _called(name, build, without | options), (3, 224, 224)
    if "" not in sys.path:
        sys.path.insert(0, "")  # the working directory, as `python -m` has it; an installed command does not
    try:
        build = getattr(importlib.import_module(source), member)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"{name}: expected package.module:callable, but {error}") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"{name}: {source} cannot be imported: {type(error).__name__}: {error}") from error
    return _called(name, build, options), None


def _called(name: str, build: Any, options: dict[str, Any]) -> nn.Module:
    try:
        network = build(**options)
    except (Exception, SystemExit) as error:
        raise UserError(f"{name} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(network, nn.Module):
        raise OptionError(f"{name}: expected a callable that gives an nn.Module, got {type(network).__name__}")
    return network
