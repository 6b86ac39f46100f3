"""`fastcnn tune`: what begins with bytes, mistakes in one line, and the table that it shows."""

import io

import pytest
from rich.console import Console
from tables import NAME, cache
from test_tune import KERNEL, STOCK, small_stages, stub_timer

import fastcnn
from fastcnn.cli import main
from fastcnn.tune import report, run
from fastcnn.tuning import Winner, table

__all__ = ["cache"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]


def test_the_command_tunes_what_begins_with_bytes(monkeypatch, capsys):
    stub_timer(monkeypatch, {"torch": 2.0, "cpu": 1.0})
    command = "tune mnist_cnn --batch-size 4 --inference --device cpu --dtype bfloat16 --bytes"
    assert main(command.split()) == 0
    assert "normalize_conv_relu_pool 4x1x28x28 * 32x1x3x3, bytes" in " ".join(capsys.readouterr().out.split())
    keys = [each["key"] for each in table.read(table.user_path(NAME), NAME).values()]
    (key,) = (each for each in keys if each["op"] == "normalize_conv_relu_pool")
    assert (key["dtype"], key["images"], key["layout"]) == ("bfloat16", "uint8", "nchw")


MISTAKES = {
    "no batch size": ("tune mnist_cnn", 2, "--batch-size"),
    "unknown model": ("tune vgg61 --batch-size 2", 2, "no model is named 'vgg61'"),
    "unknown backend": ("tune mnist_cnn --batch-size 2 --backend cudnn", 2, "expected one of triton, cuda, cpu"),
    "device": ("tune mnist_cnn --batch-size 2 --device tpu", 2, "--device tpu: not a device of torch"),
    "too small": (
        "tune alexnet --batch-size 2 --input-size 3,7,7",
        2,
        "alexnet does not run in float32 on an input of 2x3x7x7",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_one_line(name, capsys):
    command, code, words = MISTAKES[name]
    assert main(command.split()) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert words in error


def test_table_says_what_failed():
    stage = small_stages()[0]
    long = Winner("triton", "implicit_gemm:128x64x32w8s3")
    trials = [run.Trial(STOCK, 2e-3, 0.0), run.Trial(KERNEL, None, 9.0, refused="output: error 9, allowed 1")]
    trials.append(run.Trial(long, 0.12345, 0.42))
    results = [run.Result(stage, mode, trials, 0.01, trials[0], {}) for mode in run.MODES]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(report.table(results))
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "FAILED" in text
    assert "0.42" in text
    assert "error 9" in " ".join(text.split())
    assert "1 candidates FAILED" in " ".join(report.summary(results))
    assert "take stock's place" not in text


def test_table_says_why_a_slower_one_wins():
    stage = small_stages()[0]
    trials = [run.Trial(STOCK, 2e-3, 0.0), run.Trial(KERNEL, 1.98e-3, 0.1)]
    console = Console(width=80, file=io.StringIO(), color_system=None)
    console.print(report.table([run.Result(stage, "inference", trials, 0.01, trials[0], {})]))
    said = "a candidate that is faster by less than 3% does not take stock's place"
    assert said in " ".join(console.file.getvalue().split())
