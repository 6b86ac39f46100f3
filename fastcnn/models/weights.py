"""Pretrained weights: named, downloaded and verified by torchvision."""

from typing import Any

__all__ = ["pretrained_weights"]


def pretrained_weights(model: str, weights: Any) -> Any:
    """Look up torchvision's weights of `model`: `weights` is one of its enum members, or the name of one.

    Raises ImportError without torchvision, TypeError for weights of another model, KeyError for an unknown name.

    Example:
        >>> from fastcnn.models.weights import pretrained_weights
        >>> pretrained_weights("alexnet", "IMAGENET1K_V1").meta["num_params"]
        61100840
    """
    try:
        from torchvision.models import get_model_weights
    except ImportError as error:
        raise ImportError(
            f"{model}: weights={weights!r} needs torchvision, which is not installed: pip install 'fastcnn[train]'"
        ) from error
    return get_model_weights(model).verify(weights)


def num_classes_of(weights: Any, num_classes: int | None) -> int:
    """Tell how many classes `weights` score, and raise ValueError where `num_classes` asks for another number."""
    classes = len(weights.meta["categories"])
    if num_classes not in (None, classes):
        raise ValueError(f"num_classes: expected {classes}, as {weights} have, got {num_classes}")
    return classes
