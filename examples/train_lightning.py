"""Train AlexNet with PyTorch Lightning's Trainer.

    python examples/train_lightning.py
    python examples/train_lightning.py --data photos/train --size 224 --batch-size 128 --precision 16-mixed

Only the import of `alexnet` differs from a script for torchvision's model. Needs pytorch-lightning.
"""

import argparse

import pytorch_lightning as pl
import torch
from images import image_folder
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastcnn import alexnet


class Classifier(pl.LightningModule):
    """AlexNet, its loss and its optimizer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.model = alexnet(num_classes=num_classes)
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss of one batch."""
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.log("loss", loss, prog_bar=True)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the classic one."""
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def main(argv: list[str] | None = None) -> list[float]:
    """Train and return the loss of every batch."""
    parser = argparse.ArgumentParser(description="Train AlexNet with PyTorch Lightning.")
    parser.add_argument("--data", help="a folder with one folder a class (default: made-up images)")
    parser.add_argument("--size", type=int, default=64, help="images are cropped to this many pixels a side")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--precision", default="32-true", help="as Lightning names it: 32-true, 16-mixed, bf16-mixed")
    args = parser.parse_args(argv)

    pl.seed_everything(0)
    crop = transforms.Compose([transforms.RandomResizedCrop(args.size), transforms.ToTensor()])
    data = ImageFolder(args.data or image_folder(), crop)
    model = Classifier(len(data.classes))
    trainer = pl.Trainer(
        max_epochs=args.epochs, precision=args.precision, devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(model, DataLoader(data, args.batch_size, shuffle=True))
    return model.losses


if __name__ == "__main__":
    main()
