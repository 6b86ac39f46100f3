"""VGG: the columns of the paper's table 1 as a table of layers, and one builder."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fastcnn.fuse import fuse
from fastcnn.models.dropin import DropIn, dropout_classifier
from fastcnn.models.weights import num_classes_of, pretrained_state_dict, pretrained_weights, takes_pretrained

# A number is a 3x3 convolution with so many output channels, a pair (channels, 1) a 1x1 convolution, "M" a 2x2
# max-pool, "LRN" a local response normalization.
Layer: TypeAlias = int | tuple[int, int] | Literal["M", "LRN"]

COLUMNS: dict[str, tuple[Layer, ...]] = {
    "A": (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "A-LRN": (64, "LRN", "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "B": (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"),
    "C": (64, 64, "M", 128, 128, "M", 256, 256, (256, 1), "M", 512, 512, (512, 1), "M", 512, 512, (512, 1), "M"),
    "D": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "E": (64, 64, "M", 128, 128, "M", *(256,) * 4, "M", *(512,) * 4, "M", *(512,) * 4, "M"),
}


class VGG(DropIn):
    """VGG as torchvision has it: the same layers, keys and, from the same seed, the same weights.

    `features` are the convolutional layers, ending in 512 channels. `cifar=True` is for 32x32 images: what the
    features leave, one value a channel, goes into a 512-512-`num_classes` classifier.

    Shapes: input (N, 3, H, W), H and W from 32 up, 224 by custom; output (N, num_classes), unnormalized scores.
    VGG-16 has 138,357,544 parameters with 1000 classes. Source: Simonyan, Zisserman, "Very Deep Convolutional
    Networks for Large-Scale Image Recognition", 2014.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.vgg11(cifar=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        features: nn.Module,
        num_classes: int = 1000,
        init_weights: bool = True,
        dropout: float = 0.5,
        *,
        cifar: bool = False,
    ) -> None:
        super().__init__()
        self.features = features
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1) if cifar else (7, 7))
        self.classifier = (
            dropout_classifier(512, 512, num_classes, dropout) if cifar else _classifier(num_classes, dropout)
        )
        if init_weights:
            self.apply(_initialize)
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x`: (N, 3, H, W)."""
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def _classifier(num_classes: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(512 * 7 * 7, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(4096, 4096),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(4096, num_classes),
    )


def _initialize(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d):
        nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight, mean=0.0, std=0.01)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.ones_(layer.weight)
    else:
        return
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _features(column: tuple[Layer, ...], batch_norm: bool) -> nn.Sequential:
    """Turn a row of the table into layers, from 3 channels on."""
    layers: list[nn.Module] = []
    in_channels = 3
    for entry in column:
        if entry == "M":
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        elif entry == "LRN":
            layers.append(nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0))
        else:
            out_channels, kernel_size = (entry, 3) if isinstance(entry, int) else entry
            layers.append(nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = out_channels
    return nn.Sequential(*layers)


def _builder(name: str, column: str, *, batch_norm: bool = False) -> Callable[..., VGG]:
    """Make the public function `name`, which builds the VGG of one column."""

    def build(*, weights: Any = None, progress: bool = True, cifar: bool = False, **kwargs: Any) -> VGG:
        if weights is None:
            defaults = {"num_classes": 10} if cifar else {}
            return VGG(_features(COLUMNS[column], batch_norm), cifar=cifar, **{**defaults, **kwargs})
        weights = pretrained_weights(f"{name}(cifar=True)" if cifar else name, weights)
        kwargs |= {"init_weights": False, **num_classes_of(weights, kwargs.get("num_classes"))}
        model = VGG(_features(COLUMNS[column], batch_norm), **kwargs)
        model.load_state_dict(pretrained_state_dict(name, weights, progress))
        return model

    build.__name__ = build.__qualname__ = name
    build.__doc__ = f"""Build the VGG of column {column}{" with batch normalization" if batch_norm else ""}.

    `weights` is a member of torchvision's weights of the same model, or its name; `progress` shows the download. The
    legacy `pretrained=True` is taken with torchvision's warning. `cifar=True` builds the variant for 32x32 images, with
    ten classes unless `num_classes` says otherwise; other keywords go to `fastcnn.VGG`. Raises ImportError where
    weights are asked for and torchvision is missing, ValueError where there are none of this variant or `num_classes`
    is not theirs, ConnectionError and RuntimeError where they cannot be downloaded or are damaged.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.{name}(cifar=True)(torch.randn(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return takes_pretrained(build)


vgg11 = _builder("vgg11", "A")
vgg11_bn = _builder("vgg11_bn", "A", batch_norm=True)
vgg11_lrn = _builder("vgg11_lrn", "A-LRN")
vgg13 = _builder("vgg13", "B")
vgg13_bn = _builder("vgg13_bn", "B", batch_norm=True)
vgg16 = _builder("vgg16", "D")
vgg16_bn = _builder("vgg16_bn", "D", batch_norm=True)
vgg16_1x1 = _builder("vgg16_1x1", "C")
vgg19 = _builder("vgg19", "E")
vgg19_bn = _builder("vgg19_bn", "E", batch_norm=True)
