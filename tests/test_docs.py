"""The documentation site: it builds without a warning, shows what it links to, and fetches nothing."""

import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import fastcnn
from docs.pictures import readme
from fastcnn.cli import app

ROOT = Path(__file__).parents[1]
pytest.importorskip("mkdocstrings", reason="the documentation needs the extra docs")


def built(folder, **changes):
    """Build the site into a folder, with changes of mkdocs.yml."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", "-", "--site-dir", str(folder)]
    config = json.dumps({"INHERIT": "mkdocs.yml", **changes})  # JSON is YAML
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, input=config, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, with the results of whole models: the charts of all stages take longer than all the rest."""
    folder = tmp_path_factory.mktemp("site")
    shutil.copytree(ROOT / "benchmarks/results", folder / "results", ignore=shutil.ignore_patterns("ops.jsonl"))
    return built(folder / "site", extra={"results": str(folder / "results")})


@pytest.mark.sweep
def test_the_site_of_all_results(tmp_path):
    charts = re.findall(r'src="([^"]*speedups\.png)"', (built(tmp_path) / "benchmarks.html").read_text())
    assert len(charts) == len(set(charts)) > 10
    assert all((tmp_path / name).is_file() for name in charts)


class Fetched(HTMLParser):
    """Collects what a page loads by itself: scripts, styles, pictures."""

    def __init__(self):
        super().__init__()
        self.addresses = []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag in ("script", "img", "iframe"):
            self.addresses += [values["src"]] if values.get("src") else []
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preconnect", "preload"):
            self.addresses.append(values["href"])


def test_pages_load_files_that_are_there(site):
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) >= 24
    for page in pages:
        fetched = Fetched()
        fetched.feed(page.read_text())
        for address in fetched.addresses:
            assert not re.match(r"(https?:)?//", address), f"{page}: fetches {address}"
            assert (page.parent / address.split("#")[0].split("?")[0]).is_file(), f"{page}: {address} is missing"


def test_search_works_on_pages_opened_from_the_disk(site):
    assert (site / "search" / "search_index.js").is_file()
    assert 'src="iframe-worker.js"' in (site / "index.html").read_text()


def test_readme_shows_the_committed_results():
    for name, svg in readme():
        assert (ROOT / f"docs/pictures/{name}.svg").read_text() == svg, "run: python -m docs.pictures"


def test_each_picture_is_shown_in_light_and_dark(site):
    drawn = {path.name for path in (site / "pictures").glob("*.svg")}
    text = "".join(page.read_text() for page in site.rglob("*.html"))
    shown = set(re.findall(r"pictures/([\w-]+\.svg)#only-(?:light|dark)", text))
    assert drawn == shown
    assert {name.replace("-light", "-dark") for name in shown if "-light" in name} == {n for n in shown if "-dark" in n}


@pytest.mark.parametrize(
    ("page", "module"),
    [("functional", fastcnn.functional), ("nn", fastcnn.nn), ("models", fastcnn.models), ("fastcnn", fastcnn)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_public_name_is_in_the_reference(site, page, module):
    text = (site / "api" / f"{page}.html").read_text()
    elsewhere = {"functional", "models", "nn", "optim", *fastcnn.models.__all__} if module is fastcnn else set()
    for name in set(module.__all__) - elsewhere:
        assert f'id="{module.__name__}.{name}"' in text, name


def test_examples_are_shown_as_code(site):
    text = (site / "api" / "functional.html").read_text()
    assert "&gt;&gt;&gt;" in text
    assert ":func:" not in text


def test_every_command_is_in_the_reference(site):
    text = (site / "api" / "command-line.html").read_text()
    for command in app.registered_commands:
        assert f"fastcnn {command.callback.__name__}" in text


def test_the_report_is_that_of_the_committed_results(site):
    text = (site / "benchmarks.html").read_text()
    files = sorted((ROOT / "benchmarks/results").glob("*/*.jsonl"))
    assert files
    devices = {json.loads(line)["device"] for file in files for line in file.open() if '"kind": "run"' in line}
    for device in devices:
        assert device in text
    on_cpu = all("threads" in device for device in devices)
    assert ("No GPU has been measured" in text) == on_cpu


def test_every_algorithm_is_in_the_guide():
    text = (ROOT / "docs/guide/backends.md").read_text()
    with pytest.raises(ValueError, match="expected one of") as error:
        fastcnn.use_backend("auto", algorithm="?")
    algorithms = re.search(r"one of (.*) or None", str(error.value))[1].split(", ")
    with pytest.raises(ValueError, match="expected one of") as error:
        fastcnn.use_backend("auto", algorithm="epilogue+?")
    gradients = re.search(r"one of (.*) once", str(error.value))[1].split(", ")
    assert set(
        re.findall(r"^\| `(\w+)`[^|]*\| (?:torch's, without|ours|the same, a|the input|the weight)", text, re.M)
    ) == {
        *algorithms,
        *gradients,
    }
