"""The trial: what `auto` tries by itself, what it keeps, and which candidates never run in the user's process."""

import contextlib
import threading

import pytest
import torch
from tables import NAME, cache, operators
from torch import nn
from trials import SLOW, Player, entries, lookup_chosen, player, pool, runs_kernel

import fastcnn
import fastcnn.functional as FF
from fastcnn import front
from fastcnn.tuning import Winner, lookup, stage, timing

__all__ = ["cache", "player"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]
STOCK, KERNEL = Winner("torch", None), Winner("cpu", None)


def test_the_first_eager_call_tries_and_the_faster_one_runs_from_then_on(player):
    assert not runs_kernel()
    pool()
    assert runs_kernel()
    (entry,) = entries()
    assert (entry["backend"], entry["seconds"], entry["stock_seconds"]) == ("cpu", 1.0, 2.0)
    count = len(player.timed)
    pool()
    assert len(player.timed) == count
    pool(grad=True)
    assert [each["key"]["mode"] for each in entries()] == ["inference", "training"]


def test_the_next_process_starts_with_what_was_kept(player):
    pool()
    count = len(player.timed)
    lookup.forget()  # as a new process does
    pool()
    assert runs_kernel()
    assert len(player.timed) == count


@pytest.mark.parametrize(("seconds", "noise"), [(SLOW, 0.0), ({"torch": 1.0, "cpu": 0.99}, 0.0)], ids=["slow", "same"])
def test_stock_stays_where_it_is_not_clearly_beaten(player, seconds, noise):
    player.seconds = seconds
    pool()
    assert not runs_kernel()
    (entry,) = entries()
    assert entry["backend"] == "torch"
    assert fastcnn.explain(nn.Sequential(nn.MaxPool2d(2)), torch.zeros(2, 3, 8, 8))[0].reason == (
        "measured on this device: stock was faster"
    )


def test_a_gain_within_the_noise_is_none(player):
    player.seconds, player.noise = {"torch": 1.0, "cpu": 0.8}, 0.5
    pool()
    assert not runs_kernel()
    (entry,) = entries()
    assert entry["why"] == "measured on this device: too noisy to tell, stock kept"
    assert entry["noise"] > 0.2


@pytest.mark.parametrize(
    ("device", "call", "wins"),
    [(0.5, 1.0, True), (1.0, 0.5, True), (0.5, 1.5, False), (1.5, 0.5, False)],
    ids=["device faster", "launch faster", "launch slower", "device slower"],
)
def test_a_winner_loses_neither_by_the_device_s_time_nor_by_the_call_s(device, call, wins):
    times = {STOCK: timing.Times(1.0, 1.0), KERNEL: timing.Times(call, device)}
    assert (timing.fastest(times, noise=0.0)[0] == KERNEL) == wins


def call_of_stage(change):
    """Return `Stage.call` with something done to what the kernel gives, in training too."""
    call = stage.Stage.call

    def changed(self, tensors):
        output = call(self, tensors)
        return change(output) if lookup_chosen() == "cpu" else output

    return changed


WRONG = {
    "value": lambda output: output * 1.001,
    "gradient": lambda output: output.detach() * 2 - output if output.requires_grad else output,
    "not a number": lambda output: output / 0,
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_candidate_with_wrong_numbers_never_wins(player, change, monkeypatch, caplog):
    monkeypatch.setattr(stage.Stage, "call", call_of_stage(change))
    pool(grad=True)
    assert not runs_kernel(grad=True)
    (entry,) = entries()
    assert (entry["backend"], entry["why"]) == ("torch", "no kernel passed its trial on this device")
    assert "max_pool 2x3x8x8 runs without cpu, which failed its trial" in caplog.text
    assert set(player.timed) == {"torch"}


def test_a_candidate_that_raises_never_wins(player, monkeypatch, caplog):
    def fail(_):
        raise ValueError("no such\ninstruction")

    monkeypatch.setattr(stage.Stage, "call", call_of_stage(fail))
    pool()
    assert not runs_kernel()
    assert "failed its trial: ValueError: no such instruction" in caplog.text


@pytest.mark.parametrize("where", ["kernel", "stock"])
def test_running_out_of_memory_means_stock_for_this_process(where, player, monkeypatch):
    call = stage.Stage.call

    def full(self, tensors):
        if (lookup_chosen() == "cpu") == (where == "kernel"):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(stage.Stage, "call", full)
        assert pool().shape == (2, 3, 4, 4)
    assert not runs_kernel()
    assert player.room == 1
    assert entries() == []
    lookup.forget()
    pool()
    assert runs_kernel()


def test_what_stock_cannot_run_raises_as_in_stock(player):
    with pytest.raises(NotImplementedError):
        FF.max_pool2d(torch.zeros(2, 3, 8, 8, dtype=torch.bool), 2)
    assert entries() == []


def test_a_trial_leaves_the_call_and_the_process_alone(player):
    model = fastcnn.fuse(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    stock = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    x = torch.randn(4, 3, 8, 8)
    state = torch.get_rng_state()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: saved.append(each) or each, lambda each: each):
        output = model(x)
    assert len(saved) < 10
    torch.testing.assert_close(output, stock(x))
    torch.testing.assert_close(model.state_dict(), stock.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    assert entries()
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        FF.conv2d_relu(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3))
    assert len(entries()) == 2


def test_a_trial_that_fails_as_a_whole_means_stock_for_this_process(player, monkeypatch, capsys):
    monkeypatch.setattr(Player, "identity", lambda self: 1 / 0)
    for _ in range(2):
        assert pool().shape == (2, 3, 4, 4)
    assert not player.timed
    assert entries() == []
    assert f"fastcnn: stages are not tried on {NAME}: ZeroDivisionError: " in capsys.readouterr().err


@pytest.mark.parametrize("weight", [5, [1.0], torch.zeros(4, 3, 3, 3).numpy()], ids=["number", "list", "array"])
def test_a_wrong_argument_is_stock_s_to_tell(weight, player):
    pool()  # so that the table is not empty
    with pytest.raises(TypeError, match="weight"):
        FF.conv2d_relu(torch.zeros(2, 3, 8, 8), weight)
    assert len(entries()) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_reads_no_table_and_tries_nothing(player):
    pool()
    count, x = len(player.timed), torch.randn(4, 3, 9, 9)
    traced = torch.jit.trace(lambda each: FF.max_pool2d(each, 2), (x,), check_trace=False)
    assert [node.kind() for node in traced.graph.nodes() if "pool" in node.kind()] == ["aten::max_pool2d"]
    assert len(player.timed) == count
    torch.testing.assert_close(traced(x), torch.nn.functional.max_pool2d(x, 2))


def test_nothing_is_tried_under_forward_mode(player):
    x = torch.randn(2, 3, 8, 8)
    with torch.autograd.forward_ad.dual_level():
        FF.max_pool2d(torch.autograd.forward_ad.make_dual(x, x), 2)
    assert entries() == []


def off_by_environment(monkeypatch):
    monkeypatch.setenv("FASTCNN_TRIAL", "0")
    return contextlib.nullcontext()


def capturing(monkeypatch):
    monkeypatch.setattr(Player, "capturing", True)
    return contextlib.nullcontext()


@contextlib.contextmanager
def deterministic(monkeypatch):
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(front.problem != "", reason="needs the front")
@pytest.mark.parametrize("grad", [False, True])
def test_what_is_timed_is_run_by_the_front_as_the_user_s_calls_are(grad, player, monkeypatch):
    planned, measure = [], Player.measure

    def count(self, run, times):
        run(0)
        planned.append(front._front.plans())
        return measure(self, run, times)

    monkeypatch.setattr(Player, "measure", count)
    pool(grad=grad)
    FF.local_response_norm(torch.randn(2, 9, 4, 4, requires_grad=grad), 3)
    assert planned
    assert all(planned)


OFF = {
    "FASTCNN_TRIAL=0": off_by_environment,
    "graph capture": capturing,
    "deterministic algorithms": deterministic,
    "explicit backend": lambda _: fastcnn.use_backend("torch"),
}


@pytest.mark.parametrize("off", OFF.values(), ids=OFF)
def test_nothing_is_tried(off, player, monkeypatch):
    with off(monkeypatch):
        pool()
    assert not player.timed
    assert entries() == []


def test_nothing_is_tried_under_torch_func_or_compile(player):
    x = torch.randn(2, 3, 8, 8)
    torch.func.grad(lambda each: FF.max_pool2d(each, 2).sum())(x)
    torch.vmap(lambda each: FF.max_pool2d(each, 2))(x[None])
    torch._dynamo.reset()
    torch.compile(lambda each: FF.max_pool2d(each, 2), backend="eager", fullgraph=True)(x)
    assert not player.timed


def test_one_thread_tries_while_the_others_run_stock(player, monkeypatch):
    tries, go_on = threading.Event(), threading.Event()
    measure = Player.measure

    def wait(self, run, times):
        tries.set()
        assert go_on.wait(60)
        return measure(self, run, times)

    monkeypatch.setattr(Player, "measure", wait)
    first = threading.Thread(target=pool)
    first.start()
    assert tries.wait(60)
    assert pool().shape == (2, 3, 4, 4)  # and comes back at once
    assert not player.timed
    go_on.set()
    first.join()
    count = len(player.timed)
    pool()
    assert (len(player.timed), len(entries())) == (count, 1)


BATCHES = {16: True, 32: True, 31: True, 8: True, 7: False, 33: False}  # below the size from which a kernel runs anyway


@pytest.mark.parametrize(("batch", "served"), BATCHES.items())
def test_an_entry_serves_half_to_double_its_batch(player, batch, served, monkeypatch):
    pool(16)
    monkeypatch.setenv("FASTCNN_TRIAL", "0")
    assert runs_kernel(batch=batch) == served
    (row,) = fastcnn.explain(nn.Sequential(nn.MaxPool2d(2)), torch.zeros(batch, 3, 8, 8))
    near = "measured on this device at batch 16: the fastest"
    assert (row.reason == near) == (served and batch != 16)


def test_the_nearest_measured_batch_comes_first(player, monkeypatch):
    pool(8)
    player.seconds = SLOW
    pool(20)
    monkeypatch.setenv("FASTCNN_TRIAL", "0")
    reasons = [fastcnn.explain(nn.Sequential(nn.MaxPool2d(2)), (n, 3, 8, 8))[0].reason for n in (11, 12, 16)]
    assert ["at batch 8: the fastest" in reason for reason in reasons] == [True, True, False]
    assert "at batch 20: stock was faster" in reasons[2]


def test_unbatched_images_have_no_batch(player, monkeypatch):
    FF.max_pool2d(torch.randn(4, 8, 8), 2)
    monkeypatch.setenv("FASTCNN_TRIAL", "0")
    assert operators(lambda: FF.max_pool2d(torch.randn(4, 8, 8), 2))
    assert not operators(lambda: FF.max_pool2d(torch.randn(5, 8, 8), 2))


def test_what_no_kernel_takes_is_not_tried(player):
    with torch.no_grad():
        FF.max_pool2d(torch.randn(2, 3, 8, 8).double(), 2)
        FF.max_pool2d(torch.randn(0, 3, 8, 8), 2)
        FF.max_pool2d(torch.randn(2, 3, 8, 8).to_mkldnn(), 2)
        FF.max_pool2d(torch.randn(2, 3, 8, 8), 2, return_indices=True)
    assert not player.timed
