"""SGD with momentum for models in bfloat16 or float16, with float32 master weights in the optimizer."""

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fastcnn.backend import chosen, kernel
from fastcnn.route import choose

__all__ = ["SGD"]

_NAME = "SGD"


class SGD(torch.optim.Optimizer):
    """Stochastic gradient descent as `torch.optim.SGD`, with float32 master weights of parameters in half precision.

    Each parameter in bfloat16 or float16 has a float32 master, which is updated with a float32 momentum and rounded
    into the parameter. Float32 parameters are their own masters. Master and momentum are in the state dict as `master`
    and `momentum_buffer`.

    The parameter decides: wherever an element of it is no longer its master rounded (`load_state_dict`, `clamp_`, a
    re-initialization between two steps), the master first takes the parameter's value.

    Under `fastcnn.use_backend("triton")` one kernel updates all parameters of a group that have the same dtypes: it
    reads gradient, parameter, master and momentum and writes the last three; it has not been timed on a GPU yet. Under
    the other backends, and for parameters that are not dense, torch's foreach operations run.

    Args:
        params: parameters or groups of them, in float32, bfloat16 or float16.
        lr: the learning rate; a tensor on the parameters' device may change between replays of a CUDA graph.
        momentum, dampening, weight_decay, nesterov, maximize: as in `torch.optim.SGD`.

    Raises ValueError for a negative `lr`, `momentum` or `weight_decay`, and for `nesterov` without momentum or with
    dampening; TypeError, at a step, for parameters of another dtype or sparse gradients.

    Example:
        >>> import torch, fastcnn
        >>> model = fastcnn.MnistCNN().to(torch.bfloat16)
        >>> optimizer = fastcnn.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
        >>> model(torch.randn(4, 1, 28, 28, dtype=torch.bfloat16)).float().square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.state[model.fc[-1].weight]["master"].dtype
        torch.float32
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        for name, value in settings.items():
            if not isinstance(value, Tensor) and value < 0:
                raise ValueError(f"{_NAME}: argument {name!r}: expected no negative number, got {value}")
        if nesterov and (momentum <= 0 or dampening != 0):
            got = f"momentum {momentum}, dampening {dampening}"
            raise ValueError(f"{_NAME}: argument 'nesterov': expected momentum > 0 and dampening 0, got {got}")
        super().__init__(params, {**settings, "dampening": dampening, "nesterov": nesterov, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update the parameters that have gradients; a `closure` computes them first, and its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = {name: group[name] for name in ("lr", "momentum", "dampening", "weight_decay")}
            settings |= {name: group[name] for name in ("nesterov", "maximize")}
            updated = [weight for weight in group["params"] if weight.grad is not None]
            for weight in updated:
                _check(weight)
            fused = [weight for weight in updated if chosen() == "triton" and _is_dense(weight)]
            self._step_fused(fused, settings)
            in_one = {id(weight) for weight in fused}
            self._step_foreach([weight for weight in updated if id(weight) not in in_one], settings)
        return loss

    def _master(self, weight: Tensor) -> Tensor:
        if weight.dtype == torch.float32:
            return weight
        state = self.state[weight]
        if "master" not in state:
            state["master"] = weight.detach().to(torch.float32, memory_format=torch.preserve_format)
        return state["master"]

    def _step_fused(self, weights: list[Tensor], settings: dict[str, Any]) -> None:
        """Launch one kernel for all weights that are alike in device, dtypes, and whether it is their first step."""
        for weight in {(type(each), each.device, each.dtype): each for each in weights}.values():
            choose("sgd", _NAME, (weight,), lambda *arguments: arguments, lambda _: "")  # raises where it cannot run
        kinds = defaultdict(list)
        for weight in weights:
            grad, master, state = weight.grad, self._master(weight), self.state[weight]
            assert grad is not None
            if grad.stride() != weight.stride():
                grad = torch.empty_like(weight, dtype=grad.dtype).copy_(grad)
            first = "momentum_buffer" not in state
            if first and settings["momentum"]:
                state["momentum_buffer"] = torch.empty_like(master)
            buffer = state.get("momentum_buffer") if settings["momentum"] else None
            kinds[weight.device, weight.dtype, grad.dtype, first].append((weight, grad, master, buffer))
        for (device, *_, first), alike in kinds.items():
            lr = settings["lr"]
            if isinstance(lr, Tensor) and lr.device != device:
                lr = lr.item()
            kernel("triton", "sgd", "sgd")(alike, first=first, **{**settings, "lr": lr})

    def _step_foreach(self, weights: list[Tensor], settings: dict[str, Any]) -> None:
        if not weights:
            return
        masters = [self._master(weight) for weight in weights]
        pairs = [(weight, master) for weight, master in zip(weights, masters, strict=True) if weight is not master]
        for weight, master in pairs:  # the parameter's value counts where it is no longer the master's, rounded
            master.copy_(torch.where(weight == master.to(weight.dtype), master, weight.float()))
        grads = [weight.grad.float() for weight in weights]  # type: ignore[union-attr]
        if settings["maximize"]:
            grads = list(torch._foreach_neg(grads))
        if settings["weight_decay"]:
            grads = list(torch._foreach_add(grads, masters, alpha=settings["weight_decay"]))
        if momentum := settings["momentum"]:
            kept = 1 - settings["dampening"]
            buffers = [self._velocity(*each, momentum, kept) for each in zip(weights, grads, strict=True)]
            grads = list(torch._foreach_add(grads, buffers, alpha=momentum)) if settings["nesterov"] else buffers
        torch._foreach_sub_(masters, torch._foreach_mul(grads, settings["lr"]))
        if pairs:
            torch._foreach_copy_([weight for weight, _ in pairs], [master for _, master in pairs])

    def _velocity(self, weight: Tensor, grad: Tensor, momentum: float, kept: float) -> Tensor:
        """Return the momentum's buffer with a part of a gradient added; the first gradient is the buffer."""
        state = self.state[weight]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = grad.clone(memory_format=torch.preserve_format)
            return state["momentum_buffer"]
        return state["momentum_buffer"].mul_(momentum).add_(grad, alpha=kept)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned; unlike torch's own method, this keeps master and momentum in float32."""
        super().load_state_dict(state_dict)
        ours = chain.from_iterable(group["params"] for group in self.param_groups)
        theirs = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        for weight, number in zip(ours, theirs, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[weight][name] = torch.empty_like(weight, dtype=torch.float32).copy_(value)


def _is_dense(weight: Tensor) -> bool:
    """Whether a tensor fills its memory without gaps, in whatever order of axes."""
    return weight.is_contiguous() or torch.empty_like(weight, device="meta").stride() == weight.stride()


def _check(weight: Tensor) -> None:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"{_NAME}: expected parameters in float32, bfloat16 or float16, got {weight.dtype}")
    if weight.grad is not None and weight.grad.layout != torch.strided:
        raise TypeError(f"{_NAME}: expected dense gradients, got {weight.grad.layout}")
