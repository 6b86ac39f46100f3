"""Progress while training: a bar per network in a terminal, a line per epoch in a log, curves in TensorBoard."""

import math
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from fastcnn.console.errors import require
from fastcnn.train.lane import Lane

TENSORBOARD_FOLDER = "tensorboard"


def say(console: Console, text: str, style: str | None = None) -> None:
    """Print a line: wrapped between words in a terminal, whole in a log, so that a path can be copied from it."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=not console.is_terminal)


class Display:
    """Show how far each network is, with its loss and images per second: within ``with display.bars:``."""

    def __init__(self, console: Console, lanes: list[Lane], epochs: int, train_size: int, batch_size: int) -> None:
        self.console, self.epochs, self.batch_size, self.train_size = console, epochs, batch_size, train_size
        self.steps_per_epoch = math.ceil(train_size / batch_size)
        self.bars = Progress(
            TextColumn("{task.description:<11}"),
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=18),  # leaves room for the ^C that a terminal echoes
            TextColumn("loss {task.fields[loss]:>6}"),
            TextColumn("{task.fields[speed]:>6} images/s"),
            TimeRemainingColumn(compact=True),
            console=console,
            speed_estimate_period=120,  # seconds: several turns of both networks
            disable=not console.is_terminal,
        )
        total = epochs * self.steps_per_epoch
        self._tasks: dict[str, TaskID] = {}
        for lane in lanes:
            done = self._steps(lane)
            self._tasks[lane.title] = self.bars.add_task(lane.title, total=total, completed=done)
            self.update(lane)

    def update(self, lane: Lane) -> None:
        """Show the step, loss and speed that a network has reached within its epoch."""
        images = min(lane.step * self.batch_size, self.train_size)
        self.bars.update(
            self._tasks[lane.title],
            completed=self._steps(lane),
            epoch=f"{min(len(lane.epochs) + 1, self.epochs)}/{self.epochs}",
            loss=f"{lane.losses[-1]:.4f}" if lane.losses else "",
            speed=f"{images / lane.seconds:,.0f}" if lane.seconds else "",
        )

    def finish_epoch(self, lane: Lane) -> None:
        """Print a line about the epoch if the console is a log, where no bar can be drawn."""
        if self.console.is_terminal:
            return
        epoch = lane.epochs[-1]
        say(
            self.console,
            f"{lane.title:<11}  epoch {len(lane.epochs)}/{self.epochs}  loss {epoch.loss:.4f}  "
            f"test accuracy {epoch.test_accuracy:.2%}  {epoch.images_per_second:,.0f} images/s",
        )

    def _steps(self, lane: Lane) -> int:
        return len(lane.epochs) * self.steps_per_epoch + lane.step


class TensorBoard:
    """Event files under ``DIR/tensorboard``, a folder for each network.

    After a resume, TensorBoard drops what a killed run wrote beyond its checkpoint (``purge_step``).
    """

    def __init__(self, directory: Path, lanes: list[Lane]) -> None:
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        folder = directory / TENSORBOARD_FOLDER
        self._written = {lane.title: len(lane.losses) for lane in lanes}
        self._writers = {
            title: SummaryWriter(str(folder / title.replace(" ", "-")), purge_step=steps or None)
            for title, steps in self._written.items()
        }

    def update(self, lane: Lane) -> None:
        """Write the losses of the steps since the last time, by step from 0."""
        start, self._written[lane.title] = self._written[lane.title], len(lane.losses)
        for step in range(start, len(lane.losses)):
            self._writers[lane.title].add_scalar("loss/train", lane.losses[step], step)

    def finish_epoch(self, lane: Lane) -> None:
        """Write the numbers of the epoch just done, at its last step."""
        epoch, step = lane.epochs[-1], len(lane.losses) - 1
        scalars = {
            "loss/test": epoch.test_loss,
            "accuracy/top-1": epoch.test_accuracy,
            "accuracy/top-5": epoch.test_top5,
            "learning rate": epoch.lr,
            "images per second": epoch.images_per_second,
            "share of time waiting for images": epoch.waited / epoch.seconds,
        }
        for tag, value in scalars.items():
            self._writers[lane.title].add_scalar(tag, value, step)

    def flush(self) -> None:
        """Flush all writers to the disk."""
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Write what is left."""
        for writer in self._writers.values():
            writer.close()
