"""Who may import whom, and that one stem names one op in every folder (CONTRIBUTING.md tells the reasons)."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastcnn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastcnn"
STEMS = (
    *("conv_relu", "conv_relu_pool", "max_pool", "lrn", "lrn_pool", "linear_relu"),
    *("bn_relu", "bn_relu_pool", "add_relu"),
)
STEMS += ("normalize", "normalize_conv_relu", "normalize_conv_relu_pool", "linear_relu_dropout")
GRADIENTS = {"dgrad", "wgrad"}  # of every convolution: operators in ops/gradients.py, kernels in triton/convolution/

# A layer is a file or folder right under fastcnn/; `fastcnn` itself is __init__.py. Arrows go one way: nn -> stages ->
# functional -> ops -> route -> tuning -> backend, and explain and models -> fuse -> rewrite -> nn; shapes, calls
# and available are leaves. The backend finds kernels by name, when first used. The commands (train, tune,
# predict, and each folder's command.py) stand on console, never on each other's.
PUBLIC = {"fastcnn", "functional", "nn", "optim", "models"}
MAY_IMPORT = {
    "fastcnn": {"_entry", "available", "backend", "explain", "functional", "fuse", "models", "nn", "optim", "warm_up"},
    "warm_up": {"backend", "parameters", "route", "tuning"},
    "models": {"models", "fuse", "nn", "roles", "tuning"},
    "explain": {"explain", "fuse", "rewrite", "calls", "nn", "stages", "roles", "route"},
    "fuse": {"rewrite", "instance"},
    "rewrite": {"rewrite", "nn", "stages", "roles", "calls", "instance"},
    "nn": {"stages", "roles", "functional", "normalization"},
    "stages": {"roles", "functional", "calls", "normalization", "ops", "turning"},
    "turning": {"backend", "overrides", "roles", "shapes"},
    "roles": {"calls", "instance", "normalization"},
    "instance": set(),
    "normalization": {"functional"},
    "optim": {"backend", "route"},
    "calls": set(),
    "functional": {"functional", "ops", "shapes"},
    "ops": {"ops", "front", "route", "backend", "overrides", "parameters", "shapes"},
    "triton": {"triton", "shapes"},
    "front": {"available", "backend"},
    "route": {"available", "backend", "front", "overrides", "parameters", "tuning"},
    "tuning": {"tuning", "available", "backend", "overrides", "parameters", "shapes"},
    "parameters": set(),
    "overrides": set(),
    "backend": {"available"},
    "shapes": set(),
    "available": set(),
    "_entry": set(),
    "console": {"console", "tuning", *PUBLIC},
    "train": {"train", "console", *PUBLIC},
    "predict": {"predict", "console", *PUBLIC},
    "tune": {
        "tune",
        "tuning",
        "available",
        "console",
        "warm_up",
        *PUBLIC,
    },  # it times what the backends have
    "cli": {"cli", "front", "console", "explain", "predict", "train", "tune", *PUBLIC},
    "__main__": {"cli", *PUBLIC},
}
TESTS_MAY_IMPORT = {"console", "train", "predict", "tune", "cli", *PUBLIC}
# Tests of the kernels themselves, below what the public API can ask for: their configurations and compiled code.
KERNEL_TESTS = {
    "codegen.py": {"triton", "shapes"},
    "front_end.py": {"shapes"},
    "headline.py": {"shapes"},
    "test_codegen.py": {"triton", "shapes"},
    "test_csrc_math.py": {"shapes"},
    "test_configurations.py": {"triton", "shapes"},
    "played_gluon.py": {"triton", "shapes"},
    "test_first_layers_triton.py": {"triton", "shapes"},
    "test_normalize.py": {"triton"},
    "test_optim.py": {"triton"},
    "test_front.py": {"front", "ops", "tuning", "route"},
    "test_front_autograd.py": {"front", "ops", "tuning", "route"},
    "test_autograd.py": {"front"},
    "test_backend.py": {"front"},
    "conftest.py": {"available", "front"},
    "test_overrides.py": {"route"},
    "test_linear_relu_dropout.py": {"triton"},
    "test_gradients.py": {"backend"},
    "test_available.py": {"available"},
    "test_build.py": {"available"},
    "parity.py": {"tuning"},
    "tables.py": {"tuning"},
    "tuning.py": {"tuning"},
    "test_tma.py": {"triton", "shapes"},
    "test_attempts.py": {"tuning"},
    "test_tune.py": {"tuning"},
    "test_tune_command.py": {"tuning"},
    "test_gpu_run.py": {"tuning"},
    "test_explain.py": {"front"},
    "test_flops.py": {"front"},
    "trials.py": {"backend", "tuning"},
    "test_rows_in_rows.py": {"stages"},
    "test_trial.py": {"front", "tuning"},
    "test_trial_for_real.py": {"tuning"},
    "test_trial_proof.py": {"tuning"},
    "test_trial_telling.py": {"tuning"},
    "test_tuning.py": {"tuning"},
    "test_turning.py": {"models", "stages"},
    "test_warp_specialized.py": {"triton", "shapes"},
}
# Importing the package needs torch alone; what else a layer needs it imports where it is used.
OUTSIDE = {
    "triton": {"torch", "triton"},
    "console": {"torch", "typer", "rich"},
    "train": {"torch", "typer", "rich", "numpy", "matplotlib", "torchvision"},
    "tune": {"torch", "rich"},
    "cli": {"torch", "typer", "rich"},
}


def layer_of(path):
    return "fastcnn" if path == PACKAGE / "__init__.py" else path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree, whole_file=True):
    """Yield the dotted name of each thing that a file imports; `whole_file`: inside functions too."""
    for node in ast.walk(tree) if whole_file else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def touched(tree):
    """Yield `fastcnn.<name>` for each attribute of the package that code reads, which needs no import of its own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "fastcnn":
            yield f"fastcnn.{node.attr}"


def layers_used(path):
    """Return the layers of the package that a file imports or reaches through the package."""
    tree = ast.parse(path.read_text())
    names = {name for name in (*imported(tree), *touched(tree)) if name.split(".")[0] == "fastcnn"}
    return {layer_named(name) for name in names}


def layer_named(name):
    """Return the layer that a dotted name belongs to; what the package itself exports is the layer `fastcnn`."""
    parts = name.split(".")
    if len(parts) == 1 or (len(parts) == 2 and parts[1] in fastcnn.__all__ and parts[1] not in PUBLIC):
        return "fastcnn"
    return parts[1] if parts[1] in MAY_IMPORT else "fastcnn"


def module_of(path):
    """Return a file's dotted name; a folder's `__init__.py` has the folder's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_when_run(path):
    """Yield the dotted names of the package's own things that a file imports, but not under `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    return (name for name in imported(tree) if name.split(".")[0] == "fastcnn")


def file_named(name, files):
    """Return the dotted name of the file that holds what a dotted name names."""
    while name not in files:
        name = name.rpartition(".")[0]
    return name


def python_files(folder):
    return sorted(path for path in folder.rglob("*.py"))


def name_of(path):
    return str(path.relative_to(ROOT))


each_file = pytest.mark.parametrize("path", python_files(PACKAGE), ids=name_of)


@each_file
def test_file_imports_only_what_its_layer_may(path):
    commands_too = {"console"} if path.name == "command.py" else set()
    assert layers_used(path) <= MAY_IMPORT[layer_of(path)] | commands_too


@each_file
def test_only_the_command_line_imports_a_command(path):
    imports = {name for name in imported(ast.parse(path.read_text())) if ".command." in f"{name}."}
    assert not imports or layer_of(path) == "cli"


def test_importing_the_package_imports_no_command():
    code = "import fastcnn, sys; print(*(name for name in sys.modules if name.startswith('fastcnn.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert not {name.split(".")[1] for name in loaded.split()} & {"cli", "console", "train", "predict", "tune"}
    assert not [name for name in loaded.split() if name.endswith(".command")]


def test_no_circle_between_files():
    """Imports inside functions count too; those for type checkers alone do not."""
    files = {module_of(path): path for path in python_files(PACKAGE)}
    graph = {name: {file_named(each, files) for each in imported_when_run(path)} for name, path in files.items()}
    graphlib.TopologicalSorter({name: used - {name} for name, used in graph.items()}).prepare()  # names a circle


@each_file
def test_file_needs_torch_alone_to_be_imported(path):
    tree = ast.parse(path.read_text())
    outside = {name.split(".")[0] for name in imported(tree, whole_file=False)} - sys.stdlib_module_names
    commands_too = {"typer", "rich"} if path.name == "command.py" else set()
    assert outside - {"fastcnn"} <= OUTSIDE.get(layer_of(path), {"torch"}) | commands_too


def test_only_the_triton_folder_imports_triton():
    importers = {
        layer_of(path)
        for path in python_files(PACKAGE)
        if any(name.split(".")[0] == "triton" for name in imported(ast.parse(path.read_text())))
    }
    assert importers == {"triton"}


def test_convolutions_know_nothing_of_their_stages():
    for path in python_files(PACKAGE / "triton" / "convolution"):
        own = {
            name.split(".")[2] for name in imported(ast.parse(path.read_text())) if name.startswith("fastcnn.triton.")
        }
        assert own <= {"convolution", "tiles", "normalize", "max_pool_backward"}, name_of(path)


@pytest.mark.parametrize("path", [*python_files(ROOT / "tests"), *python_files(ROOT / "examples")], ids=name_of)
def test_tests_and_examples_use_the_public_api(path):
    assert layers_used(path) <= TESTS_MAY_IMPORT | KERNEL_TESTS.get(path.name, set())


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("place", ["fastcnn/ops/{}.py", "fastcnn/triton/{}.py", "tests/test_{}.py"])
def test_one_stem_names_one_op(place, stem):
    assert (ROOT / place.format(stem)).is_file()


def test_operators_are_named_after_their_stem():
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fastcnn::")]
    names = {name.removeprefix("fastcnn::").split(".")[0] for name in registered}
    kinds = ("", "_codes", "_backward", "_statistics")
    assert names <= {stem + kind for stem in STEMS for kind in kinds} | GRADIENTS
    assert set(STEMS) <= names


@pytest.mark.parametrize("path", [*python_files(PACKAGE), *python_files(ROOT / "tests")], ids=name_of)
def test_file_holds_one_idea(path):
    assert len(path.read_text().splitlines()) <= (400 if PACKAGE in path.parents else 450)


@pytest.mark.parametrize(
    ("code", "layers"),
    [
        ("import fastcnn", {"fastcnn"}),
        ("import fastcnn.ops.lrn", {"ops"}),
        ("from fastcnn import use_backend", {"fastcnn"}),
        ("from fastcnn import functional as FF", {"functional"}),
        ("from fastcnn.route import choose", {"route"}),
        ("from fastcnn.backend import use_backend", {"backend"}),
        ("def late():\n    from fastcnn.triton import tiles", {"triton"}),
        ("import fastcnn\nfastcnn.shapes.pair", {"fastcnn", "shapes"}),
        ("import fastcnn\nfastcnn.fuse(model)", {"fastcnn"}),
        ("import torch.nn, fastcnnlike", set()),
    ],
)
def test_the_law_sees(tmp_path, code, layers):
    (tmp_path / "code.py").write_text(code)
    assert layers_used(tmp_path / "code.py") == layers
