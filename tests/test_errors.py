from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo import errors
from nni_topo.errors import ConfigError, unknown_name
from nni_topo.rules import number, whole
from nni_topo.studies.plan import load_plan


def test_numbers_pass_or_are_refused():
    cases = [
        (whole(1), [1, np.int64(2)], [0, True, 2.0, "2", None, math.nan], "an integer of at least 1"),
        (number(0, 1, "neither"), [0.5, np.float32(0.25)], [0, 1, True, "0.5", math.nan], r"in \(0, 1\)"),
        (number(0, 1, "right"), [1], [0], r"in \(0, 1\]"),
    ]
    for rule, good, bad, words in cases:
        for value in good:
            rule.check("share", value, "here")
        for value in bad:
            with pytest.raises(ConfigError, match=rf"share must be {words}, got .* \(here\)"):
                rule.check("share", value, "here")


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("l11", ["l1", "l2", "random"], "did you mean l1?"),
        ("Conv1", ["features.CONV1", "features.pool"], "did you mean features.CONV1?"),
        ("zzz", ["b", "a"], "known: a, b"),
        ("zzz", [f"{number:02}" for number in range(40)], ", 28, 29 and 10 more"),
    ],
)
def test_an_unknown_name_is_told_with_its_place_and_what_is_near(name, known, hint):
    words = str(unknown_name("pruner", name, known, "shrink"))
    assert words.startswith(f"pruner must be a known name, got {name!r}; ")
    assert words.endswith(f"{hint} (shrink)")


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


ROWS = torch.linspace(-1.0, 1.0, 64).reshape(16, 4)
HALF = [{"op_types": ["Linear"], "exclude_op_names": ["4"], "sparse_ratio": 0.5}]


def plan(tmp_path, text):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return path


# What is mistyped, and the place that the error must name.
MISTYPED = {
    "layer of shrink": (lambda _: nni_topo.shrink(small(), [ROWS], {"flops": 0.5}, layers=["00"]), "shrink"),
    "knob of distill": (lambda _: nni_topo.shrink(small(), [ROWS], {"flops": 0.5}, distill={"step": 1}), "shrink"),
    "cost": (lambda _: nni_topo.shrink(small(), [ROWS], {"flop": 0.5}), "budget"),
    "knob of create_pruner": (lambda _: nni_topo.create_pruner("l1", small(), HALF, mod="a"), "create_pruner"),
    "layer of a config_list": (
        lambda _: nni_topo.dependency_groups(small(), ROWS, [*HALF, {"op_names": ["00"], "sparse_ratio": 0.5}]),
        "config_list[1]",
    ),
    "target": (
        lambda _: nni_topo.MatrixPruner(small(), [{**HALF[0], "target_names": ["weigth"]}]),
        "config_list[0]",
    ),
    "module of a mask": (lambda _: nni_topo.to_dense(small(), ROWS, {"00": {"weight": torch.ones(4, 4)}}), "masks"),
    "key of a plan": (
        lambda folder: load_plan(plan(folder, "models: [small_cnn]\ndata: [digits]\npruner: [l1]\n")),
        "plan.yaml",
    ),
}


@pytest.mark.parametrize("what", MISTYPED)
def test_a_mistyped_name_is_told_with_its_place(what, tmp_path):
    call, place = MISTYPED[what]
    with pytest.raises(ConfigError, match=rf"must be a known name, got '.*'; .* \({re.escape(place)}\)$"):
        call(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: nni_topo.compensate(small(), {}, [ROWS], seed="a"), ConfigError, r"got 'a' \(compensate\)$"),
        (lambda: nni_topo.compensate("net", {}, [ROWS]), ConfigError, r"got a str \(compensate\)$"),
        (
            lambda: nni_topo.compensate(small(), {}, [ROWS], sed=1),
            TypeError,
            r"^compensate\(\) got an unexpected .* 'sed'$",
        ),
        (lambda: nni_topo.compensate(small(), {}), TypeError, r"^compensate\(\) missing a required argument: 'calib"),
    ],
)
def test_an_error_names_the_function_that_was_called(call, error, words):
    with pytest.raises(error, match=words):
        call()


class Narrow(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.shape[1] % 4:
            raise ValueError
        return y


def error_of(called):
    with pytest.raises(Exception) as raised:  # noqa: PT011
        called()
    return raised.value


def test_an_error_of_a_forward_is_told_with_its_line():
    net = nn.Sequential(nn.Linear(3, 6), Narrow(6, 6))
    bare = errors.raised(error_of(lambda: net(torch.zeros(2, 3))))
    assert re.fullmatch(rf"ValueError, at `raise ValueError` in {re.escape(__file__)}:\d+", bare)
    # What PyTorch raises is told with the line that calls it.
    sizes = errors.raised(error_of(lambda: net[1](torch.zeros(2, 3))))
    assert re.search(
        r"RuntimeError: mat1 and mat2 .*\(2x3 and 6x6\), at `y = super\(\).forward\(x\)` in .*:\d+$", sizes
    )
