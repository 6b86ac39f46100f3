"""fuse on networks whose modules refer to themselves and to each other besides their children."""

import copy
import functools
import importlib
import logging
import pickle
import weakref
from collections import OrderedDict, deque

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastcnn


class Block(nn.Module):
    """It runs fused, so that fuse makes another module of it, and depends on its mode and on an attribute."""

    def __init__(self, channels=3):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(channels, 4, 3, padding=1), 1.0

    def forward(self, x):
        return self.drop(F.relu(self.conv(x)))

    def drop(self, x, p=0.5):
        return F.dropout(x, p, self.training) * self.gain


class InAList(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Block(), Block(4)
        self.blocks = [self.first, [self.second]]

    def forward(self, x):
        return self.blocks[1][0](self.blocks[0](x))


class InATupleAndASet(InAList):
    def __init__(self):
        super().__init__()
        self.blocks = ({self.first}, {"second": (self.second,)})

    def forward(self, x):
        (first,) = self.blocks[0]
        return self.blocks[1]["second"][0](first(x))


class MethodInADict(Block):
    def __init__(self):
        super().__init__()
        self.heads = OrderedDict(drop=self.drop)

    def forward(self, x):
        return self.heads["drop"](F.relu(self.conv(x)))


class Partial(Block):
    def __init__(self):
        super().__init__()
        self.head = functools.partial(self.drop, p=0.25)
        self.other = functools.partial(Block.drop, self, p=0.25)

    def forward(self, x):
        return self.head(F.relu(self.conv(x))) + self.other(x).mean()


class Child(nn.Module):
    def __init__(self, parent):
        super().__init__()
        self.__dict__["parent"] = parent

    def forward(self, x):
        return self.get().drop(x)

    def get(self):
        return self.parent


class BackReference(Block):
    def __init__(self):
        super().__init__()
        self.child = Child(self)

    def forward(self, x):
        return self.child(F.relu(self.conv(x)))


class WeakChild(Child):
    def __init__(self, parent):
        super().__init__(weakref.ref(parent))

    def get(self):
        return self.parent()


class WeakBackReference(BackReference):
    def __init__(self):
        super().__init__()
        self.child = WeakChild(self)


class Cycle(Block):
    def __init__(self):
        super().__init__()
        self.members = [self]
        self.members.append(self.members)

    def forward(self, x):
        return self.members[1][0].drop(F.relu(self.conv(x)))


class HookOfItsOwn(nn.Module):
    """The usual extractor of features: a hook, on a layer or a block, leaves them on the network."""

    def __init__(self):
        super().__init__()
        self.block = Block()
        self.last = nn.Conv2d(4, 4, 1)
        self.block.register_forward_hook(self.save)
        self.last.register_forward_pre_hook(functools.partial(self.save, output=None))

    def save(self, _layer, inputs, output):
        if output is None:
            self.before = inputs[0]
        else:
            self.feature = output

    def forward(self, x):
        return self.last(self.block(x)) + self.feature.mean() + self.before.mean()


class Once(HookOfItsOwn):
    """Its hook takes itself away."""

    def __init__(self):
        super().__init__()
        self.handle = self.block.register_forward_hook(self.mark)

    def mark(self, _layer, _inputs, output):
        self.handle.remove()
        return output + 1


FOLLOWED = [
    InAList,
    InATupleAndASet,
    MethodInADict,
    Partial,
    BackReference,
    WeakBackReference,
    Cycle,
    HookOfItsOwn,
    Once,
]


class ClosureHook(HookOfItsOwn):
    def __init__(self):
        super().__init__()

        def save(_layer, _inputs, output):
            self.feature = output

        self.block.register_forward_hook(save)


class Lambda(Block):
    def __init__(self):
        super().__init__()
        self.head = lambda x: self.drop(x)

    def forward(self, x):
        return self.head(F.relu(self.conv(x)))


class Default(Lambda):
    def __init__(self):
        super().__init__()
        self.head = lambda x, owner=self: owner.drop(x)


class Head:
    def __init__(self, owner):
        self.owner = owner

    def __call__(self, x):
        return self.owner.drop(x)


class InAnObject(Lambda):
    def __init__(self):
        super().__init__()
        self.head = Head(self)


class InADeque(Lambda):
    def __init__(self):
        super().__init__()
        self.heads = deque([self.drop])

    def forward(self, x):
        return self.heads[0](F.relu(self.conv(x)))


class ByProxy(BackReference):
    def __init__(self):
        super().__init__()
        self.child = Child(weakref.proxy(self))


class HookOfAParameter(Block):
    """Its gradients depend on its mode."""

    def __init__(self):
        super().__init__()
        self.conv.weight.register_hook(self.scale)

    def scale(self, gradient):
        return gradient * 2 if self.training else gradient

    def drop(self, x):
        return x


LEFT = {
    ClosureHook: "ClosureHook.__init__.<locals>.save",
    Lambda: "Lambda.__init__.<locals>.<lambda>",
    Default: "Default.__init__.<locals>.<lambda>",
    InAnObject: "an object of class Head",
    InADeque: "an object of class deque",
    ByProxy: "an object of class CallableProxyType",
    HookOfAParameter: "an object of class Parameter",
}


def name(network):
    return network.__name__


each_network = pytest.mark.parametrize("network", [*FOLLOWED, *LEFT], ids=name)


def run(model):
    """The output, and the gradient of each parameter, for an image of a number of its own."""
    torch.manual_seed(0)
    model.zero_grad()
    outputs = [model(torch.randn(2, 3, 6, 6)) for _ in range(2)]
    torch.stack(outputs).square().sum().backward()
    return [*outputs, *(parameter.grad.clone() for parameter in model.parameters())]


def assert_runs_as(model, stock):
    for actual, expected in zip(run(model), run(stock), strict=True):
        torch.testing.assert_close(actual, expected)


def twins(network):
    torch.manual_seed(0)
    model = network()
    stock = network()
    stock.load_state_dict(model.state_dict())
    return model, stock


@each_network
def test_fused_network_sees_itself(network):
    model, stock = twins(network)
    fused = fastcnn.fuse(model)
    assert_runs_as(fused.eval(), stock.eval())
    assert_runs_as(fused.train(), stock.train())
    for each in (fused, stock):
        each.gain = 3.0
    assert_runs_as(fused, stock)


@each_network
def test_original_sees_itself_as_before(network):
    model, stock = twins(network)
    fused = fastcnn.fuse(model)
    if fused is not model:
        fused.eval().gain = 3.0
    assert_runs_as(model, stock)


@each_network
def test_fused_after_a_run_keeps_nothing_of_it(network):
    model, stock = twins(network)
    assert_runs_as(model, stock)
    assert_runs_as(fastcnn.fuse(model), stock)
    assert_runs_as(fastcnn.unfuse(fastcnn.fuse(model)).eval(), stock.eval())


@pytest.mark.parametrize("network", [each for each in FOLLOWED if each not in (WeakBackReference, Cycle)], ids=name)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copy_of_the_fused_network_sees_itself(network, duplicate):
    model, stock = twins(network)
    assert_runs_as(duplicate(fastcnn.fuse(model)).eval(), duplicate(stock).eval())


@pytest.mark.parametrize("network", FOLLOWED, ids=name)
def test_references_do_not_keep_a_network_from_being_fused(network):
    model = network()
    assert fastcnn.fuse(model) is not model
    assert any(row.stage for row in fastcnn.explain(model))


@pytest.mark.parametrize("network", LEFT, ids=name)
def test_what_cannot_be_followed_stays_as_it_is_and_log_and_explain_say_why(network, caplog, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastcnn.fuse"), "_said", set())
    model = network()
    with caplog.at_level(logging.INFO, "fastcnn"):
        assert fastcnn.fuse(model) is model
    assert "fuse runs" not in caplog.text
    assert "fuse leaves" in caplog.text
    rows = fastcnn.explain(model)
    assert not any(row.stage for row in rows)
    assert LEFT[network] in caplog.text
    assert any(LEFT[network] in row.reason for row in rows)


def test_rest_of_a_network_is_fused_around_what_is_left():
    model = nn.ModuleList([Block(), Lambda()])
    fused = fastcnn.fuse(model)
    assert fused[0] is not model[0]
    assert fused[1] is model[1]
    assert sum(bool(row.stage) for row in fastcnn.explain(fused)) == 1


def test_part_of_a_network_stays_where_the_whole_refers_to_it():
    whole = BackReference()
    part = whole.child
    part.block = Block()
    assert fastcnn.fuse(part) is part


def test_lists_without_modules_are_shared():
    model = Block()
    model.seen, model.hooked = [], []
    model.conv.register_forward_hook(lambda *_: model_hooked.append(1))
    model_hooked = model.hooked
    fused = fastcnn.fuse(model)
    assert fused.seen is model.seen
    assert fused.conv is model.conv
    fused(torch.randn(1, 3, 4, 4))
    assert model.hooked == [1]


def test_layer_that_refers_to_the_network_shares_its_parameters():
    model = HookOfItsOwn()
    fused = fastcnn.fuse(model)
    assert fused.last is not model.last
    assert fused.last.weight is model.last.weight
    fused.double()
    assert model.last.weight.dtype is torch.float64
