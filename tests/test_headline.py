"""The memory-bound Triton kernels issue no more instructions than has been reached, for sm_90 and without a GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import headline
import pytest
from issue_slots import AIM

ROOT = Path(__file__).parent
PLACES = ("bf16 NHWC", "bf16 NCHW", "fp32 NHWC", "fp32 NCHW")
# Issue time over memory time, the most of an operator's planes, in the order of PLACES.
REACHED: dict[str, tuple[float, ...]] = {}
# What takes a minute to compile: of each operator in channels_last, the plane that takes most.
FEW = "bf16 NHWC .*(AlexNet 27|paper 27|VGG 28|ResNet)"


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
        assert [kernel for kernel in row["kernels"] if kernel["stack"]] == [], row["case"]
    assert found == set(REACHED)
