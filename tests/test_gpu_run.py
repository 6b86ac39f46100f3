"""`make gpu` where there is no GPU: how it goes on after tests and candidates that end their process."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gpu import run, tuning

ROOT = Path(__file__).parents[1]
BLOCKED = (
    "typer",
    "rich",
    "xdist",
    "matplotlib",
    "torchinfo",
    "tensorboard",
    "markdown",
)  # what a machine with a GPU may lack
BLOCK = f"""
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocked())
"""
TESTS = """
import os, time, pytest
@pytest.mark.parametrize("number", range(6))
def test_some(number):
    with open("ran", "a") as file:
        print(number, file=file)
    assert number != 1
    if number == 3:
        os.abort()
    if number == 4:
        pytest.skip("no")
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tree with one test file, which `parity` runs."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_some.py").write_text(TESTS)
    monkeypatch.setattr(run, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # seconds of imports in each process
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    return tmp_path


def a_run(folder):
    return run.Run(600, folder / "state", folder / "results")  # minutes that no test needs


def ran(folder):
    return sorted((folder / "ran").read_text().split())


def test_each_test_runs_once_and_one_that_crashes_fails_alone(folder, capsys):
    found = a_run(folder)
    run.parity(found, {"some": 2}, 2)
    assert ran(folder) == list("012345")
    assert "parity: 3 passed, 1 skipped, 2 failed" in capsys.readouterr().out
    assert sorted(found.failed) == [
        "tests/test_some.py::test_some[1]: tests/test_some.py:7: AssertionError",
        "tests/test_some.py::test_some[3]: it ended the process, or hung",
    ]
    assert not found.left
    run.parity(a_run(folder), {"some": 2}, 2)
    assert ran(folder) == list("012345")  # nothing ran again


class UntilTheThirdTest(subprocess.Popen):
    """A process whose time is up once test 2 has begun."""

    def wait(self, timeout=None):
        if timeout is None or timeout <= run.GRACE:
            return super().wait(timeout)
        while self.poll() is None:
            if Path("began").exists():
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.02)
        return self.returncode


def test_what_the_time_interrupts_is_no_failure_and_runs_again(folder, monkeypatch):
    monkeypatch.chdir(folder)
    # In many short sleeps: a signal that comes just before a long one begins would be heeded after it.
    wait = (
        "    while number == 2 and not os.path.exists('go on'):\n        open('began', 'w').close(); time.sleep(0.1)\n"
    )
    slow = TESTS.replace("    assert number", wait + "    assert number")
    (folder / "tests" / "test_some.py").write_text(slow.replace("os.abort()", "pass"))
    found = a_run(folder)
    with monkeypatch.context() as patched:
        patched.setattr(run, "GRACE", 300)  # seconds for pytest to end: a busy machine takes its time
        patched.setattr(run.subprocess, "Popen", UntilTheThirdTest)
        run.parity(found, {"some": 1}, 1)
    assert found.left == ["parity"]
    assert len(found.failed) == 1
    (folder / "go on").touch()
    found = a_run(folder)
    run.parity(found, {"some": 1}, 1)
    assert not found.left
    assert ran(folder) == list("0122345")


def test_what_has_no_time_left_is_told(folder):
    found = run.Run(0, folder / "state", folder / "results")
    for part in (run.trial, run.bench):
        part(found)
    assert found.left == ["trial", "bench"]
    assert not found.failed


def test_a_file_that_cannot_be_collected_is_told(folder):
    (folder / "tests" / "test_some.py").write_text("import nothing_of_this_name")
    found = a_run(folder)
    run.parity(found, {"some": 1}, 1)
    (problem,) = found.failed
    assert problem.startswith("tests/test_some.py does not run (exit status 2): see ")


def test_a_test_that_hangs_ends_its_process(folder):
    text = (ROOT / "tests" / "gpu" / "outcomes.py").read_text()
    for name in ("run.py", "outcomes.py"):
        (folder / name).write_text((ROOT / "tests" / "gpu" / name).read_text())
    (folder / "outcomes.py").write_text(text.replace("HANGS = 180", "HANGS = 2"))
    (folder / "tests" / "test_some.py").write_text(
        "import time\ndef test_some():\n    time.sleep(60)\ndef test_other():\n    pass"
    )
    found = a_run(folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(run, "HERE", folder)
        run.parity(found, {"some": 1}, 1)
    assert found.failed == ["tests/test_some.py::test_some: it ended the process, or hung"]
    assert not found.left


def test_parity_and_benchmarks_need_no_more_than_torch_and_pytest(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "FASTCNN_BACKEND": "auto"}
    collect = ["-q", "--collect-only", "-p", "no:cacheprovider"]
    runs = [[*collect, *(f"tests/test_{name}.py" for name in run.FILES)], [*collect, "benchmarks", "--device", "cpu"]]
    code = f"import sys, pytest\nfailed = [pytest.main(each) for each in {runs}]\nimport tests.gpu.tuning\n"
    code += "sys.exit(any(failed))"
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr


def test_tuning_checks_shares_and_writes_each_time(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTCNN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(tuning, "MODELS", {"mnist_cnn": 2})
    monkeypatch.setattr(tuning, "DTYPES", (torch.float32,))
    monkeypatch.setattr("fastcnn.tune.run.SECONDS", {"cpu": 1e-4})
    seen = []
    monkeypatch.setattr(tuning, "check", lambda stage, *_: seen.append(stage) or [])
    for share in range(2):
        tuning.check_share(share, 2)
    stages = tuning.stages()
    assert sorted(map(str, seen)) == sorted(map(str, stages))
    tuning.time_all(tmp_path / "results")
    text = (tmp_path / "results" / "cpu" / "tuning.txt").read_text()
    for stage in stages:
        for mode in ("inference", "training"):
            assert f"{stage.op} {stage} float32 {mode}: " in text
    tables = [tmp_path / "results" / "cpu", tmp_path / "tuning"]
    assert len({path.read_text() for folder in tables for path in folder.glob("*.json")}) == 1
    tuning.time_all(tmp_path / "results")  # nothing is left to time
    assert (tmp_path / "results" / "cpu" / "tuning.txt").read_text() == text


def test_every_kernel_test_is_in_the_run():
    files = {path.stem.removeprefix("test_"): path.read_text() for path in (ROOT / "tests").glob("test_*.py")}
    assert set(run.FILES) >= {name for name, text in files.items() if "\nfrom parity import" in text}
    assert set(run.FILES) <= set(files)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs there for real")
def test_without_a_gpu_it_says_so(capsys):
    assert run.main(run.PARTS) == 1
    assert "no CUDA GPU that this torch can use; nothing was run" in capsys.readouterr().out
