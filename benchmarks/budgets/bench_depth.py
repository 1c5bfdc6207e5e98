"""Blocks, channels or both: what networks lose at the same MACs, and what time they take.

    python benchmarks/budgets/bench_depth.py --out runs/depth

trains small networks on the digits, and removes channels alone (`shrink`), blocks alone, blocks alone in a random
order, or lets both compete (`shrink(..., depth=True)`), at the same shares of the MACs. Calibration data are the
training images without their labels. ``--distill`` 0 leaves out distillation. Blocks alone leave about the share that
was asked for, for they can't be divided. A line per network goes to ``depth.jsonl``; the same command goes on where
it was stopped. With ``--data fashion-mnist --data-dir DIR`` the networks are trained on 5,000 of its images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_topo
from nni_topo import zoo
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.runs.depth import DepthPath, cost_saved, removable_blocks
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

NETS = ("vit_small", "resnet20")
SHARES = (0.5, 0.25)
SEEDS = (0, 1, 2)
DISTILLED = (0, 200)
WAYS = {"channels": "channels", "blocks": "blocks", "random": "blocks in a random order", "both": "blocks and channels"}
TRAINED, CALIBRATED, TESTED, BATCH, TIMED = 5000, 1024, 2000, 128, 16


class RandomPath(DepthPath):
    """Removes blocks in a random order; the layers before them make up for them as ever."""

    generator = torch.Generator()

    def choose(self, candidates: Any, scores: Any) -> int:
        """Return the number of any block."""
        return int(torch.randint(len(scores), (1,), generator=self.generator))


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--distill", type=int, nargs="+", default=DISTILLED, help="steps of distillation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "depth.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    data = zoo.load_data(options.data, options.data_dir, limit=TRAINED if options.data_dir else None)
    for name in options.nets:
        for seed in options.seeds:
            keys = []
            for steps in options.distill:
                keys += [(name, seed, share, way, steps) for share in options.shares for way in WAYS]
            if all(key in done for key in keys):
                continue
            net = trained_net(name, seed, data, options.out)
            images = Calibration(list(data.train[:CALIBRATED][0].split(BATCH)))
            unused = [torch.cat([data.validation[:][part], data.test[:][part]])[:TESTED] for part in (0, 1)]
            tested = TensorDataset(*unused)
            for key in keys:
                if key not in done:
                    append_record(path, {"key": key, **_made(net, images, tested, *key[2:], seed)})
                    print(key, flush=True)
    print(table(read_records(path)))


def trained_net(name: str, seed: int, data: zoo.DataBundle, out: Path) -> nn.Module:
    """Return a network of the zoo, trained by its recipe, or read from the folder if it was trained before."""
    sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
    net, path = zoo.create_model(name, **sizes, seed=seed), out / f"{name}-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, net)
    else:
        recipe = zoo.default_recipe(name, data.name)
        zoo.train(net, data, recipe, seed=seed, device=torch.device("cpu"), progress=False)
        zoo.save_checkpoint(path, net, {})
    return net.eval()


def _made(
    net: nn.Module, images: Calibration, tested: Any, share: float, way: str, steps: int, seed: int
) -> dict[str, Any]:
    """Make one network, and measure it on test images, which nothing else uses."""
    began = time.process_time()
    distill: Any = {"steps": steps} if steps else False
    example: Tensor = images[0][:2]
    removed: list[str] = []
    if way in ("channels", "both"):
        small = nni_topo.shrink(net, images, {"flops": share}, depth=way == "both", distill=distill, progress=False)
        report: Any = small.report
        removed = [each.name for each in report.depth.removed] if report.depth else []
    else:
        learned, judges = images.split()
        assert judges is not None
        removable = removable_blocks(net, images)
        kind = RandomPath if way == "random" else DepthPath
        RandomPath.generator.manual_seed(seed)
        path = kind(net, learned, judges, None, removable, cost_saved(net, example, "flops"))
        state = path.states[path.nearest(share)]
        small, removed = state.net, [each.name for each in state.removed]
        if steps:
            small = nni_topo.distill(small, net, learned, steps=steps, held_out=judges, progress=False)
    seconds = time.process_time() - began
    with evaluation_mode(net), evaluation_mode(small), torch.no_grad():
        changed = int((net(tested[:][0]).argmax(1) != small(tested[:][0]).argmax(1)).sum())
    ((taken, _),) = time_shares([small.eval()], net, images[0][:TIMED], seconds=2.0)
    return {
        "left": zoo.count_macs(small, example) / zoo.count_macs(net, example),
        "time": taken,
        "unpruned": zoo.evaluate(net, tested),
        "accuracy": zoo.evaluate(small, tested),
        "changed": changed / len(tested),
        "removed": removed,
        "seconds": seconds,
    }


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, budget and way, with means over seeds and the largest deviations from them."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        name, _, share, way, steps = record["key"]
        groups.setdefault((name, steps, share, way), []).append(record)
    rows = []
    for (name, steps, share, way), found in groups.items():
        channels = groups.get((name, steps, share, "channels"), [])
        costs = [record["seconds"] for record in found]
        of_one = [record["seconds"] for record in channels]
        is_shrink = way == "both" and len(costs) == len(of_one)
        rows.append(
            [
                name + (f", distilled {steps} steps" if steps else ""),
                f"{100 * share:g} %",
                WAYS[way],
                str(len(found)),
                _spread([100 * record["left"] for record in found]),
                _spread([100 * record["time"] for record in found]),
                _spread([100 * (record["unpruned"] - record["accuracy"]) for record in found]),
                _spread([100 * record["changed"] for record in found]),
                _spread([float(len(record["removed"])) for record in found]),
                f"{sum(costs) / sum(of_one):.1f}" if is_shrink else "",
            ]
        )
    head = ["network", "MACs asked", "what is removed", "seeds", "MACs kept %", "time kept %", "points lost"]
    return markdown_table([*head, "answers changed %", "blocks removed", "CPU time of one `shrink`"], rows)


def _spread(values: list[float]) -> str:
    """Return a mean, and of several seeds the largest deviation from it."""
    mean = sum(values) / len(values)
    return f"{mean:.1f}" + (f" ± {max(abs(value - mean) for value in values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
