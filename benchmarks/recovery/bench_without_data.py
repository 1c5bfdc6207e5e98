"""Without any inputs: images that `synthetic_images` makes of the network, beside real ones and L1 by weights alone.

    python -m benchmarks.recovery.bench_without_data --out runs/without_data

trains the small CNN of the zoo, which has batch norms, on the digits, and keeps a share of its MACs: by `shrink` on the
training images without labels, by `shrink` on as many synthetic images, and by L1, with no recovery and with
``compensate(method="merge")``, which takes weights alone. Accuracy is that of the test images. A line per network,
share and way goes to ``without_data.jsonl``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch

import nni_topo
from benchmarks.recovery import recovery_rules  # noqa: F401  (registers "merge")
from nni_topo import zoo
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table, show_accuracies

NET, SHARES, SEEDS, BATCH = "small_cnn", (0.25, 0.1), range(5), 128
REAL, SYNTHETIC = "`shrink`, real images", "`shrink`, synthetic images"
L1 = {None: "L1, no recovery", "merge": 'L1, `compensate(method="merge")`'}


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "without_data.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    data = zoo.load_data("digits")
    real = list(data.train.tensors[0].split(BATCH))
    for seed in options.seeds:
        if all((seed, share, way) in done for share in SHARES for way in (REAL, SYNTHETIC, *L1.values())):
            continue
        model = zoo.create_model(NET, num_classes=10, in_channels=1, image_size=8, seed=seed)
        zoo.train(model, data, zoo.default_recipe(NET, data.name), seed=seed, progress=False)
        began = time.process_time()
        made = nni_topo.synthetic_images(model, real[0][:2], count=len(data.train), seed=seed, progress=False)
        making = time.process_time() - began
        ways: list[tuple[str, Any, dict[str, Any]]] = [(REAL, real, {}), (SYNTHETIC, made, {})]
        for method, way in L1.items():
            ways.append((way, made, {"pruner": "l1", "compensate": method, "distill": False}))
        for share, (way, images, knobs) in itertools.product(SHARES, ways):
            if (seed, share, way) in done:
                continue
            began = time.process_time()
            small = nni_topo.shrink(model, images, {"flops": share}, **knobs, seed=seed, progress=False)
            seconds = time.process_time() - began + (making if way == SYNTHETIC else 0.0)
            record = {
                "key": (seed, share, way),
                "unpruned": zoo.evaluate(model, data.test),
                "accuracy": zoo.evaluate(small, data.test),
                "seconds": seconds,
                **provenance(),
            }
            append_record(path, record)
            print(record, flush=True)
    print(table(read_records(path)))


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each share and way, with means over the networks and 95 % intervals."""
    by_key = {tuple(record["key"]): record for record in records}
    rows = []
    for share, way in itertools.product(SHARES, (REAL, SYNTHETIC, *L1.values())):
        found = {seed: record for (seed, *rest), record in by_key.items() if rest == [share, way]}
        if not found:
            continue
        less = [
            100 * (by_key[seed, share, REAL]["accuracy"] - record["accuracy"])
            for seed, record in found.items()
            if (seed, share, REAL) in by_key
        ]
        rows.append(
            [
                f"{100 * share:g} %",
                way,
                str(len(found)),
                show_accuracies([record["unpruned"] for record in found.values()]),
                show_accuracies([record["accuracy"] for record in found.values()]),
                "" if way == REAL or not less else interval(less).show(1),
                f"{interval([record['seconds'] for record in found.values()]).mean:.0f}",
            ]
        )
    head = ["MACs kept", "way", "networks", "unpruned %", "accuracy %", "points less than on real images", "CPU s"]
    return markdown_table(head, rows, text_columns=2)


if __name__ == "__main__":
    main()
