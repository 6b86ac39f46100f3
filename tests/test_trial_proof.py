"""What a child process proves of each kernel before a trial: verdicts that are kept, and kernels that never run."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tables import CPU, NAME, cache, operators
from trials import ROOT, Player, lookup_chosen, player, pool, runs_kernel

import fastcnn
import fastcnn.functional as FF
from fastcnn.tuning import candidates, lookup, places, proof, stage

__all__ = ["cache", "player"]
pytestmark = [
    pytest.mark.usefixtures("cache"),
    pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension"),
]


CHILD = """
import os, signal, sys, time
import torch
from fastcnn.tuning import proof, stage
from fastcnn.backend import chosen
call = stage.Stage.call
def fail(output):
    raise KeyError("x")
BAD = {
    "add_relu": fail,
    "bn_relu": lambda output: os.kill(os.getpid(), signal.SIGSEGV),
    "bn_relu_pool": lambda output: time.sleep(600),
    "lrn_pool": lambda output: os._exit(3),
    "max_pool": lambda output: output * 2,
}
def bad(self, tensors):
    output = call(self, tensors)
    return BAD[self.op](output) if chosen() == "cpu" and self.op in BAD else output
stage.Stage.call = bad
proof.main()
"""
SAID = {
    "add_relu": "KeyError: 'x'",
    "bn_relu": "it ended its process (signal 11)",
    "bn_relu_pool": "it did not end within",
    "lrn": "",
    "lrn_pool": "it ended its process (exit status 3)",
    "max_pool": "output: error",
}


def test_kernels_that_fail_their_proof_never_run_in_this_process(player, monkeypatch, capsys):
    lines, seconds = proof._lines, proof.SECONDS

    def impatient(stream):
        monkeypatch.setattr(proof, "SECONDS", seconds)
        for line in lines(stream):
            if line.startswith("begin bn_relu_pool"):
                monkeypatch.setattr(proof, "SECONDS", 0.5)
            yield line

    names = {op: proof.kernel_name(op, *candidates.light(op, CPU)) for op in SAID}
    monkeypatch.setattr(proof, "CASES", {op: proof.CASES[op] for op in SAID})
    monkeypatch.setattr(proof, "_lines", impatient)
    monkeypatch.setattr(Player, "child", lambda self: [sys.executable, "-c", CHILD, "cpu"])
    ran = []
    call = stage.Stage.call
    monkeypatch.setattr(stage.Stage, "call", lambda self, tensors: ran.append(lookup_chosen()) or call(self, tensors))
    pool()
    assert not runs_kernel()
    assert set(ran) == {"torch"}
    kept = json.loads(proof.path_of(NAME).read_text())["verdicts"]
    told = capsys.readouterr().err
    for op, words in SAID.items():
        assert words in kept[names[op]], op
        assert bool(kept[names[op]]) == bool(words), op
        assert (f"kernel {names[op]} is left out on {NAME}: " in told) == bool(words), op
    FF.local_response_norm(torch.randn(2, 9, 4, 4), 3)
    assert operators(lambda: FF.local_response_norm(torch.randn(2, 9, 4, 4), 3))


def test_the_proof_is_kept_for_a_build_and_made_anew_for_another(player, monkeypatch):
    count = []
    child = Player.child
    monkeypatch.setattr(Player, "child", lambda self: count.append(1) or child(self))
    pool()
    lookup.forget()
    pool(batch=9)
    assert len(count) == 1
    monkeypatch.setattr(places, "_digest", lambda: "another")
    pool(batch=50)
    assert len(count) == 2


def test_a_child_that_does_not_begin_says_nothing_of_kernels(player, monkeypatch, capsys):
    monkeypatch.setattr(proof, "_not_started", {})
    count = []
    code = "raise RuntimeError('the device is busy')"
    monkeypatch.setattr(Player, "child", lambda self: count.append(1) or [sys.executable, "-c", code])
    for batch in (2, 50):
        assert pool(batch=batch).shape == (batch, 3, 4, 4)
    assert len(count) == 1
    assert not player.timed
    assert not proof.path_of(NAME).exists()
    words = "the process that checks kernels did not start: RuntimeError: the device is busy"
    assert capsys.readouterr().err.count(words) == 1


def test_the_child_has_this_process_s_modules_and_not_the_folder_s(player, monkeypatch, tmp_path):
    (tmp_path / "filelock.py").write_text("raise RuntimeError('a file of the user')")
    (tmp_path / "queue.py").write_text("raise RuntimeError('a file of the user')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each])
    monkeypatch.setattr(Player, "child", lambda self: [sys.executable, "-m", "fastcnn.tuning.proof", "cpu"])
    monkeypatch.setattr(proof, "CASES", {"add_relu": proof.CASES["add_relu"]})
    assert proof.verdicts(player) == {"add_relu: cpu": ""}


def test_where_nothing_can_be_kept_the_process_knows_for_itself(player, monkeypatch, capsys):
    monkeypatch.setenv("FASTCNN_CACHE", os.devnull)
    lookup.forget()
    count = []
    child = Player.child
    monkeypatch.setattr(Player, "child", lambda self: count.append(1) or child(self))
    pool()
    assert runs_kernel()
    pool(batch=9)
    assert len(count) == 1
    assert "results of trials cannot be stored" in capsys.readouterr().err


def test_a_process_that_dies_in_a_trial_leaves_the_candidate_out_in_the_next(player, request):
    if "FASTCNN_ALONE" not in os.environ:  # a fork of a process that has run much may crash by itself
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.node.nodeid]
        alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        run = subprocess.run(command, cwd=ROOT, env=alone | {"FASTCNN_ALONE": "1"}, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout
        return
    call = stage.Stage.call

    def die(self, tensors):
        if lookup_chosen() == "cpu":
            os._exit(7)
        return call(self, tensors)

    process = os.fork()
    if not process:
        stage.Stage.call = die
        pool()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 7
    pool()
    assert not runs_kernel()
    assert set(player.timed) == {"torch"}
