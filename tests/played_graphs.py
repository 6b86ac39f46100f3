"""CUDA graphs played on the CPU, so that all but CUDA's own part of a captured step is tested without a GPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastcnn
from fastcnn.train import graphed


class Recorder(TorchDispatchMode):
    """Runs and notes every operator: its arguments and the tensors it made."""

    takes_any_operator = True

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result


class PlayedCapture:
    """Takes the place of ``CudaCapture``: a replay runs the noted operators again on the very same tensors.

    As in a CUDA graph, what Python read or decided while capturing stays as it was. Unlike one, recording runs the
    operators, so the first replay does nothing.
    """

    waits = []  # what a warm-up step would be caught at
    recorded = 0

    def __init__(self, device):
        self.device = device

    def warm_up(self, function):
        return function(), list(self.waits)

    def record(self, function):
        with Recorder() as recorder:
            output = function()
        type(self).recorded += 1
        has_run = iter([True])

        def replay():
            if not next(has_run, False):
                play(recorder.calls)

        return replay, output


@torch.no_grad()
def play(calls):
    for function, args, kwargs, result in calls:
        again = function(*args, **kwargs)
        for buffer, value in zip(tree_leaves(result), tree_leaves(again), strict=True):
            if isinstance(buffer, torch.Tensor) and buffer is not value:
                buffer.copy_(value)


@pytest.fixture
def played(monkeypatch):
    """Capture on the CPU."""
    monkeypatch.setattr(PlayedCapture, "waits", [])
    monkeypatch.setattr(PlayedCapture, "recorded", 0)
    monkeypatch.setitem(graphed.CAPTURES, "cpu", PlayedCapture)
    return PlayedCapture


@pytest.fixture(autouse=True)
def one_thread():
    """Many tiny steps: sharing them out among threads takes longer than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(device="cpu"):
    """Convolution, pooling, batch norm, dropout: what has buffers and draws random numbers."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(4), nn.Flatten()]
    return fastcnn.nn.Sequential(*layers, nn.Dropout(0.5), nn.Linear(64, 10)).to(device)
