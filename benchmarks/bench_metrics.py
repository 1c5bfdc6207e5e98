"""How much cheaper FPGM's metric and the threshold of a global ranking are than NNI's loops.

Both run in one process and one thread, in turns, on the same seeded weights and metrics: 20 ms of the one, 20 ms of the
other, as a network's layers follow each other (``--block 0``: call by call, each in the other's cold caches). FPGM: the
metric of one 3x3 convolution. Ranking: the threshold over several layers, of which all blocks hold the same number of
elements ("equal", also how single weights are ranked) or each layer's its own, as in any real network: layers come from
the one with the smallest blocks to the one with the largest ("growing", as networks mostly do), the other way round
("shrinking"), or at random ("mixed", as NNI's sets iterate).

    python benchmarks/bench_metrics.py --out metrics.json
    python benchmarks/bench_metrics.py --quick
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nni_topo.compat import metrics

GOAL = 5.0
FPGM_CASES = ((64, 64), (128, 128), (256, 256), (512, 512))
LAYERS = 8
ORDERS = {"equal": (0,) * LAYERS, "growing": tuple(range(LAYERS)), "shrinking": tuple(range(LAYERS))[::-1]}
ORDERS["mixed"] = (4, 6, 0, 3, 7, 1, 5, 2)
RANKING_CASES = tuple((kind, blocks) for kind in ORDERS for blocks in (4_000, 100_000))


def medians(slow: Callable[[], Any], fast: Callable[[], Any], repeats: int, block: float) -> tuple[float, float]:
    """Time two functions in turns, each for ``block`` seconds at a time; median seconds of the process' own time."""
    found = []
    for function in (slow, fast):
        function()
        start = time.process_time()
        function()
        found.append((function, max(1, round(block / max(time.process_time() - start, 1e-6))), list[float]()))
    for _ in range(repeats):
        for function, calls, times in found:
            start = time.process_time()
            for _ in range(calls):
                function()
            times.append((time.process_time() - start) / calls)
    return statistics.median(found[0][2]), statistics.median(found[1][2])


def record(name: str, seconds: tuple[float, float], difference: float) -> dict[str, Any]:
    return {
        "case": name,
        "nni_seconds": seconds[0],
        "seconds": seconds[1],
        "ratio": seconds[0] / seconds[1],
        "largest_difference": difference,
    }


def compare_fpgm(filters: int, channels: int, timing: tuple[int, float]) -> dict[str, Any]:
    from nni.compression.pruning import FPGMPruner

    torch.manual_seed(filters)
    layer = torch.nn.Sequential(torch.nn.Conv2d(channels, filters, 3))
    pruner = FPGMPruner(layer, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    request = (2, pruner._collect_data(), pruner._target_spaces)
    slow, fast = (f(*request)["0"]["weight"] for f in (metrics.NNI_FPGM, metrics.fpgm_metrics))
    seconds = medians(lambda: metrics.NNI_FPGM(*request), lambda: metrics.fpgm_metrics(*request), *timing)
    difference = float(((slow - fast).abs() / slow).max())
    return record(f"FPGM, {filters} filters of {channels * 9}", seconds, difference)


def compare_ranking(kind: str, blocks: int, timing: tuple[int, float]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(blocks)
    scores, group = {}, []
    for index, exponent in enumerate(ORDERS[kind]):
        scores[str(index)] = {"weight": torch.rand(blocks // LAYERS, generator=generator)}
        target = torch.empty(1).expand(blocks // LAYERS, 9 * 2**exponent)
        group.append((str(index), "weight", SimpleNamespace(target=target)))
    number = sum(space.target.numel() for *_, space in group) // 2
    slow, fast = (f(scores, group, number) for f in (metrics.NNI_THRESHOLD, metrics.global_threshold))
    seconds = medians(
        lambda: metrics.NNI_THRESHOLD(scores, group, number),
        lambda: metrics.global_threshold(scores, group, number),
        *timing,
    )
    return record(f"ranking, {blocks} blocks of {kind} size", seconds, abs(slow - fast))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"NNI's loops and their replacements, one thread; goal {GOAL:g}x")
    for heading in ("case", "NNI, ms", "ours, ms", "ratio", "largest relative difference"):
        table.add_column(heading, justify="left" if heading == "case" else "right")
    for row in rows:
        cells = [f"{1e3 * row['nni_seconds']:.2f}", f"{1e3 * row['seconds']:.3f}", f"{row['ratio']:.1f}x"]
        table.add_row(row["case"], *cells, f"{row['largest_difference']:.1e}")
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--repeats", type=int, default=9, help="repetitions per figure (default: 9)")
    parser.add_argument("--block", type=float, default=0.02, help="seconds of one function at a time (default: 0.02)")
    parser.add_argument("--quick", action="store_true", help="the smaller cases, three repetitions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    timing = (3 if options.quick else options.repeats, options.block)
    rows = [compare_fpgm(*case, timing) for case in FPGM_CASES[: 2 if options.quick else None]]
    rows += [compare_ranking(*case, timing) for case in RANKING_CASES[:: 2 if options.quick else 1]]
    show(rows)
    if options.out:
        about = {"python": platform.python_version(), "processor": platform.processor() or platform.machine()}
        about |= {name: version(name) for name in ("torch", "nni")}
        options.out.write_text(json.dumps({"about": about, "threads": 1, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
