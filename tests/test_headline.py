"""The memory-bound Triton kernels issue no more instructions than has been reached, for sm_90 and without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import headline
import pytest
import triton
from issue_slots import AIM

ROOT = Path(__file__).parent
PLACES = ("bf16 NHWC", "bf16 NCHW", "fp32 NHWC", "fp32 NCHW")
# Issue time over memory time, the most of an operator's planes, in the order of PLACES; by Triton 3.8.
REACHED = {
    "bias+ReLU": (0.34, 0.55, 0.18, 0.35),
    "bias+ReLU backward": (0.46, 0.91, 0.20, 0.44),
    "bias+ReLU+pool": (1.16, 3.05, 0.47, 1.25),
    "bias+ReLU+pool backward": (1.09, 4.31, 0.69, 2.18),
    "max-pool": (0.76, 2.35, 0.39, 1.07),
    "max-pool backward": (1.00, 3.86, 0.61, 1.93),
    "LRN": (0.59, 0.85, 0.48, 0.53),
    "LRN backward": (0.72, 1.08, 0.61, 0.61),
    "LRN+pool": (0.65, 1.48, 0.44, 0.75),
    "LRN+pool backward": (0.80, 1.97, 0.60, 1.03),
    "batch norm statistics": (0.79, 0.86, 0.36, 0.39),
    "batch norm+ReLU": (0.42, 0.35, 0.21, 0.19),
    "batch norm+ReLU backward": (0.56, 0.67, 0.25, 0.30),
    "add+ReLU": (0.18, 0.18, 0.09, 0.09),
    "add+ReLU backward": (0.15, 0.15, 0.08, 0.08),
}
# What takes a minute to compile: of each operator in channels_last, the plane that takes most.
FEW = "bf16 NHWC .*(AlexNet 27|paper 27|VGG 28|ResNet)"


@pytest.mark.skipif(triton.__version__ < "3.8", reason="counted with the compiler of Triton 3.8")
@pytest.mark.parametrize("part", [FEW, pytest.param("", marks=pytest.mark.sweep, id="all")])
def test_no_headline_case_issues_more_than_has_been_reached(part: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT.parent), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "headline.py"), "--json", part]  # here the kernels are the interpreter's
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = json.loads(result.stdout)
    found = set()
    for row in rows:
        type_name, layout, operator = re.sub(r" \w+ \d+$", "", row["case"]).split(" ", 2)
        ratio, place = row["issue"] / row["memory"], PLACES.index(f"{type_name} {layout}")
        found.add(operator)
        assert ratio <= REACHED[operator][place] + 0.02, row["case"]
        assert ratio <= AIM or headline.reason(row["case"]), row["case"]
        assert row["more"] != "unexplained", row  # than stock's
        assert [kernel for kernel in row["kernels"] if kernel["stack"]] == [], row["case"]
    assert found == set(REACHED)
