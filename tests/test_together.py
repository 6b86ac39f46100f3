"""Two processes under torchrun train as one does: the same losses, and one of them speaks."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_processes
from training_processes import SETTINGS, TinyAlexNet, train, write_images

import fastcnn
from fastcnn.console import checkpoint
from fastcnn.console.errors import UserError
from fastcnn.train import Settings
from fastcnn.train.distributed import World, bytes_sent, volumes

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

SCRIPT = training_processes.__file__
NO_DROPOUT = {"dropout": 0.0}
LAYOUTS = {
    "ddp": {"parallel": "ddp", "options": NO_DROPOUT},
    "owt": {"parallel": "owt"},  # with dropout: every process draws the masks of the whole batch
    "owt, adam": {"parallel": "owt", "optimizer": "adam", "lr": 0.01},
}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        SCRIPT,
        *arguments,
    ]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """18 training images: of the last batch's 4 both processes have two, of a batch of 5 three and two."""
    return str(write_images(tmp_path_factory.mktemp("images"), per_class=8))


def settings_of(name: str, images: str, **changes: object) -> Settings:
    return replace(SETTINGS, data=images, **{**LAYOUTS[name], "parallel": "ddp", **changes})


@pytest.fixture(scope="module")
def together(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in every layout by two processes; and once more, where one process had trained an epoch."""
    folder = tmp_path_factory.mktemp("together")
    jobs = []
    for name, changes in LAYOUTS.items():
        settings = {"data": images, **changes}
        train(settings_of(name, images, epochs=1), folder / f"{name}, resumed")
        jobs.append({"directory": str(folder / name), "settings": {**settings, "checkpoint_every": 2}})
        jobs.append({"directory": str(folder / f"{name}, resumed"), "settings": settings, "resume": True})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    result = torchrun("together", str(folder / "jobs.json"))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_give_the_losses_of_one(layout: str, together: Path, images: str, tmp_path: Path) -> None:
    one = train(settings_of(layout, images), tmp_path).lanes[0]
    saved = checkpoint.load(together / layout)["lanes"]["fastcnn"]
    for name in (layout, f"{layout}, resumed"):
        losses = [json.loads((together / name / f"losses{rank}.json").read_text()) for rank in range(2)]
        assert losses[0] == losses[1]
        torch.testing.assert_close(losses[0], one.losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(saved["model"]), dict(one.model.state_dict()), rtol=1e-4, atol=1e-5)
    for epoch, expected in zip(saved["epochs"], one.epochs, strict=True):
        assert epoch["test_accuracy"] == pytest.approx(expected.test_accuracy)
        assert epoch["test_loss"] == pytest.approx(expected.test_loss, rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_process_goes_on_where_two_stopped(layout: str, together: Path, images: str, tmp_path: Path) -> None:
    state = checkpoint.load(together / layout)
    three = train(settings_of(layout, images, epochs=3), tmp_path / "three").lanes[0]
    rest = train(settings_of(layout, images, epochs=3), tmp_path / "rest", resume=state).lanes[0]
    torch.testing.assert_close(rest.losses, three.losses, rtol=1e-4, atol=1e-5)


def test_broken_image_in_one_process_is_one_line(tmp_path: Path) -> None:
    data = write_images(tmp_path / "images", per_class=5)
    broken = data / "dog" / "2.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    command = f"train imagefolder --model tiny_alexnet --input-size 3,16,16 --data {data} --workers 0 --epochs 1"
    result = torchrun(*command.split(), "--parallel", "owt", "--out", str(tmp_path), "--name", "run")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert f"{broken}: not an image that can be read" in said[0]
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_hold_results_is_one_line_of_one_process(images: str) -> None:
    command = f"train imagefolder --model tiny_alexnet --input-size 3,16,16 --data {images} --workers 0 --epochs 1"
    result = torchrun(*command.split(), "--out", "/dev/null", "--name", "run")
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert said == ["error: /dev/null/run: cannot hold results (Not a directory); choose another --out or --name"]


@pytest.mark.parametrize("count", [0, 1, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_shares_hold_every_image_once_in_order(count: int, size: int) -> None:
    images = list(range(count))
    shares = [images[World(rank, size).share(count)] for rank in range(size)]
    assert list(itertools.chain(*shares)) == images
    assert max(map(len, shares)) == -(-count // size)  # as torch.chunk and DTensor cut


def test_bytes_of_alexnet_by_hand() -> None:
    model = fastcnn.AlexNet()
    convolutions = sum(parameter.numel() for parameter in model.features.parameters())
    assert convolutions == 2_469_696
    assert bytes_sent(model, "ddp", 128, 4) == 2 * 4 * 61_100_840 * 3 // 4
    activations = 128 * (9216 + 4096 + 4096 + 1000) + 2 * 128 * (9216 + 4096 + 4096)
    assert bytes_sent(model, "owt", 128, 4) == (2 * 4 * convolutions + 4 * activations) * 3 // 4
    assert bytes_sent(model, "ddp", 128, 1) == 0
    assert "owt" not in volumes(fastcnn.MnistCNN(), 100, 2)


def test_owt_of_one_process_and_of_a_network_without_classifier(images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--parallel owt needs several processes: torchrun --nproc-per-node 2"):
        train(replace(SETTINGS, data=images, parallel="owt"), tmp_path)
    with pytest.raises(UserError, match="Linear is not, and --parallel ddp takes it"):
        bytes_sent(torch.nn.Linear(2, 2), "owt", 1, 2)
    assert isinstance(TinyAlexNet().classifier, torch.nn.Sequential)
