"""What every verb has, and what a study has by being one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from rich.console import Console
from torch.optim.optimizer import register_optimizer_step_pre_hook

import nni_topo
import nni_topo_command
from nni_topo.cli import VERBS, _failed, main, studies, verbs
from nni_topo.cli.profile import Profile
from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.network.cost.measure import ModeCost
from nni_topo.runs.choices import (
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PrunerChoice,
    Target,
)
from nni_topo.runs.run import Start
from nni_topo.studies import analysis

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
    assert answers[2].split() == ["nni_topo_command"]


@pytest.mark.parametrize("words", [[], ["analyze"]])
def test_a_command_alone_says_what_there_is(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        nni_topo_command.main(words)
    assert set(studies() if words else VERBS) <= set(capsys.readouterr().out.split())


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
    (f"{SHRINK} --shares 0.5 1", "in (0, 1), at least one, got 1.0 (shares[1])"),
    (f"{SHRINK} --tolerance nan", "tolerance must be in (0, 1) or None, got nan"),
    (f"{SHRINK} --seconds -1", "seconds must be above 0"),
    (f"{SHRINK} --round-to 0", "round_to must be an integer of at least 1 or None, got 0"),
    (f"{SHRINK} --runtime onnxruntime", "a runtime needs a budget of 'latency' without a latency_table, got 'flops'"),
    (f"{SHRINK} --images 1", "images must be an integer of at least 2, got 1"),
    (f"{SHRINK} --pruner l11", "pruner must be a known name, got 'l11'; did you mean l1?"),
    (f"{SHRINK} --method solve", "method must be a known name, got 'solve'"),
    (f"{SHRINK} --depth yes", "Unrecognized options: yes"),
    (f"{SHRINK} --floors features.conv1 1.0", "floors must be in [0, 1), got 1.0 (features.conv1)"),
    (f"{SHRINK} --budget flops", "without a share of its own, got neither"),
    (f"{SHRINK} --budget flops --params 0.5", "without a share of its own, got --params"),
    (f"{SHRINK} --shares 0.5 --params 0.5", "--shares says how much is kept, got --params beside it"),
    (f"{SHRINK} --tolerance 0.5 --pruner subcluster", "--shares, --tolerance and --depth need a pruner"),
    (f"{SHRINK} --prune l1", "Unrecognized options: --prune, l1"),
    ("shrink", "--model"),
    ("compare --model small_cnn --n-jobs 0", "n_jobs must be at least 1, or -1 for all cores, got 0"),
    ("compare --model resnet2", "model must be a known name, got 'resnet2'; did you mean"),
    ("compare --model small_cnn --data digit", "data must be a known name, got 'digit'; did you mean digits?"),
    ("compare --model small_cnn --pruners cluster --calibration 0", "pruner 'cluster' needs calibration data, got 0"),
    ("analyze energy --model small_cnn --thresholds 2", "in (0, 1) that ascend, got (2.0,)"),
    ("analyze energy --model small_cnn --max-drop -1", "max_drop must be at least 0"),
    ("compare --model small_cnn --calibration -1", "calibration must be an integer of at least 0, got -1"),
    (f"{SHRINK} --pruner taylor", "needs no evaluator, training_steps, got 'taylor'"),
    ("analyze energy --model small_cnn --normalization are", "did you mean area"),
    ("analyze evolution --model small_cnn --damage-rates 0.1 2", "damage_rate must be in [0, 1]"),
    ("analyze evolution --model small_cnn --max-sparse-ratio 1", "max_sparse_ratio must be in (0, 1) or None, got 1.0"),
    ("analyze sensitivity --model small_cnn --ratios 1", "in (0, 1), got (1.0,) (sensitivity)"),
    ("analyze sensitivity --model small_cnn --pruner l11", "got 'l11'; did you mean l1? (analyze sensitivity)"),
    (
        "analyze topology --model small_cnn --degrees -1",
        "degrees must be a sequence of at least 1",
    ),
    ("analyze topology --model small_cnn --ratio 1", "a ratio target must be in [0, 1), got 1.0"),
    ("analyze deviation --model small_cnn --seeds 0", "seeds must be an integer of at least 1, got 0"),
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


def test_a_folder_that_can_not_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main([*SHRINK.split(), "--out", str(tmp_path / "file" / "in")]) == 2
    said = "".join(capsys.readouterr().err.split())
    assert f"anoutputfoldermustbeafolderthatcanbewrittento,gotonethatcan't({tmp_path}" in said


def test_an_error_in_a_terminal_is_red_and_word_for_word(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert _failed("nni-topo list", "sizes must be [bold], got 3") == 2
    assert capsys.readouterr().err == "\x1b[31mnni-topo list: sizes must be [bold], got 3\x1b[0m\n"


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


def test_a_profile_measures_what_the_flags_say(monkeypatch, capsys):
    from nni_topo.cli import profile as module

    seen = []

    def noting(nets, images, **knobs):
        seen.append((nets, images, knobs))
        return [ModeCost(name, "plain", 10**11, 1_500_000, 1.25, 800.0, 2 * 10**11) for name in nets] + [
            ModeCost("dense", "bf16", 0, 0, math.nan, math.nan, 0, "no such numbers here")
        ]

    monkeypatch.setattr(module, "profile", noting)
    words = ["profile", "--model", "small_cnn", "--in-channels", "1", "--image-size", "8", "--classes", "5"]
    words += ["--batch-size", "3", "--ratio", "0.25", "--round-to", "5", "--modes", "plain,bf16", "--runs", "7"]
    assert main([*words, "--width", "2"]) == 2
    assert "width must be 1.0 for a model that takes no width, got 2.0" in " ".join(capsys.readouterr().err.split())
    assert main([*words, "--threads", "2", "--seed", "9"]) == 0
    shown = capsys.readouterr().out
    rows = [line.replace("│", " ").split() for line in shown.splitlines() if "unpruned" in line]
    assert rows == [["plain", "unpruned", "1.25", "800", "200000.0", "100000.0", "1500.0"]]
    assert "small_cnn, batch of 3, cpu" in shown
    assert "bf16: no such numbers here" in shown
    (nets, images, knobs), *_ = seen
    assert knobs == {"modes": ("plain", "bf16"), "runs": 7, "threads": 2, "seed": 9}
    assert tuple(images.shape) == (3, 1, 8, 8)
    assert list(nets) == ["unpruned", "dense"]
    whole, dense = nets.values()
    assert not whole.training
    assert whole(images).shape == dense(images).shape == (3, 5)
    widths = [(net.features.conv1.out_channels, net.features.conv2.out_channels) for net in (whole, dense)]
    assert widths == [(16, 32), (15, 25)]  # three quarters would be 12 and 24
    # the same seed draws the same network, another one another
    assert main([*words, "--seed", "9"]) == main([*words, "--seed", "8"]) == 0
    weights = [given[0]["unpruned"].features.conv1.weight for given in seen]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    kept = [
        [bool((row == given[0]["dense"].features.conv1.weight).flatten(1).all(1).any()) for row in weight]
        for given, weight in zip(seen, weights, strict=True)
    ]
    assert (sum(kept[0]), kept[0]) == (15, kept[1])
    assert kept[0] != kept[2]
    capsys.readouterr()
    assert main([*words, "--json"]) == 0
    *_, failed = json.loads(capsys.readouterr().out)
    assert (failed["mode"], failed["latency_ms"]) == ("bf16", None)
    defaults = Profile(model="small_cnn")
    sizes = defaults.batch_size, defaults.image_size, defaults.in_channels, defaults.classes, defaults.runs
    assert (sizes, defaults.ratio) == ((1, 32, 3, 10, 30), 0.5)


def test_a_file_of_a_dense_network_is_measured(tmp_path, monkeypatch, capsys):
    from nni_topo.cli import profile as module

    seen = []
    monkeypatch.setattr(module, "profile", lambda nets, images, **knobs: seen.append(nets) or [])
    net = nni_topo.zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()
    small = nni_topo.shrink(net, [torch.rand(8, 1, 8, 8)], {"flops": 0.5}, pruner="l1", compensate=None, distill=False)
    nni_topo.save(small, tmp_path / "dense.pt")
    words = ["profile", "--model", "small_cnn", "--in-channels", "1", "--image-size", "8"]
    assert main([*words, "--dense", str(tmp_path / "dense.pt"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    assert torch.equal(seen[0]["dense"].features.conv2.weight, small.features.conv2.weight)


def shrinking(**flags):
    return verbs.Shrink(model="small_cnn", out=Path("out"), **flags)


@pytest.mark.parametrize(
    ("flags", "budget"),
    [
        ({}, {"flops": 0.25}),
        ({"params": 0.5}, {"params": 0.5}),
        ({"latency": 0.5, "allocation": "error"}, {"latency": 0.5, "allocation": "error"}),
        ({"allocation": "auto"}, {"flops": 0.25, "allocation": "auto"}),
        ({"equal_blocks": True}, {"flops": 0.25, "equal_blocks": True}),
        ({"tolerance": 0.1}, None),
        ({"tolerance": 0.1, "budget": "params"}, "params"),
        ({"tolerance": 0.1, "allocation": "error"}, {"flops": None, "allocation": "error"}),
        ({"tolerance": 0.1, "budget": "memory", "equal_blocks": True}, {"memory": None, "equal_blocks": True}),
        ({"tolerance": 0.1, "params": 0.5}, {"params": 0.5}),
        ({"shares": (0.5,)}, None),
        ({"shares": (0.5,), "budget": "params"}, "params"),
        ({"shares": (0.5,), "equal_blocks": True}, {"flops": None, "equal_blocks": True}),
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
        yield [*words, "--images", "36", "--test-limit", "20", "--seconds", "1e-9"]


def shrunk(words, out, capsys, monkeypatch):
    """Run `shrink`; return its document, what it printed, and the names of its bars."""
    # progress that nobody asked for appears at once
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    assert main(["shrink", *words, "--out", str(out)]) == 0
    output = capsys.readouterr()
    bars = {line.partition(":")[0] for line in output.err.splitlines() if " passed" in line}
    return json.loads((out / "shrink.json").read_text(), parse_constant=pytest.fail), output.out, bars


def test_shrink_writes_what_it_tried_and_what_it_had_no_time_for(tiny, tmp_path, capsys, monkeypatch):
    words = [*tiny, "--flops", "0.5", "--allocation", "auto"]
    document, shown, bars = shrunk(words, tmp_path / "small", capsys, monkeypatch)
    assert "compensate" in bars
    assert [row["allocation"] for row in document["widths tried"]] == ["uniform", "topological", "error"]
    assert [(row["name"], row["before"], row["after"]) for row in document["widths"]] == [("1", 8, 4), ("3", 10, 10)]
    assert "No step was taken: seconds= allows too few" in document["result of distillation"]
    assert "distillation" not in document
    assert not (tmp_path / "small" / "distillation.png").exists()
    assert shown.endswith(f"report: {tmp_path / 'small' / 'report.html'}\n")


def test_numbers_that_json_has_not_are_null(tiny, tmp_path, capsys, monkeypatch):
    words = [*tiny, "--tolerance", "1e-6", "--measure", "distance", "--json"]
    document, shown, bars = shrunk(words, tmp_path / "small", capsys, monkeypatch)
    assert not bars
    assert json.loads(shown) == document["stages"]
    # the network that was found isn't confirmed
    found = document["tolerance"]
    assert (found["tolerance"], found["is_met"], found["limit"]) == (1e-6, False, None)
    assert "result of distillation" not in document


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
    assert "each pruned 1 times: some two minutes" in " ".join(said.err.split())  # before the work
    (record,) = json.loads(said.out)
    assert (record["pruner"], record["target"]) == ("l1", "ratio 0.5")
    assert tiny_for_verbs.made_by == {os.getpid()}


def test_bounds_of_layers_are_those_of_the_flags():
    data = nni_topo.zoo.load_data("digits", limit=10)
    net = nni_topo.zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()
    start = Start(net, data, nni_topo.zoo.Recipe(epochs=1))
    assert shrinking()._entries(start) is None
    found = shrinking(caps={"features.conv1": 0.5, "classifier.fc2": 0.25}, floors={"features.conv1": 0.125})._entries(
        start
    )
    entries = {entry.pop("op_names")[0]: entry for entry in found}
    assert entries["features.conv1"] == {"max_sparse_ratio": 0.5, "min_sparse_ratio": 0.125}
    assert entries["classifier.fc2"] == {"max_sparse_ratio": 0.25}
    assert entries["features.conv2"] == {}
    assert len(entries) == len(found)
    only = shrinking(floors={"features.conv2": 0.5})._entries(start)
    assert {"op_names": ["features.conv2"], "min_sparse_ratio": 0.5} in only


def test_a_comparison_is_planned_as_the_flags_say():
    common = {"model": "small_cnn", "out": Path("out")}
    plan = verbs.Compare(**common)._plan()
    assert [choice.name for choice in plan.pruners] == ["topological", "l1", "l2", "fpgm", "random"]
    assert [choice.calibration for choice in plan.pruners] == [0] * 5
    assert plan.targets == (Target("ratio", 0.5),)
    assert (plan.seeds, plan.first_seed, plan.train, plan.retrain) == (1, 0, {}, {"epochs": 1})
    assert (plan.compensate, plan.distill, plan.device) == (None, None, "cpu")
    flags = {
        "pruners": ("reconstruction", "scratch", "l1"),
        **{"params": (0.5,), "ratio": (0.25, 0.75), "memory": (0.125,), "seeds": 3, "seed": 4},
        **{"train_epochs": 0, "retrain_epochs": 2, "calibration": 16, "compensate": 8, "method": "mean", "distill": 32},
        **{"device": "cuda", "limit": 50, "test_limit": 7, "width": 0.5},
    }
    plan = verbs.Compare(**common, **flags)._plan()
    assert [(choice.name, choice.calibration) for choice in plan.pruners] == [
        ("reconstruction", 16), ("scratch", 0), ("l1", 0),
    ]  # fmt: skip
    wanted = [Target("ratio", 0.25), Target("ratio", 0.75), Target("params", 0.5), Target("memory", 0.125)]
    assert sorted(plan.targets, key=wanted.index) == wanted
    assert (plan.seeds, plan.first_seed, plan.train, plan.retrain) == (3, 4, {"epochs": 0}, {"epochs": 2})
    assert (plan.compensate, plan.distill) == (CompensationChoice(8, "mean"), DistillationChoice(32))
    (data,), (model,) = plan.data, plan.models
    assert (data.limit, data.test_limit, model.width, plan.device) == (50, 7, 0.5, "cuda")


@pytest.mark.parametrize("flags", [{}, {"n_jobs": 3, "data_dir": Path("there"), "in_process": True, "json": True}])
def test_flags_beside_a_plan_change_where_it_runs(flags, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(verbs, "_run_plan", lambda *given, **knobs: seen.append((*given, knobs)) or 0)
    path = tmp_path / "plan.yaml"
    path.write_text("models: [{name: small_cnn}]\ndata: [{name: digits, limit: 30}]\npruners: [{name: l1}]\n"
                    "targets: [{ratio: 0.5}]\nn_jobs: 2\n")  # fmt: skip
    assert verbs.Compare(plan=path, out=tmp_path, **flags).run(Console()) == 0
    ((plan, out, _, knobs),) = seen
    assert (out, plan.n_jobs, plan.data[0].limit) == (tmp_path, flags.get("n_jobs", 2), 30)
    assert plan.data[0].data_dir == ("there" if flags else None)
    assert knobs == {"isolate": not flags, "as_json": bool(flags)}


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


@pytest.mark.parametrize("as_json", [False, True])
def test_a_comparison_tells_its_cells_and_what_failed_in_plain_words(as_json, tmp_path, monkeypatch, capsys):
    (cell,) = verbs.Compare(model="small_cnn", pruners=("l1",), out=tmp_path)._plan().cells()
    cell = replace(cell, pruner=PrunerChoice("l1", label="[red]l1"))

    def compared(plan, out, *, isolate, on_cell):
        assert (out, isolate) == (tmp_path, False)
        on_cell(cell, 1, 2)
        return [], [SimpleNamespace(cell=cell, reason="it is [red]wrong")]

    monkeypatch.setattr(verbs, "compare", compared)
    said = io.StringIO()
    console = Console(file=said, width=160, force_terminal=True, color_system="standard")
    assert verbs._run_plan(None, tmp_path, console, isolate=False, as_json=as_json) == 1
    assert said.getvalue().splitlines()[0] == "[1/2] small_cnn on digits, seed 0: [red]l1, ratio 0.5"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue()).splitlines()
    assert plain[1:] == ["failed: [red]l1, seed 0", "it is [red]wrong"]
    assert capsys.readouterr().out == ("[]\n" if as_json else "")
    # a folder's name may look like Rich's markup
    out = tmp_path / "runs[red]"
    out.mkdir()
    monkeypatch.setattr(verbs, "compare", lambda *given, **knobs: ([RECORD], []))
    said = io.StringIO()
    assert verbs._run_plan(None, out, Console(file=said, width=999), isolate=False, as_json=False) == 0
    files = f"records: {out / 'results.json'} · picture: {out / 'accuracy.png'} · report: {out / 'report.html'}"
    assert said.getvalue().splitlines()[-1] == files


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
