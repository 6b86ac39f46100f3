"""Tuning for `make gpu`, without typer and rich: `check 1/8`, the second of eight shares, or `time FOLDER`."""

import sys
from itertools import product
from pathlib import Path

import torch

from benchmarks.results import folder_name
from fastcnn.console.images import STATISTICS
from fastcnn.console.models import build_model, default_input_size, normalize_first
from fastcnn.tune import Result, stages_of
from fastcnn.tune.run import Trial, check, tune
from fastcnn.tuning.attempts import Attempts
from fastcnn.tuning.candidates import candidates
from fastcnn.tuning.device import device_name, file_name
from fastcnn.tuning.stage import Stage
from fastcnn.tuning.table import user_path

# In the order in which targets hang on them.
MODELS = {"vgg16": 64, "alexnet": 128, "alexnet2012": 128, "mnist_cnn": 100, "vgg16_bn": 64, "resnet_cifar": 128}
DTYPES = (torch.bfloat16, torch.float32)
DEVICE = torch.device("cuda", 0)


def stages() -> list[Stage]:
    """Return the stages of all models, on numbers and on bytes, each once."""
    found: dict[str, Stage] = {}
    for dtype, of_bytes, (name, batch) in product(DTYPES, (False, True), MODELS.items()):
        size = default_input_size(name)
        with DEVICE:
            model, images = build_model(name), torch.randn(batch, *size)
        if of_bytes:
            normalize_first(model, STATISTICS[size[0]], dtype)
        model = model.to(DEVICE, dtype).to(memory_format=torch.channels_last)
        images = images.to(torch.uint8 if of_bytes else dtype, memory_format=torch.channels_last)
        for stage in stages_of(model, images):
            found.setdefault(repr(stage), stage)
        del model, images
        torch.cuda.empty_cache()
    return list(found.values())


def check_share(share: int, shares: int) -> None:
    """Compile and check what others will time; the compilations stay in Triton's cache."""
    attempts = Attempts(user_path(device_name(DEVICE)), DEVICE)
    for stage in stages()[share::shares]:
        for trial in check(stage, candidates(stage.op, DEVICE), DEVICE, attempts):
            if trial.refused:
                print(f"{stage.op} {stage}: {trial.candidate} FAILED: {trial.refused}", flush=True)
        torch.cuda.empty_cache()


def time_all(results: Path) -> None:
    """Time every stage that the table lacks, and write each candidate's time."""
    name = device_name(DEVICE)
    folder = results / folder_name(DEVICE)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "tuning.txt").open("a") as file:
        for result in tune(stages(), DEVICE, resume=True):
            for line in lines(result):
                print(line, file=file, flush=True)
            (folder / file_name(name)).write_bytes(user_path(name).read_bytes())
            torch.cuda.empty_cache()


def lines(result: Result) -> list[str]:
    """Return a result as text: the stage, then its candidates from the fastest on."""
    stage = result.stage
    dtype = str(stage.tensors.get("weight", stage.tensors["input"]).dtype).removeprefix("torch.")
    won = f"{result.winner.candidate}, {result.speedup:.2f}x, noise {result.noise:.1%}"
    head = f"{stage.op} {stage} {dtype} {result.mode}: {won}"
    trials = sorted(result.trials, key=lambda trial: trial.seconds or float("inf"))
    return [head, *(f"  {trial.candidate}: {_said(trial)}" for trial in trials)]


def _said(trial: Trial) -> str:
    if trial.seconds is None:
        return f"FAILED: {trial.refused}" if trial.refused else trial.problem
    return f"{trial.seconds * 1e6:.1f} us, parity {trial.parity:.2f}"


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")  # as in the benchmarks
    if sys.argv[1] == "check":
        check_share(*map(int, sys.argv[2].split("/")))
    else:
        time_all(Path(sys.argv[2]))
