"""What the package makes of some networks is what ``tools/golden/zoo.jsonl.gz`` holds of them."""

from __future__ import annotations

import copy
import importlib.metadata
from pathlib import Path

import pytest
import torch

from tools import golden

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


def test_each_kind_of_difference_is_found():
    expected = REFERENCE["torchvision/shufflenet_v2_x0_5"]
    shapes, outputs = expected["shapes"], expected["outputs"]
    layer = next(iter(shapes))

    def scaled(factor):
        return [[shape, *(number * factor for number in numbers), 0] for shape, *numbers, _ in outputs]

    def count(**values):
        return len(golden.differences(expected, {**copy.deepcopy(expected), **values}))

    assert count() == 0
    assert count(outputs=scaled(1 + 1e-6)) == 0  # rounding
    assert count(skipped=dict.fromkeys(expected["skipped"], "worded anew")) == 0
    for change in (
        {"outputs": scaled(1 + 1e-4)},
        {"shapes": {**shapes, layer: "9x9"}},
        {"entries": expected["entries"][1:]},
        {"entries": expected["entries"][::-1]},
        {"skipped": {**expected["skipped"], "another": "why"}},
        {"parameters": expected["parameters"] + 1},
        {"ties": {layer: "0 0"}},
        {"kept_counts": {layer: 1}},
        {"inputs": []},
        {"changed": ["pruning, interrupted: modes"]},
        {"status": "ValueError: other"},
    ):
        assert count(**change) == 1, change
    assert count(shares={}) == len(expected["shares"]) > 0


def test_a_packed_file_is_the_same_whenever_it_is_packed(tmp_path):
    records = {name: REFERENCE[name] for name in ("own/unet", "own/lstm")}
    lines, packed = tmp_path / "lines.jsonl", [tmp_path / "one.jsonl.gz", tmp_path / "two.jsonl.gz"]
    for name in reversed(records):
        golden.append_line(lines, {**records[name], "cpu_seconds": 1.0})
    for path in packed:
        assert golden.main(["pack", str(lines), str(path)]) == 0
    assert packed[0].read_bytes() == packed[1].read_bytes()
    assert golden.read_records(packed[0]) == records
    assert golden.main(["compare", str(packed[0]), str(lines)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own/unet", "own/lstm", "transformers/bert"])
def test_functions_and_interruptions_leave_the_users_model_as_it_was(name):
    assert golden.changes(name, dict(golden.entries())[name]) == ([], [])
