"""Wrong flags of the command are found in the source of the verbs, before anything is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

import nni_topo_command
from nni_topo.pruners.registry import list_pruners
from nni_topo.recovery import list_recoveries
from nni_topo.zoo import list_data, list_models
from nni_topo_command import _broken_rule, _fields, _names, _studies, _verb, first_mistake

SHRINK = ["shrink", "--model", "small_cnn", "--out", "new"]
VERBS = [[verb] for verb in nni_topo_command.VERBS if verb not in ("analyze", "experiment")]
VERBS += [["analyze", study] for study in _studies()]
VERBS += [["experiment", part] for part in ("run", "status", "best", "export")]


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        ([*SHRINK, "--flops", "1.5"], "flops must be in (0, 1], got 1.5 (--flops)"),
        ([*SHRINK, "--params=0"], "params must be in (0, 1], got 0 (--params)"),
        ([*SHRINK, "--shares", "0.5", "1"], "shares must be in (0, 1), got 1 (--shares)"),
        ([*SHRINK, "--tolerance", "nan"], "tolerance must be in (0, 1), got nan (--tolerance)"),
        ([*SHRINK, "--seconds", "-1"], "seconds must be above 0, got -1 (--seconds)"),
        ([*SHRINK, "--images", "1"], "images must be at least 2, got 1 (--images)"),
        ([*SHRINK, "--images", "2.5"], "images must be an integer, got '2.5' (--images)"),
        ([*SHRINK, "--pruner", "l11"], "pruner must be a known name, got 'l11'; did you mean l1? (--pruner)"),
        ([*SHRINK, "--method", "solve"], "method must be a known name, got 'solve'"),
        ([*SHRINK, "--data", "digit"], "data must be a known name, got 'digit'; did you mean digits? (--data)"),
        ([*SHRINK, "--depth", "yes"], "a flag without a value must stand alone, got 'yes' after it (--depth)"),
        ([*SHRINK, "--json=1"], "a flag without a value must stand alone, got '1' after it (--json)"),
        ([*SHRINK, "--prune", "l1"], "a flag must be a known one, got --prune; did you mean --pruner"),
        (["shrink", "--out", "new"], "nni-topo shrink must get --model MODEL, a listed name, torchvision/NAME"),
        (["compare", "--model", "small_cnn", "--out", "new", "--n-jobs", "0"], "n_jobs must be at least 1, got 0"),
        (["analyze", "sensitivity", "--model", "resnet2"], "model must be a known name, got 'resnet2'; did you mean"),
        (["experiment", "run", "--por", "3"], "a flag must be a known one, got --por; did you mean --port"),
    ],
)
def test_the_first_mistake_is_named(words, mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = first_mistake(words)
    assert mistake in found
    place = " ".join(words[: 2 if words[0] in ("analyze", "experiment") else 1])
    assert found.startswith(f"nni-topo {place}: ")
    assert found.endswith(f"; nni-topo {place} --help lists all flags")


def test_a_word_after_a_flag_without_a_value_may_be_one_of_the_verbs_own():
    assert first_mistake(["report", "--json", "runs/digits"]) == ""
    assert first_mistake([*SHRINK, "--depth", "--json", "--flops", "0.5"]) == ""


def test_flags_of_a_file_are_looked_at_too_and_those_of_the_command_line_may_complete_them(tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("model: small_cnn\nflops: 1.5\n")
    assert "flops must be in (0, 1], got 1.5" in first_mistake(["shrink", "--plan", str(plan), "--out", str(tmp_path)])
    plan.write_text("model: small_cnn\nflop: 0.5\n")
    assert "got --flop; did you mean --flops" in first_mistake(["shrink", "--plan", str(plan), "--out", str(tmp_path)])
    plan.write_text("model: small_cnn\ncaps: {features.conv1: 0.5}\njson: true\nseconds: null\n")
    assert first_mistake(["shrink", f"--plan={plan}", "--out", str(tmp_path)]) == ""
    plan.write_text("- [")
    assert first_mistake([*SHRINK, "--plan", str(plan)]) == ""  # said when the file is read


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    words = ["shrink", "--model", "small_cnn", "--out", str(tmp_path / "file" / "in")]
    assert f"an output folder must be a folder that can be written to, got one that can't: {tmp_path}" in first_mistake(
        words
    )


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_no_default_breaks_the_rule_in_its_comment(words):
    for name, field in _fields(_verb(words)).items():
        value = nni_topo_command._value(field.default, field.file) if field.default is not None else None
        for each in value if isinstance(value, tuple) else (value,):
            if isinstance(each, (int, float)) and not isinstance(each, bool):
                assert _broken_rule(each, field.comment) == "", name


def test_a_number_with_a_meaning_of_its_own_breaks_no_rule():
    comment = "cells to run at a time, at least 1; -1: one per core"
    assert [_broken_rule(value, comment) for value in (-2, -1, 0, 1)] == ["at least 1", "", "at least 1", ""]


def test_the_names_are_those_that_the_package_lists():
    assert set(list_models()) == set(_names("model"))
    assert set(list_data()) == set(_names("data"))
    assert set(list_pruners()) <= set(_names("pruner"))
    assert set(list_recoveries()) <= set(_names("method"))
    own = ["--model", "package.module:factory", "--pruner", "package.module:Class", "--data", "photos/"]
    assert first_mistake(["shrink", *own, "--out", "new"]) == ""


def test_a_wrong_flag_needs_no_import_of_the_package():
    code = (
        "import sys, nni_topo_command; code = nni_topo_command.main(['shrink', '--flops', '2']); "
        "assert not {'torch', 'nni', 'nni_topo', 'numpy'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("nni-topo shrink: flops must be in (0, 1], got 2 (--flops)")
