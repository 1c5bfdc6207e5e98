from __future__ import annotations

import json
from dataclasses import replace

import pytest

from nni_topo import zoo
from nni_topo.analysis import overlap_bound
from nni_topo.cli import main
from nni_topo.errors import ConfigError
from nni_topo.runs.choices import Cell, DataChoice, ModelChoice, Target
from nni_topo.studies.analysis.rounds import METHODS, RoundsCell, RoundsStudy, rounds_tables, run_rounds, steps_to
from nni_topo.studies.records import append_record
from nni_topo.studies.tables import as_markdown

LEVELS = (0.5, 0.9, 0.999)


def study_cells() -> list[RoundsCell]:
    recipe = zoo.Recipe(epochs=2, batch_size=32)
    cell = Cell(
        ModelChoice("small_cnn"),
        DataChoice("digits", limit=200),
        METHODS["IMP"],
        Target("ratio", LEVELS[-1]),
        0,
        train=recipe,
        retrain=recipe.for_retraining(1),
    )
    return [RoundsCell(replace(cell, pruner=method), LEVELS) for method in METHODS.values()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("timp")
    return run_rounds(study_cells(), out), out


def test_both_methods_go_through_the_same_rounds_from_the_same_net(finished):
    (imp, timp, _), _ = finished
    assert imp["accuracy_before"] == timp["accuracy_before"]
    assert imp["overlap"] == timp["overlap"]
    for record in (imp, timp):
        assert [entry["target"] for entry in record["rounds"]] == list(LEVELS)
        kept = [entry["kept"] for entry in record["rounds"]]
        assert kept == sorted(kept, reverse=True)
    assert imp["rounds"][0]["kept"] == timp["rounds"][0]["kept"] == pytest.approx(0.5, abs=1e-3)
    assert imp["rounds"][2]["kept"] == pytest.approx(0.001, abs=2e-4)


def test_trees_stay_and_nothing_is_cut_off(finished):
    (imp, timp, capped), _ = finished
    trees = 16 + (16 + 32 - 1) + (32 + 64 - 1) + (256 + 64 - 1) + (64 + 10 - 1)
    weights = 144 + 4608 + 18432 + 16384 + 640
    assert timp["rounds"][2]["kept"] == pytest.approx(trees / weights)
    for entry in timp["rounds"]:
        assert entry["channels_connected"] == entry["outputs_reached"] == 1.0
    # A kept weight at the rim of its kernel may read nothing but padding on maps as small as 2x2.
    assert imp["rounds"][2]["channels_reached"] < 0.1 < 0.9 < timp["rounds"][2]["channels_reached"]
    assert imp["rounds"][2]["channels_connected"] < 0.2
    assert imp["rounds"][2]["outputs_reached"] == 0.0
    assert [entry["kept"] for entry in capped["rounds"]] == [entry["kept"] for entry in timp["rounds"]]
    assert capped["rounds"][2]["channels_connected"] < 0.9


def test_overlaps_stand_beside_their_bounds(finished):
    (record, *_), _ = finished
    assert list(record["overlap"]) == ["classifier.fc1", "classifier.fc2"]
    assert record["overlap"]["classifier.fc1"]["bound"] == overlap_bound(64, 256)
    assert all(entry["measured"] > entry["bound"] for entry in record["overlap"].values())


def test_finished_runs_are_not_repeated(finished):
    records, out = finished
    lines = (out / "results.jsonl").read_text().splitlines()
    began: list[RoundsCell] = []
    assert run_rounds(study_cells(), out, announce=lambda cell, *_: began.append(cell)) == records
    assert began == []
    assert (out / "results.jsonl").read_text().splitlines() == lines
    assert [json.loads(line)["method"] for line in lines] == ["IMP", "T-IMP", "IMP capped"]


def test_tables_and_pictures(finished, tmp_path, drawn):
    records, _ = finished
    twice = [*records, *({**record, "seed": 1} for record in records)]
    for record in twice:
        append_record(tmp_path / "results.jsonl", record)
    table = as_markdown(rounds_tables(twice))
    assert "**small_cnn on digits, 200 images, 2 seeds; dense" in table
    assert "| T-IMP - IMP | T-IMP - IMP capped |" in table
    row = next(line for line in table.splitlines() if line.startswith("| 99.9 |"))
    last = [record["rounds"][2]["accuracy"] for record in records]
    gains = [f"{100 * (last[1] - last[baseline]):+.1f} ± 0.0" for baseline in (0, 2)]
    assert row.endswith(f"| {gains[0]} | {gains[1]} |")
    assert "| small_cnn | classifier.fc2 |" in table
    files = RoundsStudy(twice).save(tmp_path)
    assert files == [tmp_path / name for name in ("rounds.json", "rounds.png")]
    check_pictures(drawn, records)


def check_pictures(drawn, records):
    """Accuracy and connectivity of every method over the compression."""
    upper, lower = drawn.lines("rounds.png", 0), drawn.lines("rounds.png", 1)
    for record in records:
        curves = {
            "accuracy": upper[record["method"]],
            "channels_connected": lower[f"{record['method']}: channels connected"],
            "outputs_reached": lower[f"{record['method']}: outputs reached"],
        }
        for key, points in curves.items():
            wanted = [(1.0 / (1.0 - entry["target"]), 100 * entry[key]) for entry in record["rounds"]]
            assert points == [pytest.approx(point) for point in wanted]
    assert len(upper) == len(records)
    assert len(lower) == 2 * len(records)


@pytest.mark.slow
def test_the_command_goes_on_where_it_was(tmp_path, capsys):
    words = ["analyze", "rounds", "--model", "lenet300", "--limit", "100", "--train-epochs", "1"]
    words += ["--retrain-epochs", "1", "--sparsities", "0.5", "0.9", "--images", "50", "--out", str(tmp_path)]
    assert main([*words, "--methods", "T-IMP"]) == 0
    assert "[1/1] seed 0: T-IMP" in capsys.readouterr().out
    assert main([*words, "--methods", "T-IMP,IMP capped", "--json"]) == 0
    output = capsys.readouterr()
    assert "[2/2] seed 0: IMP capped" in output.err
    assert "[1/2]" not in output.err
    timp, capped = json.loads(output.out)["records"]
    assert [entry["target"] for entry in timp["rounds"]] == [0.5, 0.9]
    assert [entry["kept"] for entry in timp["rounds"]] == [entry["kept"] for entry in capped["rounds"]]
    assert json.loads((tmp_path / "rounds.json").read_text()) == {"records": [timp, capped]}
    for wrong, message in ((["--methods", "TIMP"], "did you mean"), (["--sparsities", "0.9", "0.5"], "rising numbers")):
        assert main([*words, *wrong]) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("levels", [(), (0.0, 0.5), (0.5, 1.0), (0.9, 0.5), (0.5, 0.5)])
def test_bad_sparsities_are_refused(levels):
    with pytest.raises(ConfigError, match=r"rising numbers in \(0, 1\)"):
        steps_to(levels)


def test_steps_pass_through_the_sparsities():
    assert [1 - (1 - 0.999) ** step for step in steps_to(LEVELS)] == pytest.approx(LEVELS)
