"""Images for the examples: made-up ones unless --data or --image names your own."""

import atexit
import shutil
import tempfile
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.functional import center_crop, resize, to_pil_image, to_tensor

CLASSES = ("cold", "warm")


def image_folder(number: int = 16, size: int = 64) -> str:
    """Write `number` PNGs of `size` x `size` pixels for each class, blue or red with noise; return their folder.

    It is laid out as torchvision's ImageFolder reads it, one folder a class, and goes when Python exits.
    """
    root = Path(tempfile.mkdtemp(prefix="images-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    for label, name in enumerate(CLASSES):
        (root / name).mkdir()
        tint = torch.tensor([0.3 * label, 0.0, 0.3 - 0.3 * label]).view(3, 1, 1)
        for i in range(number):
            noise = torch.rand(3, size, size, generator=generator)
            to_pil_image(0.7 * noise + tint).save(root / name / f"{i}.png")
    return str(root)


def read_image(path: str | None, size: int, seed: int = 0) -> Tensor:
    """Return an image file, or smooth random colours without one: (1, 3, size, size), values from 0 to 1."""
    if path is None:
        coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return nn.functional.interpolate(coarse, size, mode="bilinear")
    return to_tensor(center_crop(resize(Image.open(path).convert("RGB"), size), size)).unsqueeze(0)
