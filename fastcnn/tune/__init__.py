"""Tuning: time every backend, algorithm and configuration for each stage of a model, and store the winners.

What is stored, and how ``auto`` reads it, is the matter of ``fastcnn.tuning``.
"""

from fastcnn.tune.run import Result, tune
from fastcnn.tuning.stage import Stage
from fastcnn.warm_up import stages_of

__all__ = ["Result", "Stage", "stages_of", "tune"]
