"""Look at what the layers of AlexNet compute: torchvision's feature extractor, and forward hooks.

    python examples/features.py --image cat.jpg --weights DEFAULT

Only the import of `alexnet` differs from a script for torchvision's model. Without --image the image is made up;
without --weights AlexNet is random.
"""

import argparse

import torch
from images import read_image
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize

from fastcnn import alexnet

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def hooked(model: nn.Module, names: list[str], images: Tensor) -> dict[str, Tensor]:
    """Run `model` once and return what the layers of these names gave."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> object:
        return lambda _layer, _inputs, output: found.update({name: output.clone()})

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model(images)
    for handle in handles:
        handle.remove()
    return found


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Print mean and share of zeros of the layers named, and return what they gave."""
    parser = argparse.ArgumentParser(description="Look at what the layers of AlexNet compute.")
    parser.add_argument("layers", nargs="*", default=["features.0", "features.2", "features.11", "classifier.4"])
    parser.add_argument("--image", help="an image file (default: a made-up one)")
    parser.add_argument("--weights", help="torchvision's weights, as DEFAULT (default: random)")
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = alexnet(weights=args.weights).eval().to(device)
    images = normalize(read_image(args.image, args.size), MEAN, STD).to(device)
    with torch.no_grad():
        extracted = create_feature_extractor(model, args.layers)(images)
        by_hooks = hooked(model, args.layers, images)
    for name in args.layers:
        values = by_hooks[name]
        zeros = (values == 0).float().mean().item()
        print(f"{name:14} {tuple(values.shape)!s:20} mean {values.mean():.4f}, {zeros:.0%} zeros")
    return {**{f"extracted {name}": extracted[name] for name in args.layers}, **by_hooks}


if __name__ == "__main__":
    main()
