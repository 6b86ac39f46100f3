"""Models by name: building them, the images they take, and the weights that fit them."""

import difflib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import fastcnn
from fastcnn.console.errors import OptionError, UserError, require, said
from fastcnn.console.images import Statistics
from fastcnn.models import MODELS
from fastcnn.models.weights import pretrained_state_dict, pretrained_weights


def default_input_size(name: str) -> tuple[int, int, int]:
    """Return the (C, H, W) that a model is made for; raise an OptionError where there is no such model."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise OptionError(f"no model is named {name!r}; {hint}there are {', '.join(MODELS)}")
    return MODELS[name].input_size


def build_model(name: str, options: dict[str, Any] | None = None) -> nn.Module:
    """Build a model of ``fastcnn.models.MODELS`` with its builder's `options`.

    Raises OptionError where there is no such model, or it does not take an option.
    """
    default_input_size(name)
    options = options or {}
    try:
        return MODELS[name].build(**options)
    except (TypeError, ValueError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in options.items())
        raise OptionError(f"{name} cannot be built with {given}: {error}") from error


def check_shapes(name: str, options: dict[str, Any], input_size: tuple[int, int, int], classes: Sequence[str]) -> None:
    """Raise an OptionError where a network does not take such images, or scores fewer classes than there are."""
    scores = score_shape(name, options, input_size)
    if len(scores) != 2 or scores[1] < len(classes):
        raise OptionError(
            f"the data has {len(classes)} classes ({abridged(classes)}), more than the {scores[1]} that "
            f"{name} scores; leave --option num_classes out"
        )


def score_shape(name: str, options: dict[str, Any], input_size: tuple[int, int, int]) -> torch.Size:
    """Return the shape of a model's scores for one image, without memory, arithmetic or random numbers.

    Raises OptionError where the network does not take such images.
    """
    with torch.device("meta"), torch.random.fork_rng(devices=[]), fastcnn.use_backend("torch"):
        model = build_model(name, options=options).eval()
        try:
            return model(torch.empty(1, *input_size)).shape
        except RuntimeError as error:
            size = "x".join(map(str, input_size))
            raise OptionError(f"{name} does not take images of {size}: {said(error)}") from error


def normalize_first(model: nn.Module, statistics: Statistics, dtype: torch.dtype | None = None) -> None:
    """Put a normalization of bytes in front of a network's first layers, in place; the state dict's keys stay.

    `dtype` is that of the normalized images; None leaves it to autocast, or float32.
    """
    name, first = next(model.named_children())
    layers = {"normalize": fastcnn.nn.Normalize(*statistics, dtype), **dict(first.named_children())}
    setattr(model, name, fastcnn.fuse(nn.Sequential(OrderedDict(layers))))


def abridged(classes: Sequence[str]) -> str:
    """Return the first few names of classes.

    Example:
        >>> abridged("abcdef")
        'a, b, c, d, …'
    """
    return ", ".join(classes[:4]) + (", …" if len(classes) > 4 else "")


def check_same_architecture(title: str, saved: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Raise a UserError that names the first tensor of a checkpoint which a network lacks, or has in another shape."""
    shapes = {
        name: [tuple(state[name].shape) if name in state else "missing" for state in (saved, own)]
        for name in {**own, **saved}
    }
    if differ := [name for name, (there, here) in shapes.items() if there != here]:
        there, here = shapes[differ[0]]
        raise UserError(
            f"the checkpoint is of another architecture than {title}: {len(differ)} of {len(own)} tensors differ, the "
            f"first is {differ[0]}, {there} in the checkpoint and {here} in the network"
        )


def pretrained_classifier(name: str, weights: str, progress: bool = True) -> tuple[Any, dict[str, Tensor]]:
    """Look up torchvision's weights of a model by their name; return them and their tensors.

    Raises UserError where there are none of that name, they have no classifier, or they cannot be downloaded.
    """
    require("train", "torchvision")
    from torchvision.models import get_model_weights, list_models

    default_input_size(name)  # raises for unknown names
    names = sorted({*get_model_weights(name).__members__}) if name in list_models() else []
    if weights not in names:
        known = f"{name} has {', '.join(names)}" if names else f"torchvision has no weights of {name}"
        raise OptionError(f"--weights {weights}: {known}")
    try:
        chosen = pretrained_weights(name, weights)
        if chosen.meta["categories"] is None:
            raise OptionError(f"--weights {weights}: {chosen!r} has no classifier, and normalizes images differently")
        return chosen, pretrained_state_dict(name, chosen, progress)
    except (OSError, RuntimeError) as error:
        raise UserError(str(error)) from error
