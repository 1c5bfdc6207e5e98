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

    def changed(**values):
        return golden.differences(expected, {**copy.deepcopy(expected), **values})

    shapes = expected["shapes"]
    layer, skipped = next(iter(shapes)), {**expected["skipped"], "another": "why"}
    assert changed() == []
    assert len(changed(shapes={**shapes, layer: "9x9"})) == 1
    assert len(changed(entries=expected["entries"][1:])) == 1
    assert len(changed(entries=expected["entries"][::-1])) == 1
    assert len(changed(skipped=skipped)) == 1
    assert len(changed(parameters=expected["parameters"] + 1)) == 1
    assert len(changed(shares={})) == len(expected["shares"]) > 0
    assert len(changed(ties={layer: "0 0"})) == 1
    assert len(changed(kept_counts={layer: 1})) == 1
    assert len(changed(inputs=[])) == 1
    assert len(changed(status="ValueError: other")) == 1


@pytest.mark.parametrize(("factor", "count"), [(1 + 1e-6, 0), (1 + 1e-4, 1)])
def test_outputs_may_differ_by_rounding_alone(factor, count):
    expected = REFERENCE["own/unet"]
    outputs = [[shape, *(number * factor for number in numbers), 0] for shape, *numbers, _ in expected["outputs"]]
    assert len(golden.differences(expected, {**expected, "outputs": outputs})) == count


def test_another_text_of_a_reason_counts_only_where_asked_for():
    expected = next(record for record in REFERENCE.values() if record["skipped"])
    actual = {**expected, "skipped": dict.fromkeys(expected["skipped"], "worded anew")}
    assert golden.differences(expected, actual) == []
    assert golden.changed_texts(expected, actual)
    assert len(golden.differences(expected, actual, reasons=True)) == len(expected["skipped"])


def test_numbers_are_written_as_ranges():
    assert golden.as_ranges([0, 1, 2, 3, 4, 9, 9, 9, 2]) == "0:4 9*3 2"
    assert golden.renumbered({"one": [7, 7, 30], "two": [30, 7, -4]}) == {"one": "0*2 1", "two": "1 0 2"}


def test_times_are_judged_by_their_median_and_by_each_network(capsys):
    reference = {name: {"status": "ok", "seconds": [1.0, 1.0]} for name in "abc"}

    def judged(**seconds):
        records = {name: {**reference[name], "seconds": seconds[name]} for name in "abc"}
        return golden.different_times(reference, records)

    assert judged(a=[1.0, 1.0], b=[1.0, 1.1], c=[1.0, 1.9]) == []
    assert len(judged(a=[1.0, 1.0], b=[1.0, 1.0], c=[1.0, 2.1])) == 1
    assert len(judged(a=[1.2, 1.1], b=[1.2, 1.1], c=[1.0, 1.0])) == 1
    assert "median ratio 1.15 of 3 networks" in capsys.readouterr().out


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


def test_a_change_of_the_users_model_is_a_difference():
    record = REFERENCE["own/unet"]
    changed = {**record, "changed": ["pruning, interrupted: modes"]}
    assert golden.differences(record, changed) == ["the user's model has changed: pruning, interrupted: modes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own/unet", "own/lstm", "transformers/bert"])
def test_functions_and_interruptions_leave_the_users_model_as_it_was(name):
    assert golden.changes(name, dict(golden.entries())[name]) == ([], [])
