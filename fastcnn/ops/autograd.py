"""What the autograd Functions share: torch.func, autocast, and second derivatives."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcnn.backend import device_type
from fastcnn.ops import checks
from fastcnn.overrides import constant_while_compiling

_relu_gradient = torch.ops.aten.threshold_backward.default


def differentiable() -> bool:
    """Whether a backward must itself be differentiable (create_graph=True, torch.func.grad).

    Then it goes through stock operations. A compiled graph has no second derivatives but those of torch.func's
    transforms within it, so its own backward takes the kernels.
    """
    if not torch.is_grad_enabled():
        return False
    return not torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def relu_gradient(grad: Tensor, output: Tensor) -> Tensor:
    """Mask a gradient by ReLU's output; differentiable as in stock, where the mask depends on the output."""
    return _relu_gradient(grad, output, 0)


def anchor(output: Tensor) -> Tensor:
    """Return an output without elements, the anchor, for a Function that saves none of its own outputs.

    In stock a differentiable backward depends on the layers' outputs through masks and argmax places, which have no
    derivative: so the layers' inputs get second derivatives of zero, not None. Here the backward depends on the anchor.
    """
    return output.new_empty(output.shape[0], 0)


_in_graph: list[Callable[..., Any]] = []  # of the Functions, one each


@constant_while_compiling
def _allow_in_graph() -> bool:
    """Let torch.compile take Functions whole; done at the first compilation, as importing Dynamo takes seconds."""
    for apply in _in_graph:
        torch.compiler.allow_in_graph(apply)
    return True


def needs_grad(*arguments: Any) -> bool:
    """Whether a backward may follow: then the call goes through its Function, which saves tensors for it."""
    if torch._C._are_functorch_transforms_active():
        return True
    if torch.is_grad_enabled():
        for each in arguments:
            if isinstance(each, Tensor) and each.requires_grad:
                return True
    return False


def function(
    name: str,
    forward: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """Return the ``apply`` of a Function that is cheap where no transform needs its ``setup_context``.

    For a Function with ``setup_context`` torch reads the forward's signature at each call, which costs more than a
    small kernel. So plain calls go through a twin whose forward takes the context. Where torch.compile traces a
    transform of torch.func it would lose the backward, so there the graph takes the Function as one node. A Function
    without a rule for vmap gets the usual one.
    """

    def usual_vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return vmap_over_batch(whole, info, in_dims, args)

    def forward_with_context(ctx: Any, *args: Any) -> Any:
        output = forward(*args)
        setup_context(ctx, args, output)
        return output

    whole = _made(name, forward=forward, setup_context=setup_context, backward=backward, vmap=vmap or usual_vmap)
    twin = _made(name, forward=forward_with_context, backward=backward)

    def in_graph(*args: Any) -> Any:
        return whole.apply(*args)

    _in_graph.append(in_graph)

    def apply(*args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            if torch.compiler.is_compiling() and _allow_in_graph():
                return in_graph(*args)
            return whole.apply(*args)
        return whole.apply(*args) if torch.compiler.is_compiling() else twin.apply(*args)

    return apply


def _made(name: str, **methods: Callable[..., Any]) -> Any:
    metaclass: Any = type(torch.autograd.Function)
    return metaclass(name, (torch.autograd.Function,), {key: staticmethod(each) for key, each in methods.items()})


def autocast(function: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    """Check that these are tensors; where autocast is on, cast them to its dtype, as torch does for these layers."""
    checks.check_tensor(function, "input", input)
    checks.check_tensor(function, "weight", weight)
    if bias is not None:
        checks.check_tensor(function, "bias", bias)
    tensors, device = (input, weight, bias), device_type(input)
    if device == "meta" or not torch.is_autocast_enabled(device):  # torch has no autocast for meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and _autocasts(t, device) else t for t in tensors)


def _autocasts(tensor: Tensor, device: str) -> bool:
    return tensor.is_floating_point() and tensor.dtype != torch.float64 and device_type(tensor) == device


def vmap_over_batch(function: Any, info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> tuple[Any, Any]:
    """Run a Function under vmap; its first argument has a batch axis in front.

    A mapped axis of the first argument alone is one more batch axis. Where parameters are mapped too, each slice
    runs on its own.
    """
    mapped = [isinstance(dim, int) for dim in in_dims]  # a Window's entry is a tuple of None
    if mapped[0] and not any(mapped[1:]):
        batched = args[0].movedim(in_dims[0], 0)
        outputs = function.apply(batched.flatten(0, 1), *args[1:])
        return _each(outputs, lambda out: out.unflatten(0, batched.shape[:2])), _each(outputs, lambda out: 0)
    if info.batch_size == 0:
        raise RuntimeError(
            f"{function.__name__}: vmap over parameters runs slice by slice: expected at least one slice, got 0"
        )
    slices = [
        function.apply(*(arg.select(in_dims[j], i) if mapped[j] else arg for j, arg in enumerate(args)))
        for i in range(info.batch_size)
    ]
    if isinstance(slices[0], Tensor):
        return torch.stack(slices), 0
    return tuple(torch.stack(parts) for parts in zip(*slices, strict=True)), (0,) * len(slices[0])


def _each(outputs: Any, change: Any) -> Any:
    return change(outputs) if isinstance(outputs, Tensor) else tuple(change(out) for out in outputs)


def with_batch(run: Callable[..., Any], input: Tensor, *args: Any) -> Any:
    """Call with a batch axis in front of an unbatched (C, H, W) input, and take it off the results."""
    if input.dim() == 4:
        return run(input, *args)
    return _each(run(input.unsqueeze(0), *args), lambda out: out.squeeze(0))
