"""Images as networks take them: how they are read, resized, cropped and normalized."""

import contextlib
import math
from collections.abc import Callable
from os import PathLike
from typing import Any

import torch.nn.functional as F
from torch import Tensor

Statistics = tuple[tuple[float, ...], tuple[float, ...]]  # each channel's mean and deviation, for values from 0 to 1
# Mean and standard deviation by number of channels: ImageNet's for colours.
STATISTICS: dict[int, Statistics] = {3: ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), 1: ((0.5,), (0.5,))}

LONGEST = 16  # times the shorter side; longer images are cropped, as resizing would make megapixels of a line


def open_image(file: str | PathLike[str], *, small: bool = False) -> Any:
    """Read an image as viewers show it: turned as its EXIF orientation says, in 8 bits a channel, as RGB.

    16 bits are scaled to 8. An image more than 16 times as long as wide is cropped to that, around its centre. `small`
    decodes a JPEG at an eighth of its size, to see in less time whether it can be read. Returns an image of PIL; raises
    what PIL raises for a file that it cannot read, and ValueError for pixels of 32 bits, whose white nothing tells.
    """
    from PIL import Image, ImageOps

    with Image.open(file) as image:
        if small:
            image.draft("L", (1, 1))
        image.load()
        with contextlib.suppress(Exception):  # damaged EXIF data, which viewers pass over too
            ImageOps.exif_transpose(image, in_place=True)
        return _bounded(_eight_bits(image)).convert("RGB")


def _eight_bits(image: Any) -> Any:
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if wide:
        bits = getattr(image, "tag_v2", {}).get(258, (16,))[0]  # TIFF has 12 bits too, which PIL reads as 16
        return image.convert("I").point(lambda value: value * (255 / (2**bits - 1)) + 0.5).convert("L")
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} does not say which value is white; save it with 8 or 16 bits")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # PIL warns if it goes straight to RGB
    return image


def _bounded(image: Any) -> Any:
    most = LONGEST * min(image.size)
    width, height = (min(side, most) for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image if (width, height) == image.size else image.crop((left, top, left + width, top + height))


def transforms(input_size: tuple[int, int, int]) -> tuple[Callable[[Any], Tensor], Callable[[Any], Tensor]]:
    """Return the transforms of training and of held-out images: from an image of PIL to (C, H, W) uint8."""
    from torchvision.transforms import v2

    channels, height, width = input_size
    grey = [v2.Grayscale()] if channels == 1 else []
    shorter_side = math.ceil(max(height, width) * 9 / 64) * 8  # an eighth more, in eights: 256 for 224 and 227
    start, end = [*grey, v2.Resize(shorter_side)], [v2.PILToTensor()]
    train = v2.Compose([*start, v2.RandomCrop((height, width)), v2.RandomHorizontalFlip(), *end])
    return train, v2.Compose([*start, v2.CenterCrop((height, width)), *end])


def fit(images: Tensor, input_size: tuple[int, int, int]) -> Tensor:
    """Resize grey images (N, 1, h, w) to a network's input (C, H, W), and repeat the channel.

    Example:
        >>> import torch
        >>> fit(torch.zeros(4, 1, 28, 28), (3, 32, 32)).shape
        torch.Size([4, 3, 32, 32])
    """
    channels, height, width = input_size
    if images.shape[2:] != (height, width):
        images = F.interpolate(images, (height, width), mode="bilinear", antialias=True)
    return images.expand(-1, channels, -1, -1).contiguous()
