"""The training loop behind ``fastcnn train``: data, loop, CUDA graphs, checkpoints and the report of a run."""

from fastcnn.train.graphed import GraphedStep
from fastcnn.train.settings import Settings

__all__ = ["GraphedStep", "Settings"]
