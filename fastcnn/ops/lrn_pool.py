"""LRN and max-pool: the operators ``lrn_pool``, ``lrn_pool_codes`` and ``lrn_pool_backward``, and autograd."""

from typing import Any

from torch import Tensor

from fastcnn.ops import autograd, checks, lrn, max_pool, stock
from fastcnn.ops.record import INPUT, POOL, Op, like, operands
from fastcnn.ops.record import LRN as NORM


def reference(*arguments: Any) -> Tensor:
    """Return LRN and max-pool as torch runs them."""
    (input,), norm, pool = OP.split(arguments)
    return stock.pool(lrn.reference(input, *norm), *pool)


def _prepare(function: str, *arguments: Any) -> tuple[Any, ...]:
    (input,), norm, pool = OP.split(arguments)
    prepared = lrn.prepare(function, input, *norm)
    checks.check_image(function, input)
    return *prepared, max_pool.window_over(function, input.shape[-3:], *pool)


def _refuse(*prepared: Any) -> str:
    return lrn.refuse(*prepared) or max_pool.refuse_after_norm(*prepared)


OP = Op(
    "lrn_pool", "local_response_norm_max_pool2d", INPUT, NORM, POOL, stock=reference, prepare=_prepare, refuse=_refuse
)
OP.forward(max_pool.fake)
_backward = OP.define(
    "lrn_pool_backward",
    f"(Tensor grad, Tensor codes, {OP.schema}) -> Tensor",
    lambda grad, codes, input, *_: like(input),
)


@OP.differentiable("LRNPool", "norm", "window", saves=lambda ctx, inputs, output: (inputs[0], output[1]))
def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor]:
    """(N, C, H, W) -> pooled normalized values and codes; saves the input and the codes."""
    input, codes = ctx.saved_tensors
    if autograd.differentiable():
        unpooled = stock.unpool(grad, codes, ctx.window, *input.shape[2:])
        return (lrn.stock_backward(unpooled, input, ctx.norm),)
    return (_backward[ctx.backend](*operands((grad, codes, input, ctx.norm, ctx.window))),)


OP.runs()
