"""Whether a tolerance holds on images that nothing has used, and what a search, and a family of sizes, costs.

    python -m benchmarks.budgets.bench_tolerance --out runs/tolerance

trains small networks on the digits, makes each as small as a tolerance allows, and counts the answers that change on
the validation and test images, which neither the training nor the search has used. The calibration images are those
that the network was trained on ("trained on"), or others ("new"): then 400 images train it and 902 others calibrate.
Beside the search's CPU seconds stand those of one `shrink` to the share that it found. The second table compares
`frontier` with a `shrink` to each of its shares. A line per run goes to ``tolerance.jsonl``; the same command goes on
where it was stopped. ``--data-dir`` isn't needed: the digits are scikit-learn's.

    python -m benchmarks.budgets.bench_tolerance --images FILE --out runs/tolerance

does the same on five kinds of networks and Fashion-MNIST at 14 pixels, FILE being made by
``benchmarks/fresh_networks/split.py``: 5,000 images train a network, 4,096 others calibrate it, and changed answers are
counted on 5,000 test images. Beside each tolerance stands what Torch-Pruning reaches by hand: networks of ever smaller
uniform ratios, batch norms recalibrated or distilled, until one fails on the images that confirm. The lines go to
``tolerance_by_network.jsonl``.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks import recovery_nets
from nni_topo import zoo
from nni_topo.maths.limits import limit_of_share
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.runs.frontier import SHARES
from nni_topo.runs.tolerance import PARTS
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table
from nni_topo.zoo.labelled import subset

MODEL = "small_cnn"
TOLERANCES = (0.01, 0.02, 0.05)
SEEDS = (0, 1, 2)
KINDS = ("trained on", "new")
TRAINED, CALIBRATED, BATCH = 400, 1024, 128

NETWORKS = {
    "lenet5_like": "LeNet-5-like",
    "resnet20": "ResNet-20",
    "mobilenet_like": "MobileNetV2, small",
    "regnet_like": "RegNetX, small",
    "vit_small": "ViT, small",
}
"""By the name of their factory in the zoo or in recovery_nets.py."""
FIVE_TOLERANCES = (0.005, 0.01, 0.02, 0.05)
SIZE, IMAGES_TRAINED, IMAGES_CALIBRATED = 14, 5000, 4096
RATIOS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.7)
"""Of the channels of every layer that Torch-Pruning removes, one after the other."""
DISTILLED_RATIOS = (0.1, 0.3, 0.5)
RECALIBRATED, DISTILLED = "batch norms recalibrated", "distilled"

_Result = TypeVar("_Result")


def main() -> None:
    """Parse the command line, run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--images", type=Path, metavar="FILE", help="Fashion-MNIST, split by fresh_networks/split.py")
    parser.add_argument("--nets", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.images is not None:
        five_kinds(options.images, options.out, options.nets, options.seeds)
        return
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
                    made = (
                        _frontier(net, images)
                        if key[0] == "frontier"
                        else _within(net, images, unused, key[1], alone=True)
                    )
                    append_record(path, {"key": key, **made})
    records = read_records(path)
    print(table(records), table_of_families(records), sep="\n\n")


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


def _within(net: nn.Module, images: list[Tensor], unused: Tensor, tolerance: float, alone: bool) -> dict[str, Any]:
    """Return what a tolerance finds, with the seconds of one `shrink` to that share if asked for."""
    small, seconds = _timed(lambda: nni_topo.shrink(net, images, tolerance=tolerance, progress=False))
    report: Any = small.report
    found = report.tolerance
    changed = _changed(net, small, unused)
    compared: dict[str, float] = {}
    if alone:
        budget = {"flops": min(found.left, 0.95)}
        _, compared["alone"] = _timed(lambda: nni_topo.shrink(net, images, budget, progress=False))
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
        **compared,
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


def five_kinds(images: Path, out: Path, nets: list[str], seeds: list[int]) -> None:
    """Run what is missing of the second command, one seed of all networks after the other, and print the table."""
    path = out / "tolerance_by_network.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    data = small_images(images)
    for seed in seeds:
        for name in nets:
            keys: list[tuple[str, Any, int]] = [(name, way, seed) for way in (RECALIBRATED, DISTILLED)]
            keys = [(name, tolerance, seed) for tolerance in FIVE_TOLERANCES] + keys
            if all(key in done for key in keys):
                continue
            net = trained_net(name, seed, data, out)
            others = data.train[IMAGES_TRAINED : IMAGES_TRAINED + IMAGES_CALIBRATED][0]
            calibration, unused = list(others.split(BATCH)), data.test[:][0]
            for key in keys:
                if key in done:
                    continue
                way = key[1]
                is_ours = isinstance(way, float)
                made = (
                    _within(net, calibration, unused, way, alone=False)
                    if is_ours
                    else by_hand(net, calibration, unused, way)
                )
                append_record(path, {"key": key, **made})
                print(key, flush=True)
    print(table_by_network(read_records(path)))


def small_images(path: Path) -> zoo.DataBundle:
    """Return Fashion-MNIST with means of four pixels for each one."""
    data = zoo.load_data(str(path))
    parts = {}
    for part in ("train", "validation", "test"):
        images, labels = getattr(data, part)[:]
        parts[part] = TensorDataset(functional.avg_pool2d(images, 2), labels)
    return replace(data, **parts, image_size=SIZE)


def trained_net(name: str, seed: int, data: zoo.DataBundle, out: Path, *, width: float = 1.0) -> nn.Module:
    """Return a network, trained on the first images for ten epochs, or read from the folder if it was before."""
    torch.manual_seed(seed)
    if hasattr(recovery_nets, name):
        net = getattr(recovery_nets, name)(data.num_classes, data.in_channels)
    else:
        sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": data.image_size}
        net = zoo.create_model(name, **sizes, width=width, seed=seed)
    path = out / f"{name}-{seed}.pt"
    if path.exists():
        net.load_state_dict(torch.load(path, weights_only=True))
    else:
        known = name if name in zoo.list_models() else "resnet20"
        recipe = replace(zoo.default_recipe(known, "fashion-mnist"), epochs=10)
        own = replace(data, train=subset(data.train, slice(IMAGES_TRAINED)))
        zoo.train(net, own, recipe, seed=seed, device=torch.device("cpu"), progress=False)
        torch.save(net.state_dict(), path)
    return net.eval()


def by_hand(net: nn.Module, images: list[Tensor], unused: Tensor, way: str) -> dict[str, Any]:
    """Prune by Torch-Pruning at ever higher ratios, and count what changes on images that confirm and on unused ones.

    The images have the parts that `shrink` gives them.
    """
    began = time.process_time()
    learned, judges, confirming = Calibration(images).in_parts(PARTS)
    assert learned is not None
    assert confirming is not None
    looks = []
    for ratio in RATIOS if way == RECALIBRATED else DISTILLED_RATIOS:
        small = torch_pruned(net, images[0][:2], ratio)
        if way == DISTILLED:
            small = nni_topo.distill(small, net, learned, held_out=judges, progress=False)
        elif any(isinstance(module, nn.BatchNorm2d) for module in small.modules()):
            nni_topo.recalibrate_batch_norm(small, learned)
        confirmed = torch.cat(list(confirming))
        looks.append(
            {
                "ratio": ratio,
                "left": zoo.count_macs(small, images[0][:1]) / zoo.count_macs(net, images[0][:1]),
                "confirmed": _changed(net, small, confirmed),
                "confirmed_on": len(confirmed),
                "changed": _changed(net, small, unused),
                "unused": len(unused),
            }
        )
    return {"looks": looks, "seconds": time.process_time() - began}


def torch_pruned(net: nn.Module, example: Tensor, ratio: float) -> nn.Module:
    """Return a copy without a share of the channels and heads of every layer but the last one, by group norms."""
    import torch_pruning

    small = copy.deepcopy(net)
    last = [module for module in small.modules() if isinstance(module, nn.Linear)][-1]
    heads = {}
    for module in small.modules():
        if hasattr(module, "q_proj"):
            heads |= dict.fromkeys((module.q_proj, module.k_proj, module.v_proj), module.num_heads)
    torch_pruning.pruner.BasePruner(
        small,
        example,
        torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        num_heads=heads,
        prune_num_heads=bool(heads),
        prune_head_dims=not heads,
        head_pruning_ratio=ratio,
        ignored_layers=[last],
    ).step()
    return small.eval()


def _changed(net: nn.Module, small: nn.Module, images: Tensor) -> int:
    """Return of how many images the answer differs."""
    with torch.no_grad():
        return int((net(images).argmax(1) != small(images).argmax(1)).sum())


def reached(looks: list[dict[str, Any]], tolerance: float) -> dict[str, Any] | None:
    """Return the last look before the first one whose upper limit exceeds the tolerance, None if that is the first."""
    last = None
    for look in looks:
        if limit_of_share(look["confirmed"] / look["confirmed_on"], look["confirmed_on"]) > tolerance:
            break
        last = look
    return last


def table_by_network(records: list[dict[str, Any]]) -> str:
    """Return a row for each network and tolerance, with what `shrink` found and what Torch-Pruning reaches by hand."""
    found = {tuple(record["key"]): record for record in records}
    rows = []
    for name, title in NETWORKS.items():
        for tolerance in FIVE_TOLERANCES:
            runs = {seed: found[key] for key in found if key[:2] == (name, tolerance) for seed in (key[2],)}
            if not runs:
                continue
            changed = [run["changed"] / run["unused"] for run in runs.values()]
            row = [title, f"{100 * tolerance:g} %", str(len(runs))]
            row.append(_range([100 * run["left"] for run in runs.values()]))
            row.append(f"{sum(not run['is_met'] for run in runs.values())}")
            row.append(f"{100 * float(np.mean(changed)):.2f} %, {100 * max(changed):.2f} %")
            row.append(f"{sum(share > tolerance for share in changed)}")
            for way in (RECALIBRATED, DISTILLED):
                lefts = []
                for seed in runs:
                    if (name, way, seed) in found:
                        look = reached(found[name, way, seed]["looks"], tolerance)
                        lefts.append(100 * look["left"] if look else 100.0)
                row.append(_range(lefts) if lefts else "not run")
            rows.append(row)
    head = ["network", "tolerance", "seeds", "MACs kept %", "none found", "changed on unused images: mean, largest"]
    head += ["runs above the tolerance", "Torch-Pruning, batch norms recalibrated: MACs kept %"]
    return markdown_table([*head, "Torch-Pruning, distilled: MACs kept %"], rows)


def _range(values: list[float]) -> str:
    """Return a mean, and of several values the smallest and largest."""
    mean = float(np.mean(values))
    return f"{mean:.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


def _timed(work: Callable[[], _Result]) -> tuple[_Result, float]:
    """Return what a function returns, and its CPU seconds."""
    began = time.process_time()
    return work(), time.process_time() - began


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each kind of images, tolerance and seed."""
    rows = []
    for (kind, tolerance, seed), record in sorted((tuple(record["key"]), record) for record in records):
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
    return markdown_table([*head, "networks tried + distilled", "CPU s", "of one `shrink`"], rows)


def table_of_families(records: list[dict[str, Any]]) -> str:
    """Return a row for each run of `frontier`."""
    rows = [
        [
            str(record["key"][2]),
            f"{record['seconds']:.1f}",
            f"{record['seconds'] / max(record['alone']):.2f}",
            f"{record['seconds'] / sum(record['alone']):.2f}",
            ", ".join(f"{each:.3g}" for each in record["distances"]),
            ", ".join(f"{each:.3g}" for each in record["distances_alone"]),
            ", ".join(f"{each:g}" for each in record["starts"]),
        ]
        for record in records
        if record["key"][0] == "frontier"
    ]
    head = ["seed", "CPU s", "of the costliest `shrink`", "of all four", "distances", "distances one by one", "start"]
    return markdown_table(head, rows)


if __name__ == "__main__":
    main()
