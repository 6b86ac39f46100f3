"""Paint one image in the style of another: walk over VGG-19's layers and cut where a loss looks at them.

    python examples/style_transfer.py --content cat.jpg --style waves.jpg --weights DEFAULT --size 256 --steps 300

A slice of a fused network is stock, so each piece is fused by itself: that is the only change. The method is that
of Gatys, Ecker, Bethge, "A Neural Algorithm of Artistic Style", 2015. Without images it paints made-up ones, without
--weights VGG is random.
"""

import argparse

import torch
from images import read_image
from torch import Tensor, nn
from torchvision.models import vgg19
from torchvision.transforms.functional import to_pil_image

import fastcnn

CONTENT, STYLE = ("conv4_2",), ("conv1_1", "conv2_1", "conv3_1", "conv4_1", "conv5_1")


def cut(features: nn.Sequential) -> dict[str, nn.Module]:
    """Walk over the layers, named as in the paper, and cut after each convolution that a loss looks at."""
    pieces, start, block, number = {}, 0, 1, 0
    for i, layer in enumerate(features):
        if isinstance(layer, nn.Conv2d):
            number += 1
            if (name := f"conv{block}_{number}") in CONTENT + STYLE:
                pieces[name], start = fastcnn.fuse(features[start : i + 1]), i + 1
        elif isinstance(layer, nn.ReLU):
            features[i] = nn.ReLU()  # not in place: the losses look at what the convolution gave
        else:
            block, number = block + 1, 0
    return pieces


def gram(features: Tensor) -> Tensor:
    """Correlate the channels of `features`: (1, C, H, W) gives (C, C)."""
    flat = features.flatten(2).squeeze(0)
    return flat @ flat.T / flat.numel()


def looked_at(pieces: dict[str, nn.Module], picture: Tensor) -> dict[str, Tensor]:
    """Run piece after piece and return what each gives."""
    found = {}
    for name, piece in pieces.items():
        found[name] = picture = piece(picture)
    return found


def main(argv: list[str] | None = None) -> list[float]:
    """Paint, save the picture where --output says, and return the loss of every evaluation."""
    parser = argparse.ArgumentParser(description="Paint one image in the style of another.")
    parser.add_argument("--content", help="an image file (default: a made-up one)")
    parser.add_argument("--style", help="an image file (default: a made-up one)")
    parser.add_argument("--weights", help="torchvision's weights of VGG-19, as DEFAULT (default: random)")
    parser.add_argument("--size", type=int, default=48, help="in pixels a side")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", help="where to write the picture")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pieces = cut(vgg19(weights=args.weights).features.to(device).eval().requires_grad_(False))
    content = read_image(args.content, args.size, seed=1).to(device)
    style = read_image(args.style, args.size, seed=2).to(device)
    with torch.no_grad():
        wanted, wanted_style = looked_at(pieces, content), looked_at(pieces, style)
    picture = content.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([picture], max_iter=4)
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        found = looked_at(pieces, picture)
        loss = sum(nn.functional.mse_loss(found[name], wanted[name]) for name in CONTENT)
        loss = loss + 1e5 * sum(nn.functional.mse_loss(gram(found[name]), gram(wanted_style[name])) for name in STYLE)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(args.steps):
        optimizer.step(closure)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if args.output:
        to_pil_image(picture.detach().squeeze(0).clamp(0, 1).cpu()).save(args.output)
    return losses


if __name__ == "__main__":
    main()
