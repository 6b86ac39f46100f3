"""Rows of layers one after another or in one another: they run as one row, unless something watches one of them."""

import copy

import pytest
import torch
from torch import nn

import fastcnn
from fastcnn import stages


class Split(nn.Module):
    """A network whose stages begin in one Sequential and end in the next."""

    def __init__(self):
        super().__init__()
        self.begin = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.middle = nn.Sequential(nn.ReLU(), nn.Sequential(nn.MaxPool2d(2), nn.Identity()))
        self.end = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.ReLU())

    def forward(self, x):
        x = self.begin(x)
        x = self.middle(x)
        return self.end(x)


def nested():
    return nn.Sequential(*Split().children())


def image():
    return torch.randn(2, 3, 11, 11)


def roles_run(model, x):
    found = []

    def note(roles, run, input, layers):
        found.append(roles)
        return run(input, *layers)

    with stages.noting(note):
        return model(x), found


EACH = pytest.mark.parametrize("make", [Split, nested], ids=["own forward", "nested"])
WHOLE = [("conv", "relu"), ("conv", "relu", "pool"), ("linear", "relu")]


@EACH
def test_stages_cross_the_border_of_rows(make):
    model, x = fastcnn.fuse(make()), image()
    output, found = roles_run(model, x)
    assert found == WHOLE
    torch.testing.assert_close(output, fastcnn.unfuse(copy.deepcopy(model))(x))


@EACH
def test_explain_shows_them_once(make):
    model = make()
    shown = [row.stage for row in fastcnn.explain(model) if row.stage]
    assert shown == ["+".join(roles) for roles in WHOLE]
    ran = [row.stage for row in fastcnn.explain(model, image()) if row.stage]
    assert ran == shown


def hooked(row):
    row.register_forward_hook(lambda *_: None)


def with_a_forward(row):
    row.forward = lambda input: nn.Sequential.forward(row, input)


@EACH
@pytest.mark.parametrize("change", [hooked, with_a_forward, fastcnn.unfuse])
def test_a_row_that_is_watched_or_stock_runs_by_itself(make, change):
    model, x = fastcnn.fuse(make()), image()
    expected = model(x)
    change(list(model.children())[1])
    output, found = roles_run(model, x)
    torch.testing.assert_close(output, expected)
    assert found[0] == ("conv", "relu")
    assert ("conv", "relu", "pool") not in found
    assert found[-1] == ("linear", "relu")


@EACH
def test_hooks_on_a_row_see_its_output(make):
    model, x, seen = fastcnn.fuse(make()), image(), []
    rows = list(model.children())
    for row in rows:
        row.register_forward_hook(lambda row, _, output: seen.append((row, output)))
    output = model(x)
    assert [row for row, _ in seen] == rows
    torch.testing.assert_close(seen[0][1], nn.Sequential.forward(rows[0], x))
    assert seen[-1][1] is output


@EACH
def test_gradients_and_a_compiled_call(make):
    model, x = fastcnn.fuse(make()), image()
    stock = fastcnn.unfuse(copy.deepcopy(model))
    for run in (model, stock, compiled := torch.compile(copy.deepcopy(model), fullgraph=True)):
        run(x).square().sum().backward()
    for ours, expected, traced in zip(*(each.parameters() for each in (model, stock, compiled)), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)
        torch.testing.assert_close(traced.grad, expected.grad)


def test_a_row_that_holds_nothing():
    model = fastcnn.fuse(nn.Sequential(nn.Sequential(), nn.Sequential(nn.Sequential())))
    x = image()
    assert model(x) is x
