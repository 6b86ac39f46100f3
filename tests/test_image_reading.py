"""Images are read as viewers show them, in training, evaluation and prediction alike."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")

import numpy as np
from PIL import Image, ImageOps
from test_cli import write_digits
from training_processes import SETTINGS, train

from fastcnn.console.images import open_image, transforms
from fastcnn.predict import classifier, command
from fastcnn.train.data import Feed
from fastcnn.train.folder import FolderData

SIZE = (3, 64, 64)
RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
ORIENTATIONS = range(1, 9)
EXIF_ORIENTATION = 0x0112


def pixels(image: Any) -> Any:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("suffix", ["png", "tiff", "ppm"])
def test_16_bits_are_those_of_the_8_bit_picture(suffix: str, tmp_path: Path) -> None:
    Image.fromarray(RAMP).save(tmp_path / f"wide.{suffix}")
    Image.fromarray((RAMP >> 8).astype(np.uint8)).save(tmp_path / "eight.png")
    wide, eight = (pixels(open_image(tmp_path / name)) for name in (f"wide.{suffix}", "eight.png"))
    assert wide.shape == eight.shape == (64, 64, 3)
    assert abs(wide - eight).max() <= 1
    assert (wide.min(), wide.max()) == (0, 255)


def test_12_bits_of_a_tiff_are_scaled_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    Image.fromarray(RAMP >> 4).save(tmp_path / "wide.tiff")
    opened = Image.open

    def twelve(*args: Any) -> Any:
        image = opened(*args)
        image.tag_v2[258] = (12,)  # bits per sample, as cameras of 12 bits write
        return image

    monkeypatch.setattr(Image, "open", twelve)
    assert abs(pixels(open_image(tmp_path / "wide.tiff"))[..., 0] - (RAMP >> 8)).max() <= 1


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_what_does_not_say_which_value_is_white_is_refused(kind: Any, tmp_path: Path) -> None:
    file = tmp_path / "wide.tiff"
    Image.fromarray(RAMP.astype(kind)).save(file)
    problem = command.read(file, lambda image: image)
    assert str(problem).startswith(f"{file}: not an image that can be read (its mode ")
    assert "save it with 8 or 16 bits" in str(problem)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bit_modes_are_converted_as_pil_does(mode: str, tmp_path: Path) -> None:
    colours = Image.fromarray(torch.randint(256, (20, 18, 3), dtype=torch.uint8).numpy())
    colours.convert(mode).save(tmp_path / "image.tiff")
    assert pixels(open_image(tmp_path / "image.tiff")).tolist() == pixels(colours.convert(mode).convert("RGB")).tolist()


def test_transparent_palette_is_no_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    image = Image.new("P", (8, 8))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "image.png", transparency=bytes([0, 128]))
    assert pixels(open_image(tmp_path / "image.png"))[0, 0].tolist() == [10, 20, 30]
    assert not recwarn.list


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("wide", [False, True], ids=["8 bits", "16 bits"])
def test_images_are_turned_as_viewers_show_them(orientation: int, wide: bool, tmp_path: Path) -> None:
    stored = RAMP[:40, :64] if wide else (RAMP[:40, :64] >> 8).astype(np.uint8)
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(stored).save(tmp_path / "photo.png", exif=exif)
    Image.fromarray((RAMP[:40, :64] >> 8).astype(np.uint8)).save(tmp_path / "plain.png", exif=exif)
    shown = ImageOps.exif_transpose(Image.open(tmp_path / "plain.png")).convert("RGB")
    got = open_image(tmp_path / "photo.png")
    assert got.size == shown.size
    assert abs(pixels(got) - pixels(shown)).max() <= 1


def test_damaged_exif_data_are_passed_over(tmp_path: Path) -> None:
    Image.new("RGB", (9, 7), (1, 2, 3)).save(tmp_path / "photo.png", exif=b"Exif\0\0nonsense")
    assert open_image(tmp_path / "photo.png").size == (9, 7)


@pytest.mark.parametrize("size", [(4000, 1), (1, 4000), (4000, 3)])
def test_long_image_is_resized_within_bounds(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("RGB", size, (200, 10, 10)).save(tmp_path / "line.png")
    image = open_image(tmp_path / "line.png")
    assert max(image.size) <= 16 * min(image.size)
    for transform in transforms((3, 224, 224)):
        assert transform(image).shape == (3, 224, 224)


def write_set(folder: Path, save: Any) -> Path:
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        for index in range(5):
            save(folder / name / f"{index}.png")
    return folder


def test_training_evaluation_and_prediction_see_the_same(tmp_path: Path) -> None:
    """A picture stored sideways in 16 bits, and the same one in 8 bits upright."""
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6
    wide = Image.fromarray(np.ascontiguousarray(np.rot90(RAMP)))
    upright = Image.fromarray((RAMP >> 8).astype(np.uint8))
    odd = write_set(tmp_path / "odd", lambda file: wide.save(file, exif=exif))
    plain = write_set(tmp_path / "plain", upright.save)
    for batches in ("train_batches", "test_batches"):
        seen = []
        for folder in (odd, plain):
            data = FolderData(folder, Feed(SIZE, batch_size=8))
            batch, _ = next(data.train_batches(0) if batches == "train_batches" else data.test_batches())
            seen.append(batch.int())
        assert (seen[0] - seen[1]).abs().max() <= 2, batches
    _, held_out = transforms(SIZE)
    results = [command.read(folder / "a" / "0.png", held_out) for folder in (odd, plain)]
    assert all(isinstance(result, torch.Tensor) for result in results)
    assert (results[0].int() - results[1].int()).abs().max() <= 2  # type: ignore[union-attr]


def test_digits_of_16_bits_are_predicted_as_those_of_8(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "digits").mkdir()
    write_digits(tmp_path / "digits")
    settings = {"dataset": "mnist", "model": "mnist_cnn", "input_size": (1, 28, 28), "batch_size": 40, "epochs": 1}
    train(type(SETTINGS)(**settings, data=str(tmp_path / "digits")), tmp_path / "run")
    transform = classifier.load(str(tmp_path / "run"), None).transform
    Image.fromarray(RAMP).save(tmp_path / "wide.png")
    Image.fromarray((RAMP >> 8).astype(np.uint8)).save(tmp_path / "eight.png")
    wide, eight = (command.read(tmp_path / name, transform) for name in ("wide.png", "eight.png"))
    torch.testing.assert_close(wide, eight, rtol=0, atol=0.03)
