"""A folder with one folder of images for each class: finds the splits and classes, and refuses other layouts."""

import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets import ImageFolder as TorchvisionFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from fastcnn.console.errors import OptionError, UserError
from fastcnn.console.images import open_image

TRAIN = ("train", "training")
HELD_OUT = ("val", "valid", "validation", "test", "testing")  # the first one that is there
EXPECTED = f"expected train/ and {', '.join(f'{name}/' for name in HELD_OUT[:3])} or test/, each with a folder a class"


class ImageFolder(TorchvisionFolder):
    """torchvision's, without hidden files and folders. It counts by suffix the files that it skips.

    Raises:
        UserError: there are no class folders, or one without images.
    """

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

    Raises:
        UserError: there is no such folder, or its folders do not look like classes.
    """
    if not directory.is_dir():
        raise OptionError(f"{directory}: no such folder")
    inside = {folder.name.lower(): folder for folder in folders(directory)}
    with_classes = {name: folder for name, folder in inside.items() if any(folders(folder))}
    train = next((with_classes[name] for name in TRAIN if name in with_classes), None)
    if train is None:
        if splits := sorted(folder.name for name, folder in inside.items() if name in TRAIN + HELD_OUT):
            named = ", ".join(splits)
            raise UserError(f"{directory}: the folders of classes bear names of splits ({named}); {EXPECTED}")
        return _several_classes(_open(directory)), None
    held_out = next((with_classes[name] for name in HELD_OUT if name in with_classes), None)
    opened = _open(train), _open(held_out) if held_out else None
    if held_out and opened[0].classes != opened[1].classes:  # type: ignore[union-attr]
        differ = sorted({*opened[0].classes} ^ {*opened[1].classes})  # type: ignore[union-attr]
        raise UserError(f"{directory}: {train.name} and {held_out.name} differ in classes: {', '.join(differ)}")
    _several_classes(opened[0])
    return opened


def _open(directory: Path) -> ImageFolder:
    try:
        images = ImageFolder(directory)
    except FileNotFoundError as error:  # a class without images
        raise UserError(" ".join(f"{directory}: {error}".split())) from error
    _check_levels(directory, images)
    return images


def _several_classes(images: ImageFolder) -> ImageFolder:
    if len(images.classes) == 1:
        raise UserError(
            f"{images.root}: a single class ({images.classes[0]}), with nothing to tell it from; {EXPECTED}"
        )
    return images


def _check_levels(directory: Path, images: ImageFolder) -> None:
    """Refuse class folders that hold folders of images: splits inside classes, or a folder level too many."""
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


def describe_skipped(skipped: Counter[str]) -> str:
    """Say how many files were skipped, and of which kind.

    Example:
        >>> describe_skipped(Counter({".gif": 2, "": 1}))
        'skipped 3 files that are not read as images: 2 .gif, 1 without suffix'
    """
    kinds = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in skipped.most_common())
    files = "file that is" if skipped.total() == 1 else "files that are"
    return f"skipped {skipped.total():,} {files} not read as images: {kinds}"
