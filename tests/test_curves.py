"""curves.png: an axis that reads, and no warning, whatever the losses are."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from fastcnn.train.curves import write_curves
from fastcnn.train.lane import Epoch


def lane(epochs: int, losses: list[float], accuracy: float) -> Any:
    done = [Epoch(1.0, 1.0, accuracy, accuracy, 1.0, 0.0, 1.0, 0.01) for _ in range(epochs)]
    return SimpleNamespace(title="fastcnn", losses=losses, epochs=done, lr=0.01, step=0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Collect the figures that are saved."""
    figures: list[Any] = []
    save = Figure.savefig

    def kept(self: Figure, *args: Any, **more: Any) -> None:
        figures.append(self)
        save(self, *args, **more)

    monkeypatch.setattr(Figure, "savefig", kept)
    return figures


RUNS = {
    "one epoch": (1, [2.0, 1.0, 0.5], 0.9),
    "one step": (1, [2.0], 0.0),
    "losses of 0": (2, [0.0] * 4, 1.0),
    "some losses of 0": (2, [1.0, 0.1, 0.0, 0.0], 1.0),
    "stopped in the first epoch": (0, [1.0, 0.9], 0.0),
    "many epochs": (30, [1.0 / step for step in range(1, 61)], 0.97),
}


@pytest.mark.parametrize("name", RUNS)
def test_axes_read_and_nothing_warns(name: str, tmp_path: Path, drawn: list[Any]) -> None:
    epochs, losses, accuracy = RUNS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write_curves(tmp_path / "curves.png", [lane(epochs, losses, accuracy)], "mnist_cnn on mnist")
    steps, shares = drawn[0].axes
    for axes, last in ((steps, len(losses)), (shares, max(1, epochs))):
        left, right = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
        assert ticks
        assert all(tick == int(tick) for tick in ticks)  # there is no step 0.945
        assert left <= 1
        assert right >= last
    low, high = shares.get_ylim()
    assert 0 <= low < high <= 1.05
    assert high - low >= 0.09 or high >= 1.0
