"""The trial for real, on the processor: captured steps, several processes, doctor, tune and whole trainings."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from played_graphs import played
from tables import NAME, cache
from torch import nn
from trials import ROOT, entries, player, pool

import fastcnn
from fastcnn.cli import main
from fastcnn.train import GraphedStep
from fastcnn.tuning import table

__all__ = ["cache", "played", "player"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]


def test_a_captured_step_tries_before_its_capture(player, played):
    model = fastcnn.MnistCNN()

    def step(images):
        model.zero_grad()
        loss = model(images).square().sum()
        loss.backward()
        return loss

    graphed, x = GraphedStep(step), torch.randn(2, 1, 28, 28)
    graphed(x)
    count = len(player.timed)
    assert count
    for _ in range(4):
        graphed(x)
    assert graphed.reason == ""
    assert played.recorded
    assert len(player.timed) == count


WORKER = """
import torch, fastcnn, fastcnn.functional as FF
from fastcnn.tuning import trial
passed = []
trial._passes, passes = lambda *each: passed.append(passes(*each)) or passed[-1], trial._passes
x = torch.randn(4, 8, 16, 16)
for size in (2, 3):
    FF.max_pool2d(x, size)
print(passed)
"""


def test_processes_that_try_at_once_share_the_files(tmp_path):
    """As the ranks of a training do: none takes the other's attempt for one that ended its process."""
    environment = os.environ | {"FASTCNN_CACHE": str(tmp_path), "FASTCNN_TRIAL": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORKER]
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [rank.communicate()[0] for rank in ranks] == ["[True, True]\n"] * 2
    assert all(rank.returncode == 0 for rank in ranks)
    folder = tmp_path / "tuning"
    assert len(table.read(folder / table.user_path(NAME).name, NAME)) == 2
    assert not list(folder.glob("*.attempts/*"))


def test_doctor_shows_table_and_proof(player, capsys):
    pool()
    assert main(["doctor"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{NAME}: 1 entries (1 by trials; kernels win 1) with torch " in said
    assert f"kernels proved {NAME}: 9 of 9" in said


def test_tune_times_anew_what_a_trial_has_timed(player):
    x = torch.randn(2, 3, 8, 8)
    model = fastcnn.fuse(nn.Sequential(nn.MaxPool2d(2)))
    with torch.no_grad():
        model(x)
    key = entries()[0]["key"]
    path = table.user_path(NAME)
    assert table.holds(path, NAME, key, "trial")
    assert not table.holds(path, NAME, key, "tune")


def test_warm_up_tries_beforehand_and_changes_nothing(player):
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout()]
    model, x = fastcnn.fuse(nn.Sequential(*layers)), torch.randn(4, 2, 12, 12)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    random = torch.get_rng_state()
    assert fastcnn.warm_up(model, x) is model
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], each) for name, each in model.state_dict().items())
    count = len(player.timed)
    assert count
    model(x).sum().backward()
    with torch.no_grad():
        model.eval()(x)
    assert len(player.timed) == count
    with pytest.raises(TypeError, match="argument 'input': expected a Tensor, got tuple"):
        fastcnn.warm_up(model, (4, 2, 12, 12))


TRAIN = """
import json, sys
import torch
from torch import nn
import fastcnn
from fastcnn.tuning import trial
tried, measured = [], trial._measured
trial._measured = lambda stage, *rest: tried.append(str(stage)) or measured(stage, *rest)
torch.set_num_threads(1)

def small_alexnet():
    model = fastcnn.AlexNet2012(num_classes=10, dropout=0.0)
    for number, sizes in {1: (2304, 64), 4: (64, 64), 6: (64, 10)}.items():
        model.classifier[number] = nn.Linear(*sizes)
    return model

def losses(build, size, batch, kind):
    torch.manual_seed(0)
    model = build() if kind == "fused" else fastcnn.unfuse(build())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(batch, *size), torch.arange(batch) % 10
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        yield loss.item()

for kind in sys.argv[1:]:
    found = [*losses(fastcnn.MnistCNN, (1, 28, 28), 8, kind), *losses(small_alexnet, (3, 131, 131), 2, kind)]
    print(json.dumps({"losses": found, "tried": len(tried)}))
"""


def trained(folder, *kinds):
    environment = os.environ | {"FASTCNN_CACHE": str(folder), "FASTCNN_TRIAL": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, "-c", TRAIN, *kinds], env=environment, capture_output=True, text=True, check=True
    )
    return [json.loads(line) for line in process.stdout.splitlines()], process.stderr


def test_training_on_the_processor_tries_once_and_keeps_the_losses(tmp_path):
    (stock, first), said = trained(tmp_path, "stock", "fused")
    (second,), quiet = trained(tmp_path, "fused")
    assert stock["tried"] == 0
    assert first["tried"] == 12  # three of MnistCNN, seven of AlexNet's features, two linear ones
    assert second["tried"] == 0
    assert len(re.findall(rf"fastcnn: tried \d+ stages? on {NAME} in ", said)) == 1
    assert "fastcnn:" not in quiet
    torch.testing.assert_close(torch.tensor(first["losses"]), torch.tensor(stock["losses"]), rtol=1e-3, atol=1e-3)
    assert second["losses"] == first["losses"]
    kept = table.read(tmp_path / "tuning" / table.user_path(NAME).name, NAME).values()
    assert all(each["seconds"] <= each["stock_seconds"] for each in kept)
    assert {each["key"]["op"] for each in kept if each["backend"] == "cpu"} >= {"lrn_pool"}
