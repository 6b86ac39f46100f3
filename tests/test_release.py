"""What a release and its repository say of themselves: one version everywhere, and CI that runs what it must."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_one_version_everywhere():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE) == [version]
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    assert first == f"## {version}"


def test_the_workflow_runs_what_ci_runs():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert {"push", "pull_request"} <= set(workflow[True])  # `on`, as YAML reads it
    (job,) = workflow["jobs"].values()
    assert {"run": ".ci/run"} in job["steps"]


def test_issues_ask_for_the_doctor():
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/fault.yml").read_text())
    doctor = next(each for each in form["body"] if each["id"] == "doctor")
    assert "fastcnn doctor" in doctor["attributes"]["label"]
    assert doctor["validations"]["required"]


def test_every_model_has_its_paper():
    yaml = pytest.importorskip("yaml")
    papers = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    notes = " ".join(paper["notes"] for paper in papers)
    for model in ("AlexNet2012", "AlexNet", "VGG", "resnet_cifar"):
        assert model in notes
