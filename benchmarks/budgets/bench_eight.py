"""A share of the time: what networks lose by who selects the channels, with and without blocks, and how they recover.

    python -m benchmarks.budgets.bench_eight --data-dir DIR --out runs/eight
    python -m benchmarks.budgets.bench_eight --data-dir DIR --out runs/eight --net resnet56 --share 0.1 --seeds 0 1 2

trains ResNet-20 on 5,000 images of Fashion-MNIST and makes it take an eighth of its time, measured in PyTorch on one
thread: by `shrink`, with channels selected by least squares or by L1, with and without ``depth=True``, and by
Torch-Pruning: Taylor importance from labels, ranked within each layer or globally among isomorphic layers, a hundredth
of the channels at a time until the network is fast enough. ``--net`` and ``--share`` take another network and share.
Calibration data are 1,024 of the training images without labels, or ``--images``; Taylor importance also gets labels.

All networks then recover by weight reconstruction and distillation, without labels. With ``--recoveries labels`` those
of `shrink` are fine-tuned instead, after weight reconstruction, with the labels of all training images, for the CPU
time that distillation takes; Torch-Pruning's own weights for the time of reconstruction and distillation. Accuracy is
that of the test images; times are those of onnxruntime on one thread, the least of 50 runs of each network in turns,
for one image and for 16. A line per network goes to ``eight.jsonl``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks.budgets.bench_depth import BATCH, CALIBRATED, TRAINED, trained_net
from nni_topo import zoo
from nni_topo.network.cost.measure import time_shares
from nni_topo.network.layers.kinds import spread
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.runs.provenance import provenance
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

NET, SHARE, SEEDS, RUNS, BATCHES = "resnet20", 1 / 8, (0, 1, 2, 3, 4), 50, (1, 16)
OURS, TAYLOR = "least squares", "Torch-Pruning, Taylor"
GLOBAL_TAYLOR = "Torch-Pruning, Taylor, global and isomorphic"
SELECTIONS = {
    "channels": ("channels", OURS),
    "both": ("blocks and channels", OURS),
    "channels, l1": ("channels", "L1"),
    "both, l1": ("blocks and channels", "L1"),
    "channels, taylor": ("channels", TAYLOR),
    "channels, global taylor": ("channels", GLOBAL_TAYLOR),
}
DISTILLED, LABELS, BEFORE = "distilled", "labels", ", before"
RECOVERIES = {DISTILLED: "reconstruction, distillation", LABELS: "reconstruction, fine-tuned with labels"}
WAYS: dict[str, tuple[str, str, str]] = {}
"""By the last part of a key: what is removed, who selects channels, and the recovery."""
for _name, (_removed, _by) in SELECTIONS.items():
    WAYS[_name] = _removed, _by, RECOVERIES[DISTILLED]
    # Torch-Pruning's networks keep the weights that it leaves.
    WAYS[f"{_name}, {LABELS}"] = _removed, _by, "fine-tuned with labels" if "taylor" in _name else RECOVERIES[LABELS]
for _name in ("channels", "both"):  # recorded until 86c28fdd, when a budget left layers fewer channels
    WAYS[_name + BEFORE] = *SELECTIONS[_name], f"{RECOVERIES[DISTILLED]}, before"
TAYLOR_STEPS, TAYLOR_IMAGES, NEAR = 100, 256, 0.08
"""Steps of Torch-Pruning, the images that each one's gradients are of, and the share of MACs from which time counts."""
Made = tuple[nn.Module, list[str], float]  # a network, the blocks that were removed, CPU seconds


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--net", default=NET, help="of the zoo")
    parser.add_argument("--share", type=float, default=SHARE, help="of the time")
    parser.add_argument("--images", type=int, default=CALIBRATED, help="for calibration, without labels")
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS), metavar="SELECTION")
    parser.add_argument("--recoveries", nargs="+", choices=RECOVERIES, default=list(RECOVERIES))
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "eight.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    data = zoo.load_data("fashion-mnist", options.data_dir, limit=TRAINED)
    for seed in options.seeds:
        for selection in options.selections:
            keys = {}
            for recovery in options.recoveries:
                way = selection if recovery == DISTILLED else f"{selection}, {recovery}"
                keys[recovery] = (options.net, options.share, options.images, seed, way)
            if all(key in done for key in keys.values()):
                continue
            net = trained_net(options.net, seed, data, options.out)
            run = Run(net, options.net, data, options.images, options.share, seed)
            for recovery, (small, removed, seconds) in run.networks(selection, LABELS in keys):
                if recovery not in keys or keys[recovery] in done:
                    continue
                record = {
                    "key": keys[recovery],
                    "seconds": seconds,
                    "left": zoo.count_macs(small, run.images[0][:1]) / zoo.count_macs(net, run.images[0][:1]),
                    "unpruned": zoo.evaluate(net, data.test),
                    "accuracy": zoo.evaluate(small, data.test),
                    "removed": removed,
                    "faster": [times_faster(net, small, run.images[0][:count], options.out) for count in BATCHES],
                    **provenance(),
                }
                append_record(path, record)
                print(record, flush=True)
    print(table(read_records(path)))


class Run:
    """A trained network and its images, from which smaller networks are made."""

    def __init__(self, net: nn.Module, name: str, data: zoo.DataBundle, count: int, share: float, seed: int) -> None:
        self.net, self.data, self.share, self.seed = net, data, share, seed
        self.recipe = zoo.default_recipe(name, data.name).for_retraining(1)
        self.labelled = data.train[:count]
        self.images = list(self.labelled[0].split(BATCH))
        self.learned, self.judges = Calibration(self.images).split()

    def networks(self, selection: str, with_labels: bool) -> Iterator[tuple[str, Made]]:
        """Yield a selection's networks after distillation and after fine-tuning, which takes as long."""
        if selection.endswith("taylor"):
            plain, masks, seconds = self.taylor_pruned(is_global="global" in selection)
            start, spent = self.reconstructed(masks)
            removed = list[str]()
        else:
            start, removed, seconds = self.shrunk(selection)
            plain, spent = start, 0.0
        began = time.process_time()
        found = nni_topo.distillation(
            start, self.net, self.learned, held_out=self.judges, seed=self.seed, progress=False
        )
        spent += time.process_time() - began
        yield DISTILLED, (found.model, removed, seconds + spent)
        if with_labels:
            tuned, took = self.fine_tuned(plain, spent)
            yield LABELS, (tuned, removed, seconds + took)

    def shrunk(self, selection: str) -> Made:
        """Remove channels, or blocks and channels, and reconstruct the weights."""
        began = time.process_time()
        small = nni_topo.shrink(
            self.net,
            self.images,
            {"latency": self.share},
            pruner="l1" if selection.endswith("l1") else "reconstruction",
            depth=selection.startswith("both"),
            distill=False,
            seed=self.seed,
            progress=False,
        )
        report: Any = small.report
        removed = [each.name for each in report.depth.removed] if report.depth else []
        return small, removed, time.process_time() - began

    def taylor_pruned(self, is_global: bool) -> tuple[nn.Module, dict[str, Any], float]:
        """Prune by Torch-Pruning until the time is reached; return the network, masks, and CPU seconds.

        Gradients are recomputed before every step, of other images in turns, as the network is then.
        """
        import torch_pruning

        began = time.process_time()
        small = detached_copy(self.net)
        pruner = torch_pruning.pruner.BasePruner(
            small,
            self.images[0][:2],
            importance=torch_pruning.importance.GroupTaylorImportance(),
            pruning_ratio=1.0,
            iterative_steps=TAYLOR_STEPS,
            global_pruning=is_global,
            isomorphic=is_global,
            ignored_layers=[each for each in small.modules() if isinstance(each, nn.Linear)],  # the classes
        )
        layers = {module: name for name, module in small.named_modules() if isinstance(module, nn.Conv2d)}
        left = {name: torch.arange(module.out_channels) for module, name in layers.items()}
        macs = zoo.count_macs(self.net, self.images[0][:1])
        images, labels = self.labelled
        for step in range(TAYLOR_STEPS - 1):
            chosen = torch.arange(step * TAYLOR_IMAGES, (step + 1) * TAYLOR_IMAGES) % len(images)
            small.zero_grad()
            nn.functional.cross_entropy(small(images[chosen]), labels[chosen]).backward()
            for group in pruner.step(interactive=True):
                for dependency, channels in group:
                    name = layers.get(dependency.target.module)
                    if name is not None and pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                        stays = torch.ones(len(left[name]), dtype=torch.bool)
                        stays[channels] = False
                        left[name] = left[name][stays]
                group.prune()
            if zoo.count_macs(small, self.images[0][:1]) < NEAR * macs:
                ((taken, _),) = time_shares([small], self.net, self.images[0], self.share)
                if taken <= self.share:
                    break
        masks = {}
        for name, channels in left.items():
            module: Any = self.net.get_submodule(name)
            kept = torch.zeros(module.out_channels)
            kept[channels] = 1.0
            masks[name] = {"weight": spread(module, kept)}
        small.zero_grad()
        return small, masks, time.process_time() - began

    def reconstructed(self, masks: dict[str, Any]) -> tuple[nn.Module, float]:
        """Reconstruct the weights behind masks, and remove the channels; return the network and the CPU seconds."""
        began = time.process_time()
        solved = nni_topo.compensate(self.net, masks, self.learned, progress=False)
        return nni_topo.to_dense(solved, self.images[0][:2], masks), time.process_time() - began

    def fine_tuned(self, start: nn.Module, seconds: float) -> tuple[nn.Module, float]:
        """Fine-tune a copy of a network with labels for about so many CPU seconds; return it with those it took."""
        data = replace(self.data, validation=TensorDataset(*self.data.validation[:0]))

        def trained(epochs: int) -> tuple[nn.Module, float]:
            net, began = detached_copy(start), time.process_time()
            zoo.train(net, data, replace(self.recipe, epochs=epochs), seed=self.seed, progress=False)
            return net, time.process_time() - began

        trained(1)  # warms up
        return trained(max(1, round(seconds / trained(1)[1])))


def times_faster(net: nn.Module, small: nn.Module, images: Tensor, folder: Path) -> float:
    """Return how many times as fast a small network is in onnxruntime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    sessions = []
    for name, each in (("net", net), ("small", small)):
        file = folder / f"{name}.onnx"
        nni_topo.export(each, file, images[:1])
        sessions.append(onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"]))
        file.unlink()
    feed = {sessions[0].get_inputs()[0].name: images.numpy()}
    least = [float("inf")] * 2
    for _ in range(RUNS):
        for index, session in enumerate(sessions):
            began = time.thread_time()  # not the time in which other processes had the core
            session.run(None, feed)
            least[index] = min(least[index], time.thread_time() - began)
    return least[0] / least[1]


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, time, number of images and way, with means over the seeds and 95 % intervals."""
    rows = []
    for net, share, images in dict.fromkeys(tuple(record["key"][:3]) for record in records):
        by_way: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if record["key"][:3] == [net, share, images]:
                by_way.setdefault(record["key"][4], []).append(record)
        for way, (removed, by, recovery) in WAYS.items():
            found = by_way.get(way, [])
            if not found:
                continue
            ours = {each["key"][3]: _lost(each) for each in by_way.get("both" + (BEFORE if BEFORE in way else ""), [])}
            more = [_lost(each) - ours[each["key"][3]] for each in found if each["key"][3] in ours]
            columns = [[each["faster"][index] for each in found] for index in range(len(BATCHES))]
            columns += [
                [100 * each["left"] for each in found],
                [100 * each["unpruned"] for each in found],
                [_lost(each) for each in found],
                [float(len(each["removed"])) for each in found],
                [each["seconds"] for each in found],
            ]
            paired = _shown(more) if more and not way.startswith("both" + BEFORE) and way != "both" else ""
            first = [net, f"{100 * share:g} %", f"{images:,}", removed, by, recovery, str(len(found))]
            rows.append([*first, *map(_shown, columns), paired])
    head = ["network", "time asked", "images", "what is removed", "channels by", "recovery", "seeds"]
    head += ["times faster: 1 image", "16 images", "MACs kept %", "unpruned %", "points lost", "blocks removed"]
    return markdown_table([*head, "CPU s", "points more than by blocks and channels, distilled"], rows, text_columns=6)


def _lost(record: dict[str, Any]) -> float:
    return float(100 * (record["unpruned"] - record["accuracy"]))


def _shown(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}"
    found = interval(values)
    return f"{found.mean:.1f} ± {found.half:.1f}"


if __name__ == "__main__":
    main()
