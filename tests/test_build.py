"""setup.py: which toolkit it takes, and what it says where one is missing. No compiler runs here."""

import importlib.util
from pathlib import Path

import pytest
import setuptools
import torch

SETUP = Path(__file__).parents[1] / "setup.py"
TORCH_CUDA = (torch.version.cuda or "0.0").split(".")[0]


@pytest.fixture
def setup(monkeypatch):
    """Import setup.py without building anything."""
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", "0")
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("fastcnn_setup", SETUP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.delenv("FASTCNN_BUILD_CUDA")
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """Return a function that makes a toolkit whose nvcc is of a version, and sets CUDA_HOME to it."""

    def make(version):
        for name in ("include", "bin"):
            (tmp_path / name).mkdir()
        (tmp_path / "include/cuda_runtime.h").touch()
        nvcc = tmp_path / "bin/nvcc"
        nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.1'\n")
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
        assert setup.chosen_toolkit() == folder

    def test_zero_leaves_cuda_out(self, setup, toolkit, monkeypatch, capsys):
        toolkit(f"{TORCH_CUDA}.9")
        monkeypatch.setenv("FASTCNN_BUILD_CUDA", "0")
        assert setup.chosen_toolkit() is None
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize(
        ("version", "said"),
        [("11.8", "nvcc 11.8 is too old: install CUDA 12.8"), ("99.1", f"install the CUDA {TORCH_CUDA} toolkit")],
    )
    def test_a_wrong_toolkit_is_said_in_one_line(self, setup, toolkit, capsys, version, said):
        toolkit(version)
        assert setup.chosen_toolkit() is None
        line = capsys.readouterr().err
        assert line.startswith("fastcnn: the CUDA kernels are left out: nvcc")
        assert said in line
        assert line.count("\n") == 1

    def test_no_toolkit_is_said(self, setup, monkeypatch, capsys):
        no_toolkit(monkeypatch, setup)
        assert setup.chosen_toolkit() is None
        assert f"no nvcc: install the CUDA {TORCH_CUDA} toolkit, or set CUDA_HOME" in capsys.readouterr().err

    def test_one_without_a_toolkit_fails(self, setup, monkeypatch):
        no_toolkit(monkeypatch, setup)
        monkeypatch.setenv("FASTCNN_BUILD_CUDA", "1")
        with pytest.raises(SystemExit, match="FASTCNN_BUILD_CUDA=1, but no nvcc: install the CUDA"):
            setup.chosen_toolkit()


def test_a_folder_without_the_header_is_no_toolkit(setup, toolkit, monkeypatch):
    folder = toolkit("13.0")
    (folder / "include/cuda_runtime.h").unlink()
    assert setup.find_toolkit() != folder


def test_torch_without_cuda_is_said(setup, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "has no CUDA: install a CUDA build of torch" in setup.no_cuda(Path())


def test_an_unknown_choice_fails(setup, monkeypatch):
    monkeypatch.setenv("FASTCNN_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1, got 'yes'"):
        setup.chosen_toolkit()


def test_no_compiler_is_said(setup, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "install g++ 12 or later, or set CXX" in setup.missing()
