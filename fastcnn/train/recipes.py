"""How each family of networks is classically trained: the defaults of ``fastcnn train``, as a table."""

import fnmatch
from dataclasses import dataclass

DEFAULT_LR = {"adam": 1e-3, "sgd": 1e-2}


@dataclass(frozen=True)
class Recipe:
    """Defaults of a run; ``lr_step`` is the number of epochs after which the rate is divided by ten, 0 for never."""

    epochs: int
    batch_size: int
    optimizer: str
    weight_decay: float
    lr_step: int


CLASSIC = Recipe(epochs=90, batch_size=128, optimizer="sgd", weight_decay=5e-4, lr_step=30)
QUICK = Recipe(epochs=6, batch_size=100, optimizer="adam", weight_decay=0.0, lr_step=0)

# The first row whose patterns match the data set and the model. CLASSIC: Krizhevsky, Sutskever, Hinton, 2012.
RECIPES = (
    ("imagefolder", "alexnet*", CLASSIC),
    ("imagefolder", "vgg*", CLASSIC),
    ("*", "*", QUICK),
)


def recipe_of(dataset: str, model: str) -> Recipe:
    """Return the recipe by which a model is trained on a data set.

    Example:
        >>> recipe_of("imagefolder", "alexnet2012").lr_step
        30
    """
    return next(
        recipe
        for of_dataset, of_model, recipe in RECIPES
        if fnmatch.fnmatch(dataset, of_dataset) and fnmatch.fnmatch(model, of_model)
    )
