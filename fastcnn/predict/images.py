"""Finding and reading images; an unreadable one is returned as an error, so that the others go on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from fastcnn.console.errors import UserError, said
from fastcnn.console.images import open_image


def find(places: list[Path]) -> tuple[list[Path], list[UserError]]:
    """Return the image files at some places, and an error for each place that has none.

    A folder stands for all images below it, in the order of their names; a file for itself, whatever its name.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    files: list[Path] = []
    problems: list[UserError] = []
    for place in places:
        if place.is_dir():
            below = sorted(place.rglob("*"))
            found = [path for path in below if path.suffix.lower() in IMG_EXTENSIONS and path.is_file()]
            files += found
            if not found:
                problems.append(UserError(f"{place}: holds no images ({', '.join(IMG_EXTENSIONS)})"))
        elif place.exists():
            files.append(place)
        else:
            problems.append(UserError(f"{place}: no such file or folder"))
    return files, problems


def read(file: Path, transform: Callable[[Any], Tensor]) -> Tensor | UserError:
    """Return what ``transform`` makes of an image, read as viewers show it, or why there is none.

    Example:
        >>> read(Path("nowhere.jpg"), lambda image: image)
        UserError("nowhere.jpg: not an image that can be read ([Errno 2] No such file or directory: 'nowhere.jpg')")
    """
    try:
        return transform(open_image(file))
    except Exception as error:  # PIL raises many kinds for damaged files
        problem = UserError(f"{file}: not an image that can be read ({said(error)})")
        problem.__cause__ = error
        return problem
