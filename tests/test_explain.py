"""fastcnn.explain: the stages, what runs them, and why other layers run by themselves."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import fastcnn
from fastcnn import front
from fastcnn.cli import main


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)
        self.features = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Sigmoid(), nn.ReLU())
        self.bn, self.fc, self.pool = nn.BatchNorm2d(4), nn.Linear(4, 2), nn.MaxPool2d(2)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = self.features(torch.tanh(self.conv2(x)))
        x = self.pool(self.bn(self.conv3(x) * self.conv3(x)))
        return self.fc(x.mean((2, 3)))


def stages(rows):
    return [(row.names, row.stage) for row in rows if row.stage]


def reasons(rows):
    return {row.names[0]: row.reason for row in rows if not row.stage}


def test_stages_and_reasons_of_a_network_without_an_input():
    rows = fastcnn.explain(Net())
    found = dict(stages(rows))
    assert found["conv1", "F.relu", "F.max_pool2d"] == "conv+relu+pool"
    assert found["features.0", "features.1"] == "conv+relu"
    assert found["pool",] == "pool"
    assert not any(row.runs or row.shape for row in rows)
    why = reasons(rows)
    assert why["conv2"] == "before torch.tanh"
    assert why["features.2"] == "before Sigmoid"
    assert why["features.4"] == "after Sigmoid"
    assert why["conv3"] == "called 2 times, never in a stage"
    assert why["fc"] == "last of its row"


def test_input_tells_shapes_and_backends_in_the_order_of_the_run():
    with fastcnn.use_backend("cpu"):
        rows = fastcnn.explain(Net(), (2, 3, 12, 12))
    ran = [(row.names[0], row.stage, row.shape, row.runs) for row in rows if row.stage]
    assert ran == [
        ("conv1", "conv+relu+pool", (2, 3, 12, 12), "cpu"),
        ("features.0", "conv+relu", (2, 4, 3, 3), "cpu"),
        ("pool", "pool", (2, 4, 3, 3), "cpu"),
    ]
    assert set(reasons(rows)) >= {"conv2", "conv3", "fc"}


def test_stock_layers_come_with_their_reason():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    (asked,) = _under("torch", model)
    (unmeasured,) = _under("auto", model)
    assert (asked.runs, asked.reason) == ("torch", "the backend asked for")
    assert unmeasured.runs == "torch"
    assert unmeasured.reason == "stock is as fast, as measured on this kind of device"
    assert _under("auto", model)[0].reason == unmeasured.reason  # said again, though the log has it once


class Twice(nn.Module):
    """Calls of equal shape, on one line and in a loop."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())

    def forward(self, x):
        for _ in range(3):
            x = self.block(x)
        y = self.block(x)
        return F.max_pool2d(x, 2) + F.max_pool2d(y, 2)


def test_calls_of_different_places_are_rows_of_their_own_and_a_loop_is_one():
    rows = fastcnn.explain(Twice(), (1, 3, 8, 8))
    assert [row.names[0] for row in rows if row.stage] == ["block.0", "block.0", "F.max_pool2d", "F.max_pool2d"]


@pytest.mark.skipif(not fastcnn.backends()["cpu"].available, reason="needs the compiled extension")
def test_reasons_of_the_same_pool_differ_and_are_true():
    pool = nn.Sequential(nn.MaxPool2d(2))

    def reason(size, dtype=torch.float32, layout=torch.contiguous_format, gradient=False):
        input = torch.zeros(size, dtype=dtype, requires_grad=gradient).to(memory_format=layout)
        (row,) = fastcnn.explain(pool, input)
        return row.runs, row.reason

    large = (8, 32, 32, 32)
    assert reason(large) == ("cpu", "faster from this size on, as measured on this kind of device")
    assert reason((1, 3, 8, 8))[0] == ("torch" if front.problem else "cpu")
    assert reason((1, 3, 8, 8), gradient=True) == ("torch", "below the size from which it pays")
    assert reason(large, layout=torch.channels_last)[0] == "cpu"
    assert reason((8, 32, 16, 16), layout=torch.channels_last, gradient=True)[0] == "torch"
    (row,) = fastcnn.explain(nn.Sequential(nn.Conv2d(32, 8, 3), nn.ReLU()), large)
    assert (row.runs, row.reason) == ("torch", "stock is as fast, as measured on this kind of device")
    assert reason(large, torch.float16) == ("torch", "not measured for this shape and torch.float16 on this device")
    (row,) = fastcnn.explain(nn.Sequential(nn.MaxPool2d(16)), (8, 32, 32, 32))
    assert row.reason.startswith("no kernel takes this call: a kernel takes windows of up to 254 places")


def _under(backend, model):
    with fastcnn.use_backend(backend):
        return fastcnn.explain(model, torch.randn(1, 3, 8, 8))


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    fastcnn.explain(model, (2, 3, 8, 8))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model) is nn.Sequential
    assert model[0].weight.grad is None


class OwnConv(nn.Conv2d):
    def forward(self, input):
        return super().forward(input) + 1


def hooked(model):
    model[0].register_forward_hook(lambda *_: None)


OWN = {
    "hook": (lambda m: hooked(m), "it has forward hooks"),
    "pruned": (lambda m: prune.l1_unstructured(m[0], "weight", 1), "it has forward pre hooks"),
    "subclass": (lambda m: m.__setitem__(0, OwnConv(3, 4, 3)), "its class has a forward of its own"),
    "compiled": (lambda m: m[0].compile(backend="eager"), "it is compiled by itself"),
    "forward": (
        lambda m: setattr(m[0], "forward", lambda x: type(m[0]).forward(m[0], x)),
        "its forward has been replaced on the instance",
    ),
}


@pytest.mark.parametrize("case", OWN)
@pytest.mark.parametrize("input", [None, (1, 3, 8, 8)], ids=["static", "run"])
def test_layer_that_keeps_out_of_a_stage_says_why(case, input):
    change, reason = OWN[case]
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    change(model)
    rows = fastcnn.explain(model, None if case == "compiled" else input)
    assert reasons(rows)["0"] == reason
    assert stages(rows) == []


def test_parts_of_torch_and_unread_forwards_say_so():
    names = {"nn": nn, "F": F}
    exec("class Unseen(nn.Module):\n def forward(self, x):\n  return F.relu(self.conv(x))", names)
    unseen = names["Unseen"]()
    unseen.conv = nn.Conv2d(3, 4, 3)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoderLayer(4, 2), "unseen": unseen})
    why = reasons(fastcnn.explain(model))
    assert why["encoder.linear1"] == "a part of torch's TransformerEncoderLayer"
    assert why["unseen.conv"] == "in Unseen, the source of its forward is not available"


def test_long_reason_that_stages_share_is_written_once_below_the_table(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    explanation = fastcnn.explain(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))
    rows = [
        explanation[0]._replace(shape=(1, 3, 9, 9), reason=reason)
        for reason in ("so it is " * 9, "short", "so it is " * 9, "alone it is " * 9, "short")
    ]
    printed = " ".join(str(type(explanation)(rows)).split())
    table, _, note = printed.partition(" note 1: ")
    assert note.split() == ("so it is " * 9).split()
    assert table.count("note 1") == 2
    assert table.count("short") == 2
    assert table.count("alone it is") > 5


def test_table_reads_in_eighty_columns():
    table = str(fastcnn.explain(fastcnn.AlexNet2012(), (16, 3, 227, 227)))
    lines = table.splitlines()
    assert lines[0].split() == ["layers", "stage", "input", "runs", "why"]
    assert max(map(len, lines)) <= 80
    assert "features.2, 3" in table
    assert str(fastcnn.explain(nn.Linear(2, 2))).splitlines()[1].split() == ["Linear", "the", "whole", "model"]


WRONG = {
    "not a module": (lambda: fastcnn.explain(None), TypeError, "model: expected"),
    "not an input": (lambda: fastcnn.explain(nn.ReLU(), 3), TypeError, "input: expected a tensor, its sizes"),
    "no sizes": (lambda: fastcnn.explain(nn.ReLU(), (1, -3)), TypeError, "input: expected a tensor, its sizes"),
    "channels": (lambda: fastcnn.explain(Net(), (1, 4, 9, 9)), RuntimeError, "does not run on an input of 1x4x9x9"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(case):
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()


def net():
    """For the command line."""
    return Net()


def linear():
    """Takes other images than the command gives."""
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 2))


COMMANDS = {
    "ours": (["mnist_cnn"], "conv+relu+pool"),
    "torchvision": (["torchvision:squeezenet1_1", "--input-size", "3,64,64"], "features.3.squeeze"),
    "own": ([f"{__name__}:net", "--input-size", "3,12,12", "--train"], "F.max_pool2d"),
    "own without input": ([f"{__name__}:net"], "before torch.tanh"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_command(case, capsys):
    arguments, expected = COMMANDS[case]
    assert main(["explain", *arguments]) == 0
    printed = capsys.readouterr().out
    assert expected in printed
    assert max(map(len, printed.splitlines())) <= 80


OWN_FILE = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self):
        from sizes import CHANNELS  # not before the network is built

        super().__init__(nn.Conv2d(3, CHANNELS, 3), nn.ReLU())
"""


def test_installed_command_finds_files_of_the_working_directory(tmp_path):
    """Python puts the folder of the console script on its path, and not the one where it is called."""
    (tmp_path / "nets.py").write_text(OWN_FILE)
    (tmp_path / "sizes.py").write_text("CHANNELS = 4")
    script = tmp_path / "bin" / "fastcnn"
    script.parent.mkdir()
    script.write_text("import sys\nfrom fastcnn.cli import main\nsys.exit(main())")
    command = [sys.executable, script, "explain", "nets:Net", "--input-size", "3,16,16"]
    environment = {**os.environ, "PYTHONPATH": str(Path(fastcnn.__file__).parents[1])}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "conv+relu" in result.stdout


FAULTS = {
    "syntax": ("x = (", "faulty:net: faulty cannot be imported: SyntaxError: '(' was never closed"),
    "import": ("import nowhere", "faulty:net: expected package.module:callable, but No module named 'nowhere'"),
    "key": ("{}['k']", "faulty:net: faulty cannot be imported: KeyError: 'k'"),
    "exit": ("raise SystemExit(2)", "faulty:net: faulty cannot be imported: SystemExit: 2"),
    "build": ("def net():\n    return {}['k']", "faulty:net cannot be built: KeyError: 'k'"),
    "build exits": ("def net():\n    raise SystemExit(2)", "faulty:net cannot be built: SystemExit: 2"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_fault_in_a_file_of_the_users_comes_with_the_name_that_was_given(case, tmp_path, monkeypatch, capsys):
    source, expected = FAULTS[case]
    (tmp_path / "faulty.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "faulty", raising=False)
    assert main(["explain", "faulty:net"]) in (1, 2)  # 2: the argument leads to no callable
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: {expected}")
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


@pytest.mark.parametrize("name", ["googlenet", "fcn_resnet50"])
def test_model_of_torchvision_warns_of_nothing_and_loads_nothing(name, monkeypatch, recwarn, capsys):
    models = pytest.importorskip("torchvision.models")
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.setattr(models._api, "load_state_dict_from_url", lambda *_, **__: pytest.fail("weights were loaded"))
    assert main(["explain", f"torchvision:{name}", "--input-size", "3,64,64"]) == 0
    assert capsys.readouterr().err == ""
    assert [str(each.message) for each in recwarn] == []


WRONG_COMMANDS = {
    "unknown": (["nonet"], "no model is named 'nonet'"),
    "unknown of torchvision": (["torchvision:nonet"], "torchvision has no model 'nonet'"),
    "no module": (["nowhere.to.be:found"], "No module named 'nowhere'"),
    "no model": (["math:floor", "--option", "x=1"], "cannot be built"),
    "wrong size": (["mnist_cnn", "--input-size", "3,28,28"], "does not run on an input of 1x3x28x28"),
    "wrong size of a stock layer": ([f"{__name__}:linear", "--input-size", "3,3,3"], "run on an input of 1x3x3x3"),
    "device": (["mnist_cnn", "--device", "nowhere"], "--device"),
}


@pytest.mark.parametrize("case", WRONG_COMMANDS)
def test_command_says_in_one_line_what_is_wrong(case, capsys):
    arguments, expected = WRONG_COMMANDS[case]
    assert main(["explain", *arguments]) in (1, 2)  # 1: what it leads to fails
    captured = capsys.readouterr()
    assert expected in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_help_has_an_example(capsys):
    assert main(["explain", "--help"]) == 0
    assert "Example: fastcnn explain" in capsys.readouterr().out


def test_package_alone_does_not_bring_in_the_command():
    code = (
        "import sys, fastcnn; fastcnn.explain(fastcnn.MnistCNN()); print('rich' in sys.modules, 'typer' in sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["False", "False"]


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_table_fits_the_terminal(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["explain", "alexnet"]) == 0
    output = capsys.readouterr().out
    assert max(map(len, output.splitlines())) <= min(columns, 80)
    words = "".join(output.split())
    for whole in ("why", "1x3x224x224", "Linear"):
        assert columns < 60 or whole in words


def test_nothing_of_a_row_is_cut(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    reason = "a reason of many words that goes on in the next lines until it is whole"
    row = type(fastcnn.explain(fastcnn.MnistCNN())[0])(
        ("features.0", "1", "2"), ("Conv2d",), "linear+relu+dropout", "torch", (1, 384, 13, 13), reason
    )
    text = str(fastcnn.Explanation([row]))
    assert all(word in text.split() for word in reason.split())
