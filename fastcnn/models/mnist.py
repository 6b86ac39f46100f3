"""A small CNN for handwritten digits: two convolutions and two linear layers."""

import torch
from torch import Tensor, nn

from fastcnn.fuse import fuse
from fastcnn.models.dropin import DropIn


class MnistCNN(DropIn):
    """Two 3x3 convolutions (1-32-64), each with ReLU and 2x2 max-pool, then 3136-100-`num_classes`.

    Shapes: input (N, 1, 28, 28); output (N, num_classes), unnormalized scores. 333,526 parameters with ten classes.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.MnistCNN()(torch.randn(8, 1, 28, 28)).shape
        torch.Size([8, 10])
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.layer1 = nn.Sequential(nn.Conv2d(1, 32, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=2))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 64, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(kernel_size=2))
        self.fc = nn.Sequential(nn.Linear(64 * 7 * 7, 100), nn.ReLU(), nn.Linear(100, num_classes))
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x`: (N, 1, 28, 28)."""
        x = self.layer1(x)
        x = self.layer2(x)
        x = torch.flatten(x, 1)
        return self.fc(x)
