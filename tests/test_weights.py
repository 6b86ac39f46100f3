"""Pretrained weights: downloaded once, their hash checked, nothing left of a bad download; training from them."""

import inspect
import json
import re
import socket
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from pretrained import CATEGORIES, Hub, TinyAlexNet_Weights, serving, tiny_state
from torchvision import models
from training_processes import SETTINGS, train, write_images

import fastcnn
from fastcnn.cli import main
from fastcnn.console import checkpoint
from fastcnn.console.errors import UserError
from fastcnn.models.weights import num_classes_of, pretrained_state_dict, pretrained_weights
from fastcnn.train.prepare import load_pretrained

TINY = TinyAlexNet_Weights.IMAGENET1K_V1
WITH_WEIGHTS = ["alexnet", *(f"vgg{depth}{end}" for depth in (11, 13, 16, 19) for end in ("", "_bn"))]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "torch", monkeypatch) as hub:
        yield hub


@pytest.fixture
def images(tmp_path: Path) -> str:
    return str(write_images(tmp_path / "images"))


def test_alexnet_takes_the_tensors_of_the_file_and_downloads_it_once(hub: Hub, capsys: Any) -> None:
    with torch.device("meta"):
        shapes = fastcnn.alexnet().state_dict()
    # An expanded tensor has one element in the file.
    state = {key: torch.tensor(float(index)).expand(value.shape) for index, (key, value) in enumerate(shapes.items())}
    weights = models.AlexNet_Weights.IMAGENET1K_V1
    file = hub.publish(weights, state)
    for progress in (True, False):
        own = fastcnn.alexnet(weights=weights, progress=progress).state_dict()
        assert all(bool((own[key] == value).all()) for key, value in state.items())
    assert len(hub.asked) == 1
    assert list(hub.checkpoints.iterdir()) == [file]
    assert re.search(r"100(\.0)?%", capsys.readouterr().err)  # by tqdm, or by torch.hub alone


LEGACY = {
    "pretrained=False": lambda build: build(pretrained=False),
    "False": lambda build: build(False),
    "False, False, num_classes": lambda build: build(False, False, num_classes=3),
    "pretrained=True": lambda build: build(pretrained=True),
    "True": lambda build: build(True),
}


@pytest.mark.parametrize("call", LEGACY)
@pytest.mark.parametrize("name", ["alexnet", "vgg11", "vgg16_bn"])
def test_legacy_pretrained_is_taken_with_torchvisions_warnings(
    name: str, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []

    def nothing(_self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        loaded.append(_self)
        return {}

    monkeypatch.setattr(models.WeightsEnum, "get_state_dict", nothing)
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *_: None)
    said = []
    for module in (fastcnn, models):
        with torch.device("meta"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model = LEGACY[call](getattr(module, name))
        said.append([(warning.category, str(warning.message)) for warning in caught])
        assert model.classifier[-1].out_features == (3 if "num_classes" in call else 1000)
    assert said[0] == said[1] != []
    assert loaded == [models.get_model_weights(name).IMAGENET1K_V1] * (2 if "True" in call else 0)


def test_legacy_pretrained_of_a_network_that_torchvision_does_not_have() -> None:
    with pytest.raises(ValueError, match="no weights of vgg16_1x1"), pytest.warns(UserWarning, match="positional"):
        fastcnn.vgg16_1x1(True)
    with pytest.raises(TypeError), pytest.warns(UserWarning, match="positional"):
        fastcnn.alexnet(None, True, 3)


def test_progress_can_be_hidden(hub: Hub, capsys: Any) -> None:
    hub.publish(TINY, tiny_state())
    pretrained_state_dict("tiny_alexnet", TINY, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", WITH_WEIGHTS)
def test_weights_have_torchvisions_names(name: str) -> None:
    members = models.get_model_weights(name)
    for given in (members.DEFAULT, "DEFAULT", "IMAGENET1K_V1", f"{members.__name__}.IMAGENET1K_V1"):
        assert pretrained_weights(name, given) is members.IMAGENET1K_V1
    assert inspect.signature(fastcnn.models.MODELS[name].build).parameters["weights"].default is None


@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter", "ignore:for .*no-op")
def test_features_without_a_classifier_leave_the_number_of_classes_to_the_caller(hub: Hub) -> None:
    weights = models.VGG16_Weights.IMAGENET1K_FEATURES
    with torch.device("meta"):
        shapes = fastcnn.vgg16().state_dict()
    hub.publish(weights, {key: torch.zeros(()).expand(value.shape) for key, value in shapes.items()})
    with torch.device("meta"):
        model = fastcnn.vgg16(weights=weights)
    assert model.classifier[-1].out_features == 1000
    assert num_classes_of(weights, 10) == {"num_classes": 10}


@pytest.mark.parametrize("build", [fastcnn.vgg16, models.vgg16], ids=["fastcnn", "torchvision"])
def test_conflicts_are_reported_as_torchvision_does(build: Any) -> None:
    with pytest.raises(ValueError, match=r"num_classes.*expected.* 1000.*got 10"):
        build(weights=models.VGG16_Weights.DEFAULT, num_classes=10)
    with pytest.raises(TypeError, match=r"VGG16_Weights.*AlexNet_Weights"):
        build(weights=models.AlexNet_Weights.DEFAULT)


def test_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"one of DEFAULT, IMAGENET1K_FEATURES, IMAGENET1K_V1 for vgg16, got 'V9'"):
        fastcnn.vgg16(weights="V9")


@pytest.mark.parametrize("build", [fastcnn.AlexNet2012, fastcnn.MnistCNN, fastcnn.ConvNet])
def test_networks_without_pretrained_weights_take_none(build: Any) -> None:
    with pytest.raises(TypeError, match=f"{build.__name__}.*'weights'"):
        build(weights="DEFAULT")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("changed", "what came from URL is not the file of that name .*expected .*nothing was kept, try again"),
        ("cut", "what came from URL is not the file of that name .*expected .*nothing was kept, try again"),
        ("missing", r"could not be downloaded from URL \(Not Found\).*put it at FILE .*TORCH_HOME"),
    ],
)
def test_bad_download_leaves_nothing_behind(hub: Hub, damage: str, message: str) -> None:
    file = hub.publish(TINY, tiny_state(), damage)
    expected = message.replace("URL", hub.urls[TINY]).replace("FILE", str(file))
    with pytest.raises((RuntimeError, ConnectionError), match=expected) as caught:
        pretrained_state_dict("tiny_alexnet", TINY, progress=False)
    assert "\n" not in str(caught.value)
    assert list(hub.checkpoints.iterdir()) == []


def test_without_network_one_line_says_which_file_goes_where(hub: Hub) -> None:
    file = hub.publish(TINY, tiny_state())
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    hub.urls[TINY] = f"http://127.0.0.1:{port}/{file.name}"
    with pytest.raises(ConnectionError, match=rf"tiny_alexnet: TinyAlexNet_Weights.*{port}.*refused.*put it at {file}"):
        pretrained_state_dict("tiny_alexnet", TINY, progress=False)
    assert list(hub.checkpoints.iterdir()) == []


def test_file_put_there_by_hand_is_checked_and_used(hub: Hub) -> None:
    state = tiny_state()
    file = hub.publish(TINY, state)
    content, _ = hub.files.pop(f"/{file.name}")
    hub.checkpoints.mkdir(parents=True)
    file.write_bytes(content[:-100])
    with pytest.raises(RuntimeError, match=rf"{file} is damaged \(its SHA-256 begins with .*; delete it"):
        pretrained_state_dict("tiny_alexnet", TINY)
    file.write_bytes(content)
    torch.testing.assert_close(pretrained_state_dict("tiny_alexnet", TINY), dict(state), rtol=0, atol=0)
    assert hub.asked == []


def test_file_that_is_no_checkpoint_though_its_hash_is_right(hub: Hub) -> None:
    hub.checkpoints.mkdir(parents=True)
    file = hub.checkpoints / "tiny.pth"
    file.write_text("no weights")
    hub.urls[TINY] = f"{hub.root}/{file.name}"
    with pytest.raises(RuntimeError, match=f"{file} is damaged"):
        pretrained_state_dict("tiny_alexnet", TINY)


def test_folder_that_cannot_be_written(hub: Hub) -> None:
    file = hub.publish(TINY, tiny_state())
    hub.home.write_text("a file, not a folder")
    with pytest.raises(OSError, match=f"tiny_alexnet: {file}: Not a directory .*TORCH_HOME"):
        pretrained_state_dict("tiny_alexnet", TINY)


def test_training_begins_from_them_and_the_last_layer_anew(hub: Hub, images: str, tmp_path: Path) -> None:
    pretrained = tiny_state()
    hub.publish(TINY, pretrained)
    folder = tmp_path / "runs" / "first"
    command = f"train imagefolder --model tiny_alexnet --weights DEFAULT --data {images} --workers 0 --epochs 1"
    assert main([*command.split(), *f"--lr 0 --out {folder.parent} --name first".split()]) == 0
    trained = checkpoint.load(folder)["lanes"]["fastcnn"]["model"]
    for key in ("features.0.weight", "features.0.bias", "classifier.1.weight", "classifier.1.bias"):
        assert torch.equal(trained[key], pretrained[key])
    assert trained["classifier.4.weight"].shape == (3, 33)
    (note,) = [note for note in json.loads((folder / "metrics.json").read_text())["data"]["notes"] if "weights" in note]
    assert note == ("weights: TinyAlexNet_Weights.IMAGENET1K_V1; classifier.4 starts anew, for 3 classes instead of 5")


def test_resumed_training_does_not_go_back_to_them(hub: Hub, images: str, tmp_path: Path) -> None:
    hub.publish(TINY, tiny_state())
    settings = replace(SETTINGS, data=images, weights="DEFAULT")
    whole = train(settings, tmp_path / "whole").lanes[0].losses
    train(replace(settings, epochs=1), tmp_path / "rest")
    for file in hub.checkpoints.iterdir():
        file.unlink()
    asked = len(hub.asked)
    rest = train(settings, tmp_path / "rest", resume=checkpoint.load(tmp_path / "rest"))
    assert rest.lanes[0].losses == whole
    assert len(hub.asked) == asked


def test_last_layer_of_the_same_size_is_kept(hub: Hub) -> None:
    pretrained = tiny_state()
    hub.publish(TINY, pretrained)
    model = fastcnn.models.MODELS["tiny_alexnet"].build(num_classes=len(CATEGORIES))
    assert "classifier.4 is kept: the data are taken to have its 5 classes" in load_pretrained(
        model, "tiny_alexnet", "DEFAULT"
    )
    torch.testing.assert_close(model.state_dict(), pretrained, rtol=0, atol=0)


def test_weights_older_than_the_batch_counter(hub: Hub) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 5))

    torch.manual_seed(1)
    old = {key: value for key, value in build().state_dict().items() if not key.endswith("num_batches_tracked")}
    hub.publish(TINY, old)
    model = build()
    load_pretrained(model, "tiny_alexnet", "DEFAULT")
    assert torch.equal(model[0].weight, old["0.weight"])
    assert model[1].num_batches_tracked == 0


@pytest.mark.parametrize(
    ("model", "weights", "message"),
    [
        ("alexnet2012", "DEFAULT", "--weights DEFAULT: torchvision has no weights of alexnet2012"),
        ("vgg16_1x1", "DEFAULT", "--weights DEFAULT: torchvision has no weights of vgg16_1x1"),
        ("tiny_alexnet", "V9", "--weights V9: tiny_alexnet has DEFAULT, IMAGENET1K_FEATURES, IMAGENET1K_V1"),
        (
            "tiny_alexnet",
            "IMAGENET1K_FEATURES",
            "--weights IMAGENET1K_FEATURES: TinyAlexNet_Weights.IMAGENET1K_FEATURES has no classifier",
        ),
        ("tiny_alexnet", "DEFAULT", "tiny_alexnet: TinyAlexNet_Weights.IMAGENET1K_V1 could not be downloaded from"),
    ],
)
def test_weights_that_cannot_be_had_stop_the_command_before_anything_is_written(
    hub: Hub,
    model: str,
    weights: str,
    message: str,
    images: str,
    tmp_path: Path,
    capsys: Any,
) -> None:
    hub.publish(TINY, tiny_state(), "missing")
    command = f"train imagefolder --model {model} --weights {weights} --data {images} --workers 0 --out {tmp_path}"
    assert main([*command.split(), "--name", "run"]) == (2 if "--weights" in message else 1)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "run").exists()


def test_weights_of_other_layers_are_told_by_name_and_shape(hub: Hub) -> None:
    hub.publish(TINY, {**tiny_state(), "features.0.weight": torch.zeros(8, 3, 3, 3)})
    model = fastcnn.models.MODELS["tiny_alexnet"].build(num_classes=3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(UserError, match=r"another architecture than tiny_alexnet: 1 of 6 .*features.0.weight, \(8, 3"):
        load_pretrained(model, "tiny_alexnet", "DEFAULT")
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
