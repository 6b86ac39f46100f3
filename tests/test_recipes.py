"""The classic recipe and what the command line makes of it; what cannot train is said in one line."""

import doctest
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from tables import operators
from torch import nn
from training_processes import SETTINGS, TinyAlexNet, train, write_images

import fastcnn
from fastcnn.cli import main
from fastcnn.console import checkpoint, files, models
from fastcnn.console import images as console_images
from fastcnn.console.errors import UserError
from fastcnn.console.images import STATISTICS
from fastcnn.console.models import normalize_first
from fastcnn.models import MODELS
from fastcnn.train import Settings, distributed, loop, prepare
from fastcnn.train import command as train_command
from fastcnn.train.command import ParallelName
from fastcnn.train.data import Feed
from fastcnn.train.folder import FolderData
from fastcnn.train.progress import TENSORBOARD_FOLDER

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("images")))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """Collect the settings of the command line instead of training."""
    settings: list[Settings] = []
    monkeypatch.setattr(train_command, "run_training", lambda asked, *args, **kwargs: settings.append(asked))
    return settings


CLASSIC = {"epochs": 90, "batch_size": 128, "lr": 0.01, "lr_step": 30, "optimizer": "sgd", "weight_decay": 5e-4}
QUICK = {"epochs": 6, "batch_size": 100, "lr": 1e-3, "lr_step": 0, "optimizer": "adam", "weight_decay": 0.0}
COMMANDS = {
    "imagefolder --model alexnet2012": {**CLASSIC, "input_size": (3, 227, 227)},
    "imagefolder": {**CLASSIC, "model": "alexnet", "input_size": (3, 224, 224)},
    "imagefolder --model vgg16_bn": {**CLASSIC, "input_size": (3, 224, 224)},
    "imagefolder --lr-step 0 --lr 0.1 --epochs 2": {**CLASSIC, "lr_step": 0, "lr": 0.1, "epochs": 2},
    "imagefolder --optimizer adam": {**CLASSIC, "optimizer": "adam", "lr": 1e-3},
    "imagefolder --model mnist_cnn": QUICK,
    "mnist --model alexnet": QUICK,
    "mnist": {**QUICK, "workers": 0},
}


@pytest.mark.parametrize("command", COMMANDS)
def test_recipe_is_the_default_and_options_override_it(command: str, asked: list[Settings]) -> None:
    assert main(["train", *command.split()]) == 0
    (settings,) = asked
    expected = COMMANDS[command]
    assert {name: getattr(settings, name) for name in expected} == expected
    assert settings.workers >= (1 if command.startswith("imagefolder") else 0)


@pytest.mark.parametrize("size", [224, 227])
def test_classic_crops(size: int, tmp_path: Path) -> None:
    """Of a 512x256 image with a ramp from left to right: resized to 512x256, any crop, flipped or not."""
    from PIL import Image

    ramp = torch.arange(512).div(2, rounding_mode="floor").to(torch.uint8).expand(256, 512)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(10):
            Image.fromarray(ramp.numpy()).save(tmp_path / name / f"{index}.png")
    data = FolderData(tmp_path, Feed((3, size, size), batch_size=16))
    ((pixels, labels),) = data.train_draws(0)
    assert pixels.shape == (1, 16, 3, size, size)
    assert (pixels.dtype, labels.dtype) == (torch.uint8, torch.int64)
    first, last = pixels[0, :, 0, 0, 0].int(), pixels[0, :, 0, 0, -1].int()
    assert set((last - first).abs().tolist()) <= {(size - 1) // 2, (size - 1) // 2 + 1}  # crops are not resized
    assert len(set(torch.minimum(first, last).tolist())) > 8
    assert 0 < (last < first).sum() < 16
    ((pixels, _),) = data.test_draws()
    assert set(pixels[0, :, 0, 0, 0].tolist()) == {(512 - size) // 2 // 2}
    batch, _ = data.batch(pixels[0], labels[0])
    assert batch.equal(pixels[0])


def test_network_normalizes_bytes(images: str) -> None:
    """In both lanes, by ImageNet's statistics; one kernel does that and the first convolution where there is one."""
    settings = replace(SETTINGS, data=images, compare=True)
    data, (stock, fused) = prepare.prepare(settings, distributed.World(), None)
    pixels, _ = next(data.train_batches(0))
    assert pixels.dtype == torch.uint8
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.manual_seed(settings.seed)
    plain = fastcnn.unfuse(TinyAlexNet()).eval()
    for lane in (stock, fused):
        torch.testing.assert_close(lane.model.eval()(pixels), plain(expected))
        assert lane.state_dict()["model"].keys() == plain.state_dict().keys()
    with fastcnn.use_backend("triton", algorithm="packed"):
        ran = operators(lambda: fused.model(pixels))
    assert "fastcnn.normalize_conv_relu_pool_codes.triton" in ran
    assert "fastcnn.normalize.triton" not in ran


@pytest.mark.parametrize("name", MODELS)
def test_every_network_begins_with_what_normalizes(name: str) -> None:
    entry = MODELS[name]
    statistics = STATISTICS[entry.input_size[0]]
    with torch.device("meta"):
        model = entry.build(num_classes=2)
        keys = list(model.state_dict())
        normalize_first(model, statistics)
        seen: list[torch.dtype] = []
        next(model.children()).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        assert model(torch.empty(2, *entry.input_size, dtype=torch.uint8)).shape == (2, 2)
    assert seen == [torch.uint8]
    assert list(model.state_dict()) == keys


def test_rate_falls_by_ten(images: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, data=images, epochs=5, lr_step=2, lr=0.01)
    rates = [epoch.lr for epoch in train(settings, tmp_path).lanes[0].epochs]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_top5_counts_the_first_five() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.arange(8.0, 0, -1).expand(len(x), 8)  # class 0 first, class 7 last

    class Data:
        def batch(self, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(labels), 1), labels

    class Lane:
        layout = distributed.OneProcess(Fixed())

        def autocast(self) -> torch.autocast:
            return torch.autocast("cpu", enabled=False)

    lane: Any = Lane()
    data: Any = Data()
    (result,) = loop.score(lane, data, torch.tensor([[0, 0, 4, 5, 7]])).tolist()
    assert result[1:] == [2, 3]


def test_tensorboard_holds_the_losses_once_though_resumed(images: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = replace(SETTINGS, data=images, tensorboard=True)
    train(replace(settings, epochs=1), tmp_path)
    done = train(settings, tmp_path, resume=checkpoint.load(tmp_path)).lanes[0]
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER / "fastcnn")).Reload()
    assert [event.step for event in events.Scalars("loss/train")] == list(range(6))
    assert [event.value for event in events.Scalars("loss/train")] == pytest.approx(done.losses)
    assert [event.step for event in events.Scalars("accuracy/top-5")] == [2, 5]


def test_slow_loader_is_told_with_figures(images: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lane = train(replace(SETTINGS, data=images, epochs=1), tmp_path).lanes[0]
    data: Any = type("Data", (), {"train_size": 15})
    for waited, seconds, said in ((30.0, 100.0, True), (19.0, 100.0, False), (0.9, 1.0, False)):
        caplog.clear()
        lane.losses, lane.step, lane.waited, lane.seconds = [1.0], 1, waited, seconds
        with caplog.at_level(logging.WARNING, "fastcnn"):
            loop.finish_epoch(lane, data, 1.0, 0.5, 1.0)
        assert ("waited for images 30 of the 100 seconds of epoch" in caplog.text) == said
        assert ("--workers" in caplog.text) == said


@pytest.mark.parametrize("loss", ["nan", "inf"])
def test_a_loss_that_is_no_number_keeps_the_checkpoint_of_the_step_before(
    loss: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean_loss = distributed.OneProcess.mean_loss
    losses = iter([1, 1, 1, 1, float(loss), 1])
    monkeypatch.setattr(distributed.OneProcess, "mean_loss", lambda self, loss: mean_loss(self, loss) * next(losses))
    with pytest.raises(
        UserError, match=rf"the loss became {loss} in epoch 2, step 2; a smaller --lr .*\.pt holds epoch 2 of 2, step 1"
    ):
        train(replace(SETTINGS, data=images, checkpoint_every=1), tmp_path)
    assert len(checkpoint.load(tmp_path)["lanes"]["fastcnn"]["losses"]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_weights_that_are_no_numbers_are_not_saved(images: str, tmp_path: Path) -> None:
    lane = train(replace(SETTINGS, data=images, epochs=1), tmp_path).lanes[0]
    next(lane.model.parameters()).data[0] = float("inf")
    with pytest.raises(UserError, match="the weights became infinite or nan in epoch 2"):
        lane.state_dict()


def test_checkpoint_of_another_architecture(images: str, tmp_path: Path) -> None:
    train(replace(SETTINGS, data=images, epochs=1), tmp_path)
    state = checkpoint.load(tmp_path)
    weights = state["lanes"]["fastcnn"]["model"]
    weights["features.0.weight"] = weights["features.0.weight"][:2]
    del weights["classifier.1.bias"]
    with pytest.raises(
        UserError, match=r"another architecture than TinyAlexNet: 2 of 6 tensors differ, the first is .*2, 3"
    ):
        train(replace(SETTINGS, data=images), tmp_path, resume=state)


UNFIT = {
    "wrong channels": ({"input_size": (1, 16, 16)}, "tiny_alexnet does not take images of 1x16x16: .*channels"),
    "odd channels": ({"input_size": (4, 16, 16)}, "images have 3 channels, or 1 .*; the network's input has 4"),
    "more classes than scores": ({"options": {"num_classes": 2}}, r"has 3 classes \(cat, dog, emu\), more than the 2"),
    "too small": ({"model": "alexnet2012", "input_size": (3, 32, 32)}, "alexnet2012 does not take images of 3x32x32"),
    "fp16 and owt": ({"amp": "fp16", "parallel": "owt"}, "--amp fp16 needs a CUDA device"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_is_one_line_before_anything_is_written(name: str, images: str, tmp_path: Path) -> None:
    changes, message = UNFIT[name]
    with pytest.raises(UserError, match=message) as caught:
        train(replace(SETTINGS, data=images, **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["cut", "text", "empty"])
def test_broken_jpeg_stops_the_command_and_is_named(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_images(tmp_path / "images", per_class=5)
    broken = data / "emu" / "4.jpg"
    broken.write_bytes({"cut": broken.read_bytes()[:300], "text": b"no image", "empty": b""}[content])
    command = f"train imagefolder --model tiny_alexnet --input-size 3,16,16 --workers 0 --epochs 1 --data {data}"
    assert main([*command.split(), "--out", str(tmp_path), "--name", "run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {broken}: not an image that can be read (")
    assert error.count("\n") == 1


def test_layouts_of_the_command_line_exist() -> None:
    assert get_args(ParallelName) == ("ddp", "owt")


@pytest.mark.parametrize("module", [distributed, prepare, checkpoint, files, models, console_images])
def test_examples_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
