"""Every Triton kernel compiles for four GPU generations as the operators launch it, without spills."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import limits
import pytest

from fastcnn.triton.convolution import dgrad, first_layers, implicit_gemm, wgrad
from fastcnn.triton.convolution.gradient import SHARED_MEMORY
from fastcnn.triton.convolution.hopper import TMA, WARP_SPECIALIZED

ROOT = Path(__file__).parent
pytestmark = pytest.mark.sweep  # minutes of compilation
HOPPER = {"tma": TMA, "warp_specialized": WARP_SPECIALIZED}
CONFIGS = {
    "implicit_gemm": implicit_gemm.CONFIGS,
    "packed": first_layers.CONFIGS,
    "space_to_depth": implicit_gemm.CONFIGS,
    "dgrad": dgrad.CONFIGS,
    "wgrad": wgrad.CONFIGS,
}
NARROW = {"dgrad": dgrad.CONFIGS[-2:], "wgrad": wgrad.CONFIGS[-2:]}  # what gradients in NCHW take


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
    sources = "".join(path.read_text() for path in (ROOT.parent / "fastcnn" / "triton").rglob("*.py"))
    written = set(re.findall(r"^def (\w+_kernel)\(", sources, flags=re.MULTILINE))
    assert written == {row["kernel"] for row in rows}
    for portable in written - {f"{name}_kernel" for name in HOPPER}:
        assert {row["architecture"] for row in rows if row["kernel"] == portable} == {80, 90, 100, 120}, portable


@pytest.mark.parametrize(
    ("dtype", "configs"),
    [("bf16", CONFIGS | HOPPER), ("fp32", CONFIGS | NARROW), ("fp16", HOPPER)],
    ids=["bf16", "fp32", "fp16"],
)
def test_every_configuration_is_compiled(rows: list[dict[str, Any]], dtype: str, configs: dict[str, Any]) -> None:
    cases = {row["case"] for row in rows if row["case"].startswith(dtype)}
    asked = {name for case in cases for name in re.findall(r"\w+:\w+", case)}
    assert asked == {f"{name}:{config.name}" for name, held in configs.items() for config in held}


def test_every_kernel_is_compiled_in_float16(rows: list[dict[str, Any]]) -> None:
    assert {row["kernel"] for row in rows if row["case"].startswith("fp16")} == {row["kernel"] for row in rows}


def test_occupancy_counts_what_runs_out_first() -> None:
    assert limits.occupancy(90, warps=8, registers=128, shared=0) == 2 * 8 / 64  # registers
    assert limits.occupancy(90, warps=4, registers=32, shared=100 * 1024) == 2 * 4 / 64  # shared memory
    assert limits.occupancy(80, warps=4, registers=32, shared=100 * 1024) == 1 * 4 / 64
    assert limits.occupancy(90, warps=1, registers=16, shared=0) == 32 / 64  # blocks


def test_least_time_is_the_roofline_s(rows: list[dict[str, Any]]) -> None:
    found = {(row["kernel"], row["case"]): row["least_seconds"] for row in rows}
    pass_over_vgg = 2 * (16 * 64 * 224 * 224 * 2) + 64 * 2  # in place: read and written, and the bias
    assert found["bn_relu_kernel", "bf16 NHWC 3x3"] == pytest.approx(pass_over_vgg / 4.3e12)
    products = 2 * 16 * 224 * 224 * 64 * 64 * 9
    assert found["implicit_gemm_kernel", "bf16 NHWC 3x3"] == pytest.approx(products / 790e12)
    for kernel in ("tma", "warp_specialized"):
        assert found[f"{kernel}_kernel", f"vgg conv1_2, pool, {kernel}"] == pytest.approx(4 * products / 790e12)


def test_what_is_picked_fits_the_shared_memory(rows: list[dict[str, Any]]) -> None:
    assert limits.program_memory(120) == SHARED_MEMORY
    picked = [row for row in rows if ":" not in row["case"]]
    assert [where(row) for row in picked if row["shared"] > limits.program_memory(row["architecture"])] == []


def test_no_spills(rows: list[dict[str, Any]]) -> None:
    assert [where(row) for row in rows if row["stack"]] == []


def test_matrix_products_run_on_tensor_cores(rows: list[dict[str, Any]]) -> None:
    kernels = ("implicit_gemm_kernel", "dgrad_kernel", "wgrad_kernel")
    products = [row for row in rows if row["kernel"] in kernels and "exact" not in row["case"]]
    assert [where(row) for row in products if not row["tensor_cores"]] == []
    assert [where(row) for row in products if row["architecture"] == 90 and not row["wgmma"]] == []


def test_hopper_convolutions_feed_the_tensor_cores_from_shared_memory(rows: list[dict[str, Any]]) -> None:
    kernels = [row for row in rows if row["kernel"] in ("tma_kernel", "warp_specialized_kernel")]
    assert {(row["kernel"], row["architecture"]) for row in kernels} == {
        ("tma_kernel", 90),
        ("tma_kernel", 100),
        ("warp_specialized_kernel", 90),
    }
    assert [where(row) for row in kernels if not row["tma"] or not row["shared_operands"]] == []
    assert [where(row) for row in kernels if row["architecture"] == 90 and not row["wgmma"]] == []
    assert [where(row) for row in kernels if row["shared"] > limits.program_memory(row["architecture"])] == []


def test_channels_last_convolution_copies_asynchronously(rows: list[dict[str, Any]]) -> None:
    wide = [row for row in rows if row["kernel"] == "implicit_gemm_kernel" and row["case"] == "bf16 NHWC 3x3"]
    assert wide
    assert [where(row) for row in wide if not row["async_copy"]] == []


def test_channels_last_gradients_load_vectors(rows: list[dict[str, Any]]) -> None:
    wide = [row for row in rows if row["kernel"] in ("dgrad_kernel", "wgrad_kernel") and "bf16 NHWC 3x3" in row["case"]]
    assert wide
    assert [where(row) for row in wide if row["load_bytes"] < 8] == []  # 16 where a thread has so much of a tile


def test_the_optimizer_s_table_hides_no_alignment(rows: list[dict[str, Any]]) -> None:
    steps = [row for row in rows if row["kernel"] == "sgd_kernel"]
    assert steps
    assert [where(row) for row in steps if row["load_bytes"] < 16] == []


def test_channels_last_passes_load_sixteen_bytes_a_thread(rows: list[dict[str, Any]]) -> None:
    streaming = ("max_pool_kernel", "unpool_quads_kernel", "bn_relu_kernel", "masked_gradient_kernel")
    passes = [row for row in rows if row["kernel"] in streaming and "bf16 NHWC" in row["case"]]
    assert passes
    assert [where(row) for row in passes if row["load_bytes"] < 16] == []
