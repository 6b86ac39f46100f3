"""A folder with one folder of images for each class: finds the splits and classes, and refuses other layouts."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastcnn.console.errors import OptionError, UserError, said
from fastcnn.console.images import open_image

TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "test", "testing")  # the first one that is there
EXPECTED = f"expected train/ and {', '.join(f'{name}/' for name in HELD_OUT[:3])} or test/, each with a folder a class"


class ImageFolder(TorchvisionFolder):
    """torchvision's, without hidden files and folders. It counts by suffix the files that it skips."""

    def __init__(self, directory: Path) -> None:
        self.skipped: Counter[str] = Counter()
        super().__init__(str(directory), loader=open_image, is_valid_file=self._is_image)

    def find_classes(self, directory: str | Path) -> tuple[list[str], dict[str, int]]:
        """Return the names of the classes, and their numbers."""
        classes = sorted(folder.name for folder in folders(Path(directory)))
        if not classes:
            raise UserError(f"{directory}: holds no folders; {EXPECTED}")
        return classes, {name: number for number, name in enumerate(classes)}

    def _is_image(self, path: str) -> bool:
        below = os.path.relpath(path, self.root)
        if any(part.startswith(".") for part in below.split(os.sep)):
            return False
        suffix = os.path.splitext(below)[1].lower()
        if suffix not in IMG_EXTENSIONS:
            self.skipped[suffix] += 1
        return suffix in IMG_EXTENSIONS


def folders(directory: Path) -> Iterator[Path]:
    """Yield the folders of a folder, but for hidden ones."""
    return (path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))


def open_folders(directory: Path) -> tuple[ImageFolder, ImageFolder | None]:
    """Return the training images, and the held-out ones where they are in a folder of their own.

    Raises :class:`UserError` where there is no such folder, or its folders do not look like classes.
    """
    if not directory.is_dir():
        raise OptionError(f"{directory}: no such folder")
    inside = {folder.name.lower(): folder for folder in folders(directory)}
    with_classes = {name: folder for name, folder in inside.items() if any(folders(folder))}
    folder = next((with_classes[name] for name in TRAIN if name in with_classes), None)
    if folder is None and (splits := sorted(inside[name].name for name in inside if name in TRAIN + HELD_OUT)):
        named = ", ".join(splits)
        raise UserError(f"{directory}: the folders of classes bear names of splits ({named}); {EXPECTED}")
    train = _open(folder or directory)
    held_out = next((_open(with_classes[name]) for name in HELD_OUT if folder and name in with_classes), None)
    if held_out and train.classes != held_out.classes:
        names = " and ".join(Path(part.root).name for part in (train, held_out))
        differ = sorted({*train.classes} ^ {*held_out.classes})
        raise UserError(f"{directory}: {names} differ in classes: {', '.join(differ)}")
    if len(train.classes) == 1:
        raise UserError(f"{train.root}: a single class ({train.classes[0]}), with nothing to tell it from; {EXPECTED}")
    return train, held_out


def _open(directory: Path) -> ImageFolder:
    """Open a folder of classes; refuse one whose classes hold folders: splits, or a folder level too many."""
    try:
        images = ImageFolder(directory)
    except FileNotFoundError as error:  # a class without images
        raise UserError(f"{directory}: {said(error)}") from error
    parents: dict[str, set[str]] = defaultdict(set)
    for path, _ in images.samples:
        name, *below = os.path.relpath(path, directory).split(os.sep)
        parents[name].add(below[0] if len(below) > 1 else "")
    for name, inside in parents.items():
        if "" not in inside and (len(inside) > 1 or inside & {*TRAIN, *HELD_OUT}):
            listed = ", ".join(sorted(inside)[:4])
            raise UserError(
                f"{directory / name}: holds no images but folders of images ({listed}), a level more than expected; "
                f"if they are the classes or splits, give --data {directory / name}"
            )
    return images
