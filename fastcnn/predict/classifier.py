"""A network with what belongs to it when it is used: its classes, and how its images are prepared."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.nn import Normalize
from fastcnn.train import checkpoint
from fastcnn.train.build import build_model, default_input_size
from fastcnn.train.data import fit, scale_and_offset
from fastcnn.train.errors import UserError
from fastcnn.train.folder import transforms
from fastcnn.train.lane import check_same_architecture
from fastcnn.train.prepare import check_shapes
from fastcnn.train.pretrained import pretrained_classifier
from fastcnn.train.settings import Settings

CHECKPOINT_SUFFIXES = (".pt", ".pth")
DEFAULT_MODEL = "alexnet"
NETWORK = "fastcnn"  # of a run with --compare, the checkpoint holds the stock network too


@dataclass(frozen=True)
class Classifier:
    """A network in eval mode.

    ``transform`` makes one input (C, H, W) float32 of an image of PIL, of whatever mode; ``title`` says what it is.
    """

    title: str
    model: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Any], Tensor]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities (N, classes) of images (N, C, H, W).

        Raises:
            UserError: they are no numbers, as after a training that went wrong.
        """
        with torch.inference_mode():
            scores = self.model(images).float().softmax(dim=1)
        if not scores.isfinite().all():
            raise UserError(f"{self.title}: the scores are infinite or nan")
        return scores


def load(weights: str, model: str | None) -> Classifier:
    """Return the classifier that ``--weights`` and ``--model`` mean: torchvision's weights, or a checkpoint.

    Args:
        weights: the name of torchvision's weights; or a path, which exists, ends in .pt or .pth, or holds a slash.
        model: by default ``alexnet``, or the checkpoint's.

    Raises:
        UserError: there is no such thing, or it is not of that model.
    """
    path = Path(weights)
    if path.exists() or "/" in weights or path.suffix in CHECKPOINT_SUFFIXES:
        return _trained(path, model)
    return _pretrained(model or DEFAULT_MODEL, weights)


def _pretrained(name: str, weights: str) -> Classifier:
    default_input_size(name)  # which knows the names of the models
    chosen, state = pretrained_classifier(name, weights)
    classes = tuple(chosen.meta["categories"])
    with torch.device("meta"):  # initial weights would be drawn for nothing
        network = build_model(name, num_classes=len(classes))
    network.load_state_dict(state, assign=True)
    prepare = chosen.transforms()
    return Classifier(
        f"{name}, {chosen!r}",
        network.eval(),
        classes,
        lambda image: prepare(image.convert("RGB")),
    )


def _trained(path: Path, name: str | None) -> Classifier:
    file = checkpoint.locate(path)
    state = checkpoint.load(path)
    try:
        settings = Settings.from_dict(state["settings"])
        classes, statistics, weights = tuple(state["classes"]), state["statistics"], state["lanes"][NETWORK]["model"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a checkpoint of this version of fastcnn train ({error})") from error
    if name not in (None, settings.model):
        raise UserError(f"{file}: is of the model {settings.model}, not {name}; leave --model out")
    options = {"num_classes": len(classes), **settings.options}
    with torch.device("meta"):
        network = build_model(settings.model, options=options)
    try:
        check_same_architecture(settings.model, weights, network.state_dict())
        check_shapes(settings, options, classes)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    network.load_state_dict(weights, assign=True)
    return Classifier(f"{settings.model}, {file}", network.eval(), classes, _held_out(settings, statistics))


def _held_out(settings: Settings, statistics: Any) -> Callable[[Any], Tensor]:
    """Return how training prepares the images that it tests with."""
    from torchvision.transforms.functional import pil_to_tensor

    if settings.dataset == "imagefolder":
        _, cropped = transforms(settings.input_size)
        normalize = Normalize(*statistics)
        return lambda image: normalize(cropped(image.convert("RGB")))
    scale, offset = scale_and_offset(statistics)
    return lambda image: fit(
        torch.addcmul(offset, pil_to_tensor(image.convert("L")), scale).unsqueeze(0), settings.input_size
    ).squeeze(0)
