"""Normalization, convolution, ReLU and max-pool: ``normalize_conv_relu_pool``, its ``_codes``, and autograd."""

from fastcnn.ops.conv_relu_pool import OP
from fastcnn.ops.normalize_conv_relu import joined

normalize_conv_relu_pool = joined("normalize_conv_relu_pool", "NormalizeConvReLUPool", OP)
