"""What holds for every test: the interpreter where there is no GPU, poisoned memory, the default backend."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch

# Without a GPU the Triton kernels run in Triton's CPU interpreter: it must be asked for before anything imports them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1":
    with suppress(ImportError):  # of Triton, or of NumPy, which it needs
        import interpreter

        interpreter.hasten()

# The user's tuning tables stay out of the tests.
os.environ["FASTCNN_CACHE"] = os.devnull

# Inductor keeps its code for the widest vectors that it met, and would run it where ATEN_CPU_CAPABILITY narrows them.
_capability = torch.backends.cpu.get_cpu_capability()
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/fastcnn-tests-inductor-{_capability}")


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialized memory with NaN (integers: their largest value), so that nothing unwritten passes.

    FASTCNN_TEST_POISON=0 leaves that to compute-sanitizer's initcheck (make sanitize).
    """
    if os.environ.get("FASTCNN_TEST_POISON") == "0":
        yield
        return
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    from fastcnn import available  # now that the interpreter has been asked for

    available.poison(True)
    yield
    available.poison(False)
    torch.use_deterministic_algorithms(False)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let every call of a run go down one path."""
    parser.addoption("--path", choices=["front", "python"], default="front", help="which path calls go down")


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest) -> Iterator[None]:
    """Start every test without plans; with `--path python` the front steps aside."""
    from fastcnn import front

    front.forget()
    with front.aside() if request.config.getoption("--path") == "python" else nullcontext():
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Let what a file draws while it is imported depend on no other file."""
    torch.manual_seed(0)


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the fused functions, in the order in which layers call them."""
    from fastcnn import functional as FF  # now that the interpreter has been asked for

    calls: list[str] = []

    def recorded(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return getattr(FF, name)(*args, **kwargs)

        return call

    functions = SimpleNamespace(**{name: recorded(name) for name in FF.__all__})
    monkeypatch.setattr("fastcnn.nn.FF", functions)
    monkeypatch.setattr("fastcnn.stages.FF", functions)
    return calls
