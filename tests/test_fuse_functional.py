"""fuse on networks that call their layers and torch's functions in a forward of their own."""

import copy
import importlib
import logging
import pickle
import re
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from own_forwards import (
    CONV,
    NETWORKS,
    Branches,
    Captured,
    Layers,
    Nested,
    Residual,
    Statements,
    Stopped,
    Twice,
    Undecided,
    assert_runs_alike,
    image,
    pair,
    run,
)
from torch import nn

import fastcnn

each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


@each_network
def test_runs_in_stages_and_computes_the_same(network, stages):
    fused, model = pair(network)
    with fastcnn.use_backend("cpu"):
        run(fused), run(model)
    assert stages == NETWORKS[network]
    assert_runs_alike(fused, model)
    assert_runs_alike(fused.eval(), model.eval())


@each_network
def test_looks_and_copies_as_before(network):
    fused, model = pair(network)
    assert str(fused) == str(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    for copied in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), copy.copy(fused)):
        assert type(copied) is type(fused) is network
        assert_runs_alike(copied, model)
    assert_runs_alike(fastcnn.fuse(fused), model)
    assert vars(fastcnn.unfuse(fused)).keys() == vars(model).keys()


@pytest.mark.parametrize(
    "network", [each for each in NETWORKS if each is not Captured], ids=lambda network: network.__name__
)
def test_is_traced_as_the_layers_that_it_calls(network):
    fused, model = pair(network)
    if network in (Branches, Undecided, Stopped):  # whose way depends on what it is given
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(fused)
        return
    traced, expected = torch.fx.symbolic_trace(fused), torch.fx.symbolic_trace(model)
    assert [(node.op, node.name) for node in traced.graph.nodes] == [
        (node.op, node.name) for node in expected.graph.nodes
    ]
    torch.testing.assert_close(traced(image()), expected(image()))


@pytest.mark.parametrize("network", [Nested, Residual], ids=lambda network: network.__name__)
def test_compiles_without_a_break_and_exports_torch_operators(network, stages):
    torch._dynamo.reset()
    fused = fastcnn.fuse(network())
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_runs_alike(compiled, fused)
    stages.clear()
    exported = torch.export.export(fused, (image(),))
    assert stages == []
    torch.testing.assert_close(exported.module()(image()), fused(image()))


def test_arguments_and_several_outputs_go_through():
    fused, model = pair(Branches)
    assert_runs_alike(fused, model, 3, both=True)
    assert_runs_alike(fused, model, times=0)


class Mangled(Layers):
    __slope = 2.0

    def forward(self, x):
        return F.relu(super().__getattr__("conv1")(x)) + F.relu(self.conv1(x)) * self.__slope


def test_private_names_and_super_work(stages):
    assert_runs_alike(*pair(Mangled))
    assert CONV in stages


def test_variables_around_the_class_are_seen():
    factor = 2.0

    class Local(Layers):
        def forward(self, x):
            return F.relu(self.conv1(x)) * factor

    fused = fastcnn.fuse(Local())
    factor = 3.0
    torch.testing.assert_close(fused(image()), F.relu(fused.conv1(image())) * 3)


class Scaled(nn.Conv2d):
    def forward(self, x, factor=1.0):
        return super().forward(x) * factor


class Arguments(Layers):
    """Calls layers with more than an image, where the layer takes it and where it does not."""

    def __init__(self):
        super().__init__()
        self.mixed = nn.ModuleList([Scaled(4, 4, 1), Scaled(4, 4, 1)])

    def forward(self, x, *more, **named):
        x = F.relu(self.conv1(x, *more, **named))
        x = F.relu(self.mixed[0](x, 2.0))
        for layer in self.mixed:
            x = F.max_pool2d(F.relu(layer(x, factor=3.0)), 2)
        return x


class TooMany(Arguments):
    def forward(self, x):
        return F.max_pool2d(F.relu(self.conv1(x, 2.0)), 2)


class TooManyInALoop(Arguments):
    def forward(self, x):
        for layer in self.convs:
            x = F.relu(layer(x, factor=2.0))
        return x


def test_further_arguments_of_a_layer_reach_it():
    assert_runs_alike(*pair(Arguments))
    for network in (TooMany, TooManyInALoop):
        for each in (network(), fastcnn.fuse(network())):
            with pytest.raises(TypeError, match="argument"):
                each(image())


def test_error_in_forward_shows_the_line_of_the_source():
    class Wrong(Layers):
        def forward(self, x):
            x = F.relu(self.conv1(x))
            return x + self.missing

    with pytest.raises(AttributeError, match="missing") as error:
        fastcnn.fuse(Wrong())(image())
    last = error.traceback[-2]
    assert (last.path.name, str(last.statement).strip()) == ("test_fuse_functional.py", "return x + self.missing")


class InPlaceOnInput(Layers):
    """The sum changes a tensor that others see, so that it must happen in place."""

    def forward(self, x):
        y = x
        y += 1
        return F.relu(y)


def test_sum_in_place_is_seen_by_others():
    x = image()
    fastcnn.fuse(InPlaceOnInput())(x)
    torch.testing.assert_close(x, image() + 1)


class InheritedRow(nn.Sequential):
    """A subclass as torchvision's Conv2dNormActivation: it keeps the forward of nn.Sequential."""


def test_sequential_subclass_that_keeps_its_forward_runs_in_stages(stages):
    fused, model = pair(lambda: InheritedRow(nn.Conv2d(3, 4, 3), nn.ReLU()))
    assert type(fused) is InheritedRow
    assert_runs_alike(fused, model)
    assert stages == [CONV]


class RowOfItsOwn(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x * 2


def test_sequential_subclass_with_a_forward_of_its_own_runs_that(stages):
    assert_runs_alike(*pair(lambda: RowOfItsOwn(nn.Conv2d(3, 4, 3), nn.ReLU())))
    assert stages == [CONV]


def twice(function):
    def call(self, x):
        return function(self, x) * 2

    return call


class Decorated(Layers):
    @twice
    def forward(self, x):
        return F.relu(self.conv1(x))


class InheritsDecorated(Decorated):
    def forward(self, x):
        return super().forward(x) + 1


class LooksAtItself(Layers):
    def forward(self, x):
        hidden = self.conv1(x)
        output = F.relu(hidden)
        return eval("hidden") + output


def made_by_exec():
    names = {"Layers": Layers, "F": F}
    exec("class Unseen(Layers):\n def forward(self, x):\n  return F.relu(self.conv1(x))", names)
    return names["Unseen"]()


def with_another_forward():
    model = Nested()
    model.forward = lambda x: F.relu(model.conv1(x))
    return model


def edited_since():
    """A forward whose code is not that of the lines it points to."""
    code = Twice.forward.__code__
    forward = FunctionType(code.replace(co_names=code.co_names[::-1]), globals(), "forward")
    return type("Edited", (Layers,), {"forward": forward})()


LEFT = {
    "decorated": (Decorated, "as a decorator makes"),
    "inheriting a decorated one": (InheritsDecorated, r"calls super\(\).forward, which is not followed: .* decorator"),
    "looking at its variables": (LooksAtItself, "its forward may read its own variables, by eval"),
    "without a source": (made_by_exec, "source of its forward is not available"),
    "forward on the instance": (with_another_forward, "replaced on the instance"),
    "edited since": (edited_since, "differs from its source file"),
    "traced": (lambda: torch.fx.symbolic_trace(Twice()), "torch.fx"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_cannot_be_read_stays_as_it_is_and_the_log_says_why(case, caplog, monkeypatch):
    build, reason = LEFT[case]
    model = build()
    before = dict(vars(model))
    monkeypatch.setattr(importlib.import_module("fastcnn.fuse"), "_said", set())
    with caplog.at_level(logging.INFO, "fastcnn"):
        fastcnn.fuse(fastcnn.fuse(model))
    assert vars(model) == before
    (message,) = [record.getMessage() for record in caplog.records]
    assert re.search(reason, message)


class InOneLine(Layers):
    def forward(self, x):
        y = F.max_pool2d(F.relu(self.conv1(F.max_pool2d(F.relu(self.conv2(x)), 2))), 2)
        return F.relu(y + F.max_pool2d(F.relu(self.fc(x)), 2))


def test_log_tells_what_was_fused(caplog, monkeypatch):
    monkeypatch.setattr(importlib.import_module("fastcnn.fuse"), "_said", set())
    with caplog.at_level(logging.INFO, "fastcnn"):
        fastcnn.fuse(Statements())
        fastcnn.fuse(InOneLine())
    assert "self.pool(self.relu(self.conv1(x)))" in caplog.text
    inner = "F.max_pool2d(F.relu(self.conv2(x)), 2)"
    assert f"{inner}; F.max_pool2d(F.relu(self.conv1({inner})), 2)" in caplog.text
    assert "F.relu(y + F.max_pool2d(F.relu(self.fc(x)), 2))" in caplog.text
    assert "__fastcnn" not in caplog.text


def test_values_that_a_forward_looks_up_by_name_are_there():
    assert_runs_alike(*pair(LooksAtItself))
