"""Commands on the pages are commands: each parses, names verbs, flags and files that are there, and cheap ones run."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from nni_topo.cli import VERBS, main, parsed
from nni_topo.runs.choices import load_prune_config
from nni_topo.studies.plan import load_plan

PROJECT = Path(__file__).parent.parent
PAGES = [*PROJECT.glob("docs/*.md"), *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md"))]
FILES = [
    *PAGES,
    PROJECT / "benchmarks" / "RESULTS.md",
    *PROJECT.glob("benchmarks/results/*.md"),
    *PROJECT.glob("configs/**/*.y*ml"),
]
CHEAP = ("list", "analyze compression --model resnet20 ", "analyze compression --model mnist_fcn ")


def commands():
    """Each command as words, with its file: lines of a console, comments at the head of a file, words in a text."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        blocks = re.findall(r"```console\n(.*?)```", text, re.S)
        lines = [line for block in blocks for line in re.findall(r"^nni-topo .*", block, re.M)]
        lines += re.findall(r"^#   (nni-topo .*)", text, re.M)
        spoken = re.findall(r"`[^`]*?(nni-topo [^`]*)`", re.sub(r"```.*?```", "", text, flags=re.S))
        for line in [*lines, *(each for each in spoken if "..." not in each)]:
            yield path, shlex.split(line.rstrip(')"'), comments=True)[1:], line in lines or "--out " in line


def verb_of(words):
    """The class behind a command, and the words left for it."""
    kind, rest = VERBS, list(words)
    while not isinstance(kind, type):
        kind = (kind if isinstance(kind, dict) else kind())[rest.pop(0)]
        if not rest and not isinstance(kind, type):
            return None, []  # a group of verbs that is spoken of
    return kind, rest


FOUND = {f"{path.name}: {' '.join(words)}": (words, whole) for path, words, whole in commands()}


@pytest.mark.parametrize("name", FOUND)
def test_a_command_on_a_page_is_one(name, monkeypatch):
    words, is_whole = FOUND[name]
    kind, rest = verb_of(words)
    monkeypatch.chdir(PROJECT)
    files = [word for word in rest if word.startswith("configs/")]
    assert all(Path(file).is_file() for file in files)
    if kind is None or not is_whole:
        flags = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)} if kind else set()
        assert flags >= {word for word in rest if word.startswith("--")}
        return
    verb = parsed("nni-topo", kind, ["3" if re.fullmatch("[CHNW]", word) else word for word in rest])
    for file in files:
        if words[0] == "compare":
            load_plan(file, verb.network)
        elif words[0] == "prune":
            load_prune_config(file)
    assert isinstance(verb, kind)


@pytest.mark.parametrize(
    "name", [name for name in FOUND if name.partition(": ")[2].startswith(CHEAP) and FOUND[name][1]]
)
def test_what_is_cheap_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(FOUND[name][0]) == 0
    assert capsys.readouterr().out
