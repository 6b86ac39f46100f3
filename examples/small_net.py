"""The network of the examples that call `fastcnn.fuse`, written without fastcnn like one of your own."""

from torch import Tensor, nn


class SmallNet(nn.Module):
    """Three convolutions with ReLU, LRN and max-pools, and two linear layers.

    Shapes: input (N, 3, 32, 32); output (N, num_classes), unnormalized scores.
    """

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 16, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.LocalResponseNorm(5),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(16, 32, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=2),
            nn.Conv2d(32, 32, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(nn.Linear(32 * 7 * 7, 64), nn.ReLU(inplace=True), nn.Linear(64, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Score `images`: (N, 3, 32, 32)."""
        return self.classifier(self.features(images).flatten(1))
