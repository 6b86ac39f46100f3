"""A resumed run equals one that was never stopped; what a run writes is complete or not there."""

import errno
import io
import itertools
import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from played_graphs import PlayedCapture
from rich.console import Console
from torch import Tensor, nn

import fastcnn
from fastcnn.console import checkpoint, files
from fastcnn.console.errors import Interrupted, UserError
from fastcnn.models import MODELS, ModelEntry
from fastcnn.train import Settings, loop, prepare
from fastcnn.train import lane as training
from fastcnn.train import run as run_module
from fastcnn.train.data import CLASSES, Feed, TensorData, epoch_order
from fastcnn.train.graphed import CAPTURES
from fastcnn.train.idx import Labelled
from fastcnn.train.memory import peak_memory
from fastcnn.train.report import table
from fastcnn.train.run import Run
from fastcnn.train.settings import resumed

pytest.importorskip("matplotlib")

NUM_TRAIN, STEPS_PER_EPOCH = 70, 4
SETTINGS = Settings(dataset="mnist", model="tiny", input_size=(1, 8, 8), epochs=3, batch_size=20)


class TinyCNN(nn.Module):
    """Convolution, ReLU, pooling, dropout: the last makes a wrong random stream visible in the losses."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Linear(128, num_classes))
        fastcnn.fuse(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def stripes(count: int) -> Labelled:
    """Make images whose bright row tells the class."""
    labels = torch.arange(count) % 8
    images = torch.full((count, 8, 8), 20, dtype=torch.uint8)
    images[torch.arange(count), labels] = 220
    return Labelled(images, labels)


@pytest.fixture(autouse=True)
def tiny_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``mnist`` be a few stripes and give the command line the model ``tiny``."""
    monkeypatch.setitem(MODELS, "tiny", ModelEntry(TinyCNN, (1, 8, 8)))

    def load(name: str, directory: Path | None, feed: Feed) -> TensorData:
        return TensorData(stripes(NUM_TRAIN), stripes(16), CLASSES[name], feed)

    monkeypatch.setattr(prepare, "load_idx_dataset", load)


def train(settings: Settings, directory: Path, **kwargs: object) -> Run:
    return run_module.train(settings, directory, Console(file=io.StringIO()), **kwargs)


def losses(run: Run) -> dict[str, list[float]]:
    return {lane.title: lane.losses for lane in run.lanes}


def press_ctrl_c_at_step(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGINT while that training step runs, counted over all networks from 1."""
    counter = itertools.count(1)
    train_step: Callable[..., Tensor] = loop.train_step

    def interrupted_step(*args: object) -> Tensor:
        if next(counter) == step:
            signal.raise_signal(signal.SIGINT)
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", interrupted_step)


@pytest.mark.parametrize("compare", [False, True], ids=["fastcnn alone", "side by side"])
def test_run_learns_and_writes_its_three_files(compare: bool, tmp_path: Path) -> None:
    run = train(replace(SETTINGS, compare=compare, epochs=12, lr=1e-2), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png", "metrics.json"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["finished"]
    assert list(metrics["networks"]) == (["stock torch", "fastcnn"] if compare else ["fastcnn"])
    for network in metrics["networks"].values():
        assert network["test_accuracy"] > 0.9
        assert len(network["loss_per_step"]) == 12 * STEPS_PER_EPOCH
        assert len(network["epochs"]) == 12
        assert all(epoch["images_per_second"] > 0 for epoch in network["epochs"])
        assert network["peak_memory_bytes"] > 20 * 8 * 64 * 4  # one batch of the convolution's output
    assert losses(run) == {title: network["loss_per_step"] for title, network in metrics["networks"].items()}


def test_side_by_side_losses_agree_and_stock_layers_are_stock(tmp_path: Path) -> None:
    run = train(replace(SETTINGS, compare=True), tmp_path)
    stock, fused = run.lanes
    assert not [layer for layer in stock.model.modules() if "forward" in vars(layer)]
    assert [layer for layer in fused.model.modules() if "forward" in vars(layer)]
    torch.testing.assert_close(stock.losses, fused.losses, rtol=1e-5, atol=1e-6)
    assert len(set(stock.losses)) > STEPS_PER_EPOCH


def test_two_networks_take_turns_in_changing_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    finish_epoch = loop.finish_epoch
    monkeypatch.setattr(loop, "finish_epoch", lambda lane, *args: (order.append(lane.title), finish_epoch(lane, *args)))
    train(replace(SETTINGS, compare=True), tmp_path)
    assert order == ["stock torch", "fastcnn", "fastcnn", "stock torch", "stock torch", "fastcnn"]


STOPS = {
    "after the first step": (1, False),
    "at the end of an epoch": (STEPS_PER_EPOCH, False),
    "in the first network's second turn": (3 * STEPS_PER_EPOCH + 1, True),
    "at the second network's first step": (STEPS_PER_EPOCH + 1, True),
    "in the middle of the second network's turn": (STEPS_PER_EPOCH + 2, True),
}


@pytest.mark.parametrize("stop", STOPS)
def test_resumed_run_gives_the_losses_of_an_uninterrupted_one(
    stop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, compare = STOPS[stop]
    settings = replace(SETTINGS, compare=compare)
    whole = train(settings, tmp_path / "whole")
    num_warm_up_steps = 2 if compare else 0
    with monkeypatch.context() as patch:
        press_ctrl_c_at_step(patch, step + num_warm_up_steps)
        with pytest.raises(Interrupted, match=r"go on with: fastcnn train --resume .*checkpoint\.pt"):
            train(settings, tmp_path / "cut")
    state = checkpoint.load(tmp_path / "cut")
    assert sum(len(lane["losses"]) for lane in state["lanes"].values()) == step
    assert not json.loads((tmp_path / "cut" / "metrics.json").read_text())["finished"]
    torch.manual_seed(123)
    rest = train(settings, tmp_path / "cut", resume=state)
    assert losses(rest) == losses(whole)
    for lane, expected in zip(rest.lanes, whole.lanes, strict=True):
        assert [epoch.test_accuracy for epoch in lane.epochs] == [epoch.test_accuracy for epoch in expected.epochs]
        torch.testing.assert_close(lane.model.state_dict(), expected.model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("stop", [2, 9])
def test_run_with_graphs_gives_the_losses_of_one_without_and_resumes(
    stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CAPTURES, "cpu", PlayedCapture)
    monkeypatch.setattr(training, "STEPS_PER_GRAPH", 2)
    settings = replace(SETTINGS, compare=True, epochs=6)
    plain = train(replace(settings, graph=False), tmp_path / "plain")
    whole = train(settings, tmp_path / "whole")
    assert losses(whole) == losses(plain)
    assert {lane.cuda_graphs() for lane in whole.lanes} == {"captured"}
    assert {lane.cuda_graphs() for lane in plain.lanes} == {"off"}
    with monkeypatch.context() as patch:
        evaluated = itertools.count(1)
        evaluate = loop.evaluate
        patch.setattr(loop, "evaluate", lambda *args: evaluate(*args) if next(evaluated) < stop else None)
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "cut")
    rest = train(replace(settings, graph=False), tmp_path / "cut", resume=checkpoint.load(tmp_path / "cut"))
    assert losses(rest) == losses(plain)


def test_run_can_be_extended(tmp_path: Path) -> None:
    whole = train(SETTINGS, tmp_path / "whole")
    train(replace(SETTINGS, epochs=1), tmp_path / "short")
    longer = train(SETTINGS, tmp_path / "short", resume=checkpoint.load(tmp_path / "short"))
    assert losses(longer) == losses(whole)


def test_finished_run_does_not_resume_without_more_epochs(tmp_path: Path) -> None:
    train(SETTINGS, tmp_path)
    with pytest.raises(UserError, match="all 3 epochs are done; ask for more with --epochs"):
        train(SETTINGS, tmp_path, resume=checkpoint.load(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"), [("model", "vgg16"), ("dataset", "fashion-mnist"), ("lr", 0.5), ("batch_size", 7)]
)
def test_checkpoint_of_other_settings_is_refused(field: str, value: object) -> None:
    other = replace(SETTINGS, **{field: value})
    with pytest.raises(UserError, match=f"was.pt: was trained with {field.replace('_', '-')} .*, not {value!r}"):
        resumed(other, {field}, vars(SETTINGS), "was.pt")


def test_settings_not_given_come_from_the_checkpoint() -> None:
    before = replace(SETTINGS, lr=0.5, seed=9, device="cuda")
    assert resumed(SETTINGS, {"dataset", "device"}, vars(before), "was.pt") == replace(before, device="cpu")


def test_checkpoint_of_other_classes_or_data_is_refused(tmp_path: Path) -> None:
    train(SETTINGS, tmp_path)
    state = checkpoint.load(tmp_path)
    with pytest.raises(UserError, match="trained on 2 classes"):
        train(SETTINGS, tmp_path, resume={**state, "classes": ["cat", "dog"]})
    with pytest.raises(UserError, match="trained on 60,000 images, the data has 70"):
        train(SETTINGS, tmp_path, resume={**state, "train_size": 60000})


def test_results_are_not_overwritten_unless_asked(tmp_path: Path) -> None:
    train(replace(SETTINGS, epochs=1), tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(UserError, match="holds results already"):
        train(SETTINGS, tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "tensorboard").mkdir()
    train(replace(SETTINGS, seed=1), tmp_path, overwrite=True)
    assert checkpoint.load(tmp_path)["settings"]["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "curves.png", "metrics.json"]


def test_results_stay_until_the_run_that_replaces_them_can_start(tmp_path: Path) -> None:
    train(replace(SETTINGS, epochs=1), tmp_path)
    (tmp_path / "checkpoint.pt").unlink()  # what is left is results too
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="no model is named"):
        train(replace(SETTINGS, model="vgg61"), tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


NO_FOLDERS = {
    "in a file": ("/dev/null/x", "Not a directory"),
    "not to be made": ("/proc/nowhere/x", "No such file or directory"),
    "not to be written": ("/proc/tty/ldisc", "No such file or directory"),  # an empty folder, also for root
    "name too long": ("n" * 300, "File name too long"),
    "name too long, in new folders": (f"new/runs/{'n' * 300}", "File name too long"),
}


@pytest.mark.parametrize("case", NO_FOLDERS)
def test_folder_that_cannot_hold_results_is_said_before_anything_is_loaded(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, reason = NO_FOLDERS[case]
    monkeypatch.setattr(run_module, "prepare", lambda *_: pytest.fail("data and model were loaded"))
    directory = tmp_path / name
    expected = f"^{directory}: cannot hold results \\({reason}\\); choose another --out or --name$"
    with pytest.raises(UserError, match=expected):
        train(SETTINGS, directory)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tensorboard", [False, True])
def test_full_disk_at_the_first_checkpoint_leaves_no_folder(
    tensorboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tensorboard:
        pytest.importorskip("tensorboard")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    (tmp_path / "before").mkdir()
    for directory in (tmp_path / "new" / "run", tmp_path / "before"):
        with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be written \(No space left on device\)$"):
            train(replace(SETTINGS, tensorboard=tensorboard), directory)
    assert [path.name for path in tmp_path.iterdir()] == ["before"]


def test_a_loss_that_is_no_number_stops_with_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"fastcnn: the loss became (nan|inf) in epoch \d, step \d+; a smaller --lr"):
        train(replace(SETTINGS, lr=1e30, optimizer="sgd"), tmp_path)


def test_sgd_and_bfloat16_train(tmp_path: Path) -> None:
    run = train(replace(SETTINGS, optimizer="sgd", lr=0.05, amp="bf16", compare=True, epochs=8), tmp_path)
    assert run.lanes[1].epochs[-1].loss < run.lanes[1].epochs[0].loss
    torch.testing.assert_close(run.lanes[0].losses, run.lanes[1].losses, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"device": "abacus"}, "--device abacus: not a device"),
        ({"device": "cuda:99"}, "--device cuda:99: torch sees"),
        ({"amp": "fp16"}, "--amp fp16 needs a CUDA device"),
        ({"backend": "abacus"}, "--backend abacus: expected one of"),
        ({"model": "vgg61"}, "no model is named 'vgg61'; did you mean vgg"),
        ({"options": {"lrn": True}}, "tiny cannot be built with lrn=True"),
        ({"dataset": "imagefolder"}, "imagefolder needs --data DIR"),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_what_cannot_be_is_said_in_one_line(setting: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        train(replace(SETTINGS, **setting), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"epoch": 1})

    def fail_half_way(file: BinaryIO) -> None:
        file.write(b"half of a checkpoint")
        raise OSError("no space left on device")

    with pytest.raises(
        UserError, match=r"checkpoint\.pt: cannot be written \(no space left .*the one .* before it is kept"
    ):
        files.atomic_write(path, fail_half_way)
    assert checkpoint.load(path)["epoch"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_damaged_or_foreign_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"weights": torch.zeros(1000)})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"checkpoint\.pt: damaged, or not a checkpoint"):
        checkpoint.load(path)
    torch.save({"weights": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a checkpoint of fastcnn train"):
        checkpoint.load(tmp_path)
    torch.save(Console, path)  # needs code to load
    with pytest.raises(UserError, match="damaged, or not a checkpoint"):
        checkpoint.load(path)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path / "nowhere.pt")


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    def work() -> Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        return second + 1

    peak = peak_memory(work, torch.device("cpu"))
    assert peak is not None
    assert 8000 <= peak < 8100  # the constant 1 is a tensor too
    assert peak_memory(work, torch.device("meta")) is None


def test_table_reads_in_80_columns(tmp_path: Path) -> None:
    run = train(replace(SETTINGS, compare=True, epochs=12), tmp_path)
    output = io.StringIO()
    Console(file=output, width=80).print(table(run.lanes))
    lines = output.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    for label in ("loss, epoch 1 ", "loss, epoch 12", "test accuracy", "images/s", "peak memory", "largest loss diff"):
        assert sum(label in line for line in lines) >= 1, label


def test_order_is_a_permutation_that_differs_between_epochs() -> None:
    orders = [epoch_order(50, seed=3, epoch=epoch) for epoch in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(50)) for order in orders)
    assert not torch.equal(*orders)
