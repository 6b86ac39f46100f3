"""Plans for the front: what it keeps of a kind of call, made at the first one by the op's checks and route."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fastcnn.front import fronted
from fastcnn.ops import add_relu as add
from fastcnn.ops import bn_relu as bn
from fastcnn.ops import bn_relu_pool as bn_pool
from fastcnn.ops import checks
from fastcnn.ops import conv_relu as conv
from fastcnn.ops import conv_relu_pool as conv_pool
from fastcnn.ops import linear_relu as linear
from fastcnn.ops import linear_relu_dropout as dropout
from fastcnn.ops import lrn as norm
from fastcnn.ops import lrn_pool as norm_pool
from fastcnn.ops import max_pool as pool
from fastcnn.ops import normalize_conv_relu as joined
from fastcnn.ops import normalize_conv_relu_pool as joined_pool
from fastcnn.ops.convolution import output_shape
from fastcnn.ops.normalize import normalize
from fastcnn.ops.record import BATCH_NORM, CONVOLUTION, LINEAR, LRN, OTHER, POOL, WINDOW, Group, Op
from fastcnn.shapes import pair

Plan = dict[str, Any] | None


def _weight(_: Tensor, weight: Any, *__: Any) -> dict[str, Any]:
    checks.check_tensor("", "", weight)
    return {}


def _convolution(
    _: Tensor, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> dict[str, Any]:
    checks.check_tensor("", "", weight)
    name = padding if isinstance(padding, str) else ""
    pads = (0, 0) if name else pair("", "", padding)
    checks.check_integer("", "", groups)
    return {"convolution": (*pair("", "", stride), *pads, *pair("", "", dilation), groups), "padding": name}


def _pool(_: Tensor, *window: Any) -> dict[str, Any]:
    return {"window": pool.pool_window("", "", *window).numbers()}


def _window(
    _: Tensor, size: Any, stride: Any, padding: Any, dilation: Any, ceil_mode: Any, return_indices: Any
) -> dict[str, Any]:
    checks.check_flag("", "", return_indices)
    window = pool.pool_window("", "", size, stride, padding, ceil_mode, dilation)
    return {"window": window.numbers(), "indices": return_indices}


def _lrn(input: Tensor, size: Any, *constants: Any) -> dict[str, Any]:
    checks.check_lrn("", input, size, *constants)
    if input.numel() == 0 or checks.refuse_constants(**dict(zip(("alpha", "beta", "k"), constants))):
        raise TypeError
    return {"size": int(size), "constants": tuple(map(float, constants))}


def _batch_norm(input: Tensor, *arguments: Any) -> dict[str, Any]:
    checks.check_batch_norm("", input, *arguments)
    *_, training, momentum, eps = arguments
    return {"training": training, "constants": (float(momentum), float(eps))}


# By a group of parameters what reads their arguments, given the input too.
READ: dict[Group, Callable[..., dict[str, Any]]] = {
    BATCH_NORM: _batch_norm,
    CONVOLUTION: _convolution,
    LINEAR: _weight,
    LRN: _lrn,
    OTHER: _weight,
    POOL: _pool,
    WINDOW: _window,
}


def _settings(op: Op, arguments: tuple[Any, ...]) -> Plan:
    """Return what a plan says of a call's settings, or None where these are of an odd kind.

    Of the tensors all but the first, and a weight, may be None.
    """
    given, (input, *_) = op.tensors(arguments), arguments
    if input is None or not all(isinstance(each, Tensor) for each in given if each is not None):
        return None
    try:
        parts = [READ[group](input, *mine) for group, mine in zip(op.groups[1:], op.split(arguments)[1:])]
    except (TypeError, ValueError, RuntimeError):  # the stock layers themselves are to say what is wrong
        return None
    return dict(chain.from_iterable(part.items() for part in parts))


def _plan(op: Op, *arguments: Any) -> Plan:
    route, prepared = op.route(arguments)
    plan = _settings(op, arguments)
    if plan is None:
        return None
    if op.runs_stock(route, arguments):
        return {**plan, "backend": "torch"}
    if plan.get("indices"):
        return None  # Python makes them of the kernel's codes
    input, given = arguments[0], op.tensors(arguments)
    plan |= {"backend": route.backend, "batched": input.dim() == 4, "cast": _cast(prepared, given)}
    size = input.shape[-2:]
    if CONVOLUTION in op.groups:
        images, weight, _, settings, *_ = prepared
        settings = settings.running(route.algorithm) if route.algorithm else settings
        if settings.dgrad is not None or settings.wgrad is not None or images.shape != input.shape:
            return None  # gradients by our kernels, which neighbours share, or an input that is padded by hand
        size = output_shape(images, weight, settings.window(weight))[1:]
        plan["convolution"], plan["algorithm"] = settings.operands()
    pooled = dict(zip(("height", "width"), size)) if "window" in plan else {}
    return {**plan, **pooled, "derive": op.derivative(route.backend, prepared, before=None, **pooled)}


def _cast(prepared: tuple[Any, ...], given: tuple[Any, ...]) -> Any:
    """Return the dtype to which autocast casts a call's tensors, if it casts any."""
    changes = any(a is not None and b is not None and a.dtype != b.dtype for a, b in zip(prepared, given))
    return prepared[0].dtype if changes else None


def _plan_linear_relu_dropout(*arguments: Any) -> Plan:
    *layer, p, training = arguments
    dropout.check_probability(p)
    if not isinstance(training, bool):
        return None
    if training and 0 < p < 1:
        route, _ = dropout.OP.route(tuple(layer))
        if route.backend != "torch":
            return None
    plan = _plan(linear.OP, *layer)
    return plan and {**plan, "constants": (float(p),), "training": training}


def plain_linear_relu_dropout(*arguments: Any) -> Tensor:
    """Run ``fastcnn.functional.linear_relu_dropout`` down the Python path."""
    *layer, p, training = arguments
    fused = dropout.linear_relu_dropout(*arguments)
    return F.dropout(linear.linear_relu(*layer), p, training) if fused is None else fused


def _fronted(op: Op, python: Any) -> Any:
    return fronted(op.stem, partial(_plan, op), op.prepare, python)


add_relu = _fronted(add.OP, add.add_relu)
bn_relu = _fronted(bn.OP, bn.bn_relu)
bn_relu_pool = _fronted(bn_pool.OP, bn_pool.bn_relu_pool)
conv_relu = _fronted(conv.OP, conv.conv_relu)
conv_relu_pool = _fronted(conv_pool.OP, conv_pool.conv_relu_pool)
linear_relu = _fronted(linear.OP, linear.linear_relu)
linear_relu_dropout = fronted(
    dropout.OP.stem,
    _plan_linear_relu_dropout,
    lambda input, weight, bias, *_: linear.OP.prepare(input, weight, bias),
    plain_linear_relu_dropout,
)
lrn = _fronted(norm.OP, norm.lrn)
lrn_pool = _fronted(norm_pool.OP, norm_pool.lrn_pool)
max_pool = _fronted(pool.OP, pool.max_pool)


def _joined(op: Op, planned: Any, python: Any) -> Any:
    """Return what runs a stage that begins with a normalization: in one kernel if there is one, else in two steps."""

    def run(*arguments: Any) -> Tensor:
        output = joined.run_joined(op, *arguments)
        if output is not None:
            return output
        images, *groups = op.split(arguments)
        rest = python if is_compiling() else planned
        return rest(normalize(*images), *chain.from_iterable(groups))

    return run


normalize_conv_relu = _joined(joined.OP, conv_relu, conv.conv_relu)
normalize_conv_relu_pool = _joined(joined_pool.OP, conv_relu_pool, conv_pool.conv_relu_pool)
