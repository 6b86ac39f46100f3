"""What `make check` tests: the files of tests that belong to what has changed since main, for so many seconds.

    python tests/changed.py       # prints their paths

As a pytest plugin it begins no test after SECONDS (60), and says how many are left.
"""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SECONDS = float(os.environ.get("SECONDS_OF_TESTS", "60"))


def changed() -> list[str]:
    """Return the files that differ from where this branch left main, new ones among them."""

    def git(*arguments: str) -> list[str]:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return answer.stdout.splitlines() if answer.returncode == 0 else []

    since = [*git("merge-base", "HEAD", "origin/main"), *git("merge-base", "HEAD", "main"), "HEAD"][0]
    return sorted({*git("diff", "--name-only", since), *git("ls-files", "--others", "--exclude-standard")})


def tests_of(files: list[str]) -> list[str]:
    """Return the test files of changed files: themselves, those named after a file, and those that import a module.

    Example:
        >>> tests_of(["csrc/cpu/lrn.cpp"])
        ['tests/test_lrn.py']
    """
    tests = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    found = set()
    for file in files:
        path = Path(file)
        if file.startswith("tests/") and not path.name.startswith("test_"):
            names = rf"^(?:import|from) {path.stem}\b"
        else:
            modules = path.with_suffix("").parts
            names = (
                rf"^(?:import|from) {re.escape('.'.join(modules[:-1] if path.stem.startswith('__') else modules))}\b"
            )
        found |= {test for test, text in tests.items() if re.search(names, text, flags=re.MULTILINE)}
        found |= {file, f"tests/test_{path.stem}.py"} & tests.keys()
    return sorted(found)


class Limit:
    """When the first test began, and how many have run."""

    began = 0.0
    ran = 0
    left = 0


def pytest_runtest_logfinish() -> None:
    """Count a test."""
    Limit.ran += 1


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """Stop before a test that would begin too late."""
    Limit.began = Limit.began or time.monotonic()
    if time.monotonic() - Limit.began < SECONDS:
        return None
    Limit.left = len(item.session.items) - Limit.ran
    item.session.shouldstop = f"{SECONDS:.0f} seconds are over"
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if Limit.left > 0:
        terminalreporter.write_line(f"make check: {Limit.left} more tests of what has changed: make test runs them")


if __name__ == "__main__":
    print(*tests_of(changed()))
