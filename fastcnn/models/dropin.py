"""What all models share: plain layers that fuse themselves."""

import weakref
from typing import Any

from torch import nn

from fastcnn.fuse import fuse, is_fused
from fastcnn.tuning import telling


class DropIn(nn.Module):
    """A model that fuses itself when it is made, and when a saved whole one is loaded, unless it was unfused."""

    def __init__(self) -> None:
        super().__init__()
        _built.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_fuses": is_fused(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fuses = state.pop("_fuses", True)
        super().__setstate__(state)
        if fuses and _is_whole(self) and not is_fused(self):
            fuse(self)


def dropout_classifier(features: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Return AlexNet's classifier: three linear layers, with dropout before the first two."""
    return nn.Sequential(
        nn.Dropout(dropout),
        nn.Linear(features, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, num_classes),
    )


_built: "weakref.WeakSet[DropIn]" = weakref.WeakSet()
_NAMES = {"AlexNet": "alexnet", "AlexNet2012": "alexnet2012", "ConvNet": "convnet"}
_NAMES |= {"MnistCNN": "mnist_cnn", "ResNetCifar": "resnet_cifar"}


def _name_of_the_only_one() -> str:
    """Return the command line's name of the models built in this process, if all have the same one."""
    names = {_name(each) for each in _built}
    return names.pop() if len(names) == 1 else ""


def _name(model: DropIn) -> str:
    if type(model).__name__ != "VGG":
        return _NAMES.get(type(model).__name__, "")
    kinds = {type(each) for each in model.modules()}
    sizes = [each.kernel_size for each in model.modules() if isinstance(each, nn.Conv2d)]
    marks = {"_bn": nn.BatchNorm2d in kinds, "_lrn": nn.LocalResponseNorm in kinds, "_1x1": (1, 1) in sizes}
    return f"vgg{len(sizes) + 3}" + "".join(mark for mark, there in marks.items() if there)


telling.model_name = _name_of_the_only_one


def _is_whole(module: nn.Module) -> bool:
    """Whether a module and its children are complete: in a cycle one is loaded before the other."""
    there = "_modules" in vars(module)
    return there and all(_is_whole(child) for child in module._modules.values() if child is not None)
