"""The training loop behind ``fastcnn train``: data, loop, checkpoints and the report of a run."""

from fastcnn.train.errors import Interrupted, UserError
from fastcnn.train.run import Run, train
from fastcnn.train.settings import Settings

__all__ = ["Interrupted", "Run", "Settings", "UserError", "train"]
