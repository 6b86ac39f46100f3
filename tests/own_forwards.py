"""Networks that call layers and torch's functions in a forward of their own, and the stages that each runs in."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

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
    with fastcnn.use_backend("torch"):  # the same operations: kernels have their own tests of parity
        mine = run(fused, *args, **kwargs)
    for actual, expected in zip(mine, run(model, *args, **kwargs), strict=True):
        torch.testing.assert_close(actual, expected)
