"""Does the swap gain? The proof and the trial of three networks, then eager steps of stock layers and of `auto`.

It prints a line for each network and mode, and writes them to FOLDER/<gpu>/trial.txt.
"""

import copy
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastcnn
from benchmarks.results import folder_name

MODELS = {"alexnet": 128, "vgg16": 64, "mnist_cnn": 100}
DEVICE = torch.device("cuda", 0)
DTYPE = torch.bfloat16
ROUNDS, CALLS = 9, 5


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of a call, the GPU's work included."""
    _wait()
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    _wait()
    return (time.perf_counter() - begin) / CALLS


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize(DEVICE)


def lines(name: str, batch: int) -> list[str]:
    """Return what a network gains: in training, then in inference."""
    entry = fastcnn.models.MODELS[name]
    with DEVICE:
        model, images = entry.build(), torch.randn(batch, *entry.input_size)
        labels = torch.randint(10, (batch,))
    model = model.to(DTYPE).to(memory_format=torch.channels_last)
    images = images.to(DTYPE, memory_format=torch.channels_last)
    stock = fastcnn.unfuse(copy.deepcopy(model))

    def train(network: nn.Module) -> None:
        network.train().zero_grad(set_to_none=True)
        F.cross_entropy(network(images), labels).backward()

    @torch.no_grad()
    def infer(network: nn.Module) -> None:
        network.eval()(images)

    found = []
    for mode, step in (("training", train), ("inference", infer)):
        begin = time.perf_counter()
        step(model)
        _wait()
        first = time.perf_counter() - begin
        runs = [partial(step, each) for each in (stock, model)]
        for each in runs:
            each()
        rounds = [list(map(seconds, runs)) for _ in range(ROUNDS)]  # in turn, so that a slow spell slows both
        before, after = map(statistics.median, zip(*rounds))
        how = f"{before * 1e3:.3f} ms stock, {after * 1e3:.3f} ms fastcnn, {before / after:.2f}x"
        found.append(f"{name} {batch} {mode}: {how}; first step {first:.1f} s")
    rows = fastcnn.explain(model.train(), images)
    return [*found, *(f"  {', '.join(row.names)}: {row.runs}: {row.reason}" for row in rows if row.stage)]


def main(results: Path) -> None:
    """Try each network, and write what it gains."""
    folder = results / folder_name(DEVICE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "trial.txt").open("w") as file:
        for name, batch in MODELS.items():
            for line in lines(name, batch):
                print(line, flush=True)
                print(line, file=file, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
