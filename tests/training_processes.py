"""Trainings in processes of their own: killed at a given moment, or side by side under torchrun.

As a script, started by the tests: ``training_processes.py kill FOLDER DATA MOMENT...`` or, by torchrun,
``training_processes.py together JOB...``.
"""

import io
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from rich.console import Console
from torch import Tensor, nn

import fastcnn
from fastcnn.cli import main
from fastcnn.console import checkpoint
from fastcnn.models import MODELS, ModelEntry
from fastcnn.train import Settings, distributed, loop, run

INPUT_SIZE = (3, 16, 16)
SETTINGS = Settings(
    dataset="imagefolder",
    model="tiny_alexnet",
    input_size=INPUT_SIZE,
    epochs=2,
    batch_size=5,
    lr=0.05,
    lr_step=1,
    optimizer="sgd",
    weight_decay=5e-4,
)


class TinyAlexNet(nn.Module):
    """Features, then linear layers with dropout, whose widths no two processes share evenly."""

    def __init__(self, num_classes: int = 3, dropout: float = 0.5) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(4)
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(64, 33),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(33, num_classes),
        )
        fastcnn.fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


MODELS["tiny_alexnet"] = ModelEntry(TinyAlexNet, INPUT_SIZE)


def write_images(folder: Path, per_class: int = 6) -> Path:
    """Write three classes of 20x18 images, of which a fifth is held out."""
    from PIL import Image

    for label, name in enumerate(("cat", "dog", "emu")):
        (folder / name).mkdir(parents=True)
        for index in range(per_class):
            pixels = torch.randint(80, (18, 20, 3), generator=torch.Generator().manual_seed(10 * label + index))
            pixels[..., label] += 150
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(folder / name / f"{index}.jpg")
    return folder


def quiet() -> Console:
    return Console(file=io.StringIO())


def train(settings: Settings, directory: Path, **kwargs: Any) -> run.Run:
    return run.train(settings, directory, quiet(), **kwargs)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_step(number: int) -> None:
    """Die when that training step has run the network but not the optimizer."""
    calls = itertools.count(1)
    step: Callable[..., Tensor] = loop.train_step

    def deadly_step(lane: Any, *batch: Tensor) -> Tensor:
        if next(calls) == number:
            lane.optimizer.step = die
        return step(lane, *batch)

    loop.train_step = deadly_step


def kill_in_write(number: int) -> None:
    """Die when half of that checkpoint is on the disk."""
    save, calls = torch.save, itertools.count(1)

    def deadly_save(state: object, file: BinaryIO) -> None:
        if next(calls) == number:
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()
        save(state, file)

    torch.save = deadly_save


def kill_in_evaluation(number: int) -> None:
    """Die while that epoch is evaluated."""
    evaluate, calls = loop.evaluate, itertools.count(1)
    loop.evaluate = lambda *args: die() if next(calls) == number else evaluate(*args)


MOMENTS = {"step": kill_in_step, "write": kill_in_write, "evaluation": kill_in_evaluation}


def kill(folder: Path, data: str, *moments: str) -> None:
    """Train once for each moment such as step:3, in a fork that dies there; its results are FOLDER/MOMENT."""
    for moment in moments:
        kind, number = moment.split(":")
        child = os.fork()
        if child == 0:
            MOMENTS[kind](int(number))
            train(replace(SETTINGS, data=data, checkpoint_every=1), folder / moment)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), f"{moment} was never reached"


def together(path: Path) -> None:
    """Train as the JSON list at PATH says, one after the other; the first process writes the losses to each folder."""
    with distributed.joined() as world:
        for job in json.loads(path.read_text()):
            directory = Path(job["directory"])
            settings = replace(SETTINGS, **job["settings"])
            state = checkpoint.load(directory) if job.get("resume") else None
            done = train(settings, directory, resume=state, world=world)
            (directory / f"losses{world.rank}.json").write_text(json.dumps(done.lanes[0].losses))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), *sys.argv[3:])
    elif sys.argv[1] == "together":
        together(Path(sys.argv[2]))
    else:
        sys.exit(main(sys.argv[1:]))
