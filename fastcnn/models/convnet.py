"""A small CNN for photographs: two large-stride convolutions with batch normalization and one linear layer."""

import torch
from torch import Tensor, nn

from fastcnn.fuse import fuse
from fastcnn.models.dropin import DropIn


class ConvNet(DropIn):
    """Convolutions 3-32 (8x8, stride 4) and 32-64 (7x7, stride 2) with batch norm, ReLU and pool, then 1600-classes.

    Shapes: input (N, 3, 224, 224); output (N, num_classes), unnormalized scores. 117,991 parameters with seven
    classes.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.ConvNet()(torch.randn(8, 3, 224, 224)).shape
        torch.Size([8, 7])
    """

    def __init__(self, num_classes: int = 7) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(
            nn.Conv2d(3, 32, kernel_size=8, stride=4), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(kernel_size=2)
        )
        self.layer2 = nn.Sequential(
            nn.Conv2d(32, 64, kernel_size=7, stride=2), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(kernel_size=2)
        )
        self.fc = nn.Linear(64 * 5 * 5, num_classes)
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x`: (N, 3, 224, 224)."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = torch.flatten(x, 1)
        return self.fc(x)
