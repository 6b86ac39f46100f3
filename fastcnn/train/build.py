"""Models of the command line by name."""

import difflib
from typing import Any

from torch import nn

from fastcnn.models import MODELS
from fastcnn.train.errors import UserError


def default_input_size(name: str) -> tuple[int, int, int]:
    """Return the (C, H, W) that a model is made for.

    Raises:
        UserError: there is no such model.

    Example:
        >>> default_input_size("mnist_cnn")
        (1, 28, 28)
    """
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"no model is named {name!r}; {hint}there are {', '.join(MODELS)}")
    return MODELS[name].input_size


def build_model(name: str, *, num_classes: int | None = None, options: dict[str, Any] | None = None) -> nn.Module:
    """Build a model of ``fastcnn.models.MODELS``.

    Args:
        name: its key there.
        num_classes: classes to tell apart; the model's default where None.
        options: further keyword arguments of the builder.

    Raises:
        UserError: there is no such model, or it does not take an option.

    Example:
        >>> build_model("alexnet2012", options={"lrn": False}).classifier[-1].out_features
        1000
    """
    default_input_size(name)
    arguments = dict(options or {})
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    try:
        return MODELS[name].build(**arguments)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(f"{name} cannot be built with {given}: {error}") from error
