"""A device whose clock is played, on which stages are tried now, and what the tests of trials ask of it."""

import sys
from pathlib import Path

import pytest
import torch
from tables import CPU, NAME, operators

import fastcnn.functional as FF
from fastcnn.tuning import places, proof, table, telling, timing

ROOT = Path(__file__).parents[1]
FAST, SLOW = {"torch": 2.0, "cpu": 1.0}, {"torch": 1.0, "cpu": 2.0}


class Player(places.Place):
    """A device whose clock and child process are played; the candidates are the processor's."""

    seconds = FAST
    noise = 0.0
    capturing = False

    def __init__(self, device):
        super().__init__(device)
        self.timed = []
        self.room = 0

    def measure(self, run, times):
        run(0)
        backend = lookup_chosen()
        self.timed.append(backend)
        seconds = self.seconds[backend] * (1 + self.noise * (self.timed.count("torch") % 2 * (backend == "torch")))
        return timing.Times(seconds, seconds)

    def is_capturing(self):
        return self.capturing

    def make_room(self):
        self.room += 1

    def child(self):
        code = "import sys\nfor line in sys.stdin: print('end ' + line.strip() + '\\t', flush=True)"
        return [sys.executable, "-c", code]


def lookup_chosen():
    from fastcnn.backend import chosen

    return chosen()


@pytest.fixture
def player(monkeypatch):
    """Let a player stand for the processor, on which stages are tried now; nothing is deterministic."""
    monkeypatch.setenv("FASTCNN_TRIAL", "1")
    monkeypatch.setitem(places.PLACES, "cpu", Player)
    monkeypatch.setattr("fastcnn.route.FASTEST", {})  # tables alone decide
    places.place_of.cache_clear()
    telling.forget()
    monkeypatch.setattr(proof, "_known", {})
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    yield places.place_of(CPU)
    torch.use_deterministic_algorithms(before, warn_only=True)
    places.place_of.cache_clear()
    telling.forget()


def pool(batch=2, grad=False, **changes):
    x = torch.randn(batch, 3, 8, 8, requires_grad=grad)
    return FF.max_pool2d(x, 2, **changes)


def runs_kernel(**arguments):
    """Whether a pool runs by a kernel: one that is in the tables, as nothing is tried under a dispatch mode."""
    return bool(operators(lambda: pool(**arguments)))


def entries():
    return list(table.read(table.user_path(NAME), NAME).values())
