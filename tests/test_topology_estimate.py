"""T8 and the estimate over kinds: what two programs make of the same rows, and rows that mustn't be mixed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.selection import forest
from benchmarks.topology import which_estimate as t8
from nni_topo import zoo
from nni_topo.studies.records import read_records

VERDICT = t8.Path(t8.__file__).with_name("which_estimate_verdict.py")


def rows(seed: int = 0, networks: int = 60) -> list[dict]:
    """Lines as a run writes them, of the first networks."""
    generator = np.random.default_rng(seed)
    kinds = {kind: generator.normal(0.0, 0.05, len(t8.ROWS)) for kind in t8.KINDS}
    lines = []
    for number, kind in list(product(t8.SEEDS, t8.KINDS))[:networks]:
        for share, (place, row) in product(t8.SHARES, enumerate(t8.ROWS)):
            worth = 0.5 + kinds[kind][place] + (0.1 if row == t8.OURS else 0.0)
            figures = {f"test_{step}": float(generator.normal(worth, 0.02)) for step in t8.RECOVERIES}
            lines.append({"key": [kind, number, share, row], "unpruned_test": 0.9, **figures})
    return lines


def once_more(lines: list[dict], folder) -> dict:
    """What the program that shares no code makes of lines."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return json.loads(subprocess.check_output([sys.executable, str(VERDICT), str(file)], text=True))


def test_two_programs_reach_one_verdict(tmp_path):
    lines = rows()
    broken = {key: value for key, value in lines[30].items() if not key.startswith("test_")}
    lines[30] = {**broken, "error": "no such layer"}
    again = once_more(lines, tmp_path)
    primary, outcome = t8.verdict(lines)
    assert again["networks"] == 60
    assert (again["outcome"], outcome[:9]) == ("becomes the default", "All three")
    for base, points in primary.items():
        assert again["primary"][base] == pytest.approx([points.mean, points.half], rel=1e-6)
    table = [line.split(" | ") for line in t8.secondary_table(t8.accuracies_of(lines)).splitlines()[2:]]
    assert len(table) == len(again["holm"]) == 65
    assert [float(cells[-1].strip(" |")) for cells in table] == pytest.approx(list(again["holm"].values()), rel=0.06)


def test_the_verdict_is_open_until_all_networks_are_there_and_no_without_one_of_the_three(tmp_path):
    assert t8.verdict([])[1] == "Open: 0 of 60 networks."
    lines = rows(networks=59)
    assert t8.verdict(lines)[1] == "Open: 59 of 60 networks."
    assert once_more(lines, tmp_path)["outcome"] == "open"
    lines = rows()
    for line in lines:
        if line["key"][3] == "random":
            line["test_recalibrated"] += 0.3
    assert "no default changes" in t8.verdict(lines)[1]
    assert once_more(lines, tmp_path)["outcome"] == "no default changes"


def test_the_mean_over_kinds_by_hand():
    worth = {("ViT, small", 800): 0.1, ("ViT, small", 801): 0.3, ("ConvNeXt, small", 800): 0.4}
    lines = []
    for (kind, seed), more in worth.items():
        for row, accuracy in ((t8.OURS, 0.5 + more), ("l1", 0.5)):
            lines.append({"key": [kind, seed, 0.25, row], "test_recalibrated": accuracy, "test_reconstructed": 0.5})
    # the ViT's two networks count as one kind: (20 + 40) / 2, and t at one degree of freedom is 12.706
    points = t8.verdict(lines)[0]["l1"]
    assert (points.mean, points.half) == pytest.approx((30.0, 12.706 * 10.0), rel=1e-4)


def test_the_hessian_is_the_mean_of_all_images_squared_gradients():
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(5, 3, generator=generator), torch.tensor([0, 1, 1, 0, 1])
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        errors = layer(images).softmax(1) - nn.functional.one_hot(labels, 2)
    t8.hessian_of(TensorDataset(images, labels))(layer)
    assert torch.allclose(layer.weight.grad, torch.einsum("no,ni->oi", errors**2, images**2) / 5)


def test_rows_of_another_commit_or_of_another_training_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(t8, "committed_revision", lambda: t8.provenance()["revision"])
    monkeypatch.setattr(t8, "KINDS", {t8.DIGITS: replace(t8.KINDS[t8.DIGITS], recipe=zoo.Recipe(1), images=32)})
    monkeypatch.setattr(t8, "SEEDS", (290,))
    monkeypatch.setattr(t8, "SHARES", (0.25,))
    monkeypatch.setattr(t8, "ROWS", ("l1",))
    path = tmp_path / "which_estimate.jsonl"
    t8.measure(tmp_path / "none.npz", tmp_path, path)
    (line,) = read_records(path)
    assert line["key"] == [t8.DIGITS, 290, 0.25, "l1"]
    assert line["share"] == pytest.approx(0.25, abs=0.02)
    assert line["unpruned_test"] > 0.2
    before = path.read_bytes()
    t8.measure(tmp_path / "none.npz", tmp_path, path)  # nothing is missing
    assert path.read_bytes() == before
    monkeypatch.setattr(t8, "ROWS", ("l1", "random"))
    path.write_text(json.dumps({**line, "unpruned_test": line["unpruned_test"] - 0.001}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="one trained network"):
        t8.measure(tmp_path / "none.npz", tmp_path, path)
    path.write_text(json.dumps({**line, "revision": "0123456789ab"}) + "\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="one commit"):
        t8.measure(tmp_path / "none.npz", tmp_path, path)


# The estimate over the rows of earlier comparisons


def record(kind: str, seed: int, row: str, accuracy: float, **more) -> dict:
    """A row with a quarter of the MACs."""
    facts = {"kind": kind, "seed": seed, "pruner": row, "target": "25 % of the MACs left", "accuracy_before": 0.9}
    return {**facts, "accuracy_compensated": accuracy, "accuracy_retrained": accuracy, **more}


def test_rows_are_paired_by_network_and_by_what_was_done_before():
    lines = []
    for seed, more in ((0, 0.01), (1, 0.03)):
        lines += [record("a", seed, "l1", 0.5), record("a", seed, "l2", 0.5 + more)]
    lines += [record("a", 2, "l1", 0.5), record("a", 2, "l2", 0.9, accuracy_before=0.8)]  # of another training
    lines += [record("a", 3, "l1", 0.5, accuracy_distilled=0.6), record("a", 3, "l2", 0.6)]
    rows_of = forest.Rows(lines)
    assert rows_of.gains("l2", "l1", 25, "compensated") == {"a": pytest.approx([1.0, 3.0, 10.0])}
    assert rows_of.gains("l2", "l1", 25, "retrained") == {"a": pytest.approx([1.0, 3.0])}
    assert rows_of.gains("l2", "l1", 50, "compensated") == {}


def test_the_random_effects_mean_by_hand():
    # Means 1 and 4 with variances 1 and 1: Q = 4.5, the variance between kinds 3.5, equal weights 1 / 4.5, so the mean
    # is 2.5, its variance by Knapp and Hartung (2 * 2.25 / 4.5) / 1 / (2 / 4.5) = 2.25; t at one degree is 12.706.
    points = forest.random_effects({"a": [0.0, 2.0], "b": [3.0, 5.0]})
    assert (points.mean, points.half) == pytest.approx((2.5, 12.7062 * 1.5), rel=1e-4)


def test_the_picture_of_the_estimate_shows_the_figures_of_the_records(tmp_path):
    assert forest.is_current(), "run make tables"
    other = tmp_path / "other.png"
    other.write_bytes(forest.PICTURE.read_bytes().replace(forest.digest().encode(), b"0" * 64))
    assert not forest.is_current(other)
