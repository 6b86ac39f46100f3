"""How each family of networks is classically trained: the defaults of ``fastcnn train``."""

from typing import NamedTuple

DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}


class Recipe(NamedTuple):
    """Defaults of a run; ``lr_step`` is the number of epochs after which the rate is divided by ten, 0 for never."""

    epochs: int
    batch_size: int
    optimizer: str
    weight_decay: float
    lr_step: int


# Krizhevsky, Sutskever, Hinton, 2012.
CLASSIC = Recipe(epochs=90, batch_size=128, optimizer="sgd", weight_decay=5e-4, lr_step=30)
QUICK = Recipe(epochs=6, batch_size=100, optimizer="adam", weight_decay=0.0, lr_step=0)


def recipe_of(dataset: str, model: str) -> Recipe:
    """Return the recipe by which a model is trained on a data set.

    Example:
        >>> recipe_of("imagefolder", "alexnet2012").lr_step
        30
    """
    return CLASSIC if dataset == "imagefolder" and model.startswith(("alexnet", "vgg")) else QUICK
