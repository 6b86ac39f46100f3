"""A trained network with its classes and the preparation of its images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.console import checkpoint
from fastcnn.console.errors import OptionError, UserError
from fastcnn.console.images import fit, transforms
from fastcnn.console.models import build_model, check_same_architecture, check_shapes, pretrained_classifier
from fastcnn.nn import Normalize

DEFAULT_MODEL = "alexnet"
NETWORK = "fastcnn"  # of a run with --compare, the checkpoint holds the stock network too


@dataclass(frozen=True)
class Classifier:
    """A network in eval mode; ``transform`` turns an image of PIL, of any mode, into an input (C, H, W) float32."""

    title: str
    model: nn.Module
    classes: tuple[str, ...]
    transform: Callable[[Any], Tensor]

    def probabilities(self, images: Tensor) -> Tensor:
        """Return the probabilities (N, classes) of images (N, C, H, W), unless they are infinite or NaN."""
        with torch.inference_mode():
            scores = self.model(images).float().softmax(dim=1)
        if not scores.isfinite().all():
            raise UserError(f"{self.title}: the scores are infinite or nan")
        return scores


def load(weights: str, model: str | None) -> Classifier:
    """Return the classifier of torchvision's weights of that name, or of a checkpoint.

    That is a path, which exists, ends in .pt or .pth, or holds a slash.
    """
    path = Path(weights)
    if path.exists() or "/" in weights or path.suffix in (".pt", ".pth"):
        return _trained(path, model)
    return _pretrained(model or DEFAULT_MODEL, weights)


def _pretrained(name: str, weights: str) -> Classifier:
    chosen, state = pretrained_classifier(name, weights)
    classes = tuple(chosen.meta["categories"])
    with torch.device("meta"):  # initial weights would be drawn for nothing
        network = build_model(name, {"num_classes": len(classes)})
    network.load_state_dict(state, assign=True)
    prepare = chosen.transforms()
    return Classifier(f"{name}, {chosen!r}", network.eval(), classes, lambda image: prepare(image.convert("RGB")))


def _trained(path: Path, name: str | None) -> Classifier:
    file = checkpoint.locate(path)
    state = checkpoint.load(path)
    try:
        settings = state["settings"]
        model, options, dataset = settings["model"], settings["options"], settings["dataset"]
        input_size: tuple[int, int, int] = tuple(settings["input_size"])
        classes, statistics, weights = tuple(state["classes"]), state["statistics"], state["lanes"][NETWORK]["model"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file}: not a checkpoint of this version of fastcnn train ({error})") from error
    if name not in (None, model):
        raise OptionError(f"{file}: is a checkpoint of {model}, not {name}; leave --model out")
    options = {"num_classes": len(classes), **options}
    try:
        with torch.device("meta"):
            network = build_model(model, options=options)
        check_same_architecture(model, weights, network.state_dict())
        check_shapes(model, options, input_size, classes)
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    network.load_state_dict(weights, assign=True)
    return Classifier(f"{model}, {file}", network.eval(), classes, _held_out(dataset, input_size, statistics))


def _held_out(dataset: str, input_size: tuple[int, int, int], statistics: Any) -> Callable[[Any], Tensor]:
    """Return how training prepares its held-out images."""
    from torchvision.transforms.functional import pil_to_tensor

    normalize = Normalize(*statistics)
    if dataset == "imagefolder":
        _, cropped = transforms(input_size)
        return lambda image: normalize(cropped(image.convert("RGB")))
    return lambda image: fit(normalize(pil_to_tensor(image.convert("L"))[None]), input_size)[0]
