"""Notes of running candidates: what they say of a process that ended, was stopped, or goes on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from tables import CPU, cache
from test_tune import KERNEL, STOCK, small_stages

import fastcnn
from fastcnn.tuning import attempts

__all__ = ["cache"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]


@pytest.mark.parametrize(("errors", "lost"), [(0, False), (1, False), (9, True)], ids=["well", "left behind", "lost"])
def test_an_error_that_a_failed_launch_left_behind_loses_no_gpu(monkeypatch, errors, lost):
    left = ["an error"] * errors

    def synchronize(device):
        if left:
            raise RuntimeError(left.pop())

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    assert attempts.is_lost(torch.device("cuda")) is lost


def test_a_process_that_ends_leaves_the_note_of_its_candidate(tmp_path):
    tried = attempts.Attempts(tmp_path / "table.json", CPU)
    stage = small_stages()[1]
    process = os.fork()
    if not process:
        with tried.under_way(stage, KERNEL):
            os._exit(0)
    os.waitpid(process, 0)
    assert "ended the process" in tried.problem(stage, KERNEL)
    assert not tried.problem(stage, STOCK)
    with pytest.raises(KeyboardInterrupt), tried.under_way(stage, STOCK):
        raise KeyboardInterrupt
    assert not tried.problem(stage, STOCK)


def stopped(tried, stage):
    os.kill(os.getpid(), signal.SIGTERM)


def exited(tried, stage):
    """End the process normally while another thread, which does not count, runs a candidate."""

    def run():
        with tried.under_way(stage, KERNEL):
            begun.set()
            time.sleep(600)

    begun = threading.Event()
    threading.Thread(target=run, daemon=True).start()
    begun.wait()
    sys.exit()


@pytest.mark.parametrize("end", [stopped, exited])
def test_a_process_that_is_stopped_or_exits_does_not_count_against_its_candidate(end, tmp_path):
    code = (
        "import test_attempts, pathlib, sys\n"
        "tried = test_attempts.attempts.Attempts(pathlib.Path(sys.argv[1]), test_attempts.CPU)\n"
        "stage = test_attempts.small_stages()[1]\n"
        "with tried.under_way(stage, test_attempts.KERNEL if sys.argv[2] == 'stopped' else test_attempts.STOCK):\n"
        "    getattr(test_attempts, sys.argv[2])(tried, stage)\n"
    )
    path = tmp_path / "table.json"
    command = [sys.executable, "-c", code, str(path), end.__name__]
    environment = os.environ | {"PYTHONPATH": str(Path(fastcnn.__file__).parents[1])}
    process = subprocess.run(command, cwd=Path(__file__).parent, env=environment)
    assert process.returncode == (-signal.SIGTERM if end is stopped else 0)
    tried = attempts.Attempts(path, CPU)
    assert bool(list(tried.folder.iterdir())) == (end is stopped)
    assert not tried.problem(small_stages()[1], KERNEL)
    assert not list(tried.folder.iterdir())


def test_a_handler_that_another_thread_sets_meanwhile_stays(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with attempts.Attempts(tmp_path / "table.json", CPU).under_way(small_stages()[1], KERNEL):
        signal.signal(signal.SIGTERM, lambda *_: caught.append(True))
    caught = []
    signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    assert caught
