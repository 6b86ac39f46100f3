"""AlexNet twice: torchvision's (64-192-384-256-256) and the network of the 2012 paper (96-256-384-384-256)."""

from typing import Any

import torch
from torch import Tensor, nn

from fastcnn.fuse import fuse
from fastcnn.models.dropin import DropIn, dropout_classifier
from fastcnn.models.weights import num_classes_of, pretrained_state_dict, pretrained_weights, takes_pretrained


class AlexNet(DropIn):
    """AlexNet as torchvision has it: the same layers, keys and, from the same seed, the same weights.

    Shapes: input (N, 3, H, W), H and W from 63 up, 224 by custom; output (N, num_classes), unnormalized scores.
    61,100,840 parameters with 1000 classes. Source: Krizhevsky, "One weird trick for parallelizing convolutional
    neural networks", 2014.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.AlexNet(num_classes=10)(torch.randn(2, 3, 224, 224)).shape
        torch.Size([2, 10])
    """

    def __init__(self, num_classes: int = 1000, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = nn.AdaptiveAvgPool2d((6, 6))
        self.classifier = dropout_classifier(256 * 6 * 6, 4096, num_classes, dropout)
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x`: (N, 3, H, W)."""
        x = self.features(x)
        x = self.avgpool(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


@takes_pretrained
def alexnet(*, weights: Any = None, progress: bool = True, **kwargs: Any) -> AlexNet:
    """Build `AlexNet(**kwargs)`, with torchvision's pretrained weights where `weights` names some.

    `weights` is a member of `torchvision.models.AlexNet_Weights` or its name; `progress` shows the download. The legacy
    `pretrained=True` is taken with torchvision's warning.
    Raises ImportError where weights are asked for and torchvision is missing, ValueError where `num_classes`
    is not that of the weights, ConnectionError and RuntimeError where they cannot be downloaded or are damaged.

    Example:
        >>> import fastcnn
        >>> model = fastcnn.alexnet(weights="IMAGENET1K_V1").eval()  # doctest: +SKIP
    """
    if weights is None:
        return AlexNet(**kwargs)
    weights = pretrained_weights("alexnet", weights)
    model = AlexNet(**{**kwargs, **num_classes_of(weights, kwargs.get("num_classes"))})
    model.load_state_dict(pretrained_state_dict("alexnet", weights, progress))
    return model


class AlexNet2012(DropIn):
    """The network of the 2012 paper: 96-256-384-384-256 channels, with response normalization (LRN).

    `lrn=False` leaves the two LRN layers out; `groups=2` splits convolutions 2, 4 and 5 as the paper does over two
    GPUs; `log_softmax=True` ends in log-probabilities. Weights are drawn from N(0, 0.01); biases of convolutions
    2, 4 and 5 are 1, all others 0. State dicts whose keys begin with `net.` load as well: `net.4.weight` is
    `features.4.weight`, and `net.classifier.1.weight` is `classifier.1.weight`.

    Shapes: input (N, 3, 227, 227); output (N, num_classes), unnormalized scores. 62,378,344 parameters with 1000
    classes, 60,965,224 with `groups=2`. Source: Krizhevsky, Sutskever, Hinton, "ImageNet Classification with Deep
    Convolutional Neural Networks", 2012.

    Example:
        >>> import torch, fastcnn
        >>> fastcnn.AlexNet2012(num_classes=10, groups=2)(torch.randn(2, 3, 227, 227)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        lrn: bool = True,
        dropout: float = 0.5,
        groups: int = 1,
        log_softmax: bool = False,
    ) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 96, kernel_size=11, stride=4),
            nn.ReLU(inplace=True),
            *_response_norm(lrn),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(96, 256, kernel_size=5, padding=2, groups=groups),
            nn.ReLU(inplace=True),
            *_response_norm(lrn),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(256, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 384, kernel_size=3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.Conv2d(384, 256, kernel_size=3, padding=1, groups=groups),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(kernel_size=3, stride=2),
        )
        self.classifier = dropout_classifier(256 * 6 * 6, 4096, num_classes, dropout)
        if log_softmax:
            self.classifier.append(nn.LogSoftmax(dim=1))
        _initialize(self)
        self.register_load_state_dict_pre_hook(_rename_net_keys)
        fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        """Score `x`: (N, 3, 227, 227)."""
        x = self.features(x)
        x = torch.flatten(x, 1)
        return self.classifier(x)


def _response_norm(lrn: bool) -> list[nn.Module]:
    return [nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=2.0)] if lrn else []


def _initialize(model: AlexNet2012) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    for number, layer in enumerate(layers, 1):
        nn.init.normal_(layer.weight, mean=0.0, std=0.01)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, 1.0 if number in (2, 4, 5) else 0.0)


def _rename_net_keys(_model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Rename `net.<i>.*` to `features.<i>.*`, and strip `net.` from any other key, in place."""
    net = f"{prefix}net."
    for key in [key for key in state_dict if key.startswith(net)]:
        name = key.removeprefix(net)
        features = "features." if name.split(".")[0].isdigit() else ""
        renamed = f"{prefix}{features}{name}"
        if renamed not in state_dict:  # else the checkpoint holds both, and strict loading says so
            state_dict[renamed] = state_dict.pop(key)
