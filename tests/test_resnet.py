"""Networks with batch norm train as on the stock layers: outputs, gradients, running statistics, step after step."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

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


LARGER = {
    "convnet": (fastcnn.ConvNet, 224),
    "vgg11_bn": (lambda: fastcnn.vgg11_bn(cifar=True, dropout=0.0), 32),
}


def twins(name):
    """Return a fused and a stock model of the same weights, and their input's size."""
    if name == "resnet_cifar":
        fused, stock, size = fastcnn.resnet_cifar(), StockResNet(), 8
        stock.load_state_dict(fused.state_dict())  # strictly: the keys are the same
    elif name in LARGER:
        build, size = LARGER[name]
        fused = build()
        stock = fastcnn.unfuse(copy.deepcopy(fused))
    else:
        stock, size = small_vgg_bn(), 8
        stock.eval()(torch.zeros(1, 3, size, size))  # sets the last layer's size
        stock.train()
        fused = fastcnn.fuse(copy.deepcopy(stock))
    return fused.to(DEVICE), stock.to(DEVICE), size


def train(model, size, *, steps=3):
    """Return what each step sees and leaves: the output, every gradient, the running statistics."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
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


@pytest.mark.parametrize(
    ("backend", "name"),
    [*itertools.product(KERNELS, ("resnet_cifar", "vgg_bn")), *itertools.product(FAST, LARGER)],
)
def test_trains_as_stock_does(backend, name):
    fused, stock, size = twins(name)
    exact = train(copy.deepcopy(stock).double(), size)
    with fastcnn.use_backend(backend):
        ours = train(fused, size)
    for mine, theirs, truth in zip(ours, train(stock, size), exact, strict=True):
        assert mine.dtype == theirs.dtype
        # Rounding differences of one layer pass through all that follow; a wrong factor shows at 1e-1.
        assert error(mine, truth) <= 4 * error(theirs, truth) + 1e-5 * truth.double().norm().item() + 1e-7
    assert all(b == 3 for key, b in fused.named_buffers() if key.endswith("num_batches_tracked"))


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
