"""Pretrained weights: named by torchvision, downloaded by torch.hub, their hash checked."""

import functools
import hashlib
import http.client
import os
import urllib.error
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlparse

import torch

_Arguments = ParamSpec("_Arguments")
_Model = TypeVar("_Model")


def pretrained_weights(model: str, weights: Any) -> Any:
    """Look up torchvision's weights of `model`: `weights` is a member of its enum, or a member's name.

    Raises ImportError without torchvision, TypeError for weights of another model, ValueError for an unknown name and
    for a model that torchvision has no weights of.
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{model}: weights={weights!r} needs torchvision, which is not installed: pip install 'fastcnn[train]'"
        ) from error
    try:
        members = get_model_weights(model)
    except ValueError as error:
        raise ValueError(
            f"weights: expected None, as torchvision has no weights of {model}, got {weights!r}"
        ) from error
    try:
        return members.verify(weights)
    except KeyError as error:
        names = ", ".join(sorted({*members.__members__}))
        raise ValueError(f"weights: expected one of {names} for {model}, got {weights!r}") from error


def takes_pretrained(build: Callable[_Arguments, _Model]) -> Callable[_Arguments, _Model]:
    """Let a builder take torchvision's legacy `pretrained`, by keyword and by position, with torchvision's warning.

    Such a call raises ImportError without torchvision, ValueError for a model that torchvision has no weights of.
    """

    @functools.wraps(build)
    def builder(*args: Any, **kwargs: Any) -> Any:
        legacy: Any = build
        if args or "pretrained" in kwargs or isinstance(kwargs.get("weights"), bool):
            try:
                from torchvision.models._utils import handle_legacy_interface
            except ImportError as error:
                raise ImportError(
                    f"{build.__name__}: expected weights=, got torchvision's legacy arguments, which need torchvision: "
                    "pip install 'fastcnn[train]'"
                ) from error
            first = ("pretrained", lambda _: pretrained_weights(build.__name__, "IMAGENET1K_V1"))
            legacy = handle_legacy_interface(weights=first)(build)
        return legacy(*args, **kwargs)

    return builder


def num_classes_of(weights: Any, num_classes: int | None) -> dict[str, int]:
    """Return the builder's argument `num_classes` for `weights`, as torchvision decides it, or raise ValueError.

    Weights without a classifier leave the number to the caller.
    """
    if weights.meta["categories"] is None:
        return {} if num_classes is None else {"num_classes": num_classes}
    classes = len(weights.meta["categories"])
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes: expected {classes}, as {weights!r} have, got {num_classes}")
    return {"num_classes": classes}


def pretrained_state_dict(model: str, weights: Any, progress: bool = True) -> dict[str, Any]:
    """Return the tensors of `weights`, from torch.hub's folder of checkpoints or, into it, from the network.

    The hash in the file's name is checked after a download, which leaves nothing behind where it fails, and of a file
    that was there before, which a user may have put there.

    Raises ConnectionError where the download fails, OSError where the file cannot be written, and RuntimeError where
    its content is not what its name promises; each names the file, and where to put it by hand.
    """
    file = Path(torch.hub.get_dir(), "checkpoints", os.path.basename(urlparse(weights.url).path))
    expected = torch.hub.HASH_REGEX.search(file.name)  # the first digits of its SHA-256
    if expected and file.is_file():
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        if not digest.startswith(expected[1]):
            found = digest[: len(expected[1])]
            raise _damaged(model, file, f"its SHA-256 begins with {found}, its name says {expected[1]}")
    try:
        return weights.get_state_dict(progress=progress, check_hash=True)
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        raise ConnectionError(
            f"{model}: {weights!r} could not be downloaded from {weights.url} ({reason}); where there is a network, "
            f"get that file, and put it at {file} (the environment variable TORCH_HOME moves that folder)"
        ) from error
    except OSError as error:
        raise OSError(
            f"{model}: {file}: {error.strerror or error} (the environment variable TORCH_HOME moves that folder)"
        ) from error
    except Exception as error:  # unpickling damaged bytes raises many kinds
        if file.exists():
            raise _damaged(model, file, str(error)) from error
        raise RuntimeError(
            f"{model}: what came from {weights.url} is not the file of that name ({error}); nothing was kept, try again"
        ) from error


def _damaged(model: str, file: Path, reason: str) -> RuntimeError:
    return RuntimeError(f"{model}: {file} is damaged ({reason}); delete it, and it is downloaded again")
