"""Backends and devices that a user chooses, checked before anything is done."""

import torch

import fastcnn
from fastcnn.console.errors import UserError


def check_backend(name: str) -> None:
    """Raise a :class:`UserError` that tells why a backend is not available here.

    Example:
        >>> check_backend("torch")
    """
    try:
        with fastcnn.use_backend(name):
            pass
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--backend {name}: {error}") from error


def usable_device(name: str) -> torch.device:
    """Return the device of a name such as ``cuda:1``, once it has held a tensor.

    Raises:
        UserError: torch does not know it, or it is not here.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise UserError(f"--device: {str(error).splitlines()[0]}") from error
    return torch.device(name)
