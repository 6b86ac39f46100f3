"""What a person at a terminal sees: help with examples, one line per error, exit codes."""

import io
import logging
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer

import fastcnn
from fastcnn.cli import app, main
from fastcnn.console import checkpoint
from fastcnn.models import MODELS
from fastcnn.train import lane
from fastcnn.train.command import DEFAULT_LR, AmpName, OptimizerName


def write_digits(folder: Path, count: int = 40) -> Path:
    """Write 28x28 images whose bright rows tell the class, as MNIST's four files."""
    labels = torch.arange(count) % 10
    images = torch.zeros(count, 28, 28, dtype=torch.uint8)
    for row in range(2):
        images[torch.arange(count), 4 + 2 * labels + row] = 255
    for split in ("train", "t10k"):
        header = struct.pack(">4i", 0x803, count, 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(images.flatten().tolist()))
        header = struct.pack(">2i", 0x801, count)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(labels.tolist()))
    return folder


@pytest.fixture
def digits(tmp_path: Path) -> Path:
    folder = tmp_path / "digits"
    folder.mkdir()
    return write_digits(folder)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("FASTCNN_BACKEND", raising=False)


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the words that lead to each command, groups of commands included."""
    yield path
    for name, below in getattr(command, "commands", {}).items():
        yield from commands(below, (*path, name))


COMMANDS = list(commands(typer.main.get_command(app)))


def test_commands_are_all_found() -> None:
    assert {("train",), ("predict",), ("explain",)} < {*COMMANDS}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_help_has_an_example_and_fits_80_columns(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--help"]) == 0
    output = plain(capsys.readouterr().out)
    assert " ".join(["Example: fastcnn", *command]) in output
    assert max(map(len, output.splitlines())) <= 80


def test_list_of_commands_is_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_version_and_bare_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastcnn {fastcnn.__version__}\n"
    assert main([]) == 0
    assert "Usage: fastcnn" in plain(capsys.readouterr().out)


MISTAKES = {
    "unknown command": ("bogus", 2, "No such command 'bogus'"),
    "unknown option": ("doctor --bogus", 2, "--bogus"),
    "unknown data set": ("train cifar", 2, "cifar"),
    "no epochs": ("train mnist --epochs 0", 2, "--epochs"),
    "not a size": ("summary alexnet --input-size 3,x,7", 2, "expected three sizes C,H,W"),
    "a size of zero": ("summary alexnet --input-size 3,0,7", 2, "expected three sizes C,H,W"),
    "not a literal": ("summary alexnet --option dropout=maybe", 2, "expected KEY=VALUE such as lrn=False"),
    "resume under another name": ("train mnist --resume a --name b", 2, "leave out --name"),
    "missing folder": ("train mnist --data nowhere", 2, "nowhere: no such folder"),
    "missing checkpoint": ("train mnist --resume nowhere", 2, "nowhere: no such checkpoint"),
    "unknown model": ("summary vgg61", 2, "no model is named 'vgg61'"),
    "unknown model option": ("summary alexnet --option lrn=False", 2, "alexnet cannot be built with lrn=False"),
    "other channels": (
        "summary alexnet --input-size 1,224,224",
        2,
        "alexnet does not take images of 1x224x224: conv2d_relu_max_pool2d: argument 'input': expected 3 channels",
    ),
    "folder in a file": (
        "train mnist --out /dev/null --name x",
        1,
        "/dev/null/x: cannot hold results (Not a directory); choose another --out or --name",
    ),
    "unavailable backend": ("train mnist --backend cuda", 2, "--backend cuda is not available here: "),
    "unknown backend": ("train mnist --backend abacus", 2, "--backend abacus: expected one of auto, torch"),
    "unknown device": ("train mnist --device abacus", 2, "--device abacus: not a device of torch, for example cpu"),
    "unknown optimizer": (
        "train mnist --optimizer abacus",
        2,
        "'abacus' is not one of 'adam', 'sgd' (see",
    ),
    "no whole number": ("train mnist --epochs x", 2, "'--epochs': "),
    "no number": ("train mnist --lr x", 2, "'--lr': "),
    "too few epochs": ("train mnist --epochs 0", 2, "'--epochs': "),
    "nothing to train on": ("train", 2, "expected what to train on: mnist, fashion-mnist, imagefolder; or --resume"),
    "no data": ("train imagefolder", 2, "imagefolder needs --data DIR"),
    "no such weights": ("train mnist --weights V9", 2, "--weights V9: torchvision has no weights of mnist_cnn"),
    "fp16 on the CPU": ("train mnist --amp fp16 --device cpu", 2, "--amp fp16 needs a CUDA device"),
    "one process": ("train mnist --parallel owt", 2, "--parallel owt needs several processes"),
    "classes below 0": ("summary alexnet --option num_classes=-1", 2, "cannot be built with num_classes=-1"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line_on_stderr(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchinfo")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    command, exit_code, message = MISTAKES[name]
    if name == "unavailable backend" and fastcnn.backends()["cuda"].available:
        pytest.skip("the backend is available here")
    assert main(command.split()) == exit_code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err
    assert not re.search("Value error|Input should|unable to parse", captured.err)
    assert list(tmp_path.iterdir()) == []


NOT_UTF_8 = ("latin-1", "ascii", "cp1252", "koi8-r")
SHOWN = {
    "help": ("--help", "Usage: fastcnn"),
    "help of train": ("train --help", "mnist_cnn, alexnet, vgg16, ..."),
    "help of tune": ("tune --help", "Usage: fastcnn tune"),
    "help of explain": ("explain --help", "Usage: fastcnn explain"),
    "help of predict": ("predict --help", "Usage: fastcnn predict"),
    "summary": ("summary mnist_cnn", "Total params: "),
    "doctor": ("doctor", "backend in use"),
    "explain": ("explain mnist_cnn", "conv+relu+pool"),
    "a mistake": ("summary näme…", "no model is named"),
}


@pytest.mark.parametrize("encoding", NOT_UTF_8)
@pytest.mark.parametrize("name", SHOWN)
def test_terminal_that_is_not_utf_8(name: str, encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchinfo")
    words, expected = SHOWN[name]
    shown = io.BytesIO()
    for stream in ("stdout", "stderr"):
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(shown, encoding=encoding, write_through=True))
    try:
        code = main(words.split())
    finally:
        output = shown.getvalue().decode("utf-8" if encoding == "ascii" else encoding)  # click: ASCII means unset
    assert code == (2 if name == "a mistake" else 0)
    assert expected.replace("...", "…" if encoding in ("ascii", "cp1252") else "...") in output


def test_command_in_latin_1_from_outside(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-m", "fastcnn", "train", "--help"], env=environment, capture_output=True, check=True
    )
    assert "mnist_cnn, alexnet, vgg16, ..." in done.stdout.decode("latin-1")
    assert done.stderr == b""


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchinfo")
    assert main(["summary", "vgg61", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert error.splitlines()[-1].startswith("error: no model is named")


def test_input_that_is_too_small_for_the_network(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchinfo")
    assert main(["summary", "alexnet", "--input-size", "3,7,7"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: alexnet does not take images of 3x7x7: ")
    assert error.count("\n") == 1


def test_summary_of_the_96_channel_network(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchinfo")
    assert main(["summary", "alexnet2012", "--input-size", "3,227,227", "--option", "lrn=False"]) == 0
    output = capsys.readouterr().out
    convolutions = re.findall(r"Conv2d: \S+ +\[1, (\d+), (\d+), (\d+)\] +([\d,]+)", output)
    assert convolutions == [
        ("96", "55", "55", "34,944"),
        ("256", "27", "27", "614,656"),
        ("384", "13", "13", "885,120"),
        ("384", "13", "13", "1,327,488"),
        ("256", "13", "13", "884,992"),
    ]
    assert output.count("ReLU") == 7
    assert "LocalResponseNorm" not in output
    assert "Total params: 62,378,344" in output
    assert max(map(len, output.splitlines())) <= 80


@pytest.mark.parametrize("model", MODELS)
def test_summary_of_every_model_is_whole_and_fits_80_columns(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchinfo")
    assert main(["summary", model]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= 80
    with torch.device("meta"):
        layers = [layer for layer in MODELS[model].build().modules() if not [*layer.children()]]
    assert len(re.findall(r": \d+-\d+", output)) >= len(layers)


def test_doctor_tells_versions_and_why_a_backend_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FASTCNN_BACKEND", "torch")
    assert main(["doctor"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for fact in ("fastcnn", "python", "torch", "triton", "CUDA of torch", "GPU", "NVIDIA driver", torch.__version__):
        assert fact in output
    for name, status in fastcnn.backends().items():
        expected = "available" if status.available else f"not available: {status.reason}"
        assert f"backend {name} {expected}" in output
        assert status.build in output
    assert "backend in use torch (set by FASTCNN_BACKEND)" in output


def test_doctor_pads_no_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    assert not [line for line in capsys.readouterr().out.splitlines() if line != line.rstrip()]


def test_choices_are_those_of_the_loop() -> None:
    assert list(get_args(OptimizerName)) == list(lane.OPTIMIZERS) == list(DEFAULT_LR)
    assert list(get_args(AmpName)) == list(lane.AMP_DTYPES)


def test_side_by_side_run_shows_one_table(digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    command = f"train mnist --data {digits} --compare --epochs 1 --batch-size 10 --out {tmp_path} --name first"
    assert main(command.split()) == 0
    output = capsys.readouterr().out
    for label in (
        "stock torch",
        "loss, epoch 1",
        "test accuracy",
        "images/s",
        "peak memory",
        "largest loss difference",
    ):
        assert label in output
    assert "curves.png" in output
    assert main(command.split()) == 1
    assert "holds results already" in capsys.readouterr().err
    assert main(["train", "mnist", "--resume", str(tmp_path / "first"), "--lr", "0.5"]) == 2
    assert "was trained with lr 0.001, not 0.5" in capsys.readouterr().err


def test_training_opens_with_no_list_of_notes(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    logger = logging.getLogger("fastcnn")

    def told(*args: Any, **kwargs: Any) -> None:
        logger.info("a reason of auto")
        logger.warning("something to act on")

    monkeypatch.setattr("fastcnn.train.command.run_training", told)
    command = f"train mnist --data {digits} --out {tmp_path}".split()
    assert main(command) == 0
    assert capsys.readouterr().out == "note: something to act on\n"
    assert main([*command, "--debug"]) == 0
    assert capsys.readouterr().out == "note: a reason of auto\nnote: something to act on\n"


def test_ctrl_c_leaves_a_complete_checkpoint_to_go_on_from(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    arguments = f"train mnist --data {digits} --epochs 100000 --batch-size 10 --out {tmp_path} --name cut"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastcnn", *arguments.split()],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a background job would ignore
    )
    try:
        file = tmp_path / "cut" / "checkpoint.pt"
        while not file.exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, error = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130
    assert re.fullmatch(rf"stopped in epoch \d+ of 100000, step \d; go on with: .* --resume {file}\n", error)
    assert sorted(path.name for path in file.parent.iterdir()) == ["checkpoint.pt", "curves.png", "metrics.json"]
    lane = checkpoint.load(file)["lanes"]["fastcnn"]
    assert len(lane["losses"]) == 4 * len(lane["epochs"]) + lane["step"]
    epochs = len(lane["epochs"]) + 1
    assert main(["train", "mnist", "--resume", str(file), "--epochs", str(epochs)]) == 0
    assert len(checkpoint.load(file)["lanes"]["fastcnn"]["losses"]) == 4 * epochs
    assert "wrote" in capsys.readouterr().out
