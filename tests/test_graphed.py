"""A captured step trains as the plain one does, and what cannot be captured runs ungraphed, unharmed and with a reason.

Without a GPU, graphs are played on the CPU (played_graphs.py); the tests of CUDA's own part need one (make gpu).
"""

import copy
import doctest
import functools
import logging

import played_graphs
import pytest
import torch
import torch.nn.functional as F
from played_graphs import network
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastcnn.train import GraphedStep, graphed

played, one_thread = played_graphs.played, played_graphs.one_thread  # fixtures

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, fused=True),
    "sgd, a number as rate": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, fused=True),
}


class Training:
    """A network, its optimizer, and the step that a user would write."""

    def __init__(self, optimizer="sgd", device="cpu", extra=None):
        self.model = network(device)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.extra = extra  # runs in each step, between zero_grad and the network
        self.calls = 0

    def step(self, images, labels):
        self.calls += 1
        self.optimizer.zero_grad()
        if self.extra:
            self.extra()
        loss = F.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss

    def graphed(self):
        return GraphedStep(self.step, self.optimizer)

    def state(self):
        return self.model.state_dict() | {"gradients": [parameter.grad for parameter in self.model.parameters()]}


def batches(sizes=(6,) * 8, device="cpu"):
    generator = torch.Generator().manual_seed(5)
    for size in sizes:
        images, labels = torch.randn(size, 1, 8, 8, generator=generator), torch.arange(size) % 10
        yield images.to(device), labels.to(device)


def run(step, sizes=(6,) * 8, between=lambda: None, device="cpu"):
    """Return the losses of a step over some batches, from the same random state each time."""
    torch.manual_seed(1)
    losses = []
    for batch in batches(sizes, device):
        losses.append(step(*batch).detach())
        between()
    return torch.stack(losses)


def assert_same_training(given, expected, given_losses, expected_losses):
    assert len(set(expected_losses.tolist())) == len(expected_losses)
    torch.testing.assert_close(given_losses, expected_losses, rtol=0, atol=0)
    torch.testing.assert_close(given.state(), expected.state(), rtol=0, atol=0)


REMAINDERS = (6, 6, 6, 2) * 6


@pytest.mark.parametrize("sizes", [(6,) * 8, REMAINDERS], ids=["equal batches", "a smaller last batch"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_captured_step_trains_as_the_plain_one(optimizer, sizes, played):
    plain, captured = Training(optimizer), Training(optimizer)
    graphed.make_capturable(plain.optimizer)
    step = captured.graphed()
    assert_same_training(captured, plain, run(step, sizes), run(plain.step, sizes))
    assert step.reason == ""
    assert played.recorded == len(set(sizes))
    assert captured.calls == (graphed.WARM_UP_CALLS + 1) * len(set(sizes))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_schedule_is_followed(optimizer, played):
    plain, captured = Training(optimizer), Training(optimizer)
    graphed.make_capturable(plain.optimizer)
    step = captured.graphed()
    schedules = [torch.optim.lr_scheduler.StepLR(it.optimizer, 5, gamma=0.1) for it in (plain, captured)]
    sizes = (6,) * 15
    expected = run(plain.step, sizes, schedules[0].step)
    assert_same_training(captured, plain, run(step, sizes, schedules[1].step), expected)
    rate_is_a_tensor = isinstance(captured.optimizer.param_groups[0]["lr"], torch.Tensor)
    assert played.recorded == (1 if rate_is_a_tensor else 3)  # as a number, each rate has a graph of its own


def test_result_is_the_callers_own(played):
    step = Training().graphed()
    results = [step(*batch) for batch in batches()]
    assert len({result.item() for result in results}) == len(results)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loaded_optimizer_state_reaches_the_graph(optimizer, played):
    plain, captured = Training(optimizer), Training(optimizer)
    graphed.make_capturable(plain.optimizer)
    step = captured.graphed()
    run(plain.step), run(step)
    saved = copy.deepcopy((plain.model.state_dict(), plain.optimizer.state_dict()))
    expected = run(plain.step)
    assert_same_training(captured, plain, run(step), expected)
    captured.model.load_state_dict(saved[0])
    captured.optimizer.load_state_dict(saved[1])
    assert_same_training(captured, plain, run(step), expected)
    assert played.recorded == 2


def test_several_steps_in_one_graph(played):
    plain, captured = Training("adam"), Training("adam")
    graphed.make_capturable(plain.optimizer)
    step = GraphedStep(lambda *draws: torch.stack([captured.step(*draw) for draw in zip(*draws)]), captured.optimizer)
    torch.manual_seed(1)
    stacked = [torch.stack(parts) for parts in zip(*batches((6,) * 15))]
    losses = [step(*block) for block in zip(*(part.split(3) for part in stacked))]
    assert_same_training(captured, plain, torch.cat(losses), run(plain.step, (6,) * 15))
    assert captured.calls == 3 * (graphed.WARM_UP_CALLS + 1)


def test_step_without_optimizer(played):
    model = network().eval()
    step = GraphedStep(lambda images, labels: (model(images).argmax(1) == labels).sum())
    expected = [(model(images).argmax(1) == labels).sum() for images, labels in batches()]
    assert [step(*batch).item() for batch in batches()] == [value.item() for value in expected]
    assert played.recorded == 1


def fail_when_captured():
    """Fail as CUDA does where a step is recorded. Nothing has run by then: a played recording runs what it notes."""
    if is_in_torch_dispatch_mode():
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


def refused(given, step, caplog, match):
    """Check that a step gave up for a reason that the log names, and trained all the same."""
    plain = Training(extra=given.extra)
    plain.optimizer = type(given.optimizer)(plain.model.parameters(), **given.optimizer.defaults)
    graphed.make_capturable(plain.optimizer)
    with caplog.at_level(logging.WARNING, "fastcnn"):
        losses = run(step)
    assert_same_training(given, plain, losses, run(plain.step))
    assert match in step.reason
    assert [record.getMessage() for record in caplog.records] == [f"a step runs without a CUDA graph: {step.reason}"]


def test_failed_capture_does_no_harm(played, caplog):
    training = Training(extra=fail_when_captured)
    step = training.graphed()
    refused(training, step, caplog, "capturing it failed (operation not permitted when stream is capturing)")
    assert training.calls == 8 + 1


def test_failed_capture_puts_gradients_and_state_back(played):
    training = Training()
    training.step(*next(batches()))
    weight = next(training.model.parameters())
    gradient, momentum = weight.grad, training.optimizer.state[weight]["momentum_buffer"]
    found = []

    def step(*batch):
        state = training.optimizer.state
        found.append(weight.grad is gradient and state[weight].get("momentum_buffer") is momentum)
        if is_in_torch_dispatch_mode():
            training.optimizer.zero_grad()
            state.clear()
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.zeros(())

    run(GraphedStep(step, training.optimizer))
    assert found == [True] * (8 + 1)


def test_step_that_waits_is_not_captured(played, caplog):
    played.waits = ["train.py, line 12"]
    training = Training()
    refused(training, training.graphed(), caplog, "it makes the CPU wait for the GPU (train.py, line 12)")
    assert played.recorded == 0


def test_state_that_a_graph_cannot_update_is_refused(played, caplog):
    training = Training()
    training.optimizer = torch.optim.SparseAdam(training.model.parameters())
    for parameter in training.model.parameters():
        training.optimizer.state[parameter]["step"] = 0
    step = GraphedStep(lambda *batch: torch.zeros(()), training.optimizer)
    run(step)
    assert "SparseAdam keeps 'step' outside the GPU" in step.reason


def test_new_state_while_capturing_is_refused(played):
    training = Training()
    parameter = next(training.model.parameters())

    def replace_state():
        training.optimizer.state[parameter]["mean"] = parameter.detach().clone()

    training.extra = replace_state
    step = training.graphed()
    run(step)
    assert "SGD makes new state in a step instead of updating it in place" in step.reason


def test_endless_shapes_are_refused(played, caplog):
    training = Training()
    step = training.graphed()
    sizes = range(2, 4 + graphed.MAX_GRAPHS)
    plain = Training()
    graphed.make_capturable(plain.optimizer)
    assert_same_training(training, plain, run(step, sizes), run(plain.step, sizes))
    assert f"more than {graphed.MAX_GRAPHS} different shapes" in step.reason


def test_on_the_cpu_the_step_runs_ungraphed(caplog):
    training = Training()
    refused(training, training.graphed(), caplog, "its tensors are on cpu; a CUDA graph needs all of them on one GPU")
    assert not isinstance(training.optimizer.param_groups[0]["lr"], torch.Tensor)


def test_step_counts_move_with_the_optimizer(played):
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([weight], lr=0.5)
    weight.grad = torch.ones(3)
    optimizer.step()
    graphed.make_capturable(optimizer)
    (group,) = optimizer.param_groups
    assert group["capturable"]
    assert group["lr"].dtype == optimizer.state[weight]["step"].dtype == torch.float32
    rate = group["lr"]
    graphed.make_capturable(optimizer)
    assert group["lr"] is rate  # a graph reads this very tensor


def test_examples_run():
    result = doctest.testmod(graphed)
    assert result.attempted
    assert not result.failed


@needs_gpu
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_gpu_captured_step_trains_as_the_plain_one(optimizer):
    plain, captured = Training(optimizer, "cuda"), Training(optimizer, "cuda")
    graphed.make_capturable(plain.optimizer)
    step = captured.graphed()
    losses = run(step, REMAINDERS, device="cuda"), run(plain.step, REMAINDERS, device="cuda")
    torch.testing.assert_close(*losses, rtol=0, atol=0)
    torch.testing.assert_close(captured.model.state_dict(), plain.model.state_dict(), rtol=0, atol=0)
    assert step.reason == ""
    assert captured.calls == (graphed.WARM_UP_CALLS + 1) * 2


@needs_gpu
def test_gpu_replays_allocate_nothing():
    step = Training("adam", "cuda").graphed()
    (batch,) = batches((64,), "cuda")
    for _ in range(graphed.WARM_UP_CALLS + 2):
        step(*batch)
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(100):
        step(*batch)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


@needs_gpu
def test_gpu_step_that_waits_is_found_before_it_is_captured():
    training = Training("adam", "cuda")
    training.extra = lambda: next(training.model.parameters()).sum().item()
    step = training.graphed()
    run(step, device="cuda")
    assert step.reason.startswith("it makes the CPU wait for the GPU (test_graphed.py, line ")


@needs_gpu
def test_gpu_failed_capture_does_no_harm():
    """torch.cuda.synchronize() is not among what warm-up sees, and breaks a capture off."""
    other, plain, broken = (Training("adam", "cuda") for _ in range(3))
    graphed.make_capturable(plain.optimizer)
    expected = run(plain.step, device="cuda")
    other_step, broken.extra = other.graphed(), torch.cuda.synchronize
    torch.testing.assert_close(run(other_step, device="cuda"), expected, rtol=0, atol=0)
    step = broken.graphed()
    torch.testing.assert_close(run(step, device="cuda"), expected, rtol=0, atol=0)
    assert step.reason.startswith("capturing it failed (")
    # A graph that was there before goes on, with its random numbers, and new ones can be made.
    torch.testing.assert_close(run(other_step, device="cuda"), run(plain.step, device="cuda"), rtol=0, atol=0)
    assert other_step.reason == ""
    third = Training("adam", "cuda")
    torch.testing.assert_close(run(third.graphed(), device="cuda"), expected, rtol=0, atol=0)


@needs_gpu
def test_gpu_needs_every_tensor():
    training = Training("adam", "cuda")
    step = GraphedStep(lambda images, labels: training.step(images.cuda(), labels.cuda()), training.optimizer)
    run(step)
    assert step.reason == "its tensors are on cpu and cuda:0; a CUDA graph needs all of them on one GPU"
