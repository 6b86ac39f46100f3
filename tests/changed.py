"""What `make check` tests: the files of tests that belong to what has changed since main, for so many seconds.

    python tests/changed.py             # prints their paths
    python tests/changed.py --announce  # says what will run

As a pytest plugin it begins no test after SECONDS (60), and says how many are left.
"""

import os
import re
import subprocess
import sys
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


def users(source: str) -> set[str]:
    """Return the files under csrc/ that include one of them, itself among them.

    Example:
        >>> users("csrc/cpu/max_pool_rows.h")
        {'csrc/cpu/max_pool_rows.h', 'csrc/cpu/max_pool.cpp'}
    """
    includes = {
        path: {(path.parent / name).resolve() for name in re.findall(r'^#include "(.*)"', path.read_text(), re.M)}
        for path in (ROOT / "csrc").glob("**/*.*")
    }
    found, fresh = set(), {ROOT / source}
    while fresh:
        found |= fresh
        fresh = {path for path, named in includes.items() if named & fresh} - found
    return {str(path.relative_to(ROOT)) for path in found}


def tests_of(files: list[str]) -> list[str]:
    """Return the test files of changed files: themselves, those named after a file, and those that import a module.

    What includes a changed header has changed with it. Changed test files come first, then in the order of `files`.

    Example:
        >>> tests_of(["csrc/cpu/lrn.cpp"])
        ['tests/test_lrn.py']
    """
    tests = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    found: dict[str, None] = {}
    for file in sorted(files, key=lambda file: not file.startswith("tests/test_")):
        path = Path(file)
        if file.startswith("tests/") and not path.name.startswith("test_"):
            names = rf"^(?:import|from) {path.stem}\b"
        elif file.startswith("csrc/"):
            names = rf'^#include "(?:.*/)?{re.escape(path.name)}"'
        else:
            *package, name = path.parts[:-1] if path.stem.startswith("__") else path.with_suffix("").parts
            names = rf"\b{re.escape('.'.join([*package, name]))}\b"
            names += rf"|^ *from {re.escape('.'.join(package))} import .*\b{re.escape(name)}\b" if package else ""
        named = {f"tests/test_{Path(each).stem}.py" for each in (users(file) if file.startswith("csrc/") else [file])}
        named |= {test for test, text in tests.items() if re.search(names, text, flags=re.MULTILINE)}
        mine = (named | {file}) & tests.keys()
        found |= dict.fromkeys(sorted(mine, key=lambda test: (path.stem not in test, test)))
    return list(found)


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


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Call a run passed that the time alone has ended."""
    if Limit.left > 0 and exitstatus == pytest.ExitCode.INTERRUPTED and not session.testsfailed:
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what was left out."""
    if Limit.left > 0:
        terminalreporter.write_line(f"make check: {Limit.left} more tests of what has changed: make test runs them")


def announcement(files: list[str]) -> str:
    """Say what `make check` runs, and what it cannot test."""
    tests = [Path(test).stem.removeprefix("test_") for test in tests_of(files)]
    says = [
        f"make check: lint, then for {SECONDS:.0f} seconds the tests of what differs from main, but the sweeps; "
        f"90 seconds in all. Tests: {', '.join(tests) or 'none'}"
    ]
    sources = [file for file in files if file.startswith("csrc/") and (ROOT / file).exists()]
    built = max((path.stat().st_mtime for path in (ROOT / "fastcnn").glob("_*.so")), default=0.0)
    newer = [file for file in sources if (ROOT / file).stat().st_mtime > built]
    if newer:
        says.append(f"Not built yet, and so tested by make test alone, which builds first: {', '.join(newer)}")
    return "\n".join(says)


if __name__ == "__main__":
    files = changed()
    print(announcement(files) if "--announce" in sys.argv[1:] else " ".join(tests_of(files)))
