"""What pip says where setuptools is missing or too old, and that its hooks are there where it is not."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

BACKEND = Path(__file__).parents[1] / "build_backend.py"
FIRST = "first: pip install 'setuptools>=77,<82' wheel ninja"


@pytest.mark.parametrize(("version", "there"), [("65.5.0", "setuptools 65 is here"), (None, "no setuptools is here")])
def test_setuptools_that_cannot_build_says_what_to_install(
    version: str | None, there: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, hooks = ModuleType("setuptools"), ModuleType("setuptools.build_meta")
    fake.__version__ = version  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "setuptools", fake if version else None)
    monkeypatch.setitem(sys.modules, "setuptools.build_meta", hooks)
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(BACKEND))
    assert str(caught.value).startswith(f"fastcnn: {there}, 77 or later is needed")
    assert str(caught.value).endswith(FIRST)


def test_hooks_of_pip_are_there() -> None:
    pytest.importorskip("setuptools", minversion="77")
    hooks = runpy.run_path(str(BACKEND))
    assert {"build_wheel", "build_sdist", "build_editable", "get_requires_for_build_wheel"} <= hooks.keys()
