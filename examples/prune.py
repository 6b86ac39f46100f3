"""Prune AlexNet to its largest weights, train it a little more, and make the zeros permanent.

    python examples/prune.py --amount 0.8

Only the import of `alexnet` differs from a script for torchvision's model.
"""

import argparse

import torch
from torch import nn
from torch.nn.utils import prune

from fastcnn import alexnet


def main(argv: list[str] | None = None) -> dict[str, object]:
    """Print how many weights are zero; return that share, the losses, and the scores before and after the removal."""
    parser = argparse.ArgumentParser(description="Prune AlexNet.")
    parser.add_argument("--weights", help="torchvision's weights, as DEFAULT (default: random)")
    parser.add_argument("--amount", type=float, default=0.5, help="share of the convolutions' weights to set to zero")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=64)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = alexnet(weights=args.weights).to(device)
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    prune.global_unstructured([(layer, "weight") for layer in convolutions], prune.L1Unstructured, amount=args.amount)

    images = torch.randn(4, 3, args.size, args.size, device=device)
    labels = torch.randint(1000, (4,), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(args.steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    with torch.no_grad():
        pruned = model(images)
        for layer in convolutions:
            prune.remove(layer, "weight")
        permanent = model(images)
    zeros = sum((layer.weight == 0).sum().item() for layer in convolutions)
    share = zeros / sum(layer.weight.numel() for layer in convolutions)
    print(f"{share:.1%} of the convolutions' weights are zero, loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return {"zeros": share, "losses": losses, "pruned": pruned, "permanent": permanent}


if __name__ == "__main__":
    main()
