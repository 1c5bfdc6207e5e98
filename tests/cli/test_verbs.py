"""What every verb has, and what a study has by being one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import io
import json
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

import nni_topo
import nni_topo_command
from nni_topo.cli import VERBS, main, studies, verbs
from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.runs.choices import (
    DataChoice,
    ModelChoice,
    PrunerChoice,
)
from nni_topo.studies import analysis
from tools import help as help_texts

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
for words in ("--help", "--version"):
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
from nni_topo.studies.tables import table_of

"""


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
    assert answers[2].split() == ["nni_topo_command"]


def test_help_is_what_the_verbs_say_and_comes_without_loading_anything(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    written = json.loads(help_texts.FILE.read_text(encoding="utf-8"))
    made = help_texts.texts()
    assert written["verbs"].keys() == made.keys()
    for verb, text in made.items():
        if verb in KINDS:  # of groups Python's argparse prints the verbs
            flags = [set(re.findall(r"--[a-z][a-z-]*", each)) for each in (text, written["verbs"][verb])]
            assert flags[0] == flags[1], f"python tools/help.py writes {help_texts.FILE.name}"
            if written["tyro"] == importlib.metadata.version("tyro"):
                assert written["verbs"][verb] == text, f"python tools/help.py writes {help_texts.FILE.name}"
    program = f"import sys, nni_topo_command; sys.argv[1:] = {['shrink', '--help']}; nni_topo_command.main()"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == written["verbs"]["shrink"]
    assert " torch" not in done.stderr
    assert " nni" not in done.stderr.replace("nni_topo_command", "")


@pytest.mark.parametrize("words", [[], ["analyse"], ["analyze"], ["analyze", "topolgy"], ["report", "--markdwon"]])
def test_what_is_no_verb_ends_with_2(words):
    with pytest.raises(SystemExit, match="2"):
        main(words)


@pytest.fixture
def steps():
    """The optimizers of all steps that anything takes."""
    taken = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: taken.append(optimizer))
    yield taken
    hook.remove()


SHRINK = "shrink --model small_cnn"
MISTAKES = [
    (f"{SHRINK} --flops 1.5", "flops must be in (0, 1], got 1.5"),
    (f"{SHRINK} --tolerance nan", "tolerance must be in (0, 1) or None, got nan"),
    (f"{SHRINK} --runtime onnxruntime", "a runtime needs a budget of 'latency' without a latency_table, got 'flops'"),
    (f"{SHRINK} --images 1", "images must be an integer of at least 2, got 1"),
    (f"{SHRINK} --method solve", "method must be a known name, got 'solve'"),
    (f"{SHRINK} --cost flops", "--cost needs --tolerance, got none"),
    (f"{SHRINK} --tolerance 0.5 --params 0.5", "--tolerance can't be combined with a share to keep, got --params"),
    (f"{SHRINK} --tolerance 0.5 --pruner subcluster", "a tolerance must have a pruner that can be asked for a size"),
    (f"{SHRINK} --pruner taylor", "needs no evaluator, training_steps, got 'taylor'"),
    ("shrink", "--model"),
    ("compare", "--model or --plan"),
    ("compare --model small_cnn --n-jobs 0", "n_jobs must be at least 1, or -1 for all cores, got 0"),
    ("compare --model resnet2", "model must be a known name, got 'resnet2'; did you mean"),
    ("compare --model small_cnn --pruners cluster --calibration 0", "pruner 'cluster' needs calibration data, got 0"),
    ("analyze energy --model small_cnn --thresholds 2", "in (0, 1) that ascend, got (2.0,)"),
    ("analyze evolution --model small_cnn --damage-rates 0.1 2", "damage_rate must be in [0, 1]"),
    ("analyze sensitivity --model small_cnn --pruner l11", "got 'l11'; did you mean l1? (analyze sensitivity)"),
    ("analyze topology --model small_cnn --degrees -1", "degrees must be a sequence of at least 1"),
]


@pytest.mark.parametrize(("words", "mistake"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_wrong_flag_ends_with_2_before_anything_is_trained(words, mistake, tmp_path, steps, capsys):
    given = words.split()
    try:
        status = main([*given, "--out", str(tmp_path / "new")])
    except SystemExit as end:
        status = end.code
    said = " ".join(re.sub(r"[│─╭╮╰╯]", " ", capsys.readouterr().err).split())
    assert status == 2
    assert steps == []
    assert mistake in said
    assert f"nni-topo {words.partition(' --')[0]}" in said
    assert not (tmp_path / "new" / "results.jsonl").exists()


def test_a_new_study_is_one_file(tmp_path, monkeypatch, capsys):
    text = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
    example = re.search(r"## A new study.*?```python\n(.*?)```", text, re.S)[1]
    (tmp_path / "widths.py").write_text(IMPORTS + textwrap.dedent(example))
    monkeypatch.setattr(analysis, "__path__", [*analysis.__path__, str(tmp_path)])
    weights = tmp_path / "net.pth"
    net = nni_topo.zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    torch.save(net.state_dict(), weights)
    words = ["analyze", "widths", "--model", "small_cnn", "--checkpoint", str(weights), "--limit", "50"]
    assert main([*words, "--least", "32", "--out", str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert min(document["layers"].values()) == 32
    assert document == json.loads((tmp_path / "out" / "widths.json").read_text())
    assert main([*words, "--least", "64", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "widths of small_cnn" in shown
    assert f"written: {tmp_path / 'out' / 'widths.json'}" in shown.replace("\n", "")
    with pytest.raises(SystemExit, match="0"):
        main(["analyze", "widths", "--help"])
    assert "--least" in capsys.readouterr().out


def shrinking(**flags):
    return verbs.Shrink(model="small_cnn", out=Path("out"), **flags)


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        ({}, {"flops": 0.25}),
        ({"latency": 0.5, "allocation": "error"}, {"latency": 0.5, "allocation": "error"}),
        ({"tolerance": 0.1}, None),
        ({"tolerance": 0.1, "cost": "memory", "equal_blocks": True}, {"memory": None, "equal_blocks": True}),
    ],
)
def test_the_budget_of_shrink_is_what_the_flags_say(flags, budget):
    assert shrinking(**flags)._budget() == budget


TINY = """
import os

from torch import nn

made_by = set()


def net(num_classes):
    made_by.add(os.getpid())
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, num_classes))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Words that name a small network with a file of its weights, and a few images."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny_for_verbs.py").write_text(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        torch.manual_seed(0)
        net = importlib.import_module("tiny_for_verbs").net(10)
        net[1].weight.data *= 4.0  # the first unit is zero on most images, which a search doesn't see
        torch.save(net.state_dict(), folder / "net.pth")
        words = ["--model", "tiny_for_verbs:net", "--checkpoint", str(folder / "net.pth"), "--limit", "40"]
        yield [*words, "--images", "36", "--test-limit", "20", "--distill-seconds", "1e-9"]


def shrunk(words, out, capsys, monkeypatch):
    """Run `shrink`; return its document, what it printed, and the names of its bars."""
    # progress that nobody asked for appears at once
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    assert main(["shrink", *words, "--out", str(out)]) == 0
    output = capsys.readouterr()
    bars = {line.partition(":")[0] for line in output.err.splitlines() if line.endswith("it/s]")}
    return json.loads((out / "shrink.json").read_text(), parse_constant=pytest.fail), output.out, bars


def test_shrink_writes_what_it_tried_and_what_it_had_no_time_for(tiny, tmp_path, capsys, monkeypatch):
    words = [*tiny, "--flops", "0.5", "--allocation", "auto"]
    document, shown, bars = shrunk(words, tmp_path / "small", capsys, monkeypatch)
    assert "compensate" in bars
    assert [row["allocation"] for row in document["widths tried"]] == ["uniform", "topological", "error"]
    assert [(row["name"], row["before"], row["after"]) for row in document["widths"]] == [("1", 8, 4), ("3", 10, 10)]
    assert "No step was taken: --distill-seconds allows too few" in " ".join(document["notes"])
    assert "distillation" not in document
    assert not (tmp_path / "small" / "distillation.png").exists()
    assert shown.endswith(f"report: {tmp_path / 'small' / 'report.html'}\n")


def test_numbers_that_json_has_not_are_null(tiny, tmp_path, capsys, monkeypatch):
    words = [*tiny, "--tolerance", "1e-6", "--measure", "distance", "--json"]
    document, shown, bars = shrunk(words, tmp_path / "small", capsys, monkeypatch)
    assert not bars
    assert json.loads(shown) == document
    # the network that was found isn't confirmed
    found = document["tolerance"]
    assert (found["tolerance"], found["is_met"], found["limit"]) == (1e-6, False, None)
    assert not any(note.startswith("distillation is ") for note in document["notes"])


def test_a_demonstration_runs_in_this_process(tiny, tmp_path, monkeypatch, capsys):
    import tiny_for_verbs

    plan = replace(
        verbs.DEMO,
        models=(ModelChoice("tiny_for_verbs:net"),),
        data=(DataChoice("digits", limit=20, test_limit=20),),
        pruners=(PrunerChoice("l1"),),
        targets=verbs.DEMO.targets[:1],
        seeds=1,
        train={"epochs": 0},
        retrain={"epochs": 0},
        compensate=None,
    )
    monkeypatch.setattr(verbs, "DEMO", plan)
    tiny_for_verbs.made_by.clear()
    assert main(["demo", "--json", "--out", str(tmp_path / "demo")]) == 0
    said = capsys.readouterr()
    shown = " ".join(said.err.split())
    assert "each pruned 1 times: some two minutes" in shown  # before the work
    document = json.loads((tmp_path / "demo" / "shrink.json").read_text())
    assert [stage["network"] for stage in document["stages"]] == ["unpruned", "pruned", "reconstructed", "distilled"]
    # What was gained comes before the comparison, and in the last line.
    first, last = (at for at in range(len(shown)) if shown.startswith(f"shrink: {document['sentence']}", at))
    assert first < shown.index("[1/1]") < last
    assert shown.endswith(f"picture: {tmp_path / 'demo' / 'gain.png'}")
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.index(document["sentence"]) < page.index("Accuracy and time") < page.index("best method on")
    (record,) = json.loads(said.out)
    assert (record["pruner"], record["target"]) == ("l1", "ratio 0.5")
    assert tiny_for_verbs.made_by == {os.getpid()}


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("it is wrong"), 2, "nni-topo list: it is wrong\n"),
        (SpeedupError("it isn't dense"), 2, "nni-topo list: it isn't dense; see docs/compatibility.md\n"),
        (OSError("no such thing"), 2, "nni-topo list: files must be readable and writable, got no such thing\n"),
        (KeyboardInterrupt(), 130, "nni-topo list: interrupted; the same command resumes it\n"),
        (KeyboardInterrupt("go [red] on"), 130, "nni-topo list: interrupted; go [red] on\n"),
    ],
)
def test_errors_end_a_command_with_a_line(error, status, said, monkeypatch, capsys):
    def run(verb, console):
        raise error

    monkeypatch.setattr(verbs.List, "run", run)
    assert main(["list"]) == status
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("words", [["list"], ["list", "--json"]])
def test_with_json_everything_else_goes_to_standard_error(words, monkeypatch, capsys):
    seen = []

    def run(verb, console):
        seen.append(console)
        console.print("[red]" + "x" * 300)
        return 1

    monkeypatch.setattr(verbs.List, "run", run)
    assert main(words) == 1
    output = capsys.readouterr()
    told, silent = (output.err, output.out) if "--json" in words else (output.out, output.err)
    assert (told.split(), silent) == (["x" * 160, "x" * 140], "")
    assert seen[0].width == 160


FACTS = {"model": "net", "data": "digits", "target": "ratio 0.5", "flops_before": 4e6, "flops": 1e6}
FACTS |= {"params_before": 8e3, "params": 2e3, "accuracy_before": 0.99, "accuracy_oneshot": 0.5}
FACTS |= {"latency_before_ms": 2.0, "latency_ms": 1.0, "prune_seconds": 0.1, "versions": {"torch": "2.x"}}
RECORD = {**FACTS, "pruner": "l1", "pruner_name": "l1", "seed": 0, "whole": {}}
RECORD |= {"widths_before": {"conv1": 8}, "widths": {"conv1": 4}}


def test_a_report_names_its_files_and_prints_tables_or_a_document(tmp_path, capsys):
    folder = tmp_path / f"runs[red]{'long' * 50}"
    folder.mkdir()
    (folder / "results.jsonl").write_text(json.dumps(RECORD) + "\n")
    said, picture = io.StringIO(), tmp_path / "runs[red].png"
    report = verbs.Report(folders=(folder,), out=picture, json=True)
    assert report.run(Console(file=said, width=100)) == 0
    lines = said.getvalue().splitlines()
    assert lines[0] == f"report: {folder / 'report.html'}"
    assert "".join(lines[1:]).replace("\n", "") == f"picture: {picture}"
    assert PIL.Image.open(picture).info["dpi"] == pytest.approx((150, 150), abs=0.1)
    assert capsys.readouterr().out == json.dumps([RECORD], indent=1) + "\n"
