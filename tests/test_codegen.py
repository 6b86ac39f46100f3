"""Every Triton kernel compiles for three GPU generations as the operators launch it, without spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Compile in a process of its own: in this one the kernels belong to the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT.parent), *filter(None, [environment.get("PYTHONPATH")])])
    command = [sys.executable, str(ROOT / "codegen.py"), "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def where(row: dict[str, Any]) -> str:
    return f"{row['kernel']} ({row['case']}) for sm_{row['architecture']}"


def test_every_kernel_is_compiled(rows: list[dict[str, Any]]) -> None:
    sources = "".join(path.read_text() for path in (ROOT.parent / "fastcnn" / "triton").glob("*.py"))
    written = set(re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE))
    assert written == {row["kernel"] for row in rows}
    assert {row["architecture"] for row in rows} == {80, 90, 100}


def test_no_spills(rows: list[dict[str, Any]]) -> None:
    assert [where(row) for row in rows if row["stack"]] == []


def test_matrix_products_run_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    products = [row for row in rows if row["kernel"] in ("implicit_gemm_kernel", "packed_kernel")]
    assert [where(row) for row in products if not row["tensor_cores"]] == []
    assert [where(row) for row in products if row["architecture"] == 90 and not row["wgmma"]] == []


def test_channels_last_convolution_copies_asynchronously(rows: list[dict[str, Any]]) -> None:
    wide = [row for row in rows if row["kernel"] == "implicit_gemm_kernel" and row["case"] == "bf16 NHWC 3x3"]
    assert wide
    assert [where(row) for row in wide if not row["async_copy"]] == []


def test_channels_last_passes_load_sixteen_bytes_a_thread(rows: list[dict[str, Any]]) -> None:
    streaming = ("max_pool_kernel", "max_pool_backward_kernel", "bias_relu_kernel", "relu_backward_kernel")
    passes = [row for row in rows if row["kernel"] in streaming and "bf16 NHWC" in row["case"]]
    assert passes
    assert [where(row) for row in passes if row["load_bytes"] < 16] == []
