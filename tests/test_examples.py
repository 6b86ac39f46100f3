"""The examples run, fused, and give what the same script gives with stock layers: but for the import or a `fuse`."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from swapped import ALEXNET, BACKENDS, DEVICE, EXAMPLES, SMALL_NET, as_stock, counted, exact_products, load, passes

import fastcnn

pytest.importorskip("torchvision")

ROOT = EXAMPLES.parent
LIBRARIES = {  # that a word of a command needs
    "train_lightning": "pytorch_lightning",
    "train_accelerate": "accelerate",
    "deploy": "onnxscript",
    "torchinfo": "torchinfo",
    "torchsummary": "torchsummary",
    "--captum": "captum",
}
SHARED = ("images", "small_net")  # what the examples import
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in SHARED)


class Case(NamedTuple):
    """A command line, and how often which operator then runs."""

    command: str
    operators: dict[str, int]
    rounding: float = 0.0  # of what is compared, where kernels may round other than stock; 0: float32's


CASES = {
    "image folder": Case("train_imagefolder --batch-size 16", passes(ALEXNET, forward=4, backward=2)),
    "image folder, every switch": Case(
        "train_imagefolder --batch-size 16 --amp --channels-last --accumulate 2 --checkpoint --ema",
        passes(ALEXNET, forward=6, backward=2) | {"linear_relu": 8},  # features are computed again, the head is not
        rounding=2**-8 if DEVICE == "cuda" else 0.0,  # of float16, through eight layers
    ),
    "one process": Case("train_distributed", passes(SMALL_NET, forward=4, backward=4)),
    "Lightning": Case("train_lightning --batch-size 16", passes(ALEXNET, forward=2, backward=2)),
    "Accelerate": Case("train_accelerate --accumulate 2", passes(SMALL_NET, forward=4, backward=4)),
    # Pieces that begin with a pool and end with a ReLU; the target is looked at without gradients.
    "perceptual loss": Case(
        "perceptual_loss --steps 2",
        {"conv_relu": 2 * 24, "max_pool": 2 * 6, "conv_relu_backward": 24, "max_pool_backward": 6},
    ),
    # Next to a child with a hook the others run fused as far as they form stages; the extractor's graph is stock.
    "features": Case("features features.0 features.4 features.12", {"max_pool": 2, "conv_relu": 3, "linear_relu": 2}),
    "Grad-CAM": Case(
        "grad_cam --size 64",
        {**passes(ALEXNET, forward=1, backward=1), "conv_relu_pool": 2, "conv_relu_pool_backward": 2}
        | {"max_pool": 1, "max_pool_backward": 1},
    ),
    "Grad-CAM by captum": Case(  # which goes back to that convolution, and no further
        "grad_cam --size 64 --captum",
        {**ALEXNET, "conv_relu_pool": 2, "max_pool": 1, "max_pool_backward": 1, "linear_relu_backward": 2},
    ),
    # Under a summary's hooks the layers are stock; fused are the model, its pickle and five copies.
    "torchinfo": Case("inspect_model --tool torchinfo", passes(ALEXNET, forward=7, backward=0)),
    "torchsummary": Case("inspect_model --tool torchsummary", passes(ALEXNET, forward=7, backward=0)),
    "weight norm": Case("weight_norm --steps 2", passes(SMALL_NET, forward=4, backward=2)),
    "spectral norm": Case("weight_norm --norm spectral_norm --steps 2", passes(SMALL_NET, forward=4, backward=2)),
    # Convolutions that are masked in a hook run by themselves, until the zeros are permanent.
    "pruning": Case(
        "prune --steps 1",
        {**ALEXNET, "max_pool": 2 * 3, "max_pool_backward": 3, "linear_relu": 3 * 2, "linear_relu_backward": 2},
    ),
}
if DEVICE == "cpu":  # on a GPU, capturing runs a few passes first, and replaying none
    CASES["CUDA graph"] = Case("cuda_graph", passes(SMALL_NET, forward=5, backward=5))


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    with exact_products():
        yield


def run(command: str, *, stock: bool = False) -> Any:
    name, *argv = command.split()
    for word in command.split():
        pytest.importorskip(LIBRARIES.get(word, "torch"))
    script = load(name, stock)
    if DEVICE == "cuda" and hasattr(script, "alexnet"):  # Triton's dropout draws random numbers of its own
        script.alexnet = functools.partial(script.alexnet, dropout=0.0)
    return script.main(argv)


def tensors(result: Any) -> list[torch.Tensor]:
    """Return what an example gives, numbers in float32 as they were computed."""
    return [torch.as_tensor(leaf, dtype=torch.float32) for leaf in torch.utils._pytree.tree_leaves(result)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_example_runs_fused_as_it_does_on_stock_layers(case: Case) -> None:
    with fastcnn.use_backend(BACKENDS[DEVICE]):
        fused, operators = counted(lambda: run(case.command))
    stock, none = counted(lambda: run(case.command, stock=True))
    assert none == {}
    tolerance = {"rtol": case.rounding, "atol": case.rounding} if case.rounding else {}
    torch.testing.assert_close(tensors(fused), tensors(stock), **tolerance)
    if BACKENDS[DEVICE] != "auto":
        assert operators == case.operators


def test_style_transfer() -> None:
    """How often an image is evaluated is the optimizer's choice."""
    command = "style_transfer --size 32 --steps 1"
    with fastcnn.use_backend(BACKENDS[DEVICE]):
        fused, operators = counted(lambda: run(command))
    torch.testing.assert_close(tensors(fused), tensors(run(command, stock=True)))
    if BACKENDS[DEVICE] != "auto":  # the pieces begin after conv1_1, conv2_1, ... and end with the next of them
        looks = len(fused) + 2
        assert operators["conv_relu_pool"] == 4 * looks
        assert operators["conv_relu"] == 3 * looks


def test_deployed_network_gives_the_same_scores() -> None:
    with fastcnn.use_backend(BACKENDS["cpu"]):
        scores = run("deploy")
    assert sorted(scores) == ["alexnet", "onnx", "safetensors", "torch.export"]
    for found in scores.values():
        torch.testing.assert_close(found, scores["alexnet"])


def torchrun(folder: Path, *argv: str, processes: int, device: str) -> list[dict[str, Any]]:
    """Run an example in several processes, and return what each found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "FASTCNN_BACKEND": BACKENDS[device], "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    script = [str(ROOT / "tests/swapped.py"), str(folder), "train_distributed", *argv]
    process = subprocess.run(
        [sys.executable, *launcher, *script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


gpus = pytest.param("cuda", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"))


@pytest.mark.parametrize("device", ["cpu", gpus])
@pytest.mark.parametrize(
    "argv",
    [pytest.param([], id="DistributedDataParallel"), pytest.param(["--fsdp"], id="FSDP2", marks=pytest.mark.sweep)],
)
def test_losses_of_two_processes_are_those_of_one_on_stock_layers(
    argv: list[str], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = torchrun(tmp_path, *argv, processes=2, device=device)
    if device == "cpu":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one = run("train_distributed", stock=True)
    for process in found:
        torch.testing.assert_close(tensors(process["losses"]), tensors(one))
        if BACKENDS[device] != "auto":
            assert process["operators"] == passes(SMALL_NET, forward=4, backward=4)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_gpu_graph_gives_the_losses_of_stock_layers() -> None:
    with fastcnn.use_backend(BACKENDS[DEVICE]):
        fused = run("cuda_graph")
    torch.testing.assert_close(tensors(fused), tensors(run("cuda_graph", stock=True)))


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_says_how_to_run_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = (EXAMPLES / f"{name}.py").read_text()
    assert re.search(
        rf"^    (python|torchrun .*) examples/{name}\.py", ast.get_docstring(ast.parse(source)) or "", re.M
    )
    assert "fastcnn" not in {line.split(" ")[1].split(".")[0] for line in imports(as_stock(source))}
    assert f"`{name}.py`" in (ROOT / "docs/guide/torch.md").read_text()
    with pytest.raises(SystemExit) as stop:
        run(f"{name} --help")
    assert stop.value.code == 0
    assert "usage:" in capsys.readouterr().out


def imports(source: str) -> list[str]:
    return [line.strip() for line in source.splitlines() if re.match(r"\s*(import|from) ", line)]
