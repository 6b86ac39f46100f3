"""What a person sees first: a kernel that was not built, Ctrl-C while torch is imported."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str, path: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join({str(path): 0, str(ROOT): 0})}
    environment.pop("FASTCNN_BACKEND", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_first_use_says_once_what_the_build_left_out() -> None:
    code = (
        "import sys; sys.modules['fastcnn._C'] = None\n"
        "import torch, fastcnn\n"
        "for size in (3, 5): fastcnn.functional.local_response_norm(torch.ones(1, 8, 4, 4), size)\n"
        "fastcnn.functional.max_pool2d(torch.ones(8, 64, 64, 64), 2)\n"
    )
    said = run(sys.executable, "-c", code).stderr
    assert said.count("\n") == 1
    assert said.startswith(
        "the stock layers run, as kernels are missing: the compiled extension fastcnn._C was not built"
    )
    assert "see `fastcnn doctor`" in said


def test_nothing_is_said_where_all_is_there() -> None:
    code = "import torch, fastcnn; fastcnn.functional.local_response_norm(torch.ones(1, 8, 4, 4), 3)"
    done = run(sys.executable, "-c", code)
    assert (done.returncode, done.stderr) == (0, "") or "was not built" in done.stderr


@pytest.fixture
def interrupted_torch(tmp_path: Path) -> Path:
    """A torch during whose import Ctrl-C comes."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    script = "import sys\nfrom fastcnn.cli import main\nsys.exit(main())"
    (tmp_path / "fastcnn-script").mkdir()
    (tmp_path / "fastcnn-script" / "fastcnn").write_text(script)
    return tmp_path


@pytest.mark.parametrize("way", ["module", "script"])
def test_ctrl_c_during_the_imports_is_one_line(way: str, interrupted_torch: Path) -> None:
    script = [str(interrupted_torch / "fastcnn-script" / "fastcnn")]
    done = run(sys.executable, *(script if way == "script" else ["-m", "fastcnn"]), "--version", path=interrupted_torch)
    assert done.stderr == "stopped; nothing was written\n"
    assert done.returncode == -signal.SIGINT


def test_ctrl_c_in_a_program_of_the_users_shows_its_traceback(interrupted_torch: Path) -> None:
    done = run(sys.executable, "-c", "import fastcnn", path=interrupted_torch)
    assert "KeyboardInterrupt" in done.stderr
    assert "Traceback" in done.stderr
