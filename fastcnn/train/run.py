"""One training run from settings to the files in its folder."""

import contextlib
import functools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console

from fastcnn.console import checkpoint
from fastcnn.console.errors import Interrupted, UserError, require
from fastcnn.console.files import TEMPORARY
from fastcnn.train import loop
from fastcnn.train.data import Dataset
from fastcnn.train.distributed import World, volumes
from fastcnn.train.lane import Diverged, Lane
from fastcnn.train.prepare import prepare
from fastcnn.train.progress import TENSORBOARD_FOLDER, Display, TensorBoard, say
from fastcnn.train.report import table, write_report
from fastcnn.train.settings import Settings

NOT_SAVED = "no checkpoint was written yet"
FILES = (checkpoint.FILE_NAME, "metrics.json", "curves.png")


@dataclass
class Run:
    """A data set, one network or two in training on it, and the folder that receives the results."""

    settings: Settings
    data: Dataset
    lanes: list[Lane]
    directory: Path
    console: Console
    world: World
    logs: TensorBoard | None = None
    saved: str = ""

    def __post_init__(self) -> None:
        settings, images = self.settings, self.data.train_size
        self.pace = loop.Pace(settings.checkpoint_every)
        self.display = Display(self.console, self.lanes, settings.epochs, images, settings.batch_size)

    def turns(self) -> Iterator[Lane]:
        """Yield the network that trains the next epoch.

        Two take turns, and swap who goes first, so that a machine that slows down or speeds up affects both alike.
        """
        for epoch in range(self.settings.epochs):
            lanes = self.lanes if epoch % 2 == 0 else self.lanes[::-1]
            yield from (lane for lane in lanes if len(lane.epochs) == epoch)

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt: all that a resumed run needs. All processes must call it; the first one writes."""
        state = {
            "settings": asdict(self.settings),
            "classes": list(self.data.classes),
            "train_size": self.data.train_size,
            "statistics": self.data.statistics,
            "lanes": {lane.title: lane.state_dict() for lane in self.lanes},
        }
        if self.world.rank == 0:
            if self.logs:
                self.logs.flush()
            checkpoint.save(self.directory / checkpoint.FILE_NAME, state)
        self.note_saved()

    def note_saved(self) -> None:
        """Remember that the checkpoint holds the present state."""
        self.saved = f"{self.directory / checkpoint.FILE_NAME} holds {self.place()}"

    def save_between_steps(self) -> None:
        """Write checkpoint.pt, and agree on when to do it again."""
        started = time.perf_counter()
        self.save_checkpoint()
        interval = self.pace.next_interval(time.perf_counter() - started)
        self.pace.restart(self.world.gather(interval)[0])

    def place(self) -> str:
        """Say how far the training is."""
        lane = next(self.turns(), self.lanes[-1])
        epoch = min(len(lane.epochs) + 1, self.settings.epochs)
        return f"epoch {epoch} of {self.settings.epochs}, step {lane.step}"

    def show(self, lane: Lane) -> None:
        """Show and log how far a network is."""
        self.display.update(lane)
        if self.logs:
            self.logs.update(lane)


def train(
    settings: Settings,
    directory: Path,
    console: Console,
    *,
    resume: dict[str, Any] | None = None,
    overwrite: bool = False,
    changed_data: bool = False,
    world: World | None = None,
) -> Run:
    """Train, show progress and one table, and write checkpoint.pt, metrics.json and curves.png.

    Under torchrun every process calls this, with its `world`; the first one shows and writes. `resume` is the content
    of a checkpoint to go on from. Raises UserError, and Interrupted after Ctrl-C, with a complete checkpoint written.
    """
    require("train", "matplotlib", "numpy")
    world = world or World()
    writes = world.rank == 0
    torch.backends.cudnn.deterministic = settings.deterministic
    with _results(directory, overwrite or resume is not None) if writes else contextlib.nullcontext():
        data, lanes = prepare(settings, world, resume, console=console, changed_data=changed_data)
        run = Run(settings, data, lanes, directory, console, world)
        if resume is not None:
            run.note_saved()
        elif writes:
            _clear(directory)
        for note in data.notes:
            say(console, note)
        if world.size > 1:
            activation_bytes = 4 if settings.amp == "off" else 2
            sent = volumes(lanes[0].model, settings.batch_size, world.size, activation_bytes)
            say(console, f"--parallel {settings.parallel}; {sent}")
        _train_and_write(run)
    console.print(table(lanes, len(data.classes)))
    say(console, f"wrote {directory}/ with {', '.join(FILES)}")
    return run


def _train_and_write(run: Run) -> None:
    """Train to the end and write all files; after Ctrl-C, write what there is and raise Interrupted."""
    writes = run.world.rank == 0
    if run.settings.tensorboard and writes:
        run.logs = TensorBoard(run.directory, run.lanes)
    if run.settings.compare and run.world.size == 1:
        for lane in run.lanes:
            with loop.step_of_copy(lane, run.data) as step:
                step()  # so that compiling and tuning kernels is not counted as training
    how_to_resume = f"go on with: fastcnn train --resume {run.directory / checkpoint.FILE_NAME}"
    with _ctrl_c(run.world) as stopped, contextlib.closing(run.logs) if run.logs else contextlib.nullcontext():
        try:
            finished = _train_epochs(run, stopped)
        except Diverged as error:  # resumed, it would diverge again
            raise Diverged(f"{error}; {run.saved or NOT_SAVED}") from error
        except BaseException as error:
            where = f"{run.saved}; {how_to_resume}" if run.saved else NOT_SAVED
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"stopped; {where}") from error
            if _lost_loader(error):
                killed = "a process that loads images was killed, as happens where memory runs out: fewer --workers"
                raise UserError(f"{killed} need less; {where}") from error
            if run.saved:
                error.add_note(where)
            raise
        run.save_checkpoint()
        if finished and run.world.size == 1:
            for lane in run.lanes:
                lane.peak_memory_bytes = loop.step_memory(lane, run.data)
        if writes:
            write_report(run.directory, run.settings, run.data, run.lanes, finished)
    if not finished:
        raise Interrupted(f"stopped in {run.place()}; {how_to_resume}")


def _lost_loader(error: BaseException) -> bool:
    """Whether a process that loads images was killed: torch says so, or the connection broke before it noticed."""
    broken = isinstance(error, (ConnectionResetError, ConnectionRefusedError, EOFError))
    return "DataLoader worker (pid" in str(error) or (broken and "in DataLoader worker" not in str(error))


@contextlib.contextmanager
def _results(directory: Path, may_hold_results: bool) -> Iterator[None]:
    """Make a folder for results, or raise if it cannot hold them; without a checkpoint in the end, remove it again."""
    made = [path for path in (directory, *directory.parents) if not os.path.exists(path)]
    try:
        _open(directory, may_hold_results)
        yield
    finally:
        with contextlib.suppress(OSError):  # the folder may hold something else, or may never have been made
            if made and not (directory / checkpoint.FILE_NAME).exists():
                _clear(directory)
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


def _open(directory: Path, may_hold_results: bool) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
        others = [path for path in directory.iterdir() if path.suffix != TEMPORARY]
    except FileExistsError as error:
        raise UserError(f"{directory}: is a file, not a folder for results") from error
    except OSError as error:
        reason = f"cannot hold results ({error.strerror})"
        raise UserError(f"{directory}: {reason}; choose another --out or --name") from error
    if others and not may_hold_results:
        raise UserError(f"{directory}: holds results already; choose another --name, or --overwrite, or --resume")


def _clear(directory: Path) -> None:
    """Remove the results of another run."""
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    shutil.rmtree(directory / TENSORBOARD_FOLDER, ignore_errors=True)


def _train_epochs(run: Run, stopped: threading.Event) -> bool:
    """Train to the end, or to Ctrl-C; return whether the end was reached."""
    with run.display.bars:
        for lane in run.turns():
            show = functools.partial(run.show, lane)
            loop.train_epoch(lane, run.data, show, stopped.is_set, run.pace, run.save_between_steps)
            if stopped.is_set():
                return False
            result = loop.evaluate(lane, run.data, stopped.is_set)
            if result is None:
                return False
            loop.finish_epoch(lane, run.data, *result)
            run.display.finish_epoch(lane)
            if run.logs:
                run.logs.finish_epoch(lane)
            run.save_checkpoint()
            run.pace.restart()
    return True


@contextlib.contextmanager
def _ctrl_c(world: World) -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that the training loop checks; a second one stops at once.

    Several processes would not stop after the same step, so there Ctrl-C stops at once, with the last checkpoint.
    """
    pressed = threading.Event()
    if world.size > 1:
        yield pressed
        return

    def note(signum: int, frame: FrameType | None) -> None:
        pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, previous)
