"""Tensor subclasses, modes and transforms of torch.func, which see a call before our operators do.

Some handle any operator; the others have no rule for ours, so under ``auto`` they get the stock layers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

# Subclasses and modes of these modules take any operator: they trace it, run its fake kernel, or leave it alone.
_TAKE_ANY_OPERATOR = frozenset(
    {
        "torch._export.non_strict_utils",
        "torch._subclasses.fake_tensor",
        "torch._subclasses.functional_tensor",
        "torch.export._safeguard",
        "torch.fx.experimental.proxy_tensor",
        "torch.utils._device",
        "torch.utils.flop_counter",
    }
)
PLAIN = (Tensor, Parameter)

# By operator, of any backend, how many FLOPs a call takes, as torch.utils.flop_counter counts them.
FLOPS: dict[Any, Callable[..., int]] = {}


def constant_while_compiling(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a function as torch.compiler.assume_constant_result does, without importing Dynamo."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def lacks_rule(arguments: tuple[Any, ...]) -> str:
    """Say which tensor subclass or transform has no rule for our operators, or return an empty string."""
    for each in arguments:
        kind: Any = type(each)
        if kind in PLAIN or not isinstance(each, Tensor) or _takes_any_operator(kind):
            continue
        if kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl:  # it has one of its own
            return f"has no rule for tensors of type {kind.__name__}"
    if torch.compiler.is_compiling():
        return ""
    if torch._C._len_torch_dispatch_stack():
        for mode in _get_current_dispatch_mode_stack():  # active FLOP counters of torch, whose module is slow to import
            if hasattr(mode, "counter") and hasattr(mode.counter, "flop_registry"):
                mode.counter.flop_registry.update(FLOPS)
    if torch._C._are_functorch_transforms_active():
        kinds = torch._C._functorch.TransformType
        for level in torch._C._functorch.get_interpreter_stack() or ():
            if level.key() not in (kinds.Grad, kinds.Vmap, kinds.Jvp):
                return f"has no rule for torch.func's transform {level.key().name.lower()}"
    return ""


def watcher(arguments: tuple[Any, ...]) -> str:
    """Say which tensor subclass or mode is to see the calls of the stock layers, or return an empty string."""
    for each in arguments:
        if type(each) not in PLAIN and isinstance(each, Tensor) and not _takes_any_operator(type(each)):
            return f"tensors of type {type(each).__name__} see the stock layers' calls"
    return "a mode of torch sees the stock layers' calls" if is_watched() else ""


def is_watched() -> bool:
    """Whether a mode sees each call of torch's functions or operators."""
    if torch.compiler.is_compiling():
        return False
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else []
    modes += [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]
    return not all(_takes_any_operator(type(mode)) for mode in modes)


def _takes_any_operator(kind: type) -> bool:
    return kind.__module__ in _TAKE_ANY_OPERATOR or getattr(kind, "takes_any_operator", False)
