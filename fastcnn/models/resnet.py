"""The small residual network for CIFAR-10: its layer table and its block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcnn.fuse import fuse
from fastcnn.models.dropin import DropIn
from fastcnn.roles import BLOCK, GROUPS

__all__ = ["ResNetCifar", "resnet_cifar"]

# Output channels and stride of each stage; a stage has two blocks, and its first takes the stride.
STAGES = ((16, 1), (32, 2), (64, 2))
BLOCKS = 2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and the input added before the last ReLU.

    Where size or channels change, a 1x1 convolution with batch norm (the paper's option B) fits the input to the sum.

    Shapes: input (N, in_channels, H, W); output (N, out_channels, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        self.shortcut: nn.Module = nn.Identity()
        if (in_channels, stride) != (out_channels, 1):
            convolution = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x`: (N, in_channels, H, W)."""
        return F.relu(self.layers(x) + self.shortcut(x))


GROUPS[BasicBlock.forward] = BLOCK


class ResNetCifar(DropIn):
    """The residual network for 32x32 images with three stages of two blocks, 16-32-64 channels: 14 layers deep.

    A 3x3 convolution with batch norm and ReLU, six basic blocks, the average of each channel and one linear layer.
    Shapes: input (N, 3, H, W), 32x32 by custom; output (N, num_classes), unnormalized scores. 175,258 parameters with
    ten classes. Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2, with
    n = 2 and projection shortcuts; weights as there (He et al., "Delving Deep into Rectifiers").

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.ResNetCifar()(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        channels = STAGES[0][0]
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU())
        blocks: list[nn.Module] = []
        for out_channels, stride in STAGES:
            for block in range(BLOCKS):
                blocks.append(BasicBlock(channels, out_channels, stride if block == 0 else 1))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x`: (N, 3, H, W)."""
        x = self.blocks(self.stem(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet_cifar(num_classes: int = 10) -> ResNetCifar:
    """Build the residual network for CIFAR, :class:`ResNetCifar`.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.resnet_cifar(num_classes=100)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 100])
    """
    return ResNetCifar(num_classes)
