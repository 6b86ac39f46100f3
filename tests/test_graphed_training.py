"""Training and evaluation under CUDA graphs give the losses of the plain loop, and wait for nothing while captured.

Without a GPU, graphs are played on the CPU (played_graphs.py).
"""

import copy
import doctest
import functools
import itertools

import played_graphs
import pytest
import torch
from played_graphs import PlayedCapture, network
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

import fastcnn
from fastcnn.train import graphed, loop
from fastcnn.train import lane as training
from fastcnn.train.data import CLASSES, Feed, TensorData
from fastcnn.train.idx import Labelled

played, one_thread = played_graphs.played, played_graphs.one_thread  # fixtures


def digits(count, size=8):
    images = torch.arange(count * size * size).mul(37).remainder(251).to(torch.uint8).reshape(count, size, size)
    return Labelled(images, torch.arange(count) % 10)


def lane_and_data(graph, device="cpu", optimizer="adam", amp="off", model=network):
    device = torch.device(device)
    images = TensorData(digits(70), digits(25), CLASSES["mnist"], Feed((1, 8, 8), batch_size=3, device=device))
    net = model(device)
    optimizer = training.build_optimizer(optimizer, net, 0.01, 1e-4)
    return training.Lane("fastcnn", net, optimizer, device, seed=3, amp=amp, graph=graph), images


def train(lane, images, epochs, stop_at=None):
    """Train as ``fastcnn train`` does; return what an evaluation after each epoch gave."""
    scores = []
    while len(lane.epochs) < epochs:
        loop.train_epoch(lane, images, lambda: None, lambda: stop_at is not None and len(lane.losses) >= stop_at)
        if stop_at is not None and lane.step and len(lane.losses) >= stop_at:
            break
        scores.append(loop.evaluate(lane, images, lambda: False))
        loop.finish_epoch(lane, images, *scores[-1])
    return scores


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_loop_gives_the_same_losses_with_and_without_graphs(optimizer, played):
    (plain, images), (captured, _) = (lane_and_data(graph, optimizer=optimizer) for graph in (False, True))
    assert train(captured, images, 4) == train(plain, images, 4)
    assert captured.losses == plain.losses
    assert len(plain.losses) == 4 * 24  # of 23 whole batches and one of a single image
    # Of training the blocks of 10 steps, of 3, and the last image; of evaluation 8 batches at once, and the last.
    assert played.recorded == 3 + 2
    assert {step.reason for step in captured._graphed.values()} == {""}


@pytest.mark.parametrize("stop_at", [1, 24, 62])
def test_resumed_run_gives_the_same_losses_with_graphs(stop_at, played):
    plain, images = lane_and_data(graph=False)
    train(plain, images, 5)
    stopped, _ = lane_and_data(graph=True)
    train(stopped, images, 5, stop_at)
    resumed, _ = lane_and_data(graph=True)
    resumed.load_state_dict(copy.deepcopy(stopped.state_dict()))
    train(resumed, images, 5)
    assert resumed.losses == plain.losses


def test_checkpoint_moves_between_kinds_of_devices(monkeypatch):
    """The CPU plays the GPU: there an optimizer is fused, and its rate a tensor."""
    on_cpu, images = lane_and_data(graph=False)
    train(on_cpu, images, 1)
    saved = copy.deepcopy(on_cpu.state_dict())
    with monkeypatch.context() as patch:
        patch.setitem(graphed.CAPTURES, "cpu", PlayedCapture)
        on_gpu, _ = lane_and_data(graph=True)
        on_gpu.load_state_dict(saved)
        (group,) = on_gpu.optimizer.param_groups
        assert group["fused"]
        assert isinstance(group["lr"], torch.Tensor)
        train(on_gpu, images, 2)
        saved = copy.deepcopy(on_gpu.state_dict())
    back, _ = lane_and_data(graph=False)
    back.load_state_dict(saved)
    (group,) = back.optimizer.param_groups
    assert (group["lr"], group["fused"], group["capturable"]) == (0.01, None, False)
    train(on_cpu, images, 3)
    train(back, images, 3)
    torch.testing.assert_close(back.losses, on_cpu.losses, rtol=1e-3, atol=1e-4)


def test_copy_of_a_lane_leaves_its_graphs(played):
    lane, images = lane_and_data(graph=True)
    loop.train_epoch(lane, images, lambda: None, lambda: False)
    assert lane._graphed
    assert not copy.deepcopy(lane)._graphed


MODELS = {
    "mnist_cnn": (fastcnn.MnistCNN, (1, 28, 28)),
    "alexnet": (functools.partial(fastcnn.AlexNet, 10), (3, 224, 224)),
    "alexnet2012": (functools.partial(fastcnn.AlexNet2012, 10), (3, 227, 227)),
    "vgg11_bn": (functools.partial(fastcnn.vgg11_bn, num_classes=10), (3, 224, 224)),
}
WAITING = {
    "item": lambda tensor: tensor.sum().item(),
    "branch": lambda tensor: 1 if tensor.sum() > 0 else 2,
    "nonzero": lambda tensor: tensor.nonzero(),
    "boolean mask": lambda tensor: tensor[tensor > 0],
    "tolist": lambda tensor: tensor.tolist(),
}


def fake_lane(model, optimizer, amp="off"):
    """Return a lane and its data without values: whatever asks for one raises. Fused optimizers, as on a GPU."""
    build, input_size = MODELS[model]
    feed = Feed(input_size, batch_size=2)
    images = TensorData(digits(5, 28), digits(5, 28), CLASSES["mnist"], feed)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        images._images, images._labels, images._black = map(
            mode.from_tensor, (images._images, images._labels, images._black)
        )
        net = build()
        optimizer = training.OPTIMIZERS[optimizer](net.parameters(), lr=0.01, fused=True)
        graphed.make_capturable(optimizer)
        return mode, training.Lane("fastcnn", net, optimizer, torch.device("cpu"), seed=0, amp=amp), images


def fake_trainings():
    """Return each model with each optimizer and precision; all but the small one with one pair beside the sweeps."""
    pairs = list(itertools.product(training.OPTIMIZERS, ("off", "bf16")))
    return [
        pytest.param(model, *pair, marks=() if model == "mnist_cnn" or each == number % 4 else pytest.mark.sweep)
        for number, model in enumerate(MODELS)
        for each, pair in enumerate(pairs)
    ]


@pytest.mark.parametrize(("model", "optimizer", "amp"), fake_trainings())
def test_captured_code_never_asks_for_a_value(model, optimizer, amp, played):
    mode, lane, images = fake_lane(model, optimizer, amp)
    with mode:
        draws = torch.zeros(2, 2, dtype=torch.int64)
        assert loop.train_steps(lane, images, draws).shape == (2,)
        lane.model.eval()
        with torch.no_grad():
            assert loop.score(lane, images, draws).shape == (2, 3)


@pytest.mark.parametrize("wait", WAITING)
def test_asking_for_a_value_would_be_seen(wait):
    with FakeTensorMode(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        WAITING[wait](torch.zeros(3))


def test_examples_run():
    result = doctest.testmod(training)
    assert result.attempted
    assert not result.failed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("amp", training.AMP_DTYPES)
@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_gpu_loop_gives_the_same_losses_with_and_without_graphs(optimizer, amp):
    (plain, images), (captured, _) = (lane_and_data(graph, "cuda", optimizer, amp) for graph in (False, True))
    scores = train(captured, images, 6), train(plain, images, 6)
    assert {step.reason for step in captured._graphed.values()} == {""}
    assert captured.losses == plain.losses
    assert scores[0] == scores[1]
    torch.testing.assert_close(captured.state_dict()["rng"], plain.state_dict()["rng"], rtol=0, atol=0)
