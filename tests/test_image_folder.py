"""Which folders fastcnn train takes for classes, what it refuses, and images that cannot be read."""

import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("matplotlib")

from PIL import Image
from rich.console import Console
from training_processes import SETTINGS, train

from fastcnn.cli import main
from fastcnn.console import checkpoint
from fastcnn.console.errors import UserError
from fastcnn.train import folder as folder_module
from fastcnn.train.data import Feed
from fastcnn.train.folder import FolderData

OPTIONS = "--model tiny_alexnet --input-size 3,16,16 --workers 0 --epochs 1 --batch-size 5"


def write(folder: Path, *names: str, count: int = 5) -> Path:
    """Write images of 18x18 into folders of these names."""
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.new("RGB", (18, 18), (60 * number % 256, 40 * index, 90)).save(folder / name / f"{index}.png")
    return folder


def opened(folder: Path, **settings: Any) -> FolderData:
    return FolderData(folder, Feed((3, 16, 16), batch_size=5), **settings)


def command(data: Path, out: Path, *more: str) -> int:
    return main(["train", "imagefolder", *OPTIONS.split(), "--data", str(data), "--out", str(out), *more])


@pytest.mark.parametrize("held_out", ["val", "valid", "validation", "test", "Valid"])
def test_split_of_any_usual_name(held_out: str, tmp_path: Path) -> None:
    data = opened(write(tmp_path, "train/cat", "train/dog", f"{held_out}/cat", f"{held_out}/dog"))
    assert (data.classes, data.train_size, data.test_size) == (("cat", "dog"), 10, 10)
    assert f"(of {held_out}/)" in data.notes[0]


def test_val_counts_before_test_and_other_folders_do_not(tmp_path: Path) -> None:
    parts = [f"{part}/{name}" for part in ("train", "val", "test") for name in ("cat", "dog")]
    data = opened(write(tmp_path, *parts, "annotations"))
    assert "(of val/)" in data.notes[0]
    assert data.classes == ("cat", "dog")


def test_of_train_alone_a_fifth_is_held_out(tmp_path: Path) -> None:
    data = opened(write(tmp_path, "train/cat", "train/dog", "test"))  # whose images have no classes
    assert (data.classes, data.train_size, data.test_size) == (("cat", "dog"), 8, 2)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    write(tmp_path, "cat", "dog", ".ipynb_checkpoints", "cat/.ipynb_checkpoints")
    (tmp_path / "dog" / "._0.png").write_bytes(b"what a Mac leaves")
    data = opened(tmp_path)
    assert (data.classes, data.train_size + data.test_size) == (("cat", "dog"), 10)


REFUSED = {
    "names of splits": (
        ("cat", "dog", "test"),
        r"folders of classes bear names of splits \(test\); expected train/",
    ),
    "val alone": (("val/cat", "val/dog"), r"bear names of splits \(val\)"),
    "images right in train": (("train", "valid"), r"bear names of splits \(train, valid\)"),
    "a level too many": (("flowers/rose", "flowers/tulip"), "flowers: holds no images but folders of images .*--data"),
    "splits a level below": (("flowers/train/rose", "flowers/val/rose"), "flowers: holds no images but folders"),
    "splits in classes": (("cat/train", "dog/train"), "cat: holds no images but folders of images \\(train\\)"),
    "a single class": (("cat",), r"a single class \(cat\), with nothing to tell it from"),
    "a single class to train": (("train/cat", "val/cat"), r"train: a single class \(cat\)"),
    "other classes": (("train/cat", "train/dog", "test/cat", "test/fox"), "train and test differ in classes: dog, fox"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_are_no_classes_are_refused_in_one_line(name: str, tmp_path: Path) -> None:
    folders, message = REFUSED[name]
    with pytest.raises(UserError, match=message) as caught:
        opened(write(tmp_path / "data", *folders))
    assert "\n" not in str(caught.value)


def test_images_in_one_folder_below_their_class(tmp_path: Path) -> None:
    assert opened(write(tmp_path, "cat/images", "dog/images")).train_size == 8


def test_classes_and_skipped_files_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", *"abcdef")
    for name in ("x.gif", "y.gif", "noted", ".hidden"):
        (data / "a" / name).write_bytes(b"")
    assert command(data, tmp_path, "--name", "run") == 0
    output = capsys.readouterr().out
    assert "6 classes: a, b, c, d, …\n" in output
    assert "skipped 3 files that are not read as images: 2 .gif, 1 without suffix\n" in output


@pytest.mark.parametrize("split", ["train", "val"])
def test_broken_images_are_found_before_the_first_step(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", *(f"{part}/{name}" for part in ("train", "val") for name in ("cat", "dog")))
    first, second = data / split / "cat" / "1.png", data / split / "dog" / "2.png"
    first.write_bytes(first.read_bytes()[:60])
    second.write_bytes(b"no image")
    assert command(data, tmp_path, "--name", "run") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {first}: not an image that can be read (")
    assert f"; and 1 more: {second}; mend or delete broken images, or leave them out by --skip-broken" in captured.err
    assert captured.err.count("\n") == 1
    assert "epoch 1/1" not in captured.out
    assert not (tmp_path / "run").exists()

    assert command(data, tmp_path, "--name", "run", "--skip-broken") == 0
    output = capsys.readouterr().out
    assert f"left out 2 images that cannot be read: {first}, {second}\n" in output
    sizes = (8, 10) if split == "train" else (10, 8)
    assert "data: {}, {} training and {} held-out images".format(data, *sizes) in output


def test_class_of_broken_images_alone(tmp_path: Path) -> None:
    data = write(tmp_path, "cat", "dog")
    for file in (data / "dog").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="no readable image of the classes dog"):
        opened(data, skip_broken=True)


def test_what_was_read_once_is_remembered_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    data = write(tmp_path / "data", "cat", "dog")
    looked_at: list[str] = []
    reason = folder_module._reason
    monkeypatch.setattr(folder_module, "_reason", lambda file: looked_at.append(file) or reason(file))
    opened(data)
    assert len(looked_at) == 10
    looked_at.clear()
    opened(data)
    assert looked_at == []
    changed = data / "dog" / "3.png"
    changed.write_bytes(b"no image")
    os.utime(changed, ns=(1, 1))
    for _ in range(2):  # a broken one is looked at again
        looked_at.clear()
        with pytest.raises(UserError, match=r"3\.png"):
            opened(data)
        assert looked_at == [str(changed)]


def test_processes_add_to_one_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path / "cache"))
    files = [str(file) for file in sorted((write(tmp_path / "data", "cat") / "cat").iterdir())]
    reason = folder_module._reason

    def as_the_other_process_ends(file: str) -> str:
        monkeypatch.setattr(folder_module, "_reason", reason)
        assert folder_module.unreadable(files[1::2], tmp_path / "data", 1, Console(quiet=True)) == {}
        return reason(file)

    monkeypatch.setattr(folder_module, "_reason", as_the_other_process_ends)
    assert folder_module.unreadable(files[::2], tmp_path / "data", 1, Console(quiet=True)) == {}
    monkeypatch.setattr(folder_module, "_reason", lambda file: pytest.fail("it was forgotten"))
    assert folder_module.unreadable(files, tmp_path / "data", 1, Console(quiet=True)) == {}


def test_progress_of_reading_is_shown_in_a_terminal(tmp_path: Path) -> None:
    console = Console(force_terminal=True, width=80, record=True)
    files = [str(file) for file in sorted((write(tmp_path, "cat") / "cat").iterdir())]
    assert folder_module.unreadable(files, tmp_path, 2, console) == {}
    assert "checking images" in console.export_text()


def test_resume_after_an_image_was_deleted_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "data", "train/cat", "train/dog", "val/cat", "val/dog")
    assert command(data, tmp_path, "--name", "run") == 0
    (data / "train" / "dog" / "1.png").unlink()
    capsys.readouterr()
    again = ["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]
    assert main(again) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: the checkpoint was trained on 10 images, the data has 9; restore the former images,"
    )
    assert "continue with the present ones by --changed-data" in error
    assert main([*again, "--changed-data"]) == 0
    assert "losses are not those of a run that was never stopped" in " ".join(capsys.readouterr().out.split())
    assert len(checkpoint.load(tmp_path / "run")["lanes"]["fastcnn"]["epochs"]) == 2


def test_killed_loader_ends_with_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data", "train/cat", "train/dog", "val/cat", "val/dog")
    assert command(data, tmp_path, "--name", "run") == 0
    capsys.readouterr()
    (data / "train" / "cat" / "4.png").write_bytes(b"deadly")
    arguments = ["train", "--resume", str(tmp_path / "run"), "--epochs", "2", "--workers", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastcnn.train.folder.unreadable", lambda *args: {})
        patch.setattr("fastcnn.train.image_folder.open_image", die_at_deadly_image)
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a process that loads images was killed, as happens where memory runs out: fewer")
    file = tmp_path / "run" / "checkpoint.pt"
    assert re.search(rf"; {file} holds epoch 2 of 2, step \d; go on with: fastcnn train --resume {file}\n$", error)
    assert error.count("error: ") == 1


@pytest.mark.parametrize("broken", [ConnectionResetError(104, "Connection reset by peer"), EOFError()], ids=repr)
def test_loader_whose_connection_breaks_counts_as_killed(
    broken: Exception, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch says that a process was killed only where it has noticed its end by then."""
    data = write(tmp_path / "data", "train/cat", "train/dog", "val/cat", "val/dog")

    def read(*_: object, **__: object) -> None:
        raise broken

    monkeypatch.setattr("torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data", read)
    assert command(data, tmp_path, "--workers", "1") == 1
    error = capsys.readouterr().err
    assert "error: a process that loads images was killed, as happens where memory runs out: fewer" in error


def die_at_deadly_image(file: str) -> Any:
    from fastcnn.console.images import open_image

    if Path(file).read_bytes() == b"deadly":
        os.kill(os.getpid(), 9)
    return open_image(file)


def test_image_that_breaks_during_the_training_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "data", "train/cat", "train/dog", "val/cat", "val/dog")
    train(replace(SETTINGS, data=str(data), epochs=1), tmp_path / "run")
    (data / "train" / "cat" / "4.png").write_bytes(b"no image")
    monkeypatch.setattr("fastcnn.train.folder.unreadable", lambda *args: {})
    assert main(["train", "--resume", str(tmp_path / "run"), "--epochs", "2"]) == 1
    error = capsys.readouterr().err
    assert "4.png: not an image that can be read (" in error
    assert error.endswith(f"go on with: fastcnn train --resume {tmp_path / 'run' / 'checkpoint.pt'}\n")


def test_same_crops_whoever_checked(tmp_path: Path) -> None:
    data = write(tmp_path, "cat", "dog")
    first, second = (torch.cat([images for images, _ in opened(data).train_batches(1)]) for _ in range(2))
    assert first.equal(second)
