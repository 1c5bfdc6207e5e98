"""The GPU's benchmark, tried on any device: its code runs, its tables hold a figure in every row."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from nni_topo.errors import ConfigError

_FILE = Path(__file__).parents[1] / "benchmarks" / "bench_cuda.py"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    # one benchmark imports another, which lies beside it
    monkeypatch.syspath_prepend(_FILE.parent)
    spec = importlib.util.spec_from_file_location("bench_cuda", _FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def test_rows_past_the_limit_are_named_and_not_run(bench, tmp_path, capsys):
    found = run(bench, tmp_path, "--device", "cpu", "--limit", "0")
    assert [found[part] for part in bench.PARTS] == [[]] * len(bench.PARTS)
    assert len(found["left_out"]) == sum(_counts(bench))
    assert "not run within 0 s: small_cnn, l1" in capsys.readouterr().out


def test_a_row_that_fails_is_no_figure(bench):
    def fail() -> dict:
        raise RuntimeError("no compiler")

    rows = bench.Bench(SimpleNamespace(quick=True, device="cpu", limit=60.0, ways=None)).row("compiled", fail)
    assert rows == [{"row": "compiled", "error": "RuntimeError: no compiler"}]
    assert "| compiled | RuntimeError: no compiler |" in "".join(bench.tables({"compiled": rows}))


def test_a_device_that_is_not_there_is_named(bench):
    with pytest.raises(ConfigError, match="got 'tpu'"):
        bench.main(["--device", "tpu", "--quick"])


def test_the_page_has_the_tables_of_the_records(bench, tmp_path):
    benchmarks = _FILE.parent
    page = benchmarks / "results" / "gpu.md"
    copy = tmp_path / page.name
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    bench.main(["--into", str(benchmarks / "records" / "cuda.json"), str(copy)])
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    assert "| vit_b_16, float32, batch 64 | 54.9 | 33.4 | 33.3 | 31.5 | 32.3 |" in copy.read_text(encoding="utf-8")
