"""Whether a tolerance holds on images that nothing has used, and what a search, and a family of sizes, costs.

    python benchmarks/bench_tolerance.py --out runs/tolerance

trains small networks on the digits, makes each as small as a tolerance allows, and counts the answers that change on
the validation and test images, which neither the training nor the search has used. The calibration images are those
that the network was trained on ("trained on"), or others ("new"): then 400 images train it and 902 others calibrate.
Beside the search's CPU seconds stand those of one `shrink` to the share that it found. The second table compares
`frontier` with a `shrink` to each of its shares. A line per run goes to ``tolerance.jsonl``; the same command goes on
where it was stopped. ``--data-dir`` isn't needed: the digits are scikit-learn's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.runs.frontier import SHARES
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table
from nni_topo.zoo.labelled import subset

MODEL = "small_cnn"
TOLERANCES = (0.01, 0.02, 0.05)
SEEDS = (0, 1, 2)
KINDS = ("trained on", "new")
TRAINED, CALIBRATED, BATCH = 400, 1024, 128

_Result = TypeVar("_Result")


def main() -> None:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "tolerance.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for kind in KINDS:
        for seed in options.seeds:
            keys: list[tuple[str, Any, int]] = [(kind, tolerance, seed) for tolerance in TOLERANCES]
            keys += [("frontier", 0.0, seed)] * (kind == "new")
            if all(key in done for key in keys):
                continue
            net, images, unused = _trained(kind, seed)
            for key in keys:
                if key not in done:
                    made = _frontier(net, images) if key[0] == "frontier" else _within(net, images, unused, key[1])
                    append_record(path, {"key": key, **made})
    _print(read_records(path))


def _trained(kind: str, seed: int) -> tuple[nn.Module, list[Tensor], Tensor]:
    """Train a network; return it with its calibration images, and images that nothing else uses."""
    data = zoo.load_data("digits")
    calibration = data.train[:CALIBRATED][0]
    own = data
    if kind == "new":
        own, calibration = replace(data, train=subset(data.train, slice(TRAINED))), data.train[TRAINED:][0]
    net = zoo.create_model(MODEL, num_classes=10, in_channels=1, image_size=8, seed=seed)
    recipe = zoo.default_recipe(MODEL, "digits")
    zoo.train(net, own, recipe, seed=seed, device=torch.device("cpu"), progress=False)
    unused = torch.cat([data.validation[:][0], data.test[:][0]])
    return net.eval(), list(calibration.split(BATCH)), unused


def _within(net: nn.Module, images: list[Tensor], unused: Tensor, tolerance: float) -> dict[str, Any]:
    small, seconds = _timed(lambda: nni_topo.shrink(net, images, tolerance=tolerance, progress=False))
    report: Any = small.report
    found = report.tolerance
    with torch.no_grad():
        changed = int((net(unused).argmax(1) != small(unused).argmax(1)).sum())
    _, alone = _timed(lambda: nni_topo.shrink(net, images, {"flops": min(found.left, 0.95)}, progress=False))
    return {
        "left": found.left,
        "is_met": found.is_met,
        "is_distilled": report.stages[-1].network == "distilled",
        "difference": found.difference,
        "limit": found.limit if found.is_met else 0.0,
        "confirmed_on": found.held_out,
        "changed": changed,
        "unused": len(unused),
        "tried": sum(not each.is_distilled for each in found.candidates),
        "distilled": sum(each.is_distilled for each in found.candidates),
        "seconds": seconds,
        "alone": alone,
    }


def _frontier(net: nn.Module, images: list[Tensor]) -> dict[str, Any]:
    alone, distances = [], []
    for share in SHARES:

        def single(share: float = share) -> nn.Module:
            return nni_topo.shrink(net, images, {"flops": share}, progress=False)

        made, seconds = _timed(single)
        report: Any = made.report
        alone.append(seconds)
        distances.append(report.stages[-1].distance)
    found, seconds = _timed(lambda: nni_topo.frontier(net, images, progress=False))
    return {
        "seconds": seconds,
        "alone": alone,
        "distances": [point.distance for point in found.points[1:]],
        "distances_alone": distances,
        "starts": [point.start for point in found.points[1:]],
    }


def _timed(work: Callable[[], _Result]) -> tuple[_Result, float]:
    """Return what a function returns, and its CPU seconds."""
    began = time.process_time()
    return work(), time.process_time() - began


def _print(records: list[dict[str, Any]]) -> None:
    """Print the tables."""
    found = {tuple(record["key"]): record for record in records}
    rows = []
    for (kind, tolerance, seed), record in sorted(found.items()):
        if kind == "frontier":
            continue
        rows.append(
            [
                kind,
                f"{100 * tolerance:g} %",
                str(seed),
                f"{100 * record['left']:.1f} %" + " (distilled)" * record["is_distilled"],
                f"{100 * record['limit']:.2f} % on {record['confirmed_on']}" if record["is_met"] else "not met",
                f"{100 * record['changed'] / record['unused']:.2f} % ({record['changed']} of {record['unused']})",
                f"{record['tried']} + {record['distilled']}",
                f"{record['seconds']:.1f}",
                f"{record['seconds'] / record['alone']:.2f}",
            ]
        )
    head = ["calibration images", "tolerance", "seed", "MACs kept", "upper limit", "changed on unused images"]
    print(markdown_table([*head, "networks tried + distilled", "CPU s", "of one `shrink`"], rows))
    rows = []
    for (kind, _, seed), record in sorted(found.items()):
        if kind == "frontier":
            rows.append(
                [
                    str(seed),
                    f"{record['seconds']:.1f}",
                    f"{record['seconds'] / max(record['alone']):.2f}",
                    f"{record['seconds'] / sum(record['alone']):.2f}",
                    ", ".join(f"{each:.3g}" for each in record["distances"]),
                    ", ".join(f"{each:.3g}" for each in record["distances_alone"]),
                    ", ".join(f"{each:g}" for each in record["starts"]),
                ]
            )
    head = ["seed", "CPU s", "of the costliest `shrink`", "of all four", "distances", "distances one by one", "start"]
    print(markdown_table(head, rows))


if __name__ == "__main__":
    main()
