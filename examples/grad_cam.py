"""Show where AlexNet looks: Grad-CAM at its last convolution, by two hooks or by captum.

    python examples/grad_cam.py --image cat.jpg --weights DEFAULT --output cat-cam.png
    python examples/grad_cam.py --captum

Only the import of `alexnet` differs from a script for torchvision's model. Source: Selvaraju et al., "Grad-CAM: Visual
Explanations from Deep Networks via Gradient-based Localization", 2017. --captum needs captum.
"""

import argparse

import torch
from images import read_image
from torch import Tensor, nn
from torchvision.transforms.functional import normalize, to_pil_image

from fastcnn import alexnet

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet


def grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, target: int) -> Tensor:
    """Return where and how much `layer` speaks for the class `target`: (N, 1, h, w), the height and width there."""
    seen: dict[str, Tensor] = {}

    def keep(_layer: nn.Module, _inputs: object, output: Tensor) -> None:
        seen["activation"] = output.detach().clone()
        output.register_hook(lambda gradient: seen.update(gradient=gradient))

    handle = layer.register_forward_hook(keep)
    model(images)[:, target].sum().backward()
    handle.remove()
    channels = seen["gradient"].mean((2, 3), keepdim=True)
    return (channels * seen["activation"]).sum(1, keepdim=True).relu()


def captum_grad_cam(model: nn.Module, layer: nn.Module, images: Tensor, target: int) -> Tensor:
    """Return the same, by captum."""
    from captum.attr import LayerGradCam

    return LayerGradCam(model, layer).attribute(images, target=target, relu_attributions=True).detach()


def main(argv: list[str] | None = None) -> Tensor:
    """Print where the map is highest, save it where --output says, and return it."""
    parser = argparse.ArgumentParser(description="Show where AlexNet looks.")
    parser.add_argument("--image", help="an image file (default: a made-up one)")
    parser.add_argument("--weights", help="torchvision's weights, as DEFAULT (default: random)")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--target", type=int, default=281, help="a class of ImageNet; 281 is a tabby cat")
    parser.add_argument("--captum", action="store_true", help="let captum compute it")
    parser.add_argument("--output", help="where to write the map")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = alexnet(weights=args.weights).eval().to(device)
    images = normalize(read_image(args.image, args.size), MEAN, STD).to(device)
    cam = (captum_grad_cam if args.captum else grad_cam)(model, model.features[10], images, args.target)
    cam = nn.functional.interpolate(cam, images.shape[2:], mode="bilinear")
    cam = cam / cam.amax((2, 3), keepdim=True).clamp_min(1e-12)
    row, column = divmod(int(cam.argmax()), args.size)
    print(f"AlexNet looks at row {row}, column {column}")
    if args.output:
        to_pil_image(cam[0].cpu()).save(args.output)
    return cam


if __name__ == "__main__":
    main()
