"""setup.py: which toolkit it takes, for which GPUs, and what it says where one is missing. No compiler runs here."""

import importlib.util
import os
from pathlib import Path

import pytest
import setuptools
import torch

from fastcnn.available import serves

SETUP = Path(__file__).parents[1] / "setup.py"
TORCH_CUDA = (torch.version.cuda or "0.0").split(".")[0]


KNOWS = [f"compute_{each}" for each in ("75", "80", "86", "90", "100", "103", "120")]
NVCC = """#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {version}, V{version}.1';;
  --list-gpu-arch) echo '{knows}';;
  *) if [ "{refusal}" ]; then echo "crt/host_config.h:147:2: {refusal}" >&2; exit 2; fi;;
esac
"""


@pytest.fixture
def setup(monkeypatch):
    """Import setup.py without building anything."""
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("fastcnn_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("FASTCNN_BUILD_CUDA", "TORCH_CUDA_ARCH_LIST", "CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "own_architectures", set)
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Return a function that makes a toolkit whose nvcc is of a version, and sets CUDA_HOME to it."""

    def make(version, refusal=""):
        for name in ("include", "bin"):
            (tmp_path / name).mkdir()
        (tmp_path / "include/cuda_runtime.h").touch()
        nvcc = tmp_path / "bin/nvcc"
        nvcc.write_text(NVCC.format(version=version, knows="\n".join(KNOWS), refusal=refusal))
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))
        return tmp_path

    return make


def no_toolkit(monkeypatch, setup):
    monkeypatch.setattr(setup, "find_toolkit", lambda: None)


@pytest.mark.skipif(torch.version.cuda is None, reason="this torch has no CUDA")
class TestWithCUDA:
    def test_a_toolkit_of_torchs_cuda_is_taken(self, setup, toolkit):
        folder = toolkit(f"{TORCH_CUDA}.9")
        assert setup.choose_cuda() == (folder, list(setup.ARCHITECTURES))

    def test_zero_leaves_cuda_out(self, setup, toolkit, monkeypatch, capsys):
        toolkit(f"{TORCH_CUDA}.9")
        monkeypatch.setenv("FASTCNN_BUILD_CUDA", "0")
        assert setup.choose_cuda() is None
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("version", "said"),
        [("11.8", "nvcc 11.8 is too old: install CUDA 12.8"), ("99.1", f"install the CUDA {TORCH_CUDA} toolkit")],
    )
    def test_a_wrong_toolkit_is_said_in_one_line(self, setup, toolkit, capsys, version, said):
        toolkit(version)
        assert setup.choose_cuda() is None
        line = capsys.readouterr().err
        assert line.startswith("fastcnn: the CUDA kernels are left out: nvcc")
        assert said in line
        assert line.count("\n") == 1

    def test_no_toolkit_is_said(self, setup, monkeypatch, capsys):
        no_toolkit(monkeypatch, setup)
        assert setup.choose_cuda() is None
        assert f"no nvcc: install the CUDA {TORCH_CUDA} toolkit, or set CUDA_HOME" in capsys.readouterr().err

    def test_one_without_a_toolkit_fails(self, setup, monkeypatch):
        no_toolkit(monkeypatch, setup)
        monkeypatch.setenv("FASTCNN_BUILD_CUDA", "1")
        with pytest.raises(SystemExit, match="FASTCNN_BUILD_CUDA=1, but no nvcc: install the CUDA"):
            setup.choose_cuda()

    @pytest.mark.parametrize(
        ("listed", "built", "left"),
        [
            ("8.0;9.0a;10.0+PTX", ["8.0", "9.0a", "10.0+PTX"], ""),
            ("7.0 7.5;8.6", ["8.6"], "7.0, 7.5"),
            ("5.0;Hopper;99.0;twelve", ["9.0"], "5.0, 99.0, twelve"),
            ("Ampere", ["8.0", "8.6"], ""),
            ("", ["8.0", "9.0", "10.0+PTX", "12.0"], ""),
            (" ; ", ["8.0", "9.0", "10.0+PTX", "12.0"], ""),
        ],
    )
    def test_what_cannot_be_built_of_a_list_is_left_out_in_one_line(
        self, setup, toolkit, monkeypatch, capsys, listed, built, left
    ):
        toolkit(f"{TORCH_CUDA}.9")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", listed)
        assert setup.choose_cuda().architectures == built
        said = capsys.readouterr().err
        assert said.startswith(f"fastcnn: {left} of TORCH_CUDA_ARCH_LIST left out") if left else said == ""
        assert said.count("\n") == bool(left)

    @pytest.mark.parametrize(
        ("own", "built"),
        [
            ({"9.0"}, ["9.0"]),
            ({"8.6", "12.0"}, ["12.0", "8.6"]),
            ({"7.5"}, None),
            ({"13.0"}, None),
            ({"7.5", "8.0"}, ["8.0"]),
        ],
    )
    def test_where_a_gpu_is_the_build_is_for_it(self, setup, toolkit, monkeypatch, own, built):
        toolkit(f"{TORCH_CUDA}.9")
        monkeypatch.setattr(setup, "own_architectures", lambda: own)
        assert setup.choose_cuda().architectures == (built or list(setup.ARCHITECTURES))

    def test_a_list_without_a_gpu_that_can_be_served_leaves_cuda_out(self, setup, toolkit, monkeypatch, capsys):
        toolkit(f"{TORCH_CUDA}.9")
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
        assert setup.choose_cuda() is None
        assert "set it to 8.0 or above, or unset it" in capsys.readouterr().err

    def test_a_host_compiler_that_nvcc_refuses_leaves_cuda_out(self, setup, toolkit, monkeypatch, capsys):
        toolkit(f"{TORCH_CUDA}.9", refusal="error: #error -- unsupported GNU version! gcc later than 15")
        assert setup.choose_cuda() is None
        line = capsys.readouterr().err
        assert line.startswith(
            "fastcnn: the CUDA kernels are left out: nvcc cannot compile (crt/host_config.h:147:2: error:"
        )
        assert "unsupported GNU version! gcc later than 15): set CC and CXX to a compiler it takes" in line
        assert line.count("\n") == 1
        monkeypatch.setenv("FASTCNN_BUILD_CUDA", "1")
        with pytest.raises(SystemExit, match="FASTCNN_BUILD_CUDA=1, but nvcc cannot compile"):
            setup.choose_cuda()

    def test_images_for_each_architecture_and_ptx_where_asked(self, setup, toolkit):
        toolkit(f"{TORCH_CUDA}.9")
        cuda = setup.choose_cuda()
        flags = setup.kernels(cuda).extra_compile_args["nvcc"]
        assert flags[-5:] == [
            "-gencode=arch=compute_80,code=sm_80",
            "-gencode=arch=compute_90,code=sm_90",
            "-gencode=arch=compute_100,code=sm_100",
            "-gencode=arch=compute_100,code=compute_100",
            "-gencode=arch=compute_120,code=sm_120",
        ]

    @pytest.mark.parametrize("gpu", [(8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (13, 0)])
    def test_every_gpu_from_8_0_up_is_served_by_the_default(self, setup, gpu):
        assert any(serves(image, gpu) for image in setup.ARCHITECTURES)


def test_the_build_says_how_many_files_it_compiles(setup, monkeypatch, capsys):
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", "0")
    monkeypatch.delenv("NINJA_STATUS", raising=False)
    arguments = setup.extensions()
    extension, front = arguments["ext_modules"]
    command = arguments["cmdclass"]["build_ext"]
    monkeypatch.setattr(command.__mro__[1], "build_extension", lambda self, extension: None)
    command(setuptools.Distribution()).build_extension(extension)
    assert capsys.readouterr().err == f"fastcnn: fastcnn._C: {len(extension.sources)} files to compile\n"
    assert os.environ.pop("NINJA_STATUS") == "fastcnn: file %s of %t, after %e s: "
    assert front.optional


@pytest.mark.parametrize("cuda", ["0", "1"])
def test_a_front_that_cannot_be_built_is_left_out_wherever_cuda_is_wanted(cuda, setup, monkeypatch, capsys):
    def fail(self, extension):
        raise RuntimeError("Error compiling objects for extension")

    arguments = setup.extensions()
    kernels, front = arguments["ext_modules"]
    command = arguments["cmdclass"]["build_ext"]
    monkeypatch.setattr(command.__mro__[1], "build_extension", fail)
    build = command(setuptools.Distribution())
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", cuda)
    build.build_extension(front)
    assert "fastcnn._front is left out: Error compiling" in capsys.readouterr().err
    with pytest.raises(RuntimeError):
        build.build_extension(kernels)
    os.environ.pop("NINJA_STATUS", None)


def test_a_folder_without_the_header_is_no_toolkit(setup, toolkit, monkeypatch):
    folder = toolkit("13.0")
    (folder / "include/cuda_runtime.h").unlink()
    assert setup.find_toolkit() != folder


def test_torch_without_cuda_is_said(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA: install a CUDA build of torch" in setup.no_toolkit(Path())


def test_an_unknown_choice_fails(setup, monkeypatch):
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1, got 'yes'"):
        setup.choose_cuda()


def test_no_compiler_is_said(setup, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert setup.extensions() == {}
    assert "left out: no C++ compiler (no-such-compiler): install g++ 12 or later" in capsys.readouterr().err


def test_cuda_without_a_compiler_fails(setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="FASTCNN_BUILD_CUDA=1, but no C\\+\\+ compiler"):
        setup.extensions()
