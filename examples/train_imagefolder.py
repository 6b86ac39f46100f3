"""Train AlexNet on a folder of images, one folder a class: the usual loop and the usual switches.

    python examples/train_imagefolder.py
    python examples/train_imagefolder.py --data photos/train --size 224 --batch-size 128 --epochs 90 \
        --amp --channels-last --compile max-autotune --ema

Only the import of `alexnet` differs from a script for torchvision's model.
"""

import argparse

import torch
from images import image_folder
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastcnn import alexnet


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train AlexNet on a folder of images.")
    parser.add_argument("--data", help="a folder with one folder a class (default: made-up images)")
    parser.add_argument("--size", type=int, default=64, help="images are cropped to this many pixels a side")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--workers", type=int, default=0, help="processes that load images")
    parser.add_argument("--amp", action="store_true", help="autocast, with a GradScaler")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", metavar="MODE", help="default, reduce-overhead or max-autotune")
    parser.add_argument("--accumulate", type=int, default=1, help="batches for one step of the optimizer")
    parser.add_argument("--checkpoint", action="store_true", help="compute activations again in backward")
    parser.add_argument("--ema", action="store_true", help="evaluate a moving average of the weights")
    return parser.parse_args(argv)


class Checkpointed(nn.Module):
    """AlexNet that keeps no activations of its convolutions: half the memory for a third more arithmetic."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Score `images`: (N, 3, H, W)."""
        features = checkpoint(self.model.features, images, use_reentrant=False)
        return self.model.classifier(self.model.avgpool(features).flatten(1))


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader, device: str) -> float:
    """Return the share of images whose class has the highest score."""
    model.eval()
    right = [(model(images.to(device)).argmax(1).cpu() == labels).float() for images, labels in loader]
    return torch.cat(right).mean().item()


def main(argv: list[str] | None = None) -> list[float]:
    """Train, evaluate, and return the loss of every batch."""
    args = arguments(argv)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    crop = transforms.RandomResizedCrop(args.size, scale=(0.5, 1.0))
    normalize = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    data = ImageFolder(
        args.data or image_folder(),
        transforms.Compose([crop, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]),
    )
    loader = DataLoader(data, args.batch_size, shuffle=True, num_workers=args.workers, pin_memory=device == "cuda")

    model = alexnet(num_classes=len(data.classes)).to(device)
    if args.channels_last:
        model = model.to(memory_format=torch.channels_last)
    network: nn.Module = Checkpointed(model) if args.checkpoint else model
    if args.compile:
        network = torch.compile(network, mode=args.compile, fullgraph=True)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if args.ema else model
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=5e-4)
    half = torch.float16 if device == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device, enabled=args.amp)

    losses = []
    for epoch in range(args.epochs):
        model.train()
        for i, (images, labels) in enumerate(loader):
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            if args.channels_last:
                images = images.to(memory_format=torch.channels_last)
            with torch.autocast(device, half, enabled=args.amp):
                loss = nn.functional.cross_entropy(network(images), labels)
            scaler.scale(loss / args.accumulate).backward()
            if (i + 1) % args.accumulate == 0:
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                if args.ema:
                    averaged.update_parameters(model)
            losses.append(loss.item())
        print(f"epoch {epoch}: loss {losses[-1]:.4f}, accuracy {accuracy(averaged, loader, device):.1%}")
    return losses


if __name__ == "__main__":
    main()
