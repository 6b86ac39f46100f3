"""Train a network of your own with weight norm or spectral norm, and take the norm off for inference.

    python examples/weight_norm.py
    python examples/weight_norm.py --norm spectral_norm

These are torch's `parametrizations`; a norm computes the weight at each access. Sources: Salimans, Kingma,
"Weight Normalization", 2016; Miyato et al., "Spectral Normalization for Generative Adversarial Networks", 2018.
"""

import argparse

import torch
from small_net import SmallNet
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import remove_parametrizations

import fastcnn


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Return the loss of every step, and the scores before and after the norm is taken off."""
    parser = argparse.ArgumentParser(description="Train with normalized weights.")
    parser.add_argument("--norm", choices=("weight_norm", "spectral_norm"), default="weight_norm")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fastcnn.fuse(SmallNet().to(device))
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for layer in layers:
        getattr(parametrizations, args.norm)(layer)

    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(2, (args.batch_size,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(args.steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()  # spectral norm's vectors stand still from here on
    with torch.no_grad():
        normalized = model(images)
        for layer in layers:
            remove_parametrizations(layer, "weight")
        plain = model(images)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}; without the norm: {(plain - normalized).abs().max():.2g} away")
    return {"losses": losses, "normalized": normalized, "plain": plain}


if __name__ == "__main__":
    main()
