"""Linear + ReLU: torch's matrix product with its cuBLASLt epilogue, and the masking pass of conv_relu for backward."""

import torch
from torch import Tensor

from fastcnn.triton.conv_relu import bias_relu_, conv_relu_backward


def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Operator ``fastcnn::linear_relu.triton``: (N, features) -> (N, out_features)."""
    if bias is not None and bias.dim() == 1 and bias.shape[0] == weight.shape[0]:
        return torch.ops.aten._addmm_activation(bias, input, weight.t())
    y = torch.nn.functional.linear(input, weight, bias)
    bias_relu_(y, None)
    return y


def linear_relu_backward(grad: Tensor, output: Tensor, bias_grad: bool, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Operator ``fastcnn::linear_relu_backward.triton``: rows are the pixels of one channels-last image."""
    images = _as_image(grad.contiguous()), _as_image(output.contiguous())
    dx, grad_bias = conv_relu_backward(*images, bias_grad, scale)
    return dx[0, :, :, 0].t(), grad_bias


def _as_image(rows: Tensor) -> Tensor:
    return rows[None, :, None, :].permute(0, 3, 1, 2)
