"""How a trial times a GPU, and what it says: one line, a warning, the command that tunes."""

import contextlib
import threading
import warnings
import weakref
from types import SimpleNamespace

import pytest
import torch
from tables import NAME, cache
from trials import SLOW, Player, player, pool

import fastcnn
from fastcnn.tuning import places, table, telling

__all__ = ["cache", "player"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]


def test_one_visible_line_sums_up(player, capsys):
    pool()
    player.seconds = SLOW
    pool(batch=7)
    telling.sum_up()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith(f"fastcnn: tried 2 stages on {NAME} in ")
    assert said[0].endswith(f" s, 1 runs faster than stock; kept in {table.user_path(NAME)}")
    pool(batch=30)
    telling.sum_up()
    assert capsys.readouterr().err == ""


def test_what_takes_long_says_so(player, capsys, monkeypatch):
    said = threading.Event()
    once = telling.once
    monkeypatch.setattr(telling, "once", lambda message: (once(message), said.set()))
    monkeypatch.setattr(telling, "PATIENCE", 0.0)
    with telling.under_way("trying kernels"):
        assert said.wait(60)
    assert "fastcnn: trying kernels (FASTCNN_TRIAL=0 turns that off)" in capsys.readouterr().err


def test_a_gpu_that_runs_stock_warns_once_with_the_command(player, monkeypatch):
    monkeypatch.setattr("fastcnn.models.dropin._built", weakref.WeakSet())  # other tests' models may be alive
    monkeypatch.setenv("FASTCNN_TRIAL", "0")
    monkeypatch.setattr(Player, "by_default", True)
    with pytest.warns(UserWarning, match="fastcnn runs stock layers") as caught:
        pool(batch=6)
    message = str(caught[0].message)
    assert message.startswith(f"fastcnn runs stock layers on {NAME}: no table has these shapes (FASTCNN_TRIAL=0)")
    assert "To change that: fastcnn tune MODEL --batch-size 6 " in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pool(batch=7)


@pytest.mark.parametrize(
    "name", ["alexnet2012", "mnist_cnn", "resnet_cifar", "vgg11", "vgg13_bn", "vgg11_lrn", "vgg16_1x1"]
)
def test_the_command_names_the_only_model(name, monkeypatch):
    monkeypatch.setattr("fastcnn.models.dropin._built", weakref.WeakSet())  # other tests' models may be alive
    kwargs = {"cifar": True} if name.startswith("vgg") else {}
    with torch.device("meta"):
        model = fastcnn.models.MODELS[name].build(**kwargs)
    assert telling.model_name() == name
    others = fastcnn.MnistCNN(), fastcnn.ConvNet()
    assert telling.model_name() == ""
    del model, others


class Event:
    """A CUDA event whose clock stands at the number of calls."""

    calls = 0
    said: list[object] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.calls

    def synchronize(self):
        Event.said.append("end")

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_a_gpu_times_the_launch_and_its_own_work(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    stream = SimpleNamespace(synchronize=lambda: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append(type(cycles)))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "said", said)
    gpu = places.Gpu(torch.device("cuda", 0))

    def run(turn):
        Event.calls += 1

    times = gpu.measure(run, 3)
    assert times.device == 1.0
    assert times.call < 1.0
    assert said == ["wait", "wait", int, "end"]
    assert gpu.by_default
    assert isinstance(gpu._driver(), str)


@pytest.mark.parametrize(("captured", "sees"), [("mine", True), ("torch's", True), ("another", False)])
def test_a_gpu_sees_captures_of_this_thread_and_of_the_stream_that_torch_takes(captured, sees, monkeypatch):
    under = []

    @contextlib.contextmanager
    def stream(entered):
        under.append(entered)
        yield
        under.pop()

    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "mine")
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "torch's")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: under[-1] == captured)
    assert places.Gpu(torch.device("cuda", 0)).is_capturing() == sees


def test_a_trial_on_a_gpu_ignores_the_captures_of_other_threads_meanwhile(monkeypatch):
    """CUDA's driver keeps a mode for each thread, 0 unless changed, and gives the former one back."""
    modes = [0]

    def exchange(mode):
        modes[0], mode._obj.value = mode._obj.value, modes[0]

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(cuThreadExchangeStreamCaptureMode=exchange))
    with places.Gpu(torch.device("cuda", 0)).apart():
        assert modes == [places.THREAD_LOCAL]
    assert modes == [0]


def test_a_trial_runs_apart_from_other_threads_captures(player, monkeypatch):
    said = []

    @contextlib.contextmanager
    def apart(self):
        said.append(len(self.timed))
        yield
        said.append(len(self.timed))

    monkeypatch.setattr(Player, "apart", apart)
    pool()
    assert said[0] == 0 < said[1] == len(player.timed)
