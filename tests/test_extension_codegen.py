"""The CUDA kernels of the built extension: every one is there for every architecture, without spills, as fast code."""

import re
from pathlib import Path

import pytest
from extension_codegen import extension, instructions, resources

import fastcnn

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
BUILD = fastcnn.backends()["cuda"].build

pytestmark = pytest.mark.skipif(not BUILD, reason="the extension was built without CUDA")


@pytest.fixture(scope="module")
def rows():
    return resources()


@pytest.fixture(scope="module")
def code(rows):
    return instructions("sm_90" if any(row["architecture"] == "sm_90" for row in rows) else rows[0]["architecture"])


def named(code, *starts):
    found = {name: counts for name, counts in code.items() if name.startswith(starts)}
    assert found, starts
    return found


def test_every_kernel_is_built_for_every_architecture(rows):
    sources = "".join(path.read_text() for path in CUDA.iterdir())
    written = set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\(", sources))
    asked = {
        f"sm_{major}{minor}"
        for major, minor in re.findall(r"(\d+)\.(\d+a?)", BUILD.split("for")[1].split("; torch")[0])
    }
    for architecture in asked:
        built = {row["kernel"].split("<")[0] for row in rows if row["architecture"] == architecture}
        assert built == written, architecture


def test_no_spills(rows):
    assert [row for row in rows if row["stack"]] == []


def test_matrix_products_run_on_tensor_cores(code):
    for name, counts in named(code, "implicit_gemm_kernel").items():
        assert counts["HMMA"] >= 16, name
        assert counts["LDSM"] >= 8, name


def test_first_layers_in_half_precision_run_on_tensor_cores(code):
    for name, counts in named(code, "direct_kernel<BFloat16", "direct_kernel<Half").items():
        assert counts["HMMA"] >= 4, name
        assert counts["LDSM"], name
        assert counts["STG.E.128"], name


def test_whole_chunks_are_copied_asynchronously(code):
    whole = {name: counts for name, counts in named(code, "implicit_gemm_kernel").items() if not name.endswith(", 1>")}
    assert whole
    for name, counts in whole.items():
        assert counts["LDGSTS"] >= 8, name


@pytest.mark.parametrize("kernel", ["bias_relu_kernel", "mask_kernel"])
def test_passes_over_vectors_keep_several_loads_in_flight(code, kernel):
    for name, counts in named(code, *(f"{kernel}<{type}" for type in ("BFloat16, 8", "Half, 8", "float, 4"))).items():
        assert counts["LDG.E.128"] >= 4, name
        assert counts["STG.E.128"] >= 2, name


def test_the_extension_is_the_one_that_is_loaded():
    assert Path(extension()).parent == Path(fastcnn.__file__).parent
