"""Networks with batch norm train as on the stock layers: outputs, gradients, running statistics, step after step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from parity import DRAWS, assert_within_twice
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcnn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class StockBlock(nn.Module):
    """A basic block written down anew in stock layers."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
        )
        changes = stride > 1 or in_channels != out_channels
        projection = (nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))
        self.shortcut = nn.Sequential(*projection) if changes else nn.Identity()

    def forward(self, x):
        return F.relu(self.layers(x) + self.shortcut(x))


class StockResNet(nn.Module):
    """Section 4.2's network with n = 2, in stock layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        table = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)]
        self.blocks = nn.Sequential(*(StockBlock(*row) for row in table))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.avgpool(self.blocks(self.stem(x))).flatten(1))


def small_vgg_bn():
    layers = []
    for before, after in ((3, 6), (6, 8)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
        layers += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(5))


def twins(name):
    """Return a fused and a stock model of the same weights, and their input's size."""
    if name == "resnet_cifar":
        fused, stock, size = fastcnn.resnet_cifar(), StockResNet(), 8
        stock.load_state_dict(fused.state_dict())  # strictly: the keys are the same
    else:
        stock, size = small_vgg_bn(), 8
        stock.eval()(torch.zeros(1, 3, size, size))  # sets the last layer's size
        stock.train()
        fused = fastcnn.fuse(copy.deepcopy(stock))
    return fused.to(DEVICE), stock.to(DEVICE), size


class Closest(TorchDispatchMode):
    """Note how close a ReLU's input came to zero, or two values of a pool's window to each other.

    Where they are closer than rounding, a gradient takes one way or the other by chance.
    """

    gap = float("inf")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten.relu, torch.ops.aten.relu_):
            self.gap = min(self.gap, args[0].abs().min().item())
        if function.overloadpacket is torch.ops.aten.max_pool2d_with_indices:
            first, second = largest_two(args[0], args[1][0])
            self.gap = min(self.gap, (first - second)[first > 0].min().item())
        return function(*args, **(kwargs or {}))


def largest_two(x, window):
    """Return the two largest values of each window of `window` x `window` pixels that touches no other."""
    windows = x.unfold(2, window, window).unfold(3, window, window).flatten(4)
    return windows.topk(2).values.unbind(-1)


def train(model, size, seed, *, steps=3):
    """Return what each step sees and leaves: the output, every gradient, the running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        output = model(torch.randn(4, 3, size, size, generator=generator, dtype=torch.float32).to(seen_type(model)))
        optimizer.zero_grad()
        F.cross_entropy(output, torch.arange(4, device=DEVICE)).backward()
        seen += [output.detach(), *(p.grad.clone() for p in model.parameters()), *(b.clone() for b in model.buffers())]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        seen.append(model(torch.randn(4, 3, size, size, generator=generator).to(seen_type(model))))
    return seen


def seen_type(model):
    return next(model.parameters())


def error(actual, exact):
    return (actual.double() - exact.double()).norm().item()


KERNELS = [name for name in ("triton", "cpu", "cuda") if fastcnn.backends()[name].available]
FAST = [name for name in KERNELS if DEVICE == "cuda" or name == "cpu"]  # neither interpreted nor played


@pytest.mark.parametrize("name", ["resnet_cifar", "vgg_bn"])
@pytest.mark.parametrize("backend", KERNELS)
def test_trains_as_stock_does(backend, name):
    fused, stock, size = twins(name)
    for seed in itertools.count():
        with Closest() as closest:
            exact = train(copy.deepcopy(stock).double(), size, seed)
        if closest.gap > 1e-5:  # more than rounding adds up to
            break
    with fastcnn.use_backend(backend):
        ours = train(fused, size, seed)
    for mine, theirs, truth in zip(ours, train(stock, size, seed), exact, strict=True):
        assert mine.dtype == theirs.dtype
        # Rounding differences of one layer pass through all that follow; a wrong factor shows at 1e-1.
        assert error(mine, truth) <= 4 * error(theirs, truth) + 1e-5 * truth.double().norm().item() + 1e-7
    assert all(b == 3 for key, b in fused.named_buffers() if key.endswith("num_batches_tracked"))


LARGER = {
    "convnet": (fastcnn.ConvNet, 224),
    "vgg11_bn": (lambda: fastcnn.vgg11_bn(cifar=True, dropout=0.0), 32),
}


def convolutions_with_inputs(model, images):
    """Return each convolution, norm, ReLU and, where one follows, pool, and what the stock network hands them."""
    layers = [layer for layer in model.modules() if not list(layer.children())]
    starts = [number for number, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    rows = [layers[start : start + 3 + isinstance(layers[start + 3], nn.MaxPool2d)] for start in starts]
    inputs = {}
    for row in rows:
        row[0].register_forward_pre_hook(lambda layer, given: inputs.update({layer: given[0].detach().clone()}))
    with fastcnn.use_backend("torch"):
        model(images)
    return [(copy.deepcopy(nn.Sequential(*row)), inputs[row[0]]) for row in rows]


def decided(row, x):
    """Return where an output's gradient takes the same way whatever the rounding."""
    z = row[1](row[0](x))
    if len(row) == 3:
        return z.abs() > 1e-4
    first, second = largest_two(z, row[3].kernel_size)
    return ((first - second) > 1e-4) & (first > 1e-4) | (first < -1e-4)


def step(row, x, cotangents):
    """Return the output, every gradient for each cotangent, and the running statistics afterwards."""
    x = x.clone().requires_grad_()
    leaves, y = [x, *row.parameters()], row(x)
    draws = [torch.autograd.grad(y, leaves, each.to(y), retain_graph=True) for each in cotangents]
    return [y.detach(), *map(torch.stack, zip(*draws, strict=True)), row[1].running_mean, row[1].running_var]


@pytest.mark.parametrize("name", LARGER)
@pytest.mark.parametrize("backend", FAST)
def test_stages_of_larger_networks_train_as_stock_ones_do(backend, name):
    """Stage by stage: in a whole network of this size some ReLU's input or pool's window is decided by rounding."""
    build, size = LARGER[name]
    model = fastcnn.unfuse(build()).to(DEVICE)
    for row, x in convolutions_with_inputs(model, torch.randn(4, 3, size, size, device=DEVICE)):
        sure = decided(copy.deepcopy(row).double(), x.double())
        assert sure.double().mean() > 0.99
        cotangents = [torch.randn(sure.shape, device=DEVICE) * sure for _ in range(DRAWS)]
        with fastcnn.use_backend(backend):
            ours = step(fastcnn.fuse(copy.deepcopy(row)), x, cotangents)
        exact, stock = step(copy.deepcopy(row).double(), x.double(), cotangents), step(row, x, cotangents)
        names = ["output", "input", *dict(row.named_parameters()), "running mean", "running variance"]
        for what, *each in zip(names, ours, stock, exact, strict=True):
            assert_within_twice(*each, f"{row[0]}: {what}")


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    weight = fastcnn.resnet_cifar().blocks[5].layers[0].weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_sums_run_fused_and_unfuse_undoes_it(stages):
    model, x = fastcnn.resnet_cifar().eval(), torch.randn(2, 3, 16, 16)
    assert [row.stage for row in fastcnn.explain(model)].count("add+relu") == 6
    scores = model(x)
    assert stages.count("add_relu") == 6
    stages.clear()
    stock = fastcnn.unfuse(model)
    torch.testing.assert_close(stock(x), scores)
    assert stages == []
    torch.testing.assert_close(torch.jit.script(stock)(x), scores)


def test_traced_model_holds_torchs_operators():
    model = fastcnn.resnet_cifar().eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        traced, scripted = torch.fx.symbolic_trace(model), torch.jit.trace(model, x)
        for each in (traced, scripted):
            torch.testing.assert_close(each(x), model(x))
    assert "fastcnn" not in traced.code
