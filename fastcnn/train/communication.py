"""What each layout sends over the wires in a training step, computed from shapes."""

import contextlib

from torch import nn

from fastcnn.console.errors import UserError
from fastcnn.train.distributed import linear_layers

GRADIENT_BYTES = 4  # parameters, and so their gradients, are float32


def bytes_sent(model: nn.Module, layout: str, batch_size: int, processes: int, activation_bytes: int = 4) -> int:
    """Return how many bytes each process sends in one training step, with ring algorithms.

    Of n bytes in all, an all-gather sends n (p - 1) / p from each of p processes, an all-reduce twice that. ``ddp``
    all-reduces every gradient. ``owt`` all-reduces the convolutions' gradients, gathers the features of the batch and
    the output of each linear layer, and all-reduces the gradient of each linear layer's input. ``batch_size`` is that
    of the global batch; an activation has 4 bytes, or 2 under autocast.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    reduced, gathered = GRADIENT_BYTES * parameters, 0
    if layout == "owt":
        layers = list(linear_layers(model).values())
        split = sum(parameter.numel() for layer in layers for parameter in layer.parameters())
        inputs, outputs = sum(layer.in_features for layer in layers), sum(layer.out_features for layer in layers)
        reduced = GRADIENT_BYTES * (parameters - split) + activation_bytes * batch_size * inputs
        gathered = activation_bytes * batch_size * (layers[0].in_features + outputs)
    return (2 * reduced + gathered) * (processes - 1) // processes


def describe(model: nn.Module, batch_size: int, processes: int, activation_bytes: int = 4) -> str:
    """Say in one line what each layout sends.

    Example:
        >>> import fastcnn
        >>> describe(fastcnn.AlexNet(), 128, 2)
        'each of 2 processes sends in a step of 128 images: ddp 244.4 MB, owt 23.5 MB'
    """
    volumes = []
    for layout in ("ddp", "owt"):
        with contextlib.suppress(UserError):  # owt is not for every network
            sent = bytes_sent(model, layout, batch_size, processes, activation_bytes)
            volumes.append(f"{layout} {sent / 1e6:.1f} MB")
    return f"each of {processes} processes sends in a step of {batch_size} images: {', '.join(volumes)}"
