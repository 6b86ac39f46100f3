"""Layers that a fused forward leaves out, or finds changed: it looks at each call."""

import random

import pytest
import torch
import torch.nn.functional as F
from own_forwards import (
    CONV,
    CONV_POOL,
    POOL,
    Layers,
    Nested,
    Optional,
    OptionalResidual,
    Statements,
    Stopped,
    Undecided,
    assert_runs_alike,
    image,
    pair,
    run,
)
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastcnn

OPTIONAL = {
    "all": ({"pool": True}, ["batch_norm_relu", "local_response_norm_max_pool2d"]),
    "no norm": ({"norm": False}, [CONV]),
    "no activation": ({"activate": False, "pool": True}, ["local_response_norm_max_pool2d"]),
    "another activation": ({"norm": False, "other": nn.Sigmoid()}, []),
    "another that fuses": ({"norm": False, "activate": False, "other": nn.ReLU()}, [CONV]),
    "nothing": ({"norm": False, "activate": False}, []),
}


@pytest.mark.parametrize("case", OPTIONAL)
def test_layers_that_attributes_leave_out(case, stages):
    settings, expected = OPTIONAL[case]
    fused, model = pair(lambda: Optional(**settings))
    run(fused)
    assert stages == expected
    assert_runs_alike(fused, model)
    assert [row.stage for row in fastcnn.explain(fused) if "conv1" in row.names] == [
        row.stage for row in fastcnn.explain(fused, (2, 3, 8, 8)) if "conv1" in row.names
    ]


def test_layer_that_an_attribute_leaves_out_later_is_left_out(stages):
    fused, model = pair(Optional)
    for each in (fused, model):
        each.bn = None
    assert_runs_alike(fused, model)
    for each in (fused, model):
        each.activate = False
    assert_runs_alike(fused, model)
    assert stages == [CONV]


def test_sum_in_place_on_what_an_optional_layer_gives_stays_in_place():
    kept = []

    class Keeps(nn.Module):
        def forward(self, x):
            kept.append(x)
            return x

    run(fastcnn.fuse(OptionalResidual(Keeps()))), run(OptionalResidual(Keeps()))
    assert kept[0].min() == kept[1].min() == 0  # the ReLU is in place too


def test_layers_that_an_argument_or_the_mode_leaves_out(stages):
    fused, model = pair(Undecided)
    assert_runs_alike(fused.eval(), model.eval(), activate=False)
    assert stages == []


def test_explain_names_the_if_that_ends_a_row():
    reasons = {row.names[0]: row.reason for row in fastcnn.explain(Stopped()) if not row.stage}
    assert reasons["conv1"] == "before if x.sum() > -100"


class Walks(nn.Module):
    """It calls the layers of two rows one by one, and a third as a whole."""

    def __init__(self):
        super().__init__()
        rows = [nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()) for _ in range(3)]
        self.by_index, self.in_a_loop, self.whole = rows

    def forward(self, x):
        seen = []
        for i in range(len(self.by_index)):
            x = self.by_index[i](x)
        for layer in self.in_a_loop:
            x = layer(x)
            seen.append(x)
        return self.whole(x), seen


@pytest.mark.parametrize("input", [None, (1, 3, 9, 9)], ids=["static", "run"])
def test_explain_tells_rows_whose_layers_are_called_one_by_one(input):
    rows = fastcnn.explain(Walks(), input)
    assert [row.names for row in rows if row.stage] == [("whole.0", "whole.1")]
    alone = {row.names[0]: row.reason for row in rows if not row.stage}
    reason = "in Sequential, whose layers a forward calls one by one"
    assert alone == dict.fromkeys(["by_index.0", "by_index.1", "in_a_loop.0", "in_a_loop.1"], reason)


def test_hook_added_after_fuse_runs_its_stage_unfused(stages):
    fused = fastcnn.fuse(Statements())
    seen = []
    handle = fused.conv1.register_forward_hook(lambda _layer, _args, output: seen.append(output))
    fused(image())
    assert stages == [POOL, CONV]
    assert [output.shape for output in seen] == [(2, 4, 8, 8)]
    handle.remove()
    fused(image())
    assert stages[2:] == [CONV_POOL, CONV]


def test_hook_there_when_fused_goes_away_later(stages):
    model = Statements()
    handle = model.conv1.register_forward_hook(lambda *_: None)
    fused = fastcnn.fuse(model)
    handle.remove()
    fused(image())
    assert stages == [CONV_POOL, CONV]


def test_swapped_layer_counts(stages):
    fused = fastcnn.fuse(Statements())
    fused.relu = nn.Sigmoid()
    expected = torch.sigmoid(fused.conv2(F.max_pool2d(torch.sigmoid(fused.conv1(image())), 2)))
    torch.testing.assert_close(fused(image()), expected)
    assert stages == [POOL]


@pytest.mark.parametrize(
    "change",
    [
        lambda conv: prune.l1_unstructured(conv, "weight", amount=0.5),
        lambda conv: parametrizations.weight_norm(conv),
        lambda conv: setattr(conv, "stride", (2, 2)),
        lambda conv: conv.weight.data.zero_(),
    ],
    ids=["pruned", "parametrized", "another stride", "another weight"],
)
def test_layer_changed_in_place_after_fuse_counts(change):
    fused, model = pair(Statements)
    for each in (fused, model):
        change(each.conv1)
    assert_runs_alike(fused, model)


class Reads(Layers):
    def forward(self, x):
        x = F.dropout(F.relu(self.fc(x)), p=self.p, training=self.training)
        if random.random() < self.p:
            x = x + 1
        self.calls = getattr(self, "calls", 0) + 1
        return x * self.scale


def test_attributes_mode_and_chance_are_read_at_each_call():
    fused = fastcnn.fuse(Reads())
    x = torch.randn(4, 16)
    fused.p = 1.0
    assert fused(x).eq(2).all()
    fused.eval()
    fused.scale, fused.p = 3.0, 0.0
    torch.testing.assert_close(fused(x), 3 * F.relu(fused.fc(x)))
    assert fused.calls == 2


def test_function_replaced_after_fuse_is_called(monkeypatch):
    fused = fastcnn.fuse(Nested())
    monkeypatch.setattr(F, "relu", lambda input: input * 0 + 1)
    assert fused(image()).eq(1).all()
