"""Which cells there are: subjects, shapes, modes, dtypes and layouts, with the methods that are compared in each."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

import fastcnn
from benchmarks.shapes import Stage, distinct, stages

GROUPS = {
    "ops": (),
    "alexnet": ("alexnet", "alexnet2012"),
    "vgg": ("vgg16", "vgg11", "vgg19", "vgg16_bn"),
    "small": ("mnist_cnn", "convnet", "resnet_cifar"),
}
BATCHES = (1, 32, 128, 512)
CONVOLUTIONS = ("conv_relu", "conv_relu_pool", "normalize_conv_relu", "normalize_conv_relu_pool")
# Ops with kernels in Triton alone; of the last two, which are no part of a stage, the other backends run torch's.
ON_GPUS = ("linear_relu_dropout", "normalize_conv_relu", "normalize_conv_relu_pool", "normalize", "sgd")
ALONE = ("normalize", "sgd")
# Backends and, for convolutions, their algorithms, as `fastcnn.use_backend` takes them.
FORCED = {
    "cuda": (
        *(("triton", "epilogue"), ("triton", "implicit_gemm"), ("triton", "epilogue+dgrad+wgrad")),
        *(("triton", "packed"), ("triton", "space_to_depth"), ("triton", "tma"), ("triton", "warp_specialized")),
        *(("cuda", "epilogue"), ("cuda", "implicit_gemm"), ("cuda", "direct")),
    ),
    "cpu": (("cpu", None),),
}


# Algorithms that serve a first layer alone, or all but it: no whole model can be forced to them.
OF_SOME_LAYERS = ("direct", "packed", "space_to_depth", "tma", "warp_specialized")


class Variant(NamedTuple):
    """A dtype and a layout; `everywhere` or on headline cells alone."""

    dtype: str
    layout: str
    everywhere: bool = True


class Profile(NamedTuple):
    """What is measured on a kind of device.

    Attributes:
        op_batches: the models whose stages are timed one by one, at which batch.
        op_variants: their dtypes and layouts, the main one first.
        op_headlines: stem, model and first layer of the stages that a report shows first.
        model_batches: whole models and their batches.
        model_variants: their dtypes and layouts, the main one first.
        model_headlines: the models and batches that a report shows first.
        minutes: how long a run goes on starting new work.
    """

    op_batches: dict[str, int]
    op_variants: tuple[Variant, ...]
    op_headlines: frozenset[tuple[str, str, str]]
    model_batches: dict[str, tuple[int, ...]]
    model_variants: tuple[Variant, ...]
    model_headlines: frozenset[tuple[str, int]]
    minutes: float


PROFILES = {
    "cuda": Profile(
        op_batches={
            "alexnet": 128,
            "vgg16": 64,
            "alexnet2012": 128,
            "mnist_cnn": 100,
            **dict.fromkeys(("vgg11", "vgg19", "vgg16_bn", "vgg11_lrn"), 64),
            "convnet": 128,
            "resnet_cifar": 128,
            "tiny": 1,
        },
        op_variants=(
            Variant("bfloat16", "channels_last"),
            Variant("float32", "nchw"),
            Variant("bfloat16", "nchw", everywhere=False),
            Variant("float32", "channels_last", everywhere=False),
        ),
        op_headlines=frozenset(
            {
                ("max_pool", "alexnet", "features.2"),
                ("max_pool", "vgg16", "features.4"),
                ("conv_relu", "vgg16", "features.0"),
                ("conv_relu", "vgg16", "features.12"),
                ("conv_relu", "vgg16", "features.24"),
                ("conv_relu_pool", "alexnet", "features.0"),
                ("conv_relu_pool", "vgg16", "features.2"),
                ("lrn", "alexnet2012", "features.2"),
                ("lrn_pool", "alexnet2012", "features.2"),
                ("linear_relu", "alexnet", "classifier.1"),
                ("bn_relu", "vgg16_bn", "features.1"),
                ("bn_relu_pool", "vgg16_bn", "features.4"),
                ("add_relu", "resnet_cifar", "blocks.0"),
            }
        ),
        model_batches={
            **dict.fromkeys(
                ("alexnet", "alexnet2012", "vgg11", "vgg19", "vgg16_bn", "convnet", "resnet_cifar"), BATCHES
            ),
            "vgg16": (*BATCHES, 64),
            "mnist_cnn": (*BATCHES, 100),
        },
        model_variants=(Variant("bfloat16", "channels_last"), Variant("float32", "channels_last")),
        model_headlines=frozenset({("alexnet", 128), ("alexnet2012", 128), ("vgg16", 64), ("mnist_cnn", 100)}),
        minutes=8.5,
    ),
    "cpu": Profile(
        op_batches={
            "alexnet": 16,
            "alexnet2012": 16,
            "mnist_cnn": 100,
            "vgg16": 1,
            "vgg11_lrn": 1,
            "convnet": 16,
            "vgg16_bn": 1,
            "resnet_cifar": 32,
            "tiny": 1,
        },
        op_variants=(
            Variant("float32", "nchw"),
            Variant("float32", "channels_last", everywhere=False),
            Variant("bfloat16", "nchw", everywhere=False),
        ),
        op_headlines=frozenset(
            {
                ("max_pool", "alexnet2012", "features.3"),
                ("conv_relu_pool", "alexnet", "features.0"),
                ("conv_relu_pool", "mnist_cnn", "layer1.0"),
                ("lrn", "alexnet2012", "features.2"),
                ("lrn_pool", "alexnet2012", "features.2"),
                ("bn_relu", "vgg16_bn", "features.8"),
                ("bn_relu_pool", "convnet", "layer1.1"),
                ("add_relu", "resnet_cifar", "blocks.0"),
            }
        ),
        model_batches={
            **dict.fromkeys(("alexnet", "alexnet2012", "convnet"), (16,)),
            "vgg16": (1,),
            "mnist_cnn": (100,),
            "resnet_cifar": (32,),
        },
        model_variants=(Variant("float32", "nchw"),),
        model_headlines=frozenset(
            {("alexnet", 16), ("alexnet2012", 16), ("mnist_cnn", 100), ("vgg16", 1), ("convnet", 16)}
        ),
        minutes=8.0,
    ),
}
# In this order: first what a report cannot do without.
HEADLINE, HEADLINE_COMPILED, MAIN, SECOND, COMPILED = range(5)


class Cell(NamedTuple):
    """One row: a cell and a method, with the stages that its work consists of."""

    subject: str
    case: str
    mode: str
    dtype: str
    layout: str
    method: str
    stages: tuple[Stage, ...]
    batch: int
    headline: bool
    due: int

    @property
    def training(self) -> bool:
        """Whether gradients are computed."""
        return self.mode in ("training", "forward+backward")

    @property
    def is_model(self) -> bool:
        """Whether the subject is a whole model."""
        return self.mode in ("inference", "training")

    @property
    def compiling_seconds(self) -> float:
        """A guess at what the first call takes: no new work is begun that would outlast the run."""
        a_stage = {"compile": 2.0, "compile max-autotune": 6.0}
        return 2 + a_stage.get(self.method, 0.0) * len(self.stages)

    def __str__(self) -> str:
        return f"{self.subject} {self.case} {self.mode} {self.dtype} {self.layout}: {self.method}"


def _due(headline: bool, main: bool, method: str) -> int:
    compiled = method.startswith("compile")
    if headline and main:
        return HEADLINE_COMPILED if compiled else HEADLINE
    return COMPILED if compiled else MAIN if main else SECOND


def forced(device: str, convolutions: bool, training: bool = True) -> dict[str, tuple[str, str | None]]:
    """Return the backends that can be forced here, by the name of their method, with their algorithms.

    Without `training` those that differ in their gradients alone are left out.
    """
    known = fastcnn.backends()
    able = [(name, how) for name, how in FORCED[device] if known[name].available]
    choices = [(name, how if convolutions else None) for name, how in able if training or "+" not in (how or "")]
    return {f"fastcnn {'-'.join(filter(None, choice))}": choice for choice in choices}


def op_cells(stem: str, device: str) -> Iterator[Cell]:
    """Give the rows of an op: each distinct stage of the models in its modes, dtypes, layouts and methods."""
    profile = PROFILES[device]
    if device == "cpu" and stem in ON_GPUS:
        return
    modes = {"normalize": ("forward",), "sgd": ("step",)}.get(stem, ("forward", "forward+backward"))
    for stage in distinct(profile.op_batches, stem):
        headline = (stem, stage.model, stage.layers[0].name) in profile.op_headlines and not stage.frozen
        flat = len(stage.input) <= 2
        for number, variant in enumerate(profile.op_variants):
            if not variant.everywhere and (flat or not headline):
                continue
            layout = "contiguous" if flat else variant.layout
            for mode in modes:
                for method in _op_methods(stem, device, mode, headline, main=number == 0):
                    due = _due(headline, number == 0, method)
                    row = (stem, stage.case, mode, variant.dtype, layout, method, (stage,), stage.input[0])
                    yield Cell(*row, headline and number == 0, due)


def _op_methods(stem: str, device: str, mode: str, headline: bool, main: bool) -> list[str]:
    cudnn = stem in CONVOLUTIONS and not stem.startswith("normalize") and device == "cuda" and mode == "forward"
    compiled = "compile max-autotune" if headline and device == "cuda" else "compile"
    choices = forced(device, stem in CONVOLUTIONS, training=mode == "forward+backward")
    wanted = {
        "eager": True,
        "eager again": headline and main,
        "copy": True,
        "cudnn fused": cudnn,
        "fused": stem == "sgd",
        "fastcnn": True,
        **{name: stem not in ALONE or backend == "triton" for name, (backend, _) in choices.items()},
        compiled: main and (headline or device == "cuda") and stem != "sgd",
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def model_cells(group: str, device: str) -> Iterator[Cell]:
    """Give the rows of a group's models: batches, modes, dtypes and methods.

    A cell has the layout that most of its methods run in; a method that runs in another says so in its name, but for
    `eager`, which is the stock model as users write it: NCHW.
    """
    profile = PROFILES[device]
    for model in GROUPS[group]:
        for batch in profile.model_batches.get(model, ()):
            headline = (model, batch) in profile.model_headlines
            found = stages(model, batch)
            for number, variant in enumerate(profile.model_variants):
                for mode in ("inference", "training"):
                    for method in _model_methods(device, variant, mode, headline, main=number == 0):
                        due = _due(headline, number == 0, method)
                        row = (model, f"batch {batch}", mode, variant.dtype, variant.layout, method, found, batch)
                        yield Cell(*row, headline and number == 0, due)


def _model_methods(device: str, variant: Variant, mode: str, headline: bool, main: bool) -> list[str]:
    cuda, half = device == "cuda", variant.dtype != "float32"
    compiled = "compile max-autotune" if headline and cuda else "compile"
    wanted = {
        "eager": True,
        "eager again": headline and main,
        "eager channels_last autocast": half,
        "eager channels_last": not half or mode == "inference",
        "cudnn fused": cuda and mode == "inference",
        "cuda graph": cuda,
        "fastcnn": True,
        "fastcnn autocast": half and mode == "inference",
        "fastcnn nchw": variant.layout != "nchw" and headline,
        "fastcnn cuda graph": cuda,
        "fastcnn shadow weights": cuda and half and mode == "training" and headline,
        "fastcnn shadow weights cuda graph": cuda and half and mode == "training" and headline,
        **{
            name: True
            for name, (_, how) in forced(device, True, mode == "training").items()
            if how not in OF_SOME_LAYERS
        },
        compiled: headline or cuda,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def dtypes(device: str) -> tuple[str, ...]:
    """Return the dtypes measured on a kind of device, whose matrix products are a ceiling."""
    profile = PROFILES[device]
    return tuple(dict.fromkeys(variant.dtype for variant in (*profile.op_variants, *profile.model_variants)))


def memory_format(layout: str) -> torch.memory_format:
    """Return torch's name for a layout."""
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format
