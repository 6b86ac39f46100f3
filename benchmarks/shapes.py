"""Which stages the models contain, at which shapes: the models themselves are asked, on the meta device."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastcnn
from fastcnn import stages as fused
from fastcnn.models import MODELS, ModelEntry
from fastcnn.models.resnet import BasicBlock
from fastcnn.roles import ROLES

Shape = tuple[int, ...]


class Layer(NamedTuple):
    """A layer as a run met it: its name in the model, itself, and the shapes that went in and came out."""

    name: str
    module: nn.Module
    input: Shape
    output: Shape


class Stage(NamedTuple):
    """Layers in a row that run as one.

    `activation` is the shape before the pool, which stock writes out and a fused stage does not; `first` says that
    nothing trainable precedes, so that backward needs no gradient of the input; `frozen` that a batch norm takes its
    running statistics, in training too.
    """

    stem: str
    model: str
    layers: tuple[Layer, ...]
    first: bool = False
    frozen: bool = False

    @property
    def input(self) -> Shape:
        return self.layers[0].input

    @property
    def output(self) -> Shape:
        return self.layers[-1].output

    @property
    def activation(self) -> Shape:
        return self.layers[-2].output if self.pool and len(self.layers) > 1 else self.output

    @property
    def weight(self) -> Shape | None:
        """(C_out, C_in / groups, KH, KW) of a convolution, (out, in) of a linear layer, None without a product."""
        layer = self.layers[0].module
        return tuple(layer.weight.shape) if isinstance(layer, (nn.Conv2d, nn.Linear)) else None

    @property
    def bytes(self) -> bool:
        """Whether its input is images of one byte a value, to be normalized."""
        return self.stem.startswith("normalize")

    @property
    def convolution(self) -> dict[str, Any]:
        """The keywords of a convolution, as `torch.nn.functional.conv2d` names them; empty where there is none."""
        conv = self.layers[0].module
        names = ("stride", "padding", "dilation", "groups") if isinstance(conv, nn.Conv2d) else ()
        return {name: getattr(conv, name) for name in names}

    @property
    def norm(self) -> dict[str, Any]:
        """The keywords of an LRN, as `torch.nn.functional.local_response_norm` names them."""
        lrn = self.layers[0].module
        names = ("size", "alpha", "beta", "k") if isinstance(lrn, nn.LocalResponseNorm) else ()
        return {name: getattr(lrn, name) for name in names}

    @property
    def batch_norm(self) -> dict[str, Any]:
        """The keywords of a batch norm, as `torch.nn.functional.batch_norm` names them."""
        norm = self.layers[0].module
        if not isinstance(norm, nn.BatchNorm2d):
            return {}
        return {"training": not self.frozen, "momentum": norm.momentum, "eps": norm.eps}

    @property
    def pool(self) -> dict[str, Any]:
        """The keywords of a max-pool, as `torch.nn.functional.max_pool2d` names them."""
        pool = self.layers[-1].module
        names = ("kernel_size", "stride", "padding", "ceil_mode") if isinstance(pool, nn.MaxPool2d) else ()
        return {name: getattr(pool, name) for name in names}

    @property
    def pool_of_stage(self) -> dict[str, Any]:
        """The same, as the functions of fused stages name them."""
        return {f"pool_{name.removeprefix('kernel_')}": value for name, value in self.pool.items()}

    @property
    def key(self) -> tuple[Any, ...]:
        """What two stages share that are the same work."""
        settings = (self.convolution, self.norm, self.batch_norm, self.pool)
        return (self.stem, self.input, self.weight, self.first, *(tuple(each.items()) for each in settings))

    @property
    def case(self) -> str:
        """One line for people: where it comes from, and its numbers."""
        parts = [f"{self.model} {self.layers[0].name} {_times(self.input)}"]
        if self.weight:
            parts[0] += f" -> {self.weight[0]}"
        if self.convolution:
            parts.append(
                _times((self.weight or ())[2:]) + _unless(self.convolution, stride="/", padding=" pad ", groups=" g ")
            )
        if self.bytes:
            parts.append("bytes")
        if self.norm:
            parts.append(f"lrn {self.norm['size']}")
        if self.frozen:
            parts.append("running statistics")
        if self.pool:
            parts.append(f"pool {_one(self.pool['kernel_size'])}/{_one(self.pool['stride'])}")
        return ", ".join(parts)


def _times(shape: Any) -> str:
    return "x".join(map(str, shape))


def _one(value: Any) -> str:
    """Write a pair of equal numbers as one."""
    values = value if isinstance(value, tuple) else (value,)
    return _times(sorted(set(values)) if len(set(values)) == 1 else values)


def _unless(settings: Mapping[str, Any], **signs: str) -> str:
    """Write the settings that are not torch's defaults, each after its sign."""
    default = {"stride": "1", "padding": "0", "groups": "1"}
    return "".join(sign + _one(settings[name]) for name, sign in signs.items() if _one(settings[name]) != default[name])


class AddReLU(nn.Module):
    """Stands for the sum and the ReLU that end a residual block, which are no layer of the model."""


_NAMES: dict[tuple[str, ...], str] = {("pool",): "max_pool"}  # of stages that are not named by their roles
_STEMS: dict[tuple[str, ...], str] = {each.roles: _NAMES.get(each.roles, "_".join(each.roles)) for each in fused.STAGES}
# The layers that an op can serve by itself, also where a model would run them within a longer stage.
_SINGLE: dict[tuple[str, ...], str] = {
    row: stem for row, stem in _STEMS.items() if row[0] in ("lrn", "pool") and len(row) == 1
}
_NORMS = {row: stem for row, stem in _STEMS.items() if row[0] == "bn"}
_DROPOUTS = {row: stem for row, stem in _STEMS.items() if "dropout" in row}
TABLES = {stem: table for table in (_SINGLE, _NORMS, _DROPOUTS) for stem in table.values()}
# What is in none of a model's own (dropout, the averages before the classifier, which leave 224x224 images as they are)
# costs next to nothing and is not counted.
_MODELS = {row: stem for row, stem in _STEMS.items() if row[0] in ("conv", "lrn", "pool", "linear")}
STAGES = {row: stem for row, stem in _MODELS.items() if row not in _DROPOUTS}
STAGES |= {("add relu",): "add_relu", ("linear",): "linear"}


def _role(module: nn.Module) -> str:
    return "add relu" if isinstance(module, AddReLU) else ROLES.get(type(module).forward, "")


def tiny() -> nn.Sequential:
    """Build a network of every stage on 4x8x8 images: what a call costs, next to which its arithmetic is nothing."""
    return nn.Sequential(
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()),
        *(nn.LocalResponseNorm(5, k=2.0), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 16), nn.ReLU()),
    )


ENTRIES = MODELS | {"tiny": ModelEntry(tiny, (4, 8, 8))}


@functools.cache
def layers(model: str, batch: int) -> tuple[Layer, ...]:
    """Return the layers of a model of `ENTRIES` in the order in which they run.

    Example:
        >>> [layer.input for layer in layers("mnist_cnn", 100)][0]
        (100, 1, 28, 28)
    """
    seen: list[Layer] = []
    entry = ENTRIES[model]
    with torch.device("meta"):
        network = fastcnn.unfuse(entry.build()).eval()
        image = torch.empty(batch, *entry.input_size)
    for name, module in network.named_modules():
        if not list(module.children()) or isinstance(module, BasicBlock):
            module.register_forward_hook(functools.partial(_note, seen, name))
    with torch.no_grad():
        network(image)
    return tuple(seen)


def _note(seen: list[Layer], name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if isinstance(module, BasicBlock):  # which ends with the sum
        module, inputs = AddReLU(), (output,)
    seen.append(Layer(name, module, tuple(inputs[0].shape), tuple(output.shape)))


def stages(model: str, batch: int, table: Mapping[tuple[str, ...], str] = STAGES) -> tuple[Stage, ...]:
    """Return the stages of a model's run: the longest rows of layers that the table knows.

    Example:
        >>> [stage.stem for stage in stages("mnist_cnn", 100)]
        ['conv_relu_pool', 'conv_relu_pool', 'linear_relu', 'linear']
    """
    return tuple(_found(model, layers(model, batch), table))


def _found(model: str, run: tuple[Layer, ...], table: Mapping[tuple[str, ...], str]) -> Iterator[Stage]:
    roles = tuple(_role(layer.module) for layer in run)
    start = 0
    while start < len(run):
        match = next((row for row in table if roles[start : start + len(row)] == row), None)
        if match:
            yield Stage(table[match], model, run[start : start + len(match)], first=start == 0)
        start += len(match or " ")


def distinct(batches: Mapping[str, int], stem: str) -> list[Stage]:
    """Return the stages of one stem in the models, each at its model's batch; equal work counts once.

    Those of a batch norm come with the statistics of the batch, and with the running ones. A stem that begins with
    `normalize` is what a model does to bytes: by itself, or with its first convolution. `sgd` is AlexNet's parameters.
    """
    found: dict[Any, Stage] = {}
    for model, batch in batches.items():
        for stage in _of_stem(model, batch, stem):
            for frozen in (False, True) if stage.batch_norm else (False,):
                variant = stage._replace(frozen=frozen)
                found.setdefault(variant.key, variant)
    return [stage for stage in found.values() if stage.stem == stem]


def _of_stem(model: str, batch: int, stem: str) -> Iterator[Stage]:
    """Give stages of a model, those of this stem among them."""
    whole, after = nn.Identity(), stem.removeprefix("normalize_")
    if stem == "normalize":
        images = layers(model, batch)[0].input
        yield Stage(stem, model, (Layer("images", whole, images, images),), first=True)
    elif stem == "sgd" and model == "alexnet":
        with torch.device("meta"):
            count = (sum(parameter.numel() for parameter in ENTRIES[model].build().parameters()),)
        yield Stage(stem, model, (Layer("parameters", whole, count, count),))
    elif after != stem:
        yield from (each._replace(stem=stem) for each in stages(model, batch) if each.first and each.stem == after)
    else:
        yield from stages(model, batch, TABLES.get(stem, STAGES))
