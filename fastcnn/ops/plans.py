"""Plans for the front: one planner an op, called once for each kind of call; it uses the op's checks and route."""

from itertools import chain
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from fastcnn.front import derivative, fronted
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
from fastcnn.ops.convolution import Convolution, output_shape
from fastcnn.ops.normalize import normalize
from fastcnn.ops.record import Op
from fastcnn.shapes import pair

Plan = dict[str, Any] | None


def _stock_convolution(
    input: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any
) -> dict[str, Any]:
    checks.check_tensor("", "", weight)
    name = padding if isinstance(padding, str) else ""
    pads = (0, 0) if name else pair("", "", padding)
    checks.check_integer("", "", groups)
    return {"convolution": (*pair("", "", stride), *pads, *pair("", "", dilation), groups), "padding": name}


def _stock_window(*window: Any) -> dict[str, Any]:
    return {"window": pool.pool_window("", "", *window).numbers()}


def _stock_norm(input: Tensor, size: Any, alpha: Any, beta: Any, k: Any) -> dict[str, Any]:
    checks.check_lrn("", input, size, alpha, beta, k)
    if input.numel() == 0 or checks.refuse_constants(alpha=alpha, beta=beta, k=k):
        raise TypeError
    return {"size": size, "constants": (float(alpha), float(beta), float(k))}


def _stock_batch_norm(*arguments: Any) -> dict[str, Any]:
    *_, training, momentum, eps = arguments
    checks.check_batch_norm("", *arguments)
    return {"training": training, "constants": (float(momentum), float(eps))}


def _stock(tensors: tuple[Any, ...], *settings: Any) -> Plan:
    """Return the plan of the stock layers: by functions of their arguments; None where these are of an odd kind.

    Of the tensors all but the first, and a weight, may be None.
    """
    plan: dict[str, Any] = {"backend": "torch"}
    if not all(isinstance(each, Tensor) for each in tensors if each is not None) or tensors[0] is None:
        return None
    try:
        for read, *arguments in settings:
            plan |= read(*arguments)
    except (TypeError, ValueError, RuntimeError):  # the stock layers themselves are to say what is wrong
        return None
    return plan


def _cast(prepared: tuple[Tensor | None, ...], given: tuple[Tensor | None, ...]) -> dict[str, Any]:
    """Return the dtype to which autocast casts a convolution's tensors, if it casts any."""
    changes = any(a is not None and b is not None and a.dtype != b.dtype for a, b in zip(prepared, given))
    return {"cast": prepared[0].dtype if changes else None}  # type: ignore[union-attr]


def _kernel_convolution(
    prepared: tuple[Tensor | None, ...], given: tuple[Any, ...], settings: Convolution, algorithm: str | None
) -> Plan:
    if algorithm:
        settings = settings.running(algorithm)
    if settings.dgrad is not None or settings.wgrad is not None or prepared[0].shape != given[0].shape:  # type: ignore[union-attr]
        return None  # gradients by our kernels, which neighbours share, or an input that is padded by hand
    numbers, name = settings.operands()
    batched = given[0].dim() == 4
    return {"convolution": numbers, "algorithm": name, "batched": batched, **_cast(prepared, given)}


def _plan_conv_relu(*arguments: Any) -> Plan:
    route, prepared = conv.OP.route(arguments)
    if route.backend == "torch":
        return _stock(conv.OP.tensors(arguments), (_stock_convolution, *arguments))
    *tensors, settings = prepared
    plan = _kernel_convolution(tuple(tensors), conv.OP.tensors(arguments), settings, route.algorithm)
    derive = derivative(conv.ConvReLU, settings=settings, backend=route.backend, before=None)
    return plan and {**plan, "backend": route.backend, "derive": derive}


def _plan_conv_relu_pool(*arguments: Any) -> Plan:
    given = conv_pool.OP.tensors(arguments)
    route, prepared = conv_pool.OP.route(arguments)
    if route.backend == "torch":
        (input,), layer, window = conv_pool.OP.split(arguments)
        return _stock(given, (_stock_convolution, input, *layer), (_stock_window, *window))
    *tensors, settings, window = prepared
    plan = _kernel_convolution(tuple(tensors), given, settings, route.algorithm)
    input, weight, _ = tensors
    height, width = output_shape(input if input.dim() == 4 else input[None], weight, *settings.window())[2:]
    context = {"settings": settings, "window": window, "height": height, "width": width, "before": None}
    derive = derivative(conv_pool.ConvReLUPool, others=2, backend=route.backend, **context)
    pooled = {"window": window.numbers(), "height": height, "width": width}
    return plan and {**plan, **pooled, "backend": route.backend, "derive": derive}


def _plan_max_pool(*arguments: Any) -> Plan:
    input, size, stride, padding, dilation, ceil_mode, return_indices = arguments
    if return_indices is not False:
        return None
    route, prepared = pool.OP.route(arguments)
    if route.backend == "torch":
        return _stock((input,), (_stock_window, size, stride, padding, ceil_mode, dilation))
    window = prepared[1]
    height, width = input.shape[-2:]
    derive = derivative(pool.MaxPool, others=2, window=window, height=height, width=width, backend=route.backend)
    pooled = {"window": window.numbers(), "height": height, "width": width, "batched": input.dim() == 4}
    return {**pooled, "backend": route.backend, "derive": derive}


def _plan_lrn(*arguments: Any) -> Plan:
    route, prepared = norm.OP.route(arguments)
    if route.backend == "torch":
        return _stock(norm.OP.tensors(arguments), (_stock_norm, *arguments))
    size, *constants = settings = norm.kernel_norm(prepared[1])
    derive = derivative(norm.LocalResponseNorm, norm=settings, backend=route.backend)
    return {"size": size, "constants": tuple(constants), "backend": route.backend, "derive": derive}


def _plan_lrn_pool(*arguments: Any) -> Plan:
    route, prepared = norm_pool.OP.route(arguments)
    if route.backend == "torch":
        (input,), settings, window = norm_pool.OP.split(arguments)
        return _stock((input,), (_stock_norm, input, *settings), (_stock_window, *window))
    window = prepared[2]
    size, *constants = settings = norm.kernel_norm(prepared[1])
    derive = derivative(norm_pool.LRNPool, others=1, norm=settings, window=window, backend=route.backend)
    numbers = {"size": size, "constants": tuple(constants), "window": window.numbers()}
    return {**numbers, "backend": route.backend, "derive": derive}


def _plan_linear_relu(*arguments: Any) -> Plan:
    route, prepared = linear.OP.route(arguments)
    if route.backend == "torch":
        return _stock(arguments) if isinstance(arguments[1], Tensor) else None
    derive = derivative(linear.LinearReLU, backend=route.backend)
    return {**_cast(prepared, arguments), "backend": route.backend, "derive": derive}


def _plan_linear_relu_dropout(*arguments: Any) -> Plan:
    *layer, p, training = arguments
    dropout.check_probability(p)
    if not isinstance(training, bool):
        return None
    if training and 0 < p < 1:
        route, _ = dropout.OP.route(tuple(layer))
        if route.backend != "torch":
            return None
    plan = _plan_linear_relu(*layer)
    return plan and {**plan, "constants": (float(p),), "training": training}


def _plan_bn_relu(*arguments: Any) -> Plan:
    (input,), numbers = bn.OP.split(arguments)
    route, _ = bn.OP.route(arguments, bn.measured(*numbers))
    if route.backend == "torch" or input.numel() == 0:
        return _stock(bn.OP.tensors(arguments), (_stock_batch_norm, *arguments))
    settings = _stock_batch_norm(*arguments)
    context = {"eps": settings["constants"][1], "training": settings["training"]}
    derive = derivative(bn.BatchNormReLU, backend=route.backend, **context)
    return {**settings, "backend": route.backend, "derive": derive}


def _plan_bn_relu_pool(*arguments: Any) -> Plan:
    route, prepared = bn_pool.OP.route(arguments)
    (input,), numbers, pool_arguments = bn_pool.OP.split(arguments)
    if route.backend == "torch" or input.numel() == 0:
        tensors = bn_pool.OP.tensors(arguments)
        return _stock(tensors, (_stock_batch_norm, input, *numbers), (_stock_window, *pool_arguments))
    settings, window = _stock_batch_norm(input, *numbers), prepared[1]
    context = {"eps": settings["constants"][1], "training": settings["training"], "window": window}
    derive = derivative(bn_pool.BatchNormReLUPool, others=1, backend=route.backend, **context)
    return {**settings, "window": window.numbers(), "backend": route.backend, "derive": derive}


def _plan_add_relu(*arguments: Any) -> Plan:
    route, _ = add.OP.route(arguments)
    if route.backend == "torch":
        return _stock(arguments) if isinstance(arguments[1], Tensor) else None
    return {"backend": route.backend, "derive": derivative(add.AddReLU, backend=route.backend)}


def plain_linear_relu_dropout(*arguments: Any) -> Tensor:
    """Run ``fastcnn.functional.linear_relu_dropout`` down the Python path."""
    *layer, p, training = arguments
    fused = dropout.linear_relu_dropout(*arguments)
    return F.dropout(linear.linear_relu(*layer), p, training) if fused is None else fused


def _fronted(op: Op, plan: Any, python: Any) -> Any:
    return fronted(op.stem, plan, op.prepare, python)


add_relu = _fronted(add.OP, _plan_add_relu, add.add_relu)
bn_relu = _fronted(bn.OP, _plan_bn_relu, bn.bn_relu)
bn_relu_pool = _fronted(bn_pool.OP, _plan_bn_relu_pool, bn_pool.bn_relu_pool)
conv_relu = _fronted(conv.OP, _plan_conv_relu, conv.conv_relu)
conv_relu_pool = _fronted(conv_pool.OP, _plan_conv_relu_pool, conv_pool.conv_relu_pool)
linear_relu = _fronted(linear.OP, _plan_linear_relu, linear.linear_relu)
linear_relu_dropout = fronted(
    dropout.OP.stem,
    _plan_linear_relu_dropout,
    lambda input, weight, bias, *_: linear.OP.prepare(input, weight, bias),
    plain_linear_relu_dropout,
)
lrn = _fronted(norm.OP, _plan_lrn, norm.lrn)
lrn_pool = _fronted(norm_pool.OP, _plan_lrn_pool, norm_pool.lrn_pool)
max_pool = _fronted(pool.OP, _plan_max_pool, pool.max_pool)


def _joined(op: Op, fused: Any, planned: Any, python: Any) -> Any:
    """Return what runs a stage that begins with a normalization: in one kernel if there is one, else in two steps."""

    def run(*arguments: Any) -> Tensor:
        images, *groups = op.split(arguments)
        output = fused(*arguments)
        if output is not None:
            return output
        rest = python if is_compiling() else planned
        return rest(normalize(*images), *chain.from_iterable(groups))

    return run


normalize_conv_relu = _joined(joined.OP, joined.normalize_conv_relu, conv_relu, conv.conv_relu)
normalize_conv_relu_pool = _joined(
    joined_pool.OP, joined_pool.normalize_conv_relu_pool, conv_relu_pool, conv_pool.conv_relu_pool
)
