"""Roles: what a layer, or a call of a function, can be in a stage."""

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fastcnn.calls import ADMITTED, Call
from fastcnn.instance import is_replaced
from fastcnn.normalization import Normalize

# Captured at import, so that a class whose forward is patched later does not count as stock.
STOCK_CALL = nn.Module.__call__
_STOCK_CONV_FORWARD = nn.Conv2d._conv_forward
_STOCK_BN_CHECK = nn.BatchNorm2d._check_input_dim

IDENTITY = "identity"  # a layer that does nothing: stages skip it
BLOCK = "block"  # layers with a forward around them that reads no strides; no stage has it
ROW = "row"  # a Sequential that runs its children fused: a row around it takes them in
ROLES: dict[Any, str] = {  # by the forward function of the class
    nn.Conv2d.forward: "conv",
    nn.ReLU.forward: "relu",
    nn.MaxPool2d.forward: "pool",
    nn.LocalResponseNorm.forward: "lrn",
    nn.Linear.forward: "linear",
    nn.BatchNorm2d.forward: "bn",
    nn.Dropout.forward: "dropout",
    nn.Identity.forward: IDENTITY,
    Normalize.forward: "normalize",
}
GROUPS: dict[Any, str] = {nn.Sequential.forward: ROW}  # the same for modules of several layers: BLOCK or ROW
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def roles_of(layers: Iterable[Any]) -> tuple[str | None, ...]:
    """Tell what each layer can be in a stage, or None where only its own call does all that the user asked of it.

    It runs at every call of a network: hence one loop, and few look-ups.
    """
    roles: list[str | None] = []
    for layer in layers:
        kind = type(layer)
        if kind is Call:
            roles.append(layer.role)
            continue
        # Looked up on the class, as torch.compile traces that; subclasses that keep the stock forward keep the role,
        # and a scripted module's class has no forward to read.
        forward = getattr(kind, "forward", None)
        role = ROLES.get(forward) or GROUPS.get(forward)
        if role is not None:
            # Read from the dictionary: torch.compile guards what is read there, so that a hook added after compiling
            # fires; by its default settings it does not guard the same hooks read as attributes.
            state = layer.__dict__
            if (
                state["_forward_hooks"]
                or state["_forward_pre_hooks"]
                or state["_backward_hooks"]
                or state["_backward_pre_hooks"]
                or kind.__call__ is not STOCK_CALL
                or (state.get("_compiled_call_impl"))
                or ("forward" in state and is_replaced(layer, "forward"))
            ):
                role = None
            elif role in _ADMITTED:
                role = _ADMITTED[role](layer)
        roles.append(role)
    return tuple(roles)


def role_of(layer: Any) -> str | None:
    """Tell what one layer can be in a stage."""
    return roles_of((layer,))[0]


def _conv_role(conv: nn.Conv2d) -> str | None:
    return "conv" if type(conv)._conv_forward is _STOCK_CONV_FORWARD else None


def _bn_role(bn: nn.Module) -> str | None:  # one forward serves batch norms of every rank
    return "bn" if getattr(type(bn), "_check_input_dim", None) is _STOCK_BN_CHECK else None


def _row_role(row: nn.Module) -> str | None:
    return ROW if "forward" in vars(row) or type(row).forward is not nn.Sequential.forward else None


# What a layer of a role becomes by its settings, or its class.
_ADMITTED: dict[str, Callable[[Any], str | None]] = {"conv": _conv_role, "bn": _bn_role, ROW: _row_role, **ADMITTED}
