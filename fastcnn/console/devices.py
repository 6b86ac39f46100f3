"""Backends and devices that a user chooses, checked before anything is done."""

import torch

import fastcnn
from fastcnn.console.errors import OptionError


def check_backend(name: str) -> None:
    """Raise an OptionError that tells why a backend cannot be chosen here, if so."""
    known = fastcnn.backends()
    if name not in known:
        raise OptionError(f"--backend {name}: expected one of {', '.join(known)}")
    if reason := known[name].reason:
        raise OptionError(f"--backend {name} is not available here: {reason}")


def device_named(name: str) -> torch.device:
    """Return the device of a name, which may not be here; raise an OptionError for one that torch does not know.

    Example:
        >>> device_named("cuda:1").index
        1
    """
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise OptionError(f"--device {name}: not a device of torch, for example cpu, cuda or cuda:1") from error


def usable_device(name: str) -> torch.device:
    """Return the device of a name, once it has held a tensor; raise an OptionError for one that is not here."""
    device = device_named(name)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise OptionError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
