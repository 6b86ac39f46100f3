"""Train a network of your own with Hugging Face Accelerate.

    python examples/train_accelerate.py
    accelerate launch examples/train_accelerate.py --mixed-precision fp16 --accumulate 4

One call of `fastcnn.fuse` is the only change. Needs accelerate.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from images import image_folder
from small_net import SmallNet
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

import fastcnn


def main(argv: list[str] | None = None) -> list[float]:
    """Train and return the loss of every batch."""
    parser = argparse.ArgumentParser(description="Train a small network with Hugging Face Accelerate.")
    parser.add_argument("--data", help="a folder with one folder a class (default: made-up images)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--mixed-precision", default="no", help="as Accelerate names it: no, fp16, bf16")
    parser.add_argument("--accumulate", type=int, default=1, help="batches for one step of the optimizer")
    args = parser.parse_args(argv)

    set_seed(0)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, gradient_accumulation_steps=args.accumulate)
    crop = transforms.Compose([transforms.RandomResizedCrop(32), transforms.ToTensor()])
    data = ImageFolder(args.data or image_folder(), crop)
    model = fastcnn.fuse(SmallNet(len(data.classes)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(data, args.batch_size, shuffle=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    losses = []
    for epoch in range(args.epochs):
        for images, labels in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.gather(loss.detach()).mean().item())
        accelerator.print(f"epoch {epoch}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
