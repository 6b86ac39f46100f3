"""Look over AlexNet: the table of torchinfo or torchsummary, and what each convolution adds, tried on copies.

    python examples/inspect_model.py --weights DEFAULT --image cat.jpg --size 224
    python examples/inspect_model.py --tool torchsummary

Only the import of `alexnet` differs from a script for torchvision's model. The copies are made by `copy.deepcopy`, and
one by `pickle`, as for another process. Needs torchinfo or torchsummary.
"""

import argparse
import copy
import importlib
import pickle

import torch
from images import read_image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize

from fastcnn import alexnet

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def without(model: nn.Module, name: str) -> nn.Module:
    """Return a copy of `model` in which one layer gives zeros."""
    changed = copy.deepcopy(model)
    for parameter in changed.get_submodule(name).parameters():
        nn.init.zeros_(parameter)
    return changed


def main(argv: list[str] | None = None) -> dict[str, Tensor]:
    """Print the table and how far each convolution moves the scores; return the scores with and without it."""
    parser = argparse.ArgumentParser(description="Look over AlexNet.")
    parser.add_argument("--tool", choices=("torchinfo", "torchsummary"), default="torchinfo")
    parser.add_argument("--image", help="an image file (default: a made-up one)")
    parser.add_argument("--weights", help="torchvision's weights, as DEFAULT (default: random)")
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = alexnet(weights=args.weights).eval().to(device)
    summary = importlib.import_module(args.tool).summary
    if args.tool == "torchinfo":
        print(summary(model, (1, 3, args.size, args.size), device=device, verbose=0))
    else:
        summary(model, (3, args.size, args.size), device=device)

    images = normalize(read_image(args.image, args.size), MEAN, STD).to(device)
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        scores = {"whole": model(images), "pickled": pickle.loads(pickle.dumps(model))(images)}
        scores |= {f"without {name}": without(model, name)(images) for name in names}
    for name, found in scores.items():
        print(f"{name:20} scores differ by {(found - scores['whole']).abs().mean():.4f} in the mean")
    return scores


if __name__ == "__main__":
    main()
