"""Fused conv+ReLU, max-pool and LRN kernels for classic CNNs: the module tree is stock, only the run is fused."""

from importlib import metadata as _metadata

from fastcnn import _entry, functional, models, nn, optim  # noqa: F401  _entry does its work by being imported
from fastcnn.available import BackendStatus, backends
from fastcnn.backend import use_backend
from fastcnn.explain import Explanation, explain
from fastcnn.fuse import fuse, unfuse
from fastcnn.models import *  # noqa: F403  the models are re-exported by their own __all__
from fastcnn.warm_up import warm_up

try:
    __version__ = _metadata.version("fastcnn")
except _metadata.PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendStatus",
    "Explanation",
    "backends",
    "explain",
    "functional",
    "fuse",
    "models",
    "nn",
    "optim",
    "unfuse",
    "use_backend",
    "warm_up",
    *models.__all__,
]
