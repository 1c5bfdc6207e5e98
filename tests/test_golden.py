"""What the package makes of some networks is what ``tools/golden/zoo.jsonl.gz`` holds of them."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch

from tools import golden, must_go

REFERENCE = golden.read_records(Path(golden.__file__).parent / "golden" / "zoo.jsonl.gz")


QUICK_FAMILIES = ("own", "transformers")
LONGEST = 10.0  # processor seconds that a network of the slow tests may take; the others are compared by `make zoo`


def other_release(name):
    """Say that Transformers is of another release than the record's: its networks compute in other ways then."""
    recorded = REFERENCE[name]["versions"].get("transformers")
    return recorded and recorded.split(".")[:2] != importlib.metadata.version("transformers").split(".")[:2]


def other_torch(name):
    """Say that PyTorch is of another release than the record's."""
    return REFERENCE[name]["versions"]["torch"].split(".")[:2] != torch.__version__.split(".")[:2]


def networks():
    """The networks of the installed packages, but for those that take long."""
    for name, options in golden.entries():
        family = name.partition("/")[0]
        if family in ("timm", "yolo") or sum(REFERENCE[name]["seconds"]) > LONGEST:
            continue
        marks = [] if family in QUICK_FAMILIES else [pytest.mark.slow]
        if other_release(name):
            marks.append(pytest.mark.skip(reason="the record is of another release of Transformers"))
        yield pytest.param(name, options, marks=marks, id=name)


@pytest.mark.parametrize(("name", "options"), list(networks()))
@pytest.mark.quick_every(16)
def test_groups_and_dense_networks_are_those_of_the_golden_record(name, options):
    record = {"status": "ok", **golden.measure(name, options, timed=False)}
    found = golden.differences(REFERENCE[name], record)
    if found and found[0].startswith(golden.OTHER_WEIGHTS) and other_torch(name):
        pytest.skip("the record is of another release of PyTorch, which draws other weights")
    assert found == []


def test_every_network_of_the_zoo_is_in_the_golden_record():
    assert REFERENCE.keys() == {name for name, _ in golden.entries()}
    assert {record["status"] for record in REFERENCE.values()} == {"ok"}


def test_no_network_keeps_channels_that_must_go():
    rows = must_go.read_table()
    found = {name: rows[name].problems(record["channels"]) for name, record in REFERENCE.items()}
    assert {name: problems for name, problems in found.items() if problems} == {}
    assert all(reason for row in rows.values() for reason in (*row.layers.values(), *row.requests.values()))


def test_a_layer_that_stays_without_a_reason_is_named():
    row, counts = must_go.read_table()["own/unet"], REFERENCE["own/unet"]["channels"]
    left, channels = counts["up1"]
    assert left < channels
    share = f"{row.removed}/{row.channels} channels must go, got {row.removed - (channels - left)}/{row.channels}"
    assert row.problems(counts | {"up1": [channels, channels]}) == ["up1 must lose channels", share]
    assert row.problems(counts | {"up1": [left + 1, channels]})[0].endswith(f"got {row.removed - 1}/{row.channels}")
    assert row.problems(counts | {"head": [1, 2]}) == ["head loses channels, so it needs no entry"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own/unet", "own/lstm", "transformers/bert"])
def test_functions_and_interruptions_leave_the_users_model_as_it_was(name):
    assert golden.changes(name, dict(golden.entries())[name]) == ([], [])
