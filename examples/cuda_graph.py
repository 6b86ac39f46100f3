"""Capture forward and backward of a network in CUDA graphs, for small batches that wait for launches.

    python examples/cuda_graph.py

Without a GPU the same steps run without a graph. `fastcnn.train.GraphedStep` captures the optimizer's step too.
"""

import argparse

import torch
from small_net import SmallNet
from torch import nn

import fastcnn


def main(argv: list[str] | None = None) -> list[float]:
    """Train on random images and return the loss of every step."""
    parser = argparse.ArgumentParser(description="Capture a network in CUDA graphs.")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = fastcnn.fuse(SmallNet().to(device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images = torch.randn(args.batch_size, 3, 32, 32, device=device)
    labels = torch.randint(2, (args.batch_size,), device=device)
    if device == "cuda":
        model = torch.cuda.make_graphed_callables(model, (torch.randn_like(images),))
    else:
        print("no CUDA device: the steps run without a graph")

    losses = []
    for _ in range(args.steps):
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)  # a graph writes gradients where they were when it was captured
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
