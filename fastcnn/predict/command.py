"""The command ``fastcnn predict``."""

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

import fastcnn
from fastcnn.console.errors import UserError, require, said
from fastcnn.console.images import open_image
from fastcnn.console.options import Backend, Debug, Device, check_backend, default_device, usable_device
from fastcnn.predict.classifier import DEFAULT_MODEL, Classifier, load

WIDTH = 80
IMAGE_WIDTH = 33  # leaves room for the longest of ImageNet's names

Row = tuple[Path, list[float], list[str]]  # an image, its largest probabilities, and the names of their classes


def predict(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE", help="Files, or folders of images.")],
    model: Annotated[
        str | None, typer.Option(help="alexnet, vgg16, …", show_default=f"{DEFAULT_MODEL}, or the checkpoint's")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="torchvision's: DEFAULT, IMAGENET1K_V1, …; or a checkpoint, or the folder of a run.")
    ] = "DEFAULT",
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 5,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at once.")] = 32,
    device: Device = None,
    backend: Backend = "auto",
    debug: Debug = False,
) -> None:
    """Print the most probable classes of images.

    Images are resized, cropped and normalized as the weights want them, or as in
    the training that wrote the checkpoint. They are read as viewers show them: EXIF
    orientation, 16 bits, grey and transparent ones. An image that cannot be read is
    reported in one line, the others are still classified, and the exit code is 1.

    Example: fastcnn predict cat.jpg

    Example: fastcnn predict photos --weights runs/flowers/checkpoint.pt --top 1
    """
    require("train", "torchvision")
    check_backend(backend)
    place = usable_device(device or default_device())
    files, problems = find(images)
    _tell(problems, debug)
    if files:
        classifier = load(weights, model)
        classifier.model.to(place)
        console = Console(highlight=False)
        console.print(f"{classifier.title}, on {place}", soft_wrap=True, markup=False)
        header = True
        for start in range(0, len(files), batch_size):
            with fastcnn.use_backend(backend):
                rows, unread = _classified(files[start : start + batch_size], classifier, place, top)
            if rows:
                console.print(_table(rows, header))
                header = False
            _tell(unread, debug)
            problems += unread
    if problems:
        raise typer.Exit(1)


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


def _classified(
    files: list[Path], classifier: Classifier, device: torch.device, top: int
) -> tuple[list[Row], list[UserError]]:
    """Return a row for each image that can be read, and what is wrong with the others."""
    with ThreadPoolExecutor() as pool:  # PIL decodes without holding the interpreter
        loaded = list(pool.map(partial(read, transform=classifier.transform), files))
    problems = [image for image in loaded if isinstance(image, UserError)]
    readable = [(file, image) for file, image in zip(files, loaded) if isinstance(image, Tensor)]
    if not readable:
        return [], problems
    scores = classifier.probabilities(torch.stack([image for _, image in readable]).to(device))
    best = scores.topk(min(top, scores.shape[1]))
    names = dict(enumerate(classifier.classes))
    rows = [
        (file, values, [names.get(index, f"class {index}") for index in indices])  # a head may have more outputs
        for (file, _), values, indices in zip(readable, best.values.tolist(), best.indices.tolist(), strict=True)
    ]
    return rows, problems


def _table(rows: list[Row], header: bool) -> Table:
    """Return one batch's table; all batches have the same column widths."""
    table = Table(box=None, width=WIDTH, pad_edge=False, show_header=header)
    table.add_column("image", width=IMAGE_WIDTH, overflow="fold")
    table.add_column("class", ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("probability", width=len("probability"), justify="right")
    for file, probabilities, names in rows:
        shares = "\n".join(f"{100 * probability:.2f} %" for probability in probabilities)
        table.add_row(Text(str(file)), Text("\n".join(names)), shares)
    return table


def _tell(problems: list[UserError], debug: bool) -> None:
    for problem in problems:
        if debug:
            traceback.print_exception(problem)
        typer.echo(f"error: {problem}", err=True)
