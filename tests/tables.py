"""What the tests of tuning share: a cache folder of their own, and a look at the operators that run."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn
from fastcnn import tuning
from fastcnn.tuning import device, table

CPU = torch.device("cpu")
NAME = device.device_name(CPU)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give each test a cache folder of its own, and tables read anew."""
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path))
    monkeypatch.setattr(table, "shipped_path", lambda name: tmp_path / "shipped.json")
    tuning.forget()
    with fastcnn.use_backend("auto"):
        yield tmp_path
    tuning.forget()


def operators(function):
    """Return the names of fastcnn's operators that a function runs, with their arguments."""

    class Recorder(TorchDispatchMode):
        takes_any_operator = True

        def __init__(self):
            super().__init__()
            self.calls = {}

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if str(func).startswith("fastcnn."):
                self.calls[str(func)] = args
            return func(*args, **(kwargs or {}))

    with Recorder() as recorder:
        function()
    return recorder.calls
