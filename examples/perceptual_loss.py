"""Train a super-resolution network with a perceptual loss: VGG-19 cut into pieces, its features compared.

    python examples/perceptual_loss.py --image cat.jpg --weights DEFAULT --size 256 --steps 200

A slice of a fused network is stock, so each piece is fused by itself: that is the only change. The loss is that of
Johnson, Alahi, Fei-Fei, "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", 2016. Without --weights
VGG is random.
"""

import argparse

import torch
from images import read_image
from torch import Tensor, nn
from torchvision.models import vgg19

import fastcnn

# Where the pieces end: relu1_2, relu2_2, relu3_4, relu4_4.
ENDS = (4, 9, 18, 27)


class PerceptualLoss(nn.Module):
    """The distance of two images in the features of VGG-19.

    Shapes: two images (N, 3, H, W), values from 0 to 1; output a scalar.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, weights: str | None) -> None:
        super().__init__()
        features = vgg19(weights=weights).features.eval().requires_grad_(False)
        self.pieces = nn.ModuleList(fastcnn.fuse(features[start:end]) for start, end in zip((0, *ENDS), ENDS))
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        """Sum the mean absolute differences at the end of every piece."""
        image, target = (image - self.mean) / self.std, (target - self.mean) / self.std
        loss = image.new_zeros(())
        for piece in self.pieces:
            image, target = piece(image), piece(target)
            loss = loss + nn.functional.l1_loss(image, target)
        return loss


def main(argv: list[str] | None = None) -> list[float]:
    """Learn to double the size of one image; return the loss of every step."""
    parser = argparse.ArgumentParser(description="Train a super-resolution network with a perceptual loss.")
    parser.add_argument("--image", help="an image file (default: a made-up one)")
    parser.add_argument("--weights", help="torchvision's weights of VGG-19, as DEFAULT (default: random)")
    parser.add_argument("--size", type=int, default=32, help="of the large image, in pixels a side")
    parser.add_argument("--steps", type=int, default=3)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    large = read_image(args.image, args.size).to(device)
    small = nn.functional.avg_pool2d(large, 2)
    upsampler = nn.Sequential(
        nn.Conv2d(3, 32, 5, padding=2), nn.ReLU(), nn.Conv2d(32, 12, 3, padding=1), nn.PixelShuffle(2)
    ).to(device)
    perceptual_loss = PerceptualLoss(args.weights).to(device)
    optimizer = torch.optim.Adam(upsampler.parameters(), lr=1e-3)

    losses = []
    for _ in range(args.steps):
        loss = perceptual_loss(upsampler(small), large)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"perceptual loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    main()
