"""LRN and max-pool: the operators ``lrn_pool``, ``lrn_pool_codes`` and ``lrn_pool_backward``, and autograd."""

from typing import Any

from torch import Tensor

from fastcnn.ops import autograd, lrn, max_pool, stock
from fastcnn.ops.record import like, operands

OP = max_pool.after(lrn.OP, "lrn_pool", "local_response_norm_max_pool2d")
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
        height, width = input.shape[2:]
        unpooled = stock.unpool(grad, codes, ctx.window, height, width, autograd.anchor(grad))
        return (lrn.stock_backward(unpooled, input, ctx.norm),)
    return (_backward[ctx.backend](*operands((grad, codes, input, ctx.norm, ctx.window))),)


OP.runs()
