"""The pages do what they say: snippets run, links lead somewhere, the shelves hold every page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).parent.parent
PAGES = sorted([*PROJECT.glob("docs/*.md"), PROJECT / "README.md", PROJECT / "CONTRIBUTING.md"])
RUN = ("start", "export", "migrating", "own_pruner", "transformers")
MADE = {"index.md", "api.md", "verbs.md", "results.md", "contributing.md", "changelog.md"}


def snippets(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def run(path, tmp_path, monkeypatch):
    if path.stem == "export":
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": path.stem}
    for snippet in snippets(path):
        exec(compile(snippet, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("name", RUN)
def test_snippets_of_a_page_run_one_after_the_other(name, tmp_path, monkeypatch):
    run(PROJECT / "docs" / f"{name}.md", tmp_path, monkeypatch)


def test_caps_and_floors_hold_under_a_budget_as_the_page_says(tmp_path, monkeypatch):
    masks = run(PROJECT / "docs" / "config_list.md", tmp_path, monkeypatch)["masks"]
    kept = {name: int(found["weight"].flatten(1).amax(1).sum()) for name, found in masks.items()}
    assert kept["0"] >= 12
    assert kept["2"] <= 8


@pytest.mark.slow
def test_snippets_of_the_readme_run(tmp_path, monkeypatch):
    run(PROJECT / "README.md", tmp_path, monkeypatch)
    assert {path.name for path in tmp_path.iterdir()} == {"small.pt", "small.pt2"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_snippet_is_python(path):
    for snippet in snippets(path):
        ast.parse(snippet)


def anchors(path):
    heads = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_lead_to_files_and_headings(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.S)
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)]*)\)", text):
        place = path.parent / target if target else path
        assert place.exists(), f"{target} ({path.name})"
        assert not anchor or anchor in anchors(place), f"{target}#{anchor} ({path.name})"


def test_the_readme_is_short():
    assert len((PROJECT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_every_page_stands_on_a_shelf():
    shelves = yaml.safe_load((PROJECT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert [name for shelf in shelves for name in shelf] == ["Start", "Choose", "How to", "Reference"]
    pages = [page for shelf in shelves for found in shelf.values() for page in found]
    assert sorted(pages) == sorted({path.name for path in PROJECT.glob("docs/*.md")} | MADE)
