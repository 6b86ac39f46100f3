"""Which GPUs a build has kernels for: what ``backends()`` says of ``cuda`` on each."""

import pytest
import torch

import fastcnn
from fastcnn import available

NAMES = {(7, 5): "Tesla T4", (8, 0): "A100", (9, 0): "H200", (11, 0): "Thor", (12, 0): "RTX 5090"}
BUILT = {"torch": "2.11", "compiler": "g++", "cuda": "13.0"}


@pytest.fixture
def machine(monkeypatch):
    """Return a function that makes up a build and the GPUs that are here, and tells the status of `cuda`."""

    def make(images, *gpus):
        monkeypatch.setattr(available, "_PLAYED", "")
        monkeypatch.setattr(available, "_EXTENSION_PROBLEM", "")
        monkeypatch.setattr(available, "_built_with", lambda: {**BUILT, "architectures": images})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: gpus[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: NAMES[gpus[i]])
        available._gpus.cache_clear()
        return fastcnn.backends()["cuda"]

    yield make
    available._gpus.cache_clear()


@pytest.mark.parametrize(
    ("image", "served"),
    [
        ("8.0", {(8, 0), (8, 6), (8, 9)}),
        ("8.6", {(8, 6), (8, 9)}),
        ("8.0+PTX", {(8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0)}),
        ("9.0a", {(9, 0)}),
        ("9.0a+PTX", {(9, 0)}),
        ("10.0f+PTX", {(10, 3)}),
        ("", set()),
    ],
)
def test_what_an_image_serves(image, served):
    gpus = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 3), (12, 0)]
    assert {gpu for gpu in gpus if available.serves(image, gpu)} == served


@pytest.mark.parametrize("gpus", [[(9, 0)], [(8, 0), (9, 0)], [(7, 5), (8, 0)]], ids=str)
def test_available_where_an_image_serves_a_gpu(machine, gpus):
    status = machine("8.0:9.0", *gpus)
    assert status.available
    assert ("not for Tesla T4 (7.5)" in status.build) == ((7, 5) in gpus)


def test_a_gpu_that_no_image_serves(machine):
    status = machine("8.0:9.0", (12, 0))
    assert not status.available
    assert status.reason.startswith(
        "the compiled extension fastcnn._C holds CUDA kernels for 8.0, 9.0, not for RTX 5090"
    )
    assert "build it again: TORCH_CUDA_ARCH_LIST='12.0' pip install" in status.reason


def test_ptx_serves_later_gpus(machine):
    assert machine("8.0:9.0+PTX", (12, 0)).available


def test_a_gpu_that_no_build_can_serve(machine):
    assert machine("8.0:9.0", (7, 5)).reason.endswith("8.0 or later; here is Tesla T4 (7.5)")


def test_no_gpu(machine):
    assert machine("8.0:9.0").reason == "no CUDA device"


def test_a_forked_process_cannot_ask(machine, monkeypatch):
    machine("8.0:9.0", (12, 0))
    available._gpus.cache_clear()

    def refuse(i):
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess")

    monkeypatch.setattr(torch.cuda, "get_device_capability", refuse)
    assert fastcnn.backends()["cuda"].available
