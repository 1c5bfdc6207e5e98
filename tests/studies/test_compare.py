from __future__ import annotations

import dataclasses
import json
from unittest.mock import ANY

import pytest
from joblib.externals.loky import get_reusable_executor
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.cli import main
from nni_topo.errors import ConfigError, DataError
from nni_topo.rules import instance
from nni_topo.runs.choices import CompensationChoice, DataChoice, DistillationChoice, ModelChoice, PrunerChoice, Target
from nni_topo.studies.compare import compare
from nni_topo.studies.plan import ComparisonPlan
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import as_markdown, tables_of

RESULTS = ("accuracy_before", "accuracy_oneshot", "accuracy_recalibrated", "accuracy_retrained", "flops", "params")


def plan(*pruners, seeds=1):
    return ComparisonPlan(
        models=(ModelChoice("small_cnn"),),
        data=(DataChoice("digits", limit=300),),
        pruners=tuple(PrunerChoice(name) for name in pruners),
        targets=(Target("ratio", 0.5),),
        seeds=seeds,
        train={"epochs": 2},
        retrain={"epochs": 1},
    )


def figures(records):
    return [{name: record[name] for name in (*RESULTS, "pruner", "seed")} for record in records]


def test_records_hold_what_a_table_needs(tmp_path):
    records, failures = compare(plan("l1", "topological"), tmp_path)
    assert failures == []
    assert [record["pruner"] for record in records] == ["l1", "topological"]
    for record in records:
        assert record["flops"] < record["flops_before"]
        assert record["params"] < 0.35 * record["params_before"]
        assert all(0.0 <= record[name] <= 1.0 for name in RESULTS[:4])
        assert list(record["widths"].values())[-1] == 10
        assert record["versions"]["torch"]
    assert records[0]["flops"] == records[1]["flops"]
    assert json.loads((tmp_path / "results.json").read_text()) == records
    # a finished comparison runs nothing again; another one is refused
    ran = []
    again, _ = compare(
        plan("l1", "topological", "random"), tmp_path, on_cell=lambda cell, *_: ran.append(cell.pruner.name)
    )
    assert (ran, again[:2]) == (["random"], records)
    with pytest.raises(
        ConfigError, match=r"2 records of another one, e\.g\. small_cnn, digits, topological, ratio 0\.5"
    ):
        compare(plan("l1"), tmp_path)


@pytest.mark.slow
def test_fine_tuning_ends_where_a_share_of_the_unpruned_accuracy_is_back(tmp_path):
    asked = dataclasses.replace(plan("l1", "scratch"), retrain={"epochs": 6, "until": 0.8}, train={"epochs": 8})
    (l1, scratch), failures = compare(asked, tmp_path / "half")
    assert failures == []
    *before, last = l1["curve"]
    assert last >= 0.8 * l1["validation_before"] > max(before)
    assert len(l1["epoch_seconds"]) == len(before) < 6
    assert 0.0 < sum(l1["epoch_seconds"]) < l1["retrain_seconds"]
    assert l1["until"] == 0.8
    # a new network is trained by the whole recipe
    assert len(scratch["epoch_seconds"]) == 8
    assert "until" not in scratch
    at_once = dataclasses.replace(asked, pruners=asked.pruners[:1], retrain={"epochs": 6, "until": 1e-3})
    (record,), _ = compare(at_once, tmp_path / "at-once")
    assert (record["epoch_seconds"], record["curve"]) == ([], l1["curve"][:1])
    assert "| 0 | best baseline |" in as_markdown(tables_of([record]))


def test_fine_tuning_until_a_share_needs_validation_images(tmp_path, monkeypatch):
    load = zoo.load_data
    monkeypatch.setattr(zoo, "load_data", lambda *args, **knobs: unwatched(load(*args, **knobs)))
    asked = dataclasses.replace(plan("l1"), retrain={"epochs": 2, "until": 0.9})
    with pytest.raises(ConfigError, match=r"until needs validation images, got none \(digits\)"):
        compare(asked, tmp_path)


def unwatched(data):
    return dataclasses.replace(data, validation=TensorDataset(*data.validation[:0]))


@pytest.mark.slow
def test_records_say_whether_the_budget_is_met(tmp_path):
    targets = (Target("flops", 0.5), Target("memory", 0.5), Target("ratio", 0.5))
    asked = dataclasses.replace(plan("l1", "level"), targets=targets, retrain={"epochs": 0})
    records, failures = compare(asked, tmp_path)
    assert failures == []
    told = {(each["pruner"], each["budget"]["kind"]): each["budget"] for each in records if "budget" in each}
    assert set(told) == {("l1", "flops"), ("l1", "memory"), ("level", "flops"), ("level", "memory")}
    for kind in ("flops", "memory"):
        assert told["l1", kind] == {"kind": kind, "asked": 0.5, "left": ANY, "is_met": True, "why": ""}
        assert told["l1", kind]["left"] == pytest.approx(0.5, abs=0.01)
        assert told["level", kind]["left"] == 1.0
        assert not told["level", kind]["is_met"]
        assert told["level", kind]["why"] == "the pruner removes single weights and no channels"


@pytest.mark.slow
def test_cells_that_run_at_a_time_give_the_same_figures(tmp_path):
    both = dataclasses.replace(plan("l1", seeds=2), targets=(Target("flops", 0.5), Target("params", 0.5)))
    began = []
    apart = dataclasses.replace(both, n_jobs=2)
    alone, _ = compare(apart, tmp_path / "alone", on_cell=lambda cell, *_: began.append(cell.seed))
    together, _ = compare(both, tmp_path / "together")
    assert figures(alone) == figures(together)
    assert began[:2] == [0, 1]  # each trains its network
    ratios = [json.loads((tmp_path / name / "ratios.json").read_text()) for name in ("alone", "together")]
    assert ratios[0] == ratios[1]


def test_a_file_says_how_many_cells_run_at_a_time_and_the_command_before_it(tmp_path, monkeypatch):
    path = tmp_path / "plan.yaml"
    path.write_text("{models: small_cnn, data: digits, pruners: l1, targets: {ratio: 0.5}, n_jobs: 3}")
    asked = []
    monkeypatch.setattr("nni_topo.cli.verbs.compare", lambda plan, *_, **knobs: (asked.append(plan.n_jobs) or [], []))
    for given in ([], ["--n-jobs", "2"]):
        assert main(["compare", "--plan", str(path), "--out", str(tmp_path / "out"), *given]) == 0
    assert asked == [3, 2]


FAILING = """
import os, signal

def failing(num_classes):
    raise ValueError("no such net")

def killed(num_classes):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("net", "n_jobs", "why"), [("failing", 1, "no such net"), ("failing", 2, "no such net"), ("killed", 2, "killed")]
)
def test_a_failing_cell_is_reported_and_the_others_run(net, n_jobs, why, tmp_path, monkeypatch):
    (tmp_path / "failing_nets_for_tests.py").write_text(FAILING)
    monkeypatch.syspath_prepend(tmp_path)
    get_reusable_executor().shutdown()  # processes of another test, which don't know the folder
    models = (*plan("l1").models, ModelChoice(f"failing_nets_for_tests:{net}"))
    asked = dataclasses.replace(plan("l1"), models=models, n_jobs=n_jobs)
    records, failures = compare(asked, tmp_path / "out")
    assert why in failures[-1]["reason"]
    assert failures == json.loads((tmp_path / "out" / "failures.json").read_text())
    failed = [(each["model"], each["pruner"], each["seed"]) for each in failures]
    assert failed[-1] == (f"failing_nets_for_tests:{net}", "l1", 0)
    # a process that is killed may end the one beside it
    assert len(records) + len(failed) == 2
    assert net == "killed" or [record["model"] for record in records] == ["small_cnn"]


def test_a_part_of_the_test_images(tmp_path):
    few = ComparisonPlan(**{**plan("l1").__dict__, "data": (DataChoice("digits", limit=300, test_limit=20),)})
    (record,), _ = compare(few, tmp_path)
    assert record["accuracy_before"] * 20 == pytest.approx(round(record["accuracy_before"] * 20))
    none = {**few.__dict__, "data": (DataChoice("digits", test_limit=0),)}
    with pytest.raises(ConfigError, match="test_limit must be at least 1, got 0"):
        compare(ComparisonPlan(**none), tmp_path)


def test_a_resumed_comparison_stops_if_its_unpruned_network_is_another_one(tmp_path):
    compare(plan("l1", seeds=2), tmp_path)
    before = (tmp_path / "results.jsonl").read_bytes()
    rows = read_records(tmp_path / "results.jsonl")
    assert rows[0]["accuracy_before"] != rows[1]["accuracy_before"]
    # the files of both seeds change places, as a network that was trained again on another processor may differ
    one, other = (tmp_path / "checkpoints" / f"{cell.training_key}.pt" for cell in plan("l1", seeds=2).cells())
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    ran = []
    message = (
        rf"same unpruned network, got accuracy_before {rows[1]['accuracy_before']:g} beside "
        rf"{rows[0]['accuracy_before']:g} of earlier rows.*seed 0 \(.*results\.jsonl\)"
    )
    with pytest.raises(DataError, match=message):
        compare(plan("l1", "random", seeds=2), tmp_path, on_cell=lambda cell, *_: ran.append(cell.seed))
    assert ran == [0]
    assert (tmp_path / "results.jsonl").read_bytes() == before
    one.write_bytes(first)
    records, failures = compare(plan("l1", "random", seeds=2), tmp_path)
    assert (len(records), failures) == (4, [])


@pytest.mark.parametrize("lost", [1, 5])
def test_a_line_cut_short_by_a_crash_is_dropped(lost, tmp_path):
    path = tmp_path / "results.jsonl"
    append_record(path, {"key": "a"})
    append_record(path, {"key": "b"})
    path.write_bytes(path.read_bytes()[:-lost])
    cut = path.read_bytes()
    assert read_records(path) == [{"key": "a"}]
    assert path.read_bytes() == cut  # another process may be writing the line
    append_record(path, {"key": "c"})
    assert read_records(path) == [{"key": "a"}, {"key": "c"}]


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_line_before_the_last_is_refused_and_nothing_is_cut_off(broken, tmp_path):
    lines = [b'{"key": "a"}\n', b'{"key": "b"}\n', b'{"key": "c"}\n']
    lines[broken] = b'{"key": \n'
    path = tmp_path / "results.jsonl"
    path.write_bytes(b"".join(lines))
    with pytest.raises(DataError, match=rf"must be a JSON record.*results\.jsonl:{broken + 1}\)"):
        read_records(path)
    assert path.read_bytes() == b"".join(lines)


@pytest.mark.slow
def test_compensation_distillation_taylor_and_a_yardstick(tmp_path):
    both = dataclasses.replace(
        plan("l1"),
        pruners=(
            PrunerChoice("l1"),
            PrunerChoice("taylor", knobs={"training_steps": 4}),
            PrunerChoice("scratch"),
        ),
        train={"epochs": 5},
        retrain={"epochs": 0},
        compensate=CompensationChoice(images=256),
        distill=DistillationChoice(images=256, steps=100, augmentation="none"),
        targets=(Target("ratio", 0.8),),
    )
    records, failures = compare(both, tmp_path)
    assert failures == []
    for record in records[:2]:
        assert record["accuracy_compensated"] > record["accuracy_oneshot"]
        assert record["accuracy_distilled"] != record["accuracy_compensated"]
        assert record["distill_seconds"] > 0.0
        for step in ("oneshot", "recalibrated", "compensated", "distilled"):
            assert 0.0 < record[f"validation_{step}"] <= 1.0
            assert record[f"validation_{step}"] != record[f"accuracy_{step}"]  # of other images
        assert "accuracy_retrained" not in record
    table = as_markdown(tables_of(records))
    assert "| distilled % | vs best baseline, distilled |" in table
    assert f"| {100 * records[0]['accuracy_distilled']:.1f} |" in table
    assert "accuracy_oneshot" not in records[2]
    assert "accuracy_distilled" not in records[2]
    assert records[2]["widths"] == records[0]["widths"]
    assert records[2]["accuracy_retrained"] > 0.5


@pytest.mark.parametrize(
    ("line", "got"),
    [("[1, 2]", "a list"), ("3", "a int"), ('{"seed": 0}', "the keys seed"), ('{"key": 5}', "a str, got 5")],
)
def test_lines_that_are_no_records_are_named(tmp_path, line, got):
    path = tmp_path / "results.jsonl"
    path.write_text('{"key": "a"}\n' + line + '\n{"key": "c"}\n')
    with pytest.raises(DataError, match=rf"a JSON record of a run.* {got} .*results\.jsonl:2\)"):
        read_records(path, {"key": instance(str)})
