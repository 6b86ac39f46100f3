"""Classic CNNs in plain layers that run fused, and the names under which the command line builds them."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastcnn.models.alexnet import AlexNet, AlexNet2012, alexnet
from fastcnn.models.convnet import ConvNet
from fastcnn.models.mnist import MnistCNN
from fastcnn.models.resnet import ResNetCifar, resnet_cifar
from fastcnn.models.vgg import (
    VGG,
    vgg11,
    vgg11_bn,
    vgg11_lrn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_1x1,
    vgg16_bn,
    vgg19,
    vgg19_bn,
)

__all__ = [
    "VGG",
    "AlexNet",
    "AlexNet2012",
    "ConvNet",
    "MnistCNN",
    "ResNetCifar",
    "alexnet",
    "resnet_cifar",
    "vgg11",
    "vgg11_bn",
    "vgg11_lrn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_1x1",
    "vgg16_bn",
    "vgg19",
    "vgg19_bn",
]


class ModelEntry(NamedTuple):
    """A model of the command line: its builder, which takes `num_classes`, and one input's size (C, H, W) in pixels.

    Example:
        >>> import torch, fastcnn
        >>> entry = fastcnn.models.MODELS["mnist_cnn"]
        >>> entry.build(num_classes=10)(torch.randn(1, *entry.input_size)).shape
        torch.Size([1, 10])
    """

    build: Callable[..., nn.Module]
    input_size: tuple[int, int, int]


MODELS: dict[str, ModelEntry] = {
    "alexnet": ModelEntry(alexnet, (3, 224, 224)),
    "alexnet2012": ModelEntry(AlexNet2012, (3, 227, 227)),
    "convnet": ModelEntry(ConvNet, (3, 224, 224)),
    "mnist_cnn": ModelEntry(MnistCNN, (1, 28, 28)),
    "resnet_cifar": ModelEntry(resnet_cifar, (3, 32, 32)),
    **{
        vgg.__name__: ModelEntry(vgg, (3, 224, 224))
        for vgg in (vgg11, vgg11_bn, vgg11_lrn, vgg13, vgg13_bn, vgg16, vgg16_1x1, vgg16_bn, vgg19, vgg19_bn)
    },
}
