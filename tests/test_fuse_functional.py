"""fuse on networks that call their layers and torch's functions in a forward of their own."""

import copy
import importlib
import logging
import pickle
import random
import re
from types import FunctionType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import fastcnn

CONV, CONV_POOL, POOL, LINEAR = "conv2d_relu", "conv2d_relu_max_pool2d", "max_pool2d", "linear_relu"


class Layers(nn.Module):
    """The layers that the networks below call, each in its own way."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 5)
        self.relu, self.pool, self.norm = nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.LocalResponseNorm(3)
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(2))
        self.body = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.ReLU(), nn.MaxPool2d(2)])
        self.p, self.scale = 0.5, 2.0


class Nested(Layers):
    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(torch.relu(self.conv2(x)), kernel_size=(2, 2), stride=2)
        return F.relu(self.fc(torch.flatten(x, 1)))


class Statements(Layers):
    def forward(self, x):
        x = self.conv1(x)
        x = self.relu(x)
        x = self.pool(x)
        out = self.conv2(x)
        activated = self.relu(out)
        return activated  # noqa: RET504


class Annotated(Layers):
    def forward(self, x):
        y: torch.Tensor = self.conv1(x)
        z: torch.Tensor = F.relu(y)
        for layer in self.body:
            z: torch.Tensor = layer(z)
        out: torch.Tensor = self.conv2(z)
        out += z
        return F.relu(out)


class Methods(Layers):
    def forward(self, x):
        return self.conv2(self.conv1(x).relu()).relu_()


class Helper(Layers):
    def forward(self, x):
        return self._features(x)

    def _features(self, x):
        x = self.norm(x)
        return F.max_pool2d(x, 2)


class Loops(Layers):
    def forward(self, x):
        x = self.conv1(x)
        for conv in self.convs:
            x = F.relu(conv(x))
        for i in range(2):
            x = F.relu(self.convs[i](x))
        for layer in self.body:
            x = layer(x)
        return x


class Residual(Layers):
    def forward(self, x):
        x = self.conv1(x)
        identity = x
        out = self.relu(self.conv2(x))
        out = self.conv2(out)
        out += identity
        return self.relu(out)


class Branches(Layers):
    def forward(self, x, times=1, *, both=False):
        if x.sum() > 0:
            x = F.relu(self.conv1(x)) * self.scale
        else:
            x = F.relu(self.conv1(-x))
        for _ in range(times):
            x = F.relu(self.conv2(x))
        parts = [F.relu(self.conv2(x)), self.conv2(x)]
        return (x, torch.cat(parts, 1)) if both else torch.cat(parts, 1)


class Inherits(Nested):
    def forward(self, x):
        return super().forward(x).softmax(1)


class InheritsTwice(Inherits):
    def forward(self, image, scale=2.0):
        image = F.relu(super().forward(image)) + super().forward(image)
        return image * scale


class InheritsHelper(Helper):
    def _features(self, x):
        return super()._features(F.relu(self.conv1(x)))


class NamesItsClass(Nested):
    SIZE = 2

    def forward(self, x):
        y = F.max_pool2d(F.relu(self.conv1(x)), NamesItsClass.SIZE)
        return super(NamesItsClass, self).forward(x) + y.mean()  # noqa: UP008


class Optional(Layers):
    """Layers that attributes leave out, as the blocks of many model zoos do."""

    def __init__(self, norm=True, activate=True, pool=False, other=None):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4) if norm else None
        self.activate, self.use_pool, self.other = activate, pool, other

    def forward(self, x):
        x = self.conv1(x)
        if self.bn is not None:
            x = self.bn(x)
        if self.activate and not (self.other or self.scale > 3):
            x = self.relu(x)
        elif self.other:
            x = self.other(x)
        if self.use_pool:
            x = self.norm(x)
            x = F.max_pool2d(x, 2)
        return x


class OptionalResidual(Layers):
    """A block of timm's: what stands between the last layer and the sum may be left out."""

    def __init__(self, attention=None):
        super().__init__()
        self.bn, self.attention, self.downsample = nn.BatchNorm2d(4), attention, nn.Conv2d(3, 4, 1)

    def forward(self, x):
        shortcut = x
        x = self.conv1(x)
        x = self.bn(x)
        if self.attention is not None:
            x = self.attention(x)
        if self.downsample is not None:
            shortcut = self.downsample(shortcut)
        x += shortcut
        x = self.relu(x)
        return x  # noqa: RET504


class NormAndActivation(nn.BatchNorm2d):
    """A batch norm that activates, and may drop: a layer of timm's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        bn_training = True if self.training else (self.running_mean is None) and (self.running_var is None)
        x = F.batch_norm(
            x,
            self.running_mean if not self.training or self.track_running_stats else None,
            self.running_var if not self.training or self.track_running_stats else None,
            self.weight,
            self.bias,
            bn_training,
            self.momentum,
            self.eps,
        )
        x = self.drop(x)
        x = self.act(x)
        return x  # noqa: RET504


class Normalized(Layers):
    def __init__(self):
        super().__init__()
        self.bn1, self.bn2, self.bn3 = NormAndActivation(4), NormAndActivation(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.bn2(F.avg_pool2d(self.bn1(self.conv1(x)), 2)).sigmoid()
        x = F.batch_norm(x, self.bn3.running_mean, self.bn3.running_var, training=self.training)
        return F.max_pool2d(F.relu(x), 2)


class Undecided(Layers):
    """Layers that the mode or an argument of a call leave out."""

    def forward(self, x, activate=True):
        x = self.conv1(x)
        if activate:
            x = F.relu(x)
        x = self.conv2(x)
        if self.training:
            x = x.relu()
        return x


class Stopped(Layers):
    """An ``if`` that looks at the value, does more than call layers, or calls a function to decide."""

    def forward(self, x):
        x = self.conv1(x)
        if x.sum() > -100:
            x = F.relu(x)
        y = self.conv2(x)
        if self.scale:
            self.seen = True
            y = F.relu(y)
        y = self.conv2(y)
        if bool(self.scale):
            y = F.relu(y)
        return y


class KeptValue(Layers):
    """Each value between conv and ReLU is looked at again."""

    def forward(self, x):
        before = self.conv1(x)
        after = F.relu(before)
        y = self.conv2(after)
        z = F.relu(y)
        return before.sum() + z + y


class Twice(Layers):
    def forward(self, x):
        x = F.relu(self.conv1(x))
        x = F.relu(self.conv2(x))
        return F.relu(self.conv2(x))


class Lookalikes(Layers):
    """What looks like a stage and is none: other functions of those names, other arguments, values used in between."""

    def forward(self, x):
        x = F.relu(F.relu(self.conv1(x)) + 1)
        x = F.relu6(self.conv2(x))
        y = self.conv2(x)
        x = F.relu(x)
        values, indices = F.max_pool2d(x, 2, return_indices=True)
        return F.max_unpool2d(values, indices, 2) + y


class Captured(Layers):
    """The value between is read later by a function that captures it, or deleted, or left by an exception."""

    def forward(self, x):
        x = self.conv1(x)
        y = self.conv2(x)
        late = lambda: y  # noqa: E731
        y = F.relu(y)
        try:
            z = self.conv2(x)
            z = F.max_pool2d(F.relu(z), 99)
        except RuntimeError:
            z = z * 2
        return late() + z


NETWORKS = {
    Nested: [CONV_POOL, CONV_POOL, LINEAR],
    Statements: [CONV_POOL, CONV],
    Annotated: [CONV, CONV_POOL, "add_relu"],
    Methods: [CONV, CONV],
    Helper: ["local_response_norm_max_pool2d"],
    Loops: [CONV, CONV, CONV, CONV, CONV_POOL],
    Residual: [CONV, "add_relu"],
    Branches: [CONV, CONV, CONV],
    Inherits: [CONV_POOL, CONV_POOL, LINEAR],
    InheritsTwice: [CONV_POOL, CONV_POOL, LINEAR] * 2,
    InheritsHelper: [CONV, "local_response_norm_max_pool2d"],
    NamesItsClass: [CONV_POOL, CONV_POOL, CONV_POOL, LINEAR],
    Optional: ["batch_norm_relu"],
    OptionalResidual: ["add_relu"],
    Normalized: ["batch_norm_relu", "batch_norm_relu", "batch_norm_relu_max_pool2d"],
    Undecided: [CONV, CONV],
    Stopped: [],
    KeptValue: [],
    Twice: [CONV, CONV, CONV],
    Lookalikes: [CONV, POOL],
    Captured: [],
}


def pair(network):
    """Return a network fused, and the same left stock."""
    model = network()
    return fastcnn.fuse(copy.deepcopy(model)), model


each_network = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)


def image(size=8):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def run(model, *args, **kwargs):
    """Outputs, and the gradients of the input and of every parameter that has one."""
    torch.manual_seed(0)
    model.zero_grad()
    x = image().requires_grad_()
    output = model(x, *args, **kwargs)
    outputs = output if isinstance(output, tuple) else (output,)
    sum(each.square().sum() for each in outputs).backward()
    return [*outputs, x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_runs_alike(fused, model, *args, **kwargs):
    for actual, expected in zip(run(fused, *args, **kwargs), run(model, *args, **kwargs), strict=True):
        torch.testing.assert_close(actual, expected)


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


def test_arguments_and_several_outputs_go_through():
    fused, model = pair(Branches)
    assert_runs_alike(fused, model, 3, both=True)
    assert_runs_alike(fused, model, times=0)


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
