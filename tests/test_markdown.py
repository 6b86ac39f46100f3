"""What the README, the guide and the other pages tell to type: Python blocks run, commands are known and parse."""

import importlib.util
import linecache
import re
import shlex
from pathlib import Path

import pytest
import typer

import fastcnn
from fastcnn.cli import app, main

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
PYTHON = re.compile(r"^```python\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHELL = re.compile(r"^```(?:bash|console)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"^    (\S.*)$", flags=re.MULTILINE)
QUOTED = re.compile(r"`((?:fastcnn|make|python|torchrun) [^`]*)`")
FENCED = re.compile(r"^```.*?^```", flags=re.DOTALL | re.MULTILINE)
COMMANDS = ("fastcnn", ".venv/bin/fastcnn", "make", "torchrun", "python")
CHEAP = ("doctor", "summary", "explain", "--version")
TARGETS = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def name_of(path):
    return str(path.relative_to(ROOT))


def commands(text):
    """Yield the words of each command of ours, and of make, that a page shows, and whether it could be typed so."""
    blocks = [
        line.removeprefix("$ ") for block in SHELL.findall(text) for line in block.replace("\\\n", "").splitlines()
    ]
    prose = FENCED.sub("", text)
    for whole, lines in ((True, [*blocks, *INDENTED.findall(prose)]), (False, QUOTED.findall(prose))):
        for line in lines:
            if line.split()[:1] and line.split()[0] in COMMANDS and "…" not in line.split():
                yield shlex.split(line, comments=True), whole


def pages_with(found):
    return [path for path in PAGES if list(found(path.read_text()))]


def look_up(arguments):
    """Raise where a command or an option is named that ``fastcnn`` does not have."""
    command = typer.main.get_command(app)
    for word in arguments:
        if word.startswith("--"):
            assert word in {option for each in command.params for option in (*each.opts, *each.secondary_opts)}, word
        elif hasattr(command, "commands"):
            command = command.commands[word]


def parse(arguments):
    """Parse arguments of ``fastcnn`` as it would, down to the last command, without running it."""
    command, name, parent = typer.main.get_command(app), "fastcnn", None
    while True:
        context = command.make_context(name, list(arguments), parent=parent)
        if not hasattr(command, "resolve_command"):
            return
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        (name, command, arguments), parent = command.resolve_command(context, rest), context


def check(words, whole=True):
    """Raise where a command asks for something that is not there."""
    program, *arguments = words
    read = parse if whole else look_up
    if program == "make":
        wanted = [word for word in arguments if "=" not in word]
        assert set(wanted) <= TARGETS, f"make has no target of {wanted}"
    elif program in ("python", "torchrun") and "-m" in arguments:
        module = arguments.index("-m") + 1
        if arguments[module] == "fastcnn":
            read(arguments[module + 1 :])
        assert importlib.util.find_spec(arguments[module]), arguments[module]
    elif program in ("python", "torchrun"):
        scripts = [word for word in arguments if word.endswith(".py")]
        assert all((ROOT / script).is_file() for script in scripts), scripts
    else:
        read(arguments)


@pytest.mark.parametrize("path", pages_with(PYTHON.findall), ids=name_of)
def test_python_runs(path, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    text = path.read_text()
    for block in PYTHON.finditer(text):
        lines = text[: block.start(1)].count("\n")  # so that a traceback tells the page's own line
        with fastcnn.use_backend("auto"):  # which the block may change
            source, place = "\n" * lines + block[1], f"{path}:{lines}"
            linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)  # as of a file
            exec(compile(source, place, "exec"), names)
        if path.name == "README.md":  # whose blocks stand alone
            names = {"__name__": "page"}


@pytest.mark.parametrize("path", pages_with(commands), ids=name_of)
def test_commands_parse(path):
    for words, whole in commands(path.read_text()):
        check(words, whole)


def cheap():
    found = {
        tuple(words[1:])
        for path in PAGES
        for words, whole in commands(path.read_text())
        if whole and "fastcnn" in words[0]
    }
    return sorted(arguments for arguments in found if arguments and arguments[0] in CHEAP)


@pytest.mark.parametrize("arguments", cheap(), ids=" ".join)
def test_cheap_commands_run(arguments, capsys):
    if arguments[0] == "summary":
        pytest.importorskip("torchinfo", reason="fastcnn summary needs the extra train")
    assert main(list(arguments)) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "fastcnn trein mnist",
        "fastcnn train mnist --epoch 3",
        "fastcnn train cifar",
        "python -m benchmarks.rapport",
        "torchrun -m fastcnn train mnist --parallel weird",
        "make dcos",
        "python examples/absent.py",
    ],
)
def test_wrong_commands_are_found(line):
    with pytest.raises(Exception, match=r"trein|epoch|cifar|rapport|weird|dcos|absent"):
        check(shlex.split(line))


@pytest.mark.parametrize("line", ["fastcnn trein", "fastcnn train --epoch"])
def test_wrong_names_in_a_sentence_are_found(line):
    [(words, whole)] = commands(f"see `{line}` for more")
    with pytest.raises((KeyError, AssertionError), match=r"trein|epoch"):
        check(words, whole)


def test_there_is_something_to_test():
    assert {"README.md", "index.md"} <= {path.name for path in pages_with(PYTHON.findall)}
    assert len(cheap()) >= 4
