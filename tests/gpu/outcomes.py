"""A pytest plugin for `make gpu`: each test's outcome is written at once, and no test runs a second time.

FASTCNN_OUTCOMES: the file of outcomes. FASTCNN_COMPLETE: a file that is made once all have run. FASTCNN_SHARD: `1/3`,
the second of three shares of the tests.
"""

import faulthandler
import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run import DONE, read

OUTCOMES = Path(os.environ["FASTCNN_OUTCOMES"])
SHARE, SHARES = map(int, os.environ.get("FASTCNN_SHARD", "0/1").split("/"))
HANGS = 180  # seconds of a test


def note(test: str, outcome: str, text: str = "") -> None:
    """Append an outcome: one of `DONE`, `began` until another follows, or `interrupted` by the time's end."""
    OUTCOMES.parent.mkdir(parents=True, exist_ok=True)
    with OUTCOMES.open("a") as file:
        file.write(json.dumps({"test": test, "outcome": outcome, "text": text[-4000:]}) + "\n")


def pytest_configure() -> None:
    """Call a test failed that began and never ended; be interrupted by the time's end, in a background job too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    lines = read(OUTCOMES)
    if lines and lines[-1]["outcome"] == "began":
        note(lines[-1]["test"], "failed", "it ended the process, or hung")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the other shares, and what is done."""
    done = {line["test"] for line in read(OUTCOMES) if line["outcome"] in DONE}
    mine = [item for number, item in enumerate(items) if number % SHARES == SHARE and item.nodeid not in done]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(mine)])
    items[:] = mine


class Outcome:
    """What the phases of the present test have said."""

    worst = "interrupted"
    text = ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Note a test before and after it runs; stop where it has left the GPU unusable, for another process to go on."""
    Outcome.worst, Outcome.text = "interrupted", ""
    note(item.nodeid, "began")
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()
        note(item.nodeid, Outcome.worst, Outcome.text)
        if Outcome.worst == "failed" and is_lost():
            item.session.shouldstop = "the GPU is unusable after an error"


def pytest_sessionfinish(exitstatus: int) -> None:
    """Say that every test has run: passed, some failed, none collected."""
    if exitstatus in (0, 1, 5):
        Path(os.environ["FASTCNN_COMPLETE"]).touch()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the first phase that did not pass; one that has not ended is `interrupted`."""
    if Outcome.worst == "failed":
        return
    if report.outcome != "passed":
        Outcome.worst, Outcome.text = report.outcome, report.longreprtext
    elif report.when == "teardown" and Outcome.worst == "interrupted":
        Outcome.worst = "passed"


def is_lost() -> bool:
    """Whether the GPU is unusable for this process after an error; that of a failed launch goes when it is asked."""
    torch = sys.modules.get("torch")  # without it no test has used the GPU
    return torch is not None and torch.cuda.is_available() and not (answers() or answers())


def answers() -> bool:
    """Whether the GPU does what is asked, and nothing before has failed."""
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True
