"""The GPU's benchmark, tried on any device: its code runs, its tables hold a figure in every row."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def bench() -> ModuleType:
    return importlib.import_module("benchmarks.speed.bench_cuda")


def run(bench: ModuleType, out: Path, *options: str) -> dict:
    bench.main(["--quick", "--threads", "1", "--out", str(out / "cuda.json"), *options])
    return json.loads((out / "cuda.json").read_text())


def _counts(bench: ModuleType) -> tuple[int, ...]:
    return len(bench.UNIFORM) + 1, 1, 1, len(bench.LAYERS), len(bench.SELECTED), 1


@pytest.mark.slow
def test_every_row_is_measured(bench, device, tmp_path, capsys):
    found = run(bench, tmp_path, "--device", str(device))
    assert (found["left_out"], found["passes"], found["block by block"], found["compiled"]) == ([], [], [], [])
    parts = ("pruned to half the MACs", "latency", "multiples of channels", "widths of a layer", "selection")
    parts += ("reconstruction",)
    counts = {part: len(found[part]) for part in parts}
    ways = (*bench.UNIFORM, "shrink")
    assert counts == dict(zip(parts, _counts(bench), strict=True))
    rows = [row for part in parts for row in found[part]]
    assert [row["error"] for row in rows if "error" in row] == []
    for row in (*found["selection"], *found["reconstruction"]):
        assert row["cpu_over_device"] == row["cpu_seconds"] / row[f"{device.type}_seconds"]
    for row in found["pruned to half the MACs"][: len(bench.UNIFORM)]:
        # its layers have few channels
        assert row["macs"] == pytest.approx(0.5, abs=0.1)
    for row in found["latency"]:
        assert row.keys() == {"row", *(f"{way} ms" for way in (bench.UNPRUNED, *ways))}
    assert all(row["masks_agree"] > 0.9 for row in found["selection"])
    assert all(row["outputs_apart"] < 1e-2 for row in found["reconstruction"])
    printed = capsys.readouterr().out
    assert all(row["row"] in printed for row in rows)
