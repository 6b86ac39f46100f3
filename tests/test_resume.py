"""A training that was killed goes on with the losses of one that never was."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import training_processes
from training_processes import SETTINGS, train, write_images

from fastcnn.console import checkpoint
from fastcnn.console.errors import UserError
from fastcnn.train import loop
from fastcnn.train.loop import Pace

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

SCRIPT = training_processes.__file__
# 15 training images in batches of 5: three steps an epoch, two epochs; a checkpoint after each step and each epoch.
# By moment: the steps that the checkpoint holds.
KILLED = {"step:2": 1, "step:4": 3, "step:6": 5, "write:1": None, "write:2": 1, "write:4": 3, "evaluation:1": 3}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_images(tmp_path_factory.mktemp("images")))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def killed(images: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    subprocess.run([sys.executable, SCRIPT, "kill", str(folder), images, *KILLED], check=True, env=environment())
    return folder


@pytest.fixture(scope="module")
def whole(images: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[float], dict[str, torch.Tensor]]:
    lane = train(replace(SETTINGS, data=images), tmp_path_factory.mktemp("whole")).lanes[0]
    return lane.losses, lane.model.state_dict()


def environment(**variables: str) -> dict[str, str]:
    root = str(Path(__file__).parents[1])
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", **variables}


@pytest.mark.parametrize("moment", KILLED)
def test_run_killed_at_any_moment_goes_on_as_if_never_stopped(
    moment: str, killed: Path, images: str, whole: tuple[list[float], dict[str, torch.Tensor]]
) -> None:
    directory, steps = killed / moment, KILLED[moment]
    settings = replace(SETTINGS, data=images)
    if steps is None:  # killed while writing the first one: the same command starts anew
        assert [path.name for path in directory.iterdir()] == [".checkpoint.pt.tmp"]
        rest = train(settings, directory)
    else:
        state = checkpoint.load(directory)
        assert len(state["lanes"]["fastcnn"]["losses"]) == steps
        torch.manual_seed(123)
        rest = train(settings, directory, resume=state)
    losses, weights = whole
    assert len(losses) == 6
    assert rest.lanes[0].losses == losses
    assert [epoch.lr for epoch in rest.lanes[0].epochs] == [0.05, 0.05 * 0.1]
    torch.testing.assert_close(rest.lanes[0].model.state_dict(), weights, rtol=0, atol=0)
    assert sorted(path.name for path in directory.iterdir()) == ["checkpoint.pt", "curves.png", "metrics.json"]


def test_command_killed_from_outside_goes_on(images: str, tmp_path: Path) -> None:
    def command(name: str, *more: str) -> list[str]:
        options = "--model tiny_alexnet --input-size 3,16,16 --epochs 500 --lr 0.01 --lr-step 1 --batch-size 5"
        where = ["--data", images, "--out", str(tmp_path), "--name", name]
        return [sys.executable, SCRIPT, "train", "imagefolder", *options.split(), "--workers", "1", *where, *more]

    process = subprocess.Popen(command("cut"), stdout=subprocess.DEVNULL, env=environment())
    file = tmp_path / "cut" / "checkpoint.pt"
    try:
        while not file.exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.3)
    finally:
        process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = checkpoint.load(file)["lanes"]["fastcnn"]
    epochs = len(before["epochs"]) + 1
    again = [sys.executable, SCRIPT, "train", "imagefolder", "--resume", str(file), "--epochs", str(epochs)]
    subprocess.run(again, check=True, stdout=subprocess.DEVNULL, env=environment())
    settings = replace(SETTINGS, data=images, epochs=epochs, lr=0.01, weight_decay=0.0, optimizer="adam")
    expected = train(settings, tmp_path / "whole").lanes[0].losses
    assert (
        json.loads((tmp_path / "cut" / "metrics.json").read_text())["networks"]["fastcnn"]["loss_per_step"] == expected
    )


def test_full_disk_is_one_line_and_keeps_the_checkpoint_before(images: str, tmp_path: Path) -> None:
    settings = replace(SETTINGS, data=images)
    train(settings, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))  # the kernel refuses what goes beyond
    try:
        with pytest.raises(
            UserError, match=r"checkpoint\.pt: cannot be written \(.*\); the one written before it is kept"
        ):
            train(replace(settings, epochs=4), tmp_path, resume=checkpoint.load(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_take_a_twentieth_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    steady, writes = Pace(), 0
    for _ in range(10_000):
        now[0] += 0.01
        if steady.due(1):
            now[0] += 0.5
            steady.restart(steady.next_interval(write_seconds=0.5))
            writes += 1
    assert writes == 1 + 9  # the first, then every 1000 steps
    assert Pace(every=7).next_interval(write_seconds=0.5) == 7
