"""What a call costs the processor: thread CPU time on tiny tensors, stock layers beside the front and the Python path.

    python -m benchmarks.call_cost            # prints the table
    python -m benchmarks.call_cost --write    # and keeps it in benchmarks/results/cpu/call_cost.json

One thread; the three ways take turns, so that whatever else the machine does meets them alike; medians of many rounds.
"""

import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastcnn
import fastcnn.functional as FF
from fastcnn import front

RESULT = Path(__file__).parent / "results" / "cpu" / "call_cost.json"
MODES = ("forward", "graph", "backward")
BACKENDS = ("auto", "cpu")
ROUND_SECONDS, ROUNDS = 4e-4, 401


class Case(NamedTuple):
    """A call, stock and ours, of an input that gradients go to, and of parameters."""

    stock: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    tensors: tuple[Tensor, ...]


def cases() -> dict[str, Case]:
    """Return the stages on tiny tensors: 1x8x6x6, 8 to 8 channels, 3x3; linear 4x16."""
    image, rows = torch.randn(1, 8, 6, 6), torch.randn(4, 16)
    conv = torch.randn(8, 8, 3, 3), torch.randn(8)
    linear = torch.randn(16, 16), torch.randn(16)
    running, scale = (torch.zeros(8), torch.ones(8)), (torch.ones(8), torch.zeros(8))

    def relu(x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2)

    def stock_conv(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return relu(F.conv2d(x, w, b, padding=1))

    def stock_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return relu(F.batch_norm(x, *running, w, b, training=True))

    return {
        "conv_relu": Case(stock_conv, lambda x, w, b: FF.conv2d_relu(x, w, b, padding=1), (image, *conv)),
        "conv_relu_pool": Case(
            lambda x, w, b: pool(stock_conv(x, w, b)),
            lambda x, w, b: FF.conv2d_relu_max_pool2d(x, w, b, padding=1, pool_size=2),
            (image, *conv),
        ),
        "max_pool": Case(pool, lambda x: FF.max_pool2d(x, 2), (image,)),
        "linear_relu": Case(lambda x, w, b: relu(F.linear(x, w, b)), FF.linear_relu, (rows, *linear)),
        "lrn": Case(lambda x: F.local_response_norm(x, 5), lambda x: FF.local_response_norm(x, 5), (image,)),
        "lrn_pool": Case(
            lambda x: pool(F.local_response_norm(x, 5)),
            lambda x: FF.local_response_norm_max_pool2d(x, 5, pool_size=2),
            (image,),
        ),
        "bn_relu (training)": Case(
            stock_norm, lambda x, w, b: FF.batch_norm_relu(x, *running, w, b, training=True), (image, *scale)
        ),
        "bn_relu_pool (training)": Case(
            lambda x, w, b: pool(stock_norm(x, w, b)),
            lambda x, w, b: FF.batch_norm_relu_max_pool2d(x, *running, w, b, training=True, pool_size=2),
            (image, *scale),
        ),
        "add_relu": Case(lambda x, y: relu(x + y), FF.add_relu, (image, torch.randn_like(image))),
    }


def work(function: Callable[..., Tensor], tensors: tuple[Tensor, ...], mode: str) -> Callable[[], object]:
    """Return a call without gradients, one that leaves a graph, or one with its backward."""
    if mode == "forward":
        plain = [each.detach() for each in tensors]

        def run() -> object:
            with torch.no_grad():
                return function(*plain)

        return run
    leaves = [each.detach().requires_grad_() for each in tensors]
    if mode == "graph":
        return lambda: function(*leaves)

    def step() -> None:
        output = function(*leaves)
        torch.autograd.backward(output, torch.ones_like(output))

    return step


def model_work(model: nn.Module, image: Tensor, training: bool) -> Callable[[], object]:
    """Return an inference call of a network, or a forward and backward."""
    if not training:

        def infer() -> object:
            with torch.no_grad():
                return model(image)

        return infer

    def step() -> None:
        output = model(image)
        torch.autograd.backward(output, torch.ones_like(output))

    return step


def take_turns(ways: list[Callable[[], object]], rounds: int = ROUNDS) -> list[float]:
    """Return the median microseconds of thread CPU time that each way takes a call."""
    for each in ways * 3:
        each()
    calls = [max(1, round(ROUND_SECONDS / max(_seconds(each, 3), 1e-7))) for each in ways]
    seen: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds):
        for i in range(len(ways)):
            j = (i + turn) % len(ways)
            seen[j].append(_seconds(ways[j], calls[j]) * 1e6)
    return [median(each) for each in seen]


def _seconds(run: Callable[[], object], calls: int) -> float:
    begin = time.thread_time()
    for _ in range(calls):
        run()
    return (time.thread_time() - begin) / calls


def stages() -> Iterator[dict[str, Any]]:
    """Measure every stage in every mode and backend."""
    for name, case in cases().items():
        for backend in BACKENDS:
            for mode in MODES:
                with fastcnn.use_backend(backend):
                    stock, ours = (work(f, case.tensors, mode) for f in (case.stock, case.ours))
                    times = take_turns([stock, ours])
                    with front.aside():
                        times += take_turns([ours], ROUNDS // 4)
                yield {"what": name, "backend": backend, "mode": mode, **_named(times)}


def models() -> Iterator[dict[str, Any]]:
    """Measure networks at batch 1 under `auto`: MnistCNN and torchvision's AlexNet."""
    for name, model, size in (
        ("MnistCNN, batch 1", fastcnn.MnistCNN(), (1, 1, 28, 28)),
        ("AlexNet, batch 1", fastcnn.AlexNet(), (1, 3, 224, 224)),
    ):
        image = torch.randn(size)
        plain = fastcnn.unfuse(_twin(model))
        for training in (False, True):
            ways = [model_work(each.train(training), image, training) for each in (plain, model)]
            times = take_turns(ways, 101 if "Mnist" in name else 15)
            with front.aside():
                times += take_turns(ways[1:], 11 if "Mnist" in name else 3)
            yield {"what": name, "backend": "auto", "mode": "training" if training else "inference", **_named(times)}


def _twin(model: nn.Module) -> nn.Module:
    twin = type(model)()
    twin.load_state_dict(model.state_dict())
    return twin


def _named(times: list[float]) -> dict[str, float]:
    return dict(zip(("stock", "front", "python"), (round(each, 2) for each in times)))


def main() -> None:
    """Measure, print, and write if asked to."""
    torch.set_num_threads(1)
    rows = []
    for row in (*stages(), *models()):
        rows.append(row)
        print(f"{row['what']:24} {row['backend']:5} {row['mode']:9}", *(f"{row[w]:9.1f}" for w in list(row)[3:]),
              f"{row['front'] / row['stock']:6.2f}", flush=True)  # fmt: skip
    versions = {"torch": torch.__version__, "python": platform.python_version(), "front": front.problem or "runs"}
    if "--write" in sys.argv:
        RESULT.write_text(json.dumps({**versions, "unit": "us", "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
