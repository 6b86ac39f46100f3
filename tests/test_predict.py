"""fastcnn predict: the right classes from the right pixels, a table that fits, and one line per thing that is wrong."""

import doctest
import io
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from PIL import Image
from pretrained import CATEGORIES, TRANSFORMS, Hub, TinyAlexNet_Weights, serving, tiny_state
from rich.console import Console
from test_cli import write_digits
from torchvision.models import AlexNet_Weights
from training_processes import SETTINGS, TinyAlexNet, train, write_images

from fastcnn.cli import main
from fastcnn.console import checkpoint, options
from fastcnn.nn import Normalize
from fastcnn.predict import classifier, command
from fastcnn.train import Settings
from fastcnn.train.data import CLASSES, Feed, load_idx_dataset
from fastcnn.train.folder import FolderData

TINY = "--model tiny_alexnet"


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FASTCNN_BACKEND", raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "torch", monkeypatch) as hub:
        hub.publish(TinyAlexNet_Weights.IMAGENET1K_V1, tiny_state())
        yield hub


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of six images, of which training holds out one each."""
    return write_images(tmp_path_factory.mktemp("photos") / "images")


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(replace(SETTINGS, data=str(photos), epochs=3), folder)
    return folder


def lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def probabilities(state: dict[str, Tensor], pixels: Tensor) -> Tensor:
    model = TinyAlexNet(num_classes=len(state["classifier.4.bias"]))
    model.load_state_dict(state)
    return model.eval()(pixels).softmax(1)


def test_pretrained_table_holds_the_largest_probabilities(hub: Hub, photos: Path, capsys: Any) -> None:
    file = photos / "cat" / "0.jpg"
    assert main(["predict", str(file), *TINY.split(), "--top", "3", "--device", "cpu"]) == 0
    out, _, table = capsys.readouterr().out.partition("image")
    assert out.endswith("tiny_alexnet, TinyAlexNet_Weights.IMAGENET1K_V1, on cpu\n")
    expected = probabilities(tiny_state(), TRANSFORMS()(Image.open(file))[None]).topk(3)
    shares = [f"{100 * value:.2f}" for value in expected.values[0]]
    names = [CATEGORIES[index] for index in expected.indices[0]]
    rows = table.splitlines()[1:4]
    assert [row.split()[-2] for row in rows] == shares
    for row, name in zip(rows, names, strict=True):
        assert name in row
    assert "".join(row[:33].strip() for row in table.splitlines()[1:]) == str(file)
    assert max(map(len, table.splitlines())) <= 80


def test_the_longest_of_imagenets_names_are_not_cut() -> None:
    names = sorted(AlexNet_Weights.DEFAULT.meta["categories"], key=len)[-5:]
    console = Console(width=80)
    with console.capture() as capture:
        console.print(command._table([(Path("a.jpg"), [0.2] * 5, names)], header=True))
    assert all(f" {name} " in capture.get() for name in names)


def test_all_classes_where_top_asks_for_more(hub: Hub, photos: Path, capsys: Any) -> None:
    assert main(["predict", str(photos / "cat" / "0.jpg"), *TINY.split(), "--top", "9"]) == 0
    output = capsys.readouterr().out
    assert output.count(" %") == 5
    assert sum(float(line[-2]) for line in lines(output) if line[-1:] == ["%"]) == pytest.approx(100, abs=0.05)
    assert all(name in output for name in CATEGORIES)


def test_checkpoint_classifies_as_its_training_did(trained: Path, photos: Path, capsys: Any) -> None:
    loaded = classifier.load(str(trained), None)
    assert loaded.classes == ("cat", "dog", "emu")
    data = FolderData(photos, Feed(SETTINGS.input_size, batch_size=50))
    (pixels, _), *_ = data.test_batches()
    seen = Normalize(*data.statistics)(pixels)
    files = [Path(data._test.samples[index][0]) for index in data._test_index]
    ours = torch.stack([loaded.transform(Image.open(file)) for file in files])
    assert torch.equal(ours, seen)
    state = checkpoint.load(trained)["lanes"]["fastcnn"]["model"]
    torch.testing.assert_close(loaded.probabilities(ours), probabilities(state, seen))

    assert main(["predict", *map(str, files), "--weights", str(trained / "checkpoint.pt"), "--top", "1"]) == 0
    output = capsys.readouterr().out
    best = [loaded.classes[index] for index in probabilities(state, seen).argmax(1)]
    assert [line[-3] for line in lines(output) if line[-1:] == ["%"]] == best


@pytest.mark.parametrize("model", ["mnist_cnn", "tiny_alexnet"])
def test_digits_come_as_training_saw_them(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "digits"
    folder.mkdir()
    write_digits(folder)
    size = (1, 28, 28) if model == "mnist_cnn" else SETTINGS.input_size
    settings = Settings("mnist", model, size, data=str(folder), epochs=1, batch_size=40)
    data = load_idx_dataset("mnist", folder, Feed(size, batch_size=40))
    (seen, _), *_ = data.test_batches()
    train(settings, tmp_path / "run")
    loaded = classifier.load(str(tmp_path / "run"), None)
    assert loaded.classes == CLASSES["mnist"]
    digit = Image.fromarray(data._images[data.train_size].numpy())
    for image in (digit, digit.convert("RGB"), digit.convert("RGBA")):
        torch.testing.assert_close(loaded.transform(image), seen[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_images_of_every_mode_are_converted_as_pil_does(hub: Hub, trained: Path, mode: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    colours = Image.fromarray(torch.randint(256, (20, 18, 3), dtype=torch.uint8).numpy())
    image = colours.convert(mode)
    file = tmp_path / "image.tiff"
    image.save(file)
    for weights, model in (("DEFAULT", "tiny_alexnet"), (str(trained), None)):
        transform = classifier.load(weights, model).transform
        got = command.read(file, transform)
        assert isinstance(got, Tensor)
        assert got.shape == SETTINGS.input_size
        assert torch.equal(got, transform(image.convert("RGB")))


def test_network_of_one_channel_gets_grey_images(photos: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, model="mnist_cnn", input_size=(1, 28, 28), data=str(photos), epochs=1)
    train(settings, tmp_path / "run")
    loaded = classifier.load(str(tmp_path / "run"), None)
    image = Image.open(photos / "emu" / "0.jpg")
    got = loaded.transform(image)
    assert got.shape == (1, 28, 28)
    torch.testing.assert_close(got, loaded.transform(image.convert("L")), rtol=0, atol=0.02)  # rounded to bytes twice


def test_folders_are_searched_and_batches_make_one_table(
    hub: Hub, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("mixed")
    (folder / "deeper").mkdir(parents=True)
    for index, name in enumerate(["b.PNG", "a.jpg", "deeper/c.webp"]):
        Image.new("RGB", (20, 20), (90 * index, 0, 0)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    once = str(folder / "a.jpg")
    assert main(["predict", str(folder), once, once, *TINY.split(), "--batch-size", "2"]) == 0
    output = capsys.readouterr().out
    assert output.count("probability") == 1
    assert output.count(" %") == 5 * 5
    order = [output.find(name) for name in ("a.jpg", "b.PNG", "c.webp")]
    assert order == sorted(order)
    assert min(order) > 0
    assert output.count("a.jpg") == 3
    whole = lines(output.split("probability")[1])
    assert main(["predict", str(folder), once, once, *TINY.split()]) == 0
    assert lines(capsys.readouterr().out.split("probability")[1]) == whole


BROKEN = {"text": b"no image", "empty": b"", "cut": None}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_image_is_named_and_the_others_are_classified(
    kind: str, hub: Hub, photos: Path, tmp_path: Path, capsys: Any
) -> None:
    good = photos / "dog" / "1.jpg"
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(BROKEN[kind] if BROKEN[kind] is not None else good.read_bytes()[:300])
    arguments = ["predict", str(broken), str(tmp_path / "nowhere.jpg"), str(good), *TINY.split()]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    missing, unreadable = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert missing == f"error: {tmp_path / 'nowhere.jpg'}: no such file or folder"
    assert unreadable.startswith(f"error: {broken}: not an image that can be read (")
    assert "Traceback" not in captured.err
    assert captured.out.count(" %") == 5
    named = "".join(row[:33].strip() for row in captured.out.splitlines() if row.endswith(" %") or row[33:] == "")
    assert str(good) in named
    assert main(["predict", str(broken), str(good), *TINY.split()]) == 1
    capsys.readouterr()
    assert main([*arguments, "--debug"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("Traceback") == 1
    assert "Image.open" in captured.err


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_names_that_the_terminal_cannot_show(
    encoding: str, hub: Hub, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name of bytes that are no UTF-8, a Japanese one, and an error about a third."""
    names = [b"caf\xe9.jpg", "猫.jpg".encode(), "犬.jpg".encode()]
    for name in names[:2]:
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes((photos / "dog" / "1.jpg").read_bytes())
    Path(os.fsdecode(bytes(tmp_path) + b"/" + names[2])).write_bytes(b"no image")
    shown = io.BytesIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(shown, encoding=encoding, write_through=True))
    assert main(["predict", str(tmp_path), *TINY.split()]) == 1
    output = shown.getvalue().decode("utf-8", errors="replace")
    assert output.count(" %") == 10
    assert output.count("not an image that can be read") == 1
    assert ("猫" in output) == (encoding == "utf-8")


def test_nothing_is_downloaded_for_no_image(hub: Hub, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(tmp_path / "empty"), *TINY.split()]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {tmp_path / 'empty'}: holds no images (.jpg")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert hub.asked == []


def changed(trained: Path, file: Path, change: Any) -> str:
    """Write the checkpoint again after ``change`` of its content."""
    state = checkpoint.load(trained)
    change(state)
    checkpoint.save(file, state)
    return str(file)


def narrow(state: Any) -> None:
    weights = state["lanes"]["fastcnn"]["model"]
    weights["features.0.weight"] = weights["features.0.weight"][:2]


def add_class(state: Any) -> None:
    state["classes"].append("fox")
    state["settings"]["options"] = {"num_classes": 3}


def fill(state: Any) -> None:
    state["lanes"]["fastcnn"]["model"]["classifier.4.bias"].fill_(float("nan"))


CHANGES = {
    "other layers": (narrow, r": the checkpoint is of another architecture than tiny_alexnet: 1 of 6 tensors differ"),
    "other model": (lambda state: state["settings"].update(model="vgg11"), "another architecture than vgg11"),
    "small head": (add_class, r"has 4 classes .*, more than the 3 that tiny_alexnet scores"),
    "channels": (lambda state: state["settings"].update(input_size=[1, 16, 16]), "does not take images of 1x16x16"),
    "no model": (lambda state: state["settings"].update(model="vgg61"), "no model is named 'vgg61'"),
    "other version": (lambda state: state.pop("statistics"), r"not a checkpoint of this version .*'statistics'"),
    "nan": (fill, r"scores are infinite or nan"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_checkpoint_that_does_not_fit(name: str, trained: Path, photos: Path, tmp_path: Path, capsys: Any) -> None:
    change, message = CHANGES[name]
    file = changed(trained, tmp_path / "changed.pt", change)
    assert main(["predict", str(photos / "cat" / "0.jpg"), "--weights", file]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)
    assert "changed.pt" in error


MISTAKES = {
    "no image": ("predict", 2, "Missing argument"),
    "no classes": ("predict IMAGE --top 0", 2, "--top"),
    "missing checkpoint": ("predict IMAGE --weights nowhere.pt", 2, "nowhere.pt: no such checkpoint"),
    "missing folder": ("predict IMAGE --weights runs/nowhere", 2, "runs/nowhere: no such checkpoint"),
    "not a checkpoint": ("predict IMAGE --weights IMAGE", 1, "0.jpg: damaged, or not a checkpoint"),
    "another model": ("predict IMAGE --weights TRAINED --model vgg16", 2, "is a checkpoint of tiny_alexnet, not vgg16"),
    "unknown weights": (
        "predict IMAGE --weights V9",
        2,
        "--weights V9: alexnet has DEFAULT, IMAGENET1K_V1",
    ),
    "no weights": ("predict IMAGE --model alexnet2012", 2, "no weights of alexnet2012"),
    "features alone": (f"predict IMAGE {TINY} --weights IMAGENET1K_FEATURES", 2, "has no classifier"),
    "unknown model": ("predict IMAGE --model vgg61", 2, "no model is named 'vgg61'"),
    "unknown device": ("predict IMAGE --device abacus", 2, "--device abacus: "),
    "unknown backend": ("predict IMAGE --backend abacus", 2, "--backend abacus: "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name: str, hub: Hub, trained: Path, photos: Path, capsys: Any) -> None:
    words, exit_code, message = MISTAKES[name]
    places = {"IMAGE": str(photos / "cat" / "0.jpg"), "TRAINED": str(trained)}
    assert main([places.get(word, word) for word in words.split()]) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


@pytest.mark.parametrize("module", [command, options])
def test_examples_run(module: Any) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
