"""Every Triton kernel passes Triton's front end as the operators launch it, whatever size is 1."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent


@pytest.mark.parametrize("sizes", ["few", pytest.param("rest", marks=pytest.mark.sweep)])
def test_every_launch_of_every_size_compiles(sizes: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT.parent), *filter(None, [environment.get("PYTHONPATH")])])
    command = [
        sys.executable,
        str(ROOT / "front_end.py"),
        sizes,
    ]  # in this process the kernels belong to the interpreter
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    sources = "".join(path.read_text() for path in (ROOT.parent / "fastcnn" / "triton").rglob("*.py"))
    assert set(found["kernels"]) == set(re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE))
    assert found["failures"] == []
