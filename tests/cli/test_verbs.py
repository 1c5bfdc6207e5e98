"""What every verb has, and what a study has by being one."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import nni_topo
import nni_topo_command
from nni_topo import analysis
from nni_topo.cli import VERBS, main, studies

STUDIES = {
    "topology", "energy", "deviation", "retraining", "compression", "magnitude", "sensitivity", "persistence",
    "rounds", "connectivity", "evolution",
}  # fmt: skip
KINDS = {
    f"{group}{name}": kind
    for group, choices in {"": VERBS, "analyze ": studies(), "experiment ": VERBS["experiment"]()}.items()
    for name, kind in choices.items()
    if isinstance(kind, type)
}
ASKING = """
import sys
before = {*sys.modules, *sys.stdlib_module_names}
import nni_topo_command
for words in ("--help", "--version", "compare --help", "analyze --help", "analyze rounds --seed 1 -h"):
    try:
        nni_topo_command.main(words.split())
    except SystemExit as end:
        assert not end.code
    print(end=chr(0))
print(*(name for name in sys.modules if name not in before and name.partition(".")[0] not in before))
"""
IMPORTS = """
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import RenderableType

from nni_topo.runs.run import layer_widths
from nni_topo.studies.study import Findings, Tell, TrainedStudy
from nni_topo.studies.tables import as_table

"""


def test_the_studies_are_found_by_their_files():
    assert set(studies()) == STUDIES


@pytest.mark.parametrize("verb", sorted(KINDS))
def test_every_flag_is_explained(verb, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([*verb.split(), "--help"])
    shown = capsys.readouterr().out
    kind = KINDS[verb]
    assert inspect.getdoc(kind).splitlines()[0] in " ".join(shown.split())
    sources = [inspect.getsource(base) for base in kind.__mro__ if dataclasses.is_dataclass(base)]
    for field in dataclasses.fields(kind):
        comment = re.compile(rf"^    {field.name}:.*  # (.*)$", re.M)
        said = next(found[1] for source in sources if (found := comment.search(source)))
        assert said.split()[0] in shown
        if "Positional" not in str(field.type):
            assert f"--{field.name.replace('_', '-')}" in shown


def test_the_listing_says_what_each_verb_does(capsys):
    for words, names in (([], VERBS), (["analyze"], STUDIES)):
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        assert set(names) <= set(capsys.readouterr().out.split())


def test_the_command_says_without_loading_anything_what_there_is(capsys):
    lines = {name: inspect.getdoc(choice).splitlines()[0] for name, choice in VERBS.items()}
    assert lines == nni_topo_command.VERBS
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    said = capsys.readouterr().out
    found = subprocess.run([sys.executable, "-c", ASKING], capture_output=True, text=True, check=True)
    answers = found.stdout.split("\0")
    assert answers[0].split() == said.split()
    assert answers[1].split() == ["nni_topo", nni_topo.__version__]
    assert "--compensate INT" in answers[2]
    assert set(STUDIES) <= set(answers[3].split())
    assert "--plan PATH" in answers[4]
    assert answers[5].split() == ["nni_topo_command"]


@pytest.mark.parametrize("verb", sorted(KINDS))
def test_help_tells_from_the_source_what_the_class_has(verb):
    read = nni_topo_command._fields(nni_topo_command._verb(verb.split()))
    fields = dataclasses.fields(KINDS[verb])
    assert list(read) == [field.name for field in fields]
    for field in fields:
        assert read[field.name].kind == ast.unparse(ast.parse(field.type, mode="eval"))
        shown = nni_topo_command._default(read[field.name])
        if field.default is dataclasses.MISSING:
            assert shown == ("(required)" if field.default_factory is dataclasses.MISSING else "")
        elif field.default is None or field.default is False or field.default in ((), ""):
            assert shown == ""
        else:
            several = isinstance(field.default, tuple)
            assert shown == f"(default: {' '.join(map(str, field.default)) if several else field.default})"


@pytest.mark.parametrize("words", [[], ["analyze"]])
def test_a_command_alone_says_what_there_is(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        nni_topo_command.main(words)
    assert set(studies() if words else VERBS) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize("words", [[], ["analyse"], ["analyze"], ["analyze", "topolgy"], ["report", "--markdwon"]])
def test_what_is_no_verb_ends_with_2(words):
    with pytest.raises(SystemExit, match="2"):
        main(words)


def test_a_new_study_is_one_file(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    example = re.search(r"## A new study.*?```python\n(.*?)```", text, re.S)[1]
    (tmp_path / "widths.py").write_text(IMPORTS + textwrap.dedent(example))
    monkeypatch.setattr(analysis, "__path__", [*analysis.__path__, str(tmp_path)])
    words = [
        "analyze",
        "widths",
        "--model",
        "small_cnn",
        "--limit",
        "50",
        "--least",
        "32",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert min(document["layers"].values()) == 32
    assert document == json.loads((tmp_path / "out" / "widths.json").read_text())
    (tmp_path / "plan.yaml").write_text("model: small_cnn\nlimit: 50\nleast: 64\n")
    assert main(["analyze", "widths", "--plan", str(tmp_path / "plan.yaml"), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "widths of small_cnn" in shown
    assert f"written: {tmp_path / 'out' / 'widths.json'}" in shown.replace("\n", "")
