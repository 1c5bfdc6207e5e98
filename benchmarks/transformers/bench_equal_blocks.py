"""What it costs a transformer that all its blocks keep the same widths, so that a config of Transformers describes it.

    python -m benchmarks.transformers.bench_equal_blocks --out runs/equal_blocks

trains a small ViT on the digits for each seed, and prunes heads and neurons to the same shares of the parameters:
equally in all blocks, and freely with one ratio or by error. Rows of narrower heads are of a version that could make
them. Calibration data are the training images without their labels. Accuracy and changed answers are those of the
validation and test images, which nothing else uses; differences are paired by network. A line per network goes to
``equal_blocks.jsonl``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks.budgets.bench_depth import trained_net
from nni_topo import zoo
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval

NET = "vit_small"
SHARES = (0.5, 0.3)
SEEDS = (0, 1, 2, 3)
WAYS: dict[str, dict[str, Any]] = {"equal": {"equal_blocks": True}, "uniform": {}, "error": {"allocation": "error"}}
"""By the word in records, the budget's settings."""
TITLES = {
    "equal": "equal in all blocks",
    "uniform": "free, one ratio",
    "error": "free, by error",
    "narrower": "free, one ratio, narrower heads",
}
LAYERS = [
    {"op_names_re": [r".*\.attention"], "granularity": "head"},
    {"op_names_re": [r".*\.fc1"]},
]
CALIBRATED, BATCH, STEPS = 1024, 128, 200


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "equal_blocks.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    data = zoo.load_data("digits")
    images = Calibration(list(data.train[:CALIBRATED][0].split(BATCH)))
    tested = TensorDataset(*(torch.cat([data.validation[:][part], data.test[:][part]]) for part in (0, 1)))
    for seed in options.seeds:
        keys = [(seed, share, way) for share in options.shares for way in WAYS]
        if all(key in done for key in keys):
            continue
        net = trained_net(NET, seed, data, options.out)
        for key in keys:
            if key not in done:
                append_record(path, {"key": key, **_made(net, images, tested, *key)})
                print(key, flush=True)
    print(table(read_records(path)))


def _made(
    net: nn.Module, images: Calibration, tested: TensorDataset, seed: int, share: float, way: str
) -> dict[str, Any]:
    """Make one network, and measure it on images that nothing else uses."""
    began = time.process_time()
    small = nni_topo.shrink(
        net,
        images,
        {"params": share, **WAYS[way]},
        layers=LAYERS,
        distill={"steps": STEPS},
        evaluate=lambda found: zoo.evaluate(found, tested),  # for the report alone
        round_to=1,
        seed=seed,
        progress=False,
    )
    seconds = time.process_time() - began
    report: Any = small.report
    accuracies = {stage.network: stage.accuracy for stage in report.stages}
    with evaluation_mode(net), evaluation_mode(small), torch.no_grad():
        changed = int((net(tested[:][0]).argmax(1) != small(tested[:][0]).argmax(1)).sum())
    widths = {row.name: row.after for row in report.layers.rows}
    return {
        "left": report.budget.left,
        **accuracies,
        "changed": changed / len(tested),
        "heads": [widths[f"blocks.{block}.attention.q_proj"] for block in range(len(net.blocks))],
        "neurons": [widths[f"blocks.{block}.mlp.fc1"] for block in range(len(net.blocks))],
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each share and way: means over networks, and what equal blocks lose more, paired by network."""
    groups: dict[tuple[float, str], dict[int, dict[str, Any]]] = {}
    for record in records:
        seed, share, way = record["key"]
        groups.setdefault((share, way), {})[seed] = record
    rows = []
    for (share, way), found in groups.items():
        equal = groups[share, "equal"]
        seeds = [seed for seed in found if seed in equal]
        left, solved, distilled, changed = (
            interval([100 * value for value in values]).show()
            for values in (
                [each["left"] for each in found.values()],
                [each["unpruned"] - each["reconstructed"] for each in found.values()],
                [each["unpruned"] - each["distilled"] for each in found.values()],
                [each["changed"] for each in found.values()],
            )
        )
        cells = [f"{100 * share:g} %", TITLES[way], left, solved, distilled, changed]
        if way == "equal":
            cells += ["", "", ""]
        else:
            for step in ("reconstructed", "distilled"):
                more = [100 * (found[seed][step] - equal[seed][step]) for seed in seeds]
                cells.append(interval(more).show(sign=True))
            changed_more = [100 * (equal[seed]["changed"] - found[seed]["changed"]) for seed in seeds]
            cells.append(interval(changed_more).show(sign=True))
        rows.append(cells)
    head = ["parameters asked", "widths", "parameters kept %", "points lost, reconstructed", "points lost, distilled"]
    head += ["answers changed %", "equal blocks lose more points, reconstructed"]
    head += ["equal blocks lose more points, distilled", "equal blocks change more answers %"]
    return markdown_table(head, rows, text_columns=2)


if __name__ == "__main__":
    main()
