"""The same numbers for TensorBoard, as training goes on."""

from pathlib import Path

from fastcnn.console.errors import require
from fastcnn.train.lane import Lane

FOLDER = "tensorboard"


class TensorBoard:
    """Event files under ``DIR/tensorboard``, a folder for each network.

    After a resume, TensorBoard drops what a killed run wrote beyond its checkpoint (``purge_step``).
    """

    def __init__(self, directory: Path, lanes: list[Lane]) -> None:
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        self._written = {lane.title: len(lane.losses) for lane in lanes}
        self._writers = {
            title: SummaryWriter(str(directory / FOLDER / title.replace(" ", "-")), purge_step=steps or None)
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
