"""What it costs in accuracy that every pruned layer keeps a multiple of eight channels, as runtimes and GPUs like it.

    python benchmarks/fresh_networks/split.py --data-dir DIR --out runs/fresh/images.npz
    python -m benchmarks.export.bench_multiples --images runs/fresh/images.npz --out runs/multiples

trains networks of the kinds of ``fresh_networks/`` on 5,000 images of Fashion-MNIST at 14 pixels (VGG-16 at 28,
padded), and shrinks each to the same shares of its MACs with any widths, with ``round_to=8`` and with the widths that
`shrink` keeps by default. 2,048 other images calibrate. Accuracy and changed answers are those of 5,000 test images,
which nothing else uses; differences are paired by network. A line per network goes to ``multiples.jsonl``; the same
command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks.budgets.bench_tolerance import IMAGES_TRAINED, NETWORKS, small_images, trained_net
from nni_topo import zoo
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

TITLES = {name: NETWORKS[name] for name in ("resnet20", "mobilenet_like", "vit_small", "lenet5_like")}
TITLES |= {"vgg16": "VGG-16, a quarter of the width"}
WIDTH, PADDED = 0.25, 32  # of the VGG-16, which takes no smaller images
SHARES = (0.5, 0.25)
DEFAULT = "default"
RULES: dict[Any, dict[str, Any]] = {None: {"round_to": 1}, 8: {"round_to": 8}, DEFAULT: {}}
SEEDS = (0, 1, 2, 3)
CALIBRATED, BATCH = 2048, 128
STEPS = ("reconstructed", "distilled")


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="Fashion-MNIST, split by fresh_networks/split.py")
    parser.add_argument("--nets", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "multiples.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    small, large = small_images(options.images), zoo.load_data(str(options.images), pad_to=PADDED)
    for seed in options.seeds:
        for name in options.nets:
            keys = [(name, seed, share, rule) for share in SHARES for rule in RULES]
            if all(key in done for key in keys):
                continue
            data, width = (large, WIDTH) if name == "vgg16" else (small, 1.0)
            net = trained_net(name, seed, data, options.out, width=width)
            others = data.train[IMAGES_TRAINED : IMAGES_TRAINED + CALIBRATED][0]
            images = Calibration(list(others.split(BATCH)))
            for key in keys:
                if key not in done:
                    append_record(path, {"key": key, **_made(net, images, data.test, *key[1:])})
                    print(key, flush=True)
    print(table(read_records(path)))


def _made(
    net: nn.Module, images: Calibration, tested: TensorDataset, seed: int, share: float, rule: int | str | None
) -> dict[str, Any]:
    """Make one network, and measure it on images that nothing else uses."""
    began = time.process_time()
    small = nni_topo.shrink(
        net,
        images,
        {"flops": share},
        **RULES[rule],
        evaluate=lambda found: zoo.evaluate(found, tested),  # for the report alone
        seed=seed,
        progress=False,
    )
    seconds = time.process_time() - began
    report: Any = small.report
    with evaluation_mode(net), evaluation_mode(small), torch.no_grad():
        shown: Tensor = tested[:][0]
        changed = int((net(shown).argmax(1) != small(shown).argmax(1)).sum())
    return {
        "left": report.budget.left,
        **{stage.network: stage.accuracy for stage in report.stages},
        "changed": changed / len(tested),
        "widths": {row.name: row.after for row in report.layers.rows},
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, share and rule: means over seeds, and what multiples lose more, paired by seed."""
    groups: dict[tuple[str, float, int | str | None], dict[int, dict[str, Any]]] = {}
    for record in records:
        name, seed, share, multiple = record["key"]
        groups.setdefault((name, share, multiple), {})[seed] = record
    rows = []
    for name, share, multiple in itertools.product(TITLES, SHARES, RULES):
        found, free = groups.get((name, share, multiple), {}), groups.get((name, share, None), {})
        if not found:
            continue
        told = {None: "any", DEFAULT: "by default"}.get(multiple, f"multiples of {multiple}")
        cells = [TITLES[name], f"{100 * share:g} %", told]
        cells.append(interval([100 * each["left"] for each in found.values()]).show())
        for step in STEPS:
            lost = [100 * (each["unpruned"] - _after(each, step)) for each in found.values()]
            cells.append(interval(lost).show())
        cells.append(interval([100 * each["changed"] for each in found.values()]).show())
        if multiple is None:
            rows.append([*cells, "", ""])
            continue
        more = [100 * (_after(free[seed], STEPS[-1]) - _after(found[seed], STEPS[-1])) for seed in found]
        changed = [100 * (found[seed]["changed"] - free[seed]["changed"]) for seed in found]
        rows.append([*cells, interval(more).show(sign=True), interval(changed).show(sign=True)])
    head = ["network", "MACs asked", "channels", "MACs kept %"]
    head += [f"points lost, {step}" for step in STEPS]
    head += ["answers changed %", "multiples lose more points", "multiples change more answers %"]
    return markdown_table(head, rows, text_columns=3)


def _after(record: dict[str, Any], step: str) -> float:
    """Return the accuracy after a step; where distillation was discarded, that after weight reconstruction."""
    return float(record.get(step, record[STEPS[0]]))


if __name__ == "__main__":
    main()
