"""Images as networks take them: how they are read, resized, cropped and normalized."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # mean and standard deviation of each channel, of 1
# Mean and standard deviation by number of channels: ImageNet's for colours.
STATISTICS: dict[int, Statistics] = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.5,), (0.5,))}


def transforms(input_size: tuple[int, int, int]) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Return what makes (C, H, W) bytes of a training image of PIL, and of a held-out one.

    Example:
        >>> from PIL import Image
        >>> transforms((1, 64, 64))[1](Image.new("RGB", (90, 60))).shape
        torch.Size([1, 64, 64])
    """
    from torchvision.transforms import v2

    channels, height, width = input_size
    grey = [v2.Grayscale()] if channels == 1 else []
    shorter_side = math.ceil(max(height, width) * 9 / 64) * 8  # an eighth more, in eights: 256 for 224 and 227
    start, end = [*grey, v2.Resize(shorter_side)], [v2.PILToTensor()]
    train = v2.Compose([*start, v2.RandomCrop((height, width)), v2.RandomHorizontalFlip(), *end])
    return train, v2.Compose([*start, v2.CenterCrop((height, width)), *end])


def scale_and_offset(statistics: Statistics, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Return factor and summand, (C, 1, 1) each, that turn bytes into normalized float32.

    Example:
        >>> scale, offset = scale_and_offset(((0.5,), (0.25,)))
        >>> (255 * scale + offset).item()
        2.0
    """
    mean, std = (torch.tensor(values, device=device).view(-1, 1, 1) for values in statistics)
    return 1 / (255 * std), -mean / std


def fit(images: Tensor, input_size: tuple[int, int, int]) -> Tensor:
    """Resize grey images (N, 1, h, w) to a network's input (C, H, W), and repeat the channel.

    Example:
        >>> fit(torch.zeros(4, 1, 28, 28), (3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """
    channels, height, width = input_size
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1).contiguous()
