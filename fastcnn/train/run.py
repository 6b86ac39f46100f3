"""One training run from settings to the files in its folder."""

import contextlib
import copy
import functools
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from torch import nn

import fastcnn
from fastcnn.train import checkpoint, loop
from fastcnn.train.build import build_model
from fastcnn.train.data import Dataset, Feed, load_idx_dataset
from fastcnn.train.errors import Interrupted, UserError, require
from fastcnn.train.folder import FolderData
from fastcnn.train.graphed import CAPTURES
from fastcnn.train.loop import Lane
from fastcnn.train.progress import Display, say
from fastcnn.train.report import table, write_metrics
from fastcnn.train.settings import Settings

FILES = (checkpoint.FILE_NAME, "metrics.json", "curves.png")


@dataclass
class Run:
    """A data set, one network or two in training on it, and the folder that receives the results."""

    settings: Settings
    data: Dataset
    lanes: list[Lane]
    directory: Path
    console: Console

    def turns(self) -> Iterator[tuple[int, Lane]]:
        """Yield (epoch, network) in the order of training.

        Two networks take turns epoch by epoch, and who goes first changes, so that a machine that slows down or
        speeds up does the same to both.
        """
        for epoch in range(self.settings.epochs):
            lanes = self.lanes if epoch % 2 == 0 else self.lanes[::-1]
            yield from ((epoch, lane) for lane in lanes if len(lane.epochs) == epoch)

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt: all that a resumed run needs."""
        state = {
            "settings": self.settings.as_dict(),
            "classes": list(self.data.classes),
            "train_size": self.data.train_size,
            "lanes": {lane.title: lane.state_dict() for lane in self.lanes},
        }
        checkpoint.save(self.directory / checkpoint.FILE_NAME, state)

    def write_report(self, finished: bool) -> None:
        """Write metrics.json and curves.png."""
        from fastcnn.train.curves import write_curves  # matplotlib takes a second to import

        sizes = {"train_size": self.data.train_size, "test_size": self.data.test_size}
        data = {**sizes, "classes": list(self.data.classes), "notes": list(self.data.notes)}
        write_metrics(self.directory / "metrics.json", self.settings, self.lanes, data, finished)
        title = f"{self.settings.model} on {self.settings.dataset}, {self.settings.device}, seed {self.settings.seed}"
        write_curves(self.directory / "curves.png", self.lanes, title)


def train(
    settings: Settings,
    directory: Path,
    console: Console,
    *,
    resume: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> Run:
    """Train, show progress and one table, and write checkpoint.pt, metrics.json and curves.png.

    Args:
        settings: what to do.
        directory: folder for the results.
        console: where progress and the table go.
        resume: content of a checkpoint to go on from.
        overwrite: replace the results of another run in ``directory``.

    Raises:
        UserError: something the user can put right.
        Interrupted: Ctrl-C; a complete checkpoint has been written.

    Example:
        >>> settings = Settings(dataset="mnist", model="mnist", input_size=(1, 28, 28), epochs=1)
        >>> train(settings, Path("runs/first"), Console())  # doctest: +SKIP
    """
    require("train", "matplotlib", "numpy")
    if resume is None:
        _claim(directory, overwrite)
    run = _prepare(settings, directory, console, resume)
    for note in run.data.notes:
        say(console, note)
    directory.mkdir(parents=True, exist_ok=True)
    if settings.compare:
        for lane in run.lanes:
            loop.warm_up(lane, run.data)
    with _ctrl_c() as stopped:
        finished = _train_epochs(run, stopped)
        run.save_checkpoint()
        if finished:
            for lane in run.lanes:
                lane.peak_memory_bytes = loop.step_memory(lane, run.data)
        run.write_report(finished)
    if not finished:
        raise Interrupted(_how_to_resume(run))
    console.print(table(run.lanes))
    say(console, f"wrote {directory}/ with {', '.join(FILES)}")
    return run


def _claim(directory: Path, overwrite: bool) -> None:
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory}: is a file, not a folder for results")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{directory}: holds results already; choose another --name, or --overwrite, or --resume")
    for name in FILES:
        (directory / name).unlink(missing_ok=True)


def _prepare(settings: Settings, directory: Path, console: Console, resume: dict[str, Any] | None) -> Run:
    _check_backend(settings.backend)
    device = _device(settings)
    feed = Feed(settings.input_size, settings.batch_size, settings.seed, device, settings.workers)
    data = _load_data(settings, feed)
    if resume is not None:
        _check_same_data(data, resume)
    torch.manual_seed(settings.seed)
    model = build_model(settings.model, num_classes=len(data.classes), options=settings.options)
    lanes = _lanes(model, settings, device)
    if resume is not None:
        for lane in lanes:
            lane.load_state_dict(resume["lanes"][lane.title])
        if all(len(lane.epochs) >= settings.epochs for lane in lanes):
            raise UserError(f"all {settings.epochs} epochs are done; ask for more with --epochs")
    return Run(settings, data, lanes, directory, console)


def _check_backend(name: str) -> None:
    try:
        with fastcnn.use_backend(name):
            pass
    except (ValueError, RuntimeError) as error:
        raise UserError(f"--backend {name}: {error}") from error


def _device(settings: Settings) -> torch.device:
    try:
        device = torch.device(settings.device)
    except RuntimeError as error:
        raise UserError(
            f"--device {settings.device}: not a device of torch, for example cpu, cuda or cuda:1"
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {settings.device}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if settings.amp == "fp16" and device.type != "cuda":
        raise UserError(f"--amp fp16 needs a CUDA device, not {device}; --amp bf16 runs here")
    return device


def _load_data(settings: Settings, feed: Feed) -> Dataset:
    directory = Path(settings.data) if settings.data else None
    if settings.dataset != "imagefolder":
        return load_idx_dataset(settings.dataset, directory, feed)
    if directory is None:
        raise UserError("imagefolder needs --data DIR, a folder with one folder of images per class")
    return FolderData(directory, feed)


def _check_same_data(data: Dataset, resume: dict[str, Any]) -> None:
    if list(data.classes) != resume["classes"]:
        raise UserError(
            f"the checkpoint was trained on {len(resume['classes'])} classes ({_abridged(resume['classes'])}), "
            f"the data has {len(data.classes)} ({_abridged(data.classes)})"
        )
    if data.train_size != resume["train_size"]:
        raise UserError(f"the checkpoint was trained on {resume['train_size']} images, the data has {data.train_size}")


def _abridged(classes: tuple[str, ...] | list[str]) -> str:
    return ", ".join(classes[:4]) + (", …" if len(classes) > 4 else "")


def _lanes(model: nn.Module, settings: Settings, device: torch.device) -> list[Lane]:
    networks = {"fastcnn": model}
    if settings.compare:
        networks = {"stock torch": fastcnn.unfuse(copy.deepcopy(model)), **networks}
    return [_lane(title, network.to(device), settings, device) for title, network in networks.items()]


def _lane(title: str, model: nn.Module, settings: Settings, device: torch.device) -> Lane:
    optimizer = loop.build_optimizer(settings.optimizer, model, settings.lr, settings.weight_decay)
    backend = settings.backend if title == "fastcnn" else None
    graph = settings.graph and device.type in CAPTURES
    return Lane(title, model, optimizer, device, settings.seed, backend, settings.amp, graph)


def _train_epochs(run: Run, stopped: threading.Event) -> bool:
    """Train to the end, or to Ctrl-C; return whether the end was reached."""
    with Display(run.console, run.lanes, run.settings.epochs, run.data.train_size, run.settings.batch_size) as display:
        for _, lane in run.turns():
            loop.train_epoch(lane, run.data, functools.partial(display.update, lane), stopped.is_set)
            if stopped.is_set():
                return False
            result = loop.evaluate(lane, run.data, stopped.is_set)
            if result is None:
                return False
            loop.finish_epoch(lane, run.data, *result)
            display.finish_epoch(lane)
            run.save_checkpoint()
    return True


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that the loop asks for; a second one stops at once."""
    pressed = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)


def _how_to_resume(run: Run) -> str:
    _, lane = next(run.turns())
    place = f"epoch {len(lane.epochs) + 1} of {run.settings.epochs}, step {lane.step}"
    path = run.directory / checkpoint.FILE_NAME
    return f"stopped in {place}; go on with: fastcnn train {run.settings.dataset} --resume {path}"
