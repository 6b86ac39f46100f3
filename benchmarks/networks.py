"""A whole model as work to be timed: inference or a training step, by each method."""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
from benchmarks.cells import Cell, forced, memory_format
from benchmarks.measure import Work, rotated
from benchmarks.roofline import ITEM_SIZE
from benchmarks.shapes import ENTRIES

GRAPH_WARM_UPS = 3  # before a capture: cuDNN chooses its algorithms, kernels are compiled, the optimizer gets its state


class Method(NamedTuple):
    """How a model is run.

    Attributes:
        network: makes the modules that run of a fastcnn model.
        layout: of weights and images; None for the cell's.
        autocast: float32 weights, cast at each call, where inference otherwise has its weights cast once. A training
            step in bfloat16 is always under autocast.
        compile: a mode of `torch.compile`.
        graph: the whole call is captured in one CUDA graph, which reads one and the same batch of images.
        cudnn_benchmark: let cuDNN try its algorithms at the first call.
        shadows: weights in the cell's dtype, which fastcnn's one-pass SGD updates by their float32 masters.
    """

    network: Callable[[nn.Module], nn.Module]
    layout: str | None = None
    autocast: bool = False
    compile: str | None = None
    graph: bool = False
    cudnn_benchmark: bool = True
    shadows: bool = False


class _CudnnConvReLU(nn.Module):
    """Convolution and ReLU as cuDNN fuses them; there is no backward."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, input: Tensor) -> Tensor:
        conv = self.conv
        settings: Any = (conv.stride, conv.padding, conv.dilation, conv.groups)
        return torch.cudnn_convolution_relu(input, conv.weight, conv.bias, *settings)


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def _stock(model: nn.Module) -> nn.Module:
    """Return the stock model: modules of its own, and the very weights, so that all methods read the same memory."""
    return fastcnn.unfuse(copy.deepcopy(model, {id(each): each for each in model.parameters()}))


def _with_cudnn(model: nn.Module) -> nn.Module:
    """Return the stock model with each convolution that a ReLU follows in cuDNN's fused form."""
    stock = _stock(model)
    for parent in [module for module in stock.modules() if isinstance(module, nn.Sequential)]:
        for index, (child, following) in enumerate(itertools.pairwise(list(parent))):
            if isinstance(child, nn.Conv2d) and isinstance(following, nn.ReLU):
                parent[index], parent[index + 1] = _CudnnConvReLU(child), nn.Identity()
    return stock


EAGER = Method(_stock, "nchw", cudnn_benchmark=False)
METHODS = {
    "eager": EAGER,
    "eager again": EAGER,
    "eager channels_last": Method(_stock, "channels_last"),
    "eager channels_last autocast": Method(_stock, "channels_last", autocast=True),
    "compile": Method(_stock, compile="default"),
    "compile max-autotune": Method(_stock, compile="max-autotune"),
    "cudnn fused": Method(_with_cudnn),
    "cuda graph": Method(_stock, graph=True),
    "fastcnn nchw": Method(_as_it_is, "nchw"),
    "fastcnn autocast": Method(_as_it_is, autocast=True),
    "fastcnn cuda graph": Method(_as_it_is, graph=True),
    "fastcnn shadow weights": Method(_as_it_is, shadows=True),
    "fastcnn shadow weights cuda graph": Method(_as_it_is, shadows=True, graph=True),
}
FUSED = Method(_as_it_is)  # and the forced backends


@contextlib.contextmanager
def model_work(cell: Cell, device: torch.device) -> Iterator[Work]:
    """Give a function that runs the cell's method once: inference on, or a training step with, the next images."""
    method = METHODS.get(cell.method, FUSED)
    usual = ("auto" if cell.method.startswith("fastcnn") else "torch", None)
    backend, algorithm = forced(device.type, convolutions=True).get(cell.method, usual)
    half = cell.dtype != "float32"
    autocast = half and (cell.training or method.autocast) and not method.shadows
    layout = method.layout or cell.layout
    dtype = torch.float32 if autocast else getattr(torch, cell.dtype)
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = method.cudnn_benchmark
    model = _model(cell.subject, dtype, layout, device)
    try:
        with fastcnn.use_backend(backend, algorithm=algorithm), torch.set_grad_enabled(cell.training):
            network = method.network(model).train(cell.training)
            if method.compile:
                network.compile(mode=method.compile, dynamic=False)
            images = _images(cell, dtype, layout, device)
            cast = functools.partial(_autocast, device.type, getattr(torch, cell.dtype), autocast)
            work = functools.partial(_training, shadows=method.shadows) if cell.training else _inference
            step: Work = work(network, itertools.repeat(next(images)) if method.graph else images, cast)
            yield _captured(step) if method.graph else step
    finally:
        torch.backends.cudnn.benchmark = before
        for parameter in model.parameters():  # which the next method shares
            parameter.grad = None


@functools.lru_cache(maxsize=2)
def _model(name: str, dtype: torch.dtype, layout: str, device: torch.device) -> nn.Module:
    """Return a model of fastcnn; methods that share weights, dtype and layout share it."""
    torch.manual_seed(0)
    with device:
        return ENTRIES[name].build().to(dtype).to(memory_format=memory_format(layout))


def _images(cell: Cell, dtype: torch.dtype, layout: str, device: torch.device) -> Iterator[Tensor]:
    shape = (cell.batch, *ENTRIES[cell.subject].input_size)

    def draw() -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype).contiguous(memory_format=memory_format(layout))

    return rotated(draw, torch.Size(shape).numel() * ITEM_SIZE[str(dtype).removeprefix("torch.")], device)


def _autocast(device: str, dtype: torch.dtype, enabled: bool) -> torch.autocast:
    # Each weight is used once a call, so that a cache of casts could save nothing; a graph must not read casts that
    # were made outside it.
    return torch.autocast(device, dtype=dtype if enabled else None, enabled=enabled, cache_enabled=False)


def _inference(network: nn.Module, images: Iterator[Tensor], cast: Callable[[], torch.autocast]) -> Work:
    def step() -> object:
        with cast():
            return network(next(images))

    return step


def _training(
    network: nn.Module, images: Iterator[Tensor], cast: Callable[[], torch.autocast], *, shadows: bool
) -> Work:
    """Return a step of SGD with momentum; its rate is so small that timing it leaves the weights what they are."""
    first = next(images)
    images = itertools.chain([first], images)
    parameters = list(network.parameters())
    if shadows:
        optimizer: torch.optim.Optimizer = fastcnn.optim.SGD(parameters, lr=1e-9, momentum=0.9)
    else:
        optimizer = torch.optim.SGD(parameters, lr=1e-9, momentum=0.9, fused=first.is_cuda or None)
    labels = torch.randint(0, _classes(network), (first.shape[0],), device=first.device)

    def step() -> object:
        optimizer.zero_grad(set_to_none=True)
        with cast():
            loss = F.cross_entropy(network(next(images)), labels)
        loss.backward()
        with fastcnn.use_backend("triton") if shadows else contextlib.nullcontext():
            optimizer.step()
        return loss

    return step


def _classes(network: nn.Module) -> int:
    return [module for module in network.modules() if isinstance(module, nn.Linear)][-1].out_features


def _captured(step: Work) -> Work:
    """Capture a call in a CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(GRAPH_WARM_UPS):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept: Any = step()
    return functools.partial(_replay, graph, kept)


def _replay(graph: torch.cuda.CUDAGraph, kept: object) -> object:
    graph.replay()
    return kept
