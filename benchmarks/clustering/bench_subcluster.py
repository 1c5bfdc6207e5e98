"""Clustered and sub-clustering pruning: neurons per layer, accuracy, epochs to come back; sweeps and baselines.

Every cell is a line of ``cells.jsonl`` in the output folder, which a second run doesn't compute again. Afterwards, and
with ``--report`` alone, the tables are printed as Markdown and the pictures are drawn.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

import nni_topo
from benchmarks.clustering.subcluster_report import report
from benchmarks.clustering.subcluster_rules import GrownLayer, Reading, kept_by_rule
from nni_topo import zoo
from nni_topo.analysis import draw_splits
from nni_topo.maths.clustering import GRAPHS
from nni_topo.maths.clustering.subclustering import STATISTICS, Growth, initial_clusters
from nni_topo.pruners.subcluster import of_layer
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.run import build_model, layer_widths, load_model_data
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.retraining import epochs_to_recover
from nni_topo.zoo.evaluation import loss_and_accuracy
from nni_topo.zoo.recipes import Precision

CALIBRATION = 1000


@dataclass(frozen=True)
class Net:
    """A network of the study: what it is trained on, and the text's settings for it."""

    model: ModelChoice
    limit: int
    epochs: int
    retrain: int
    energy: float | dict[str, float] = 0.5
    initial: dict[str, float] = field(default_factory=dict)
    calibration: int = CALIBRATION
    precision: Precision = "float32"
    skipped: tuple[str, ...] = ()

    def layers(self, model: nn.Module, bundle: zoo.DataBundle) -> list[str]:
        """Return the layers that are pruned."""
        found = inner_layers(model, bundle.test.tensors[0][:2])
        return [name for name in found if name not in self.skipped]


def of_layers(kind: str, values: tuple[float, ...]) -> dict[str, float]:
    """Name numbers after the consecutive convolutions (``conv``) or hidden layers (``fc``) they belong to."""
    part = "features" if kind == "conv" else "classifier"
    return {f"{part}.{kind}{index}": value for index, value in enumerate(values, start=1)}


LIKE = {**of_layers("conv", (10 / 32, 15 / 64)), **of_layers("fc", (50 / 1024,))}
CNN12 = {**of_layers("conv", (1 / 4,) * 4), **of_layers("fc", (64 / 128, 64 / 256, 128 / 512))}
VGG_CONV = (20 / 64,) * 2 + (25 / 128,) * 2 + (45 / 256,) * 3 + (50 / 512,) * 6
NETS = {
    "lenet300": Net(ModelChoice("lenet300"), 10_000, 8, 10, 0.5, {"fc1": 20 / 300, "fc2": 25 / 100}),
    "lenet5": Net(
        ModelChoice("lenet5"),
        10_000,
        8,
        10,
        {**of_layers("conv", (0.3, 0.3)), "classifier.fc2": 0.4},
        {**of_layers("conv", (4 / 6, 4 / 16)), "classifier.fc2": 15 / 84},
        skipped=("classifier.fc1",),  # the text leaves its 120 nodes whole
    ),
    "lenet5_like": Net(
        ModelChoice("lenet5_like"),
        10_000,
        5,
        3,
        {**of_layers("conv", (0.5, 0.5)), **of_layers("fc", (0.4,))},
        LIKE,
        precision="bfloat16",
    ),
    "vgg16_modified": Net(
        ModelChoice("vgg16_modified", 0.25),
        10_000,
        12,
        3,
        0.2,
        {**of_layers("conv", VGG_CONV), **of_layers("fc", (64 / 512,))},
        256,
        "bfloat16",
    ),
    "cnn12": Net(
        ModelChoice("cnn12"),
        3_000,
        4,
        3,
        {**of_layers("conv", (0.3,) * 4), **of_layers("fc", (0.8,) * 3)},
        CNN12,
        256,
        "bfloat16",
    ),
}


class Bench:
    """Trains each network once and keeps what was measured."""

    def __init__(self, out: Path, data_dir: Path | None, data: str) -> None:
        self.out, self.data_dir, self.data = out, data_dir, data
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "cells.jsonl"
        self.records = [json.loads(line) for line in self.file.read_text().splitlines()] if self.file.exists() else []
        self._trained: dict[tuple[str, int], tuple[nn.Module, zoo.DataBundle, float]] = {}

    def trained(self, name: str, seed: int) -> tuple[nn.Module, zoo.DataBundle, float]:
        """Return a trained network, its data and its accuracy."""
        if (name, seed) not in self._trained:
            net = NETS[name]
            folder = None if self.data_dir is None else str(self.data_dir)
            bundle = load_model_data(net.model, DataChoice(self.data, folder, net.limit, 2_000))
            model = build_model(net.model, bundle, seed)
            path = self.out / "checkpoints" / f"{name}-{self.data}-{seed}.pt"
            if path.exists():
                zoo.load_checkpoint(path, model)
            else:
                zoo.train(model, bundle, self.recipe(name), seed=seed)
                zoo.save_checkpoint(path, model, {"seed": seed})
            self._trained[name, seed] = model.eval(), bundle, zoo.evaluate(model, bundle.test)
        return self._trained[name, seed]

    def recipe(self, name: str, retraining: bool = False, most: int | None = None) -> zoo.Recipe:
        """Return the recipe of training, or of retraining for ``most`` epochs (None: the network's)."""
        net = NETS[name]
        base = zoo.default_recipe(net.model.name, self.data)
        base = replace(base, epochs=net.epochs, precision=net.precision)
        return base.for_retraining(most or net.retrain) if retraining else base

    def curves(self, name: str, model: nn.Module, bundle: zoo.DataBundle, seed: int) -> dict[str, list[list[float]]]:
        """Retrain a copy for all epochs; loss and accuracy on validation and test images before and after each."""
        parts = {"validation": TensorDataset(*bundle.validation[:2_000]), "test": bundle.test}
        model, found = copy.deepcopy(model), {part: [list(loss_and_accuracy(model, parts[part]))] for part in parts}

        def note(_: zoo.EpochLog) -> None:
            for part, images in parts.items():
                found[part].append(list(loss_and_accuracy(model, images)))

        zoo.train(model, bundle, self.recipe(name, True), seed=seed, callback=note)
        return found

    def run(self, part: str, name: str, seed: int, label: str, ratio: Any, retrain: bool, **choice: Any) -> None:
        """Compute one cell unless it is there."""
        key = f"{part}/{name}/{seed}/{label}/{ratio}"
        if any(record["key"] == key for record in self.records):
            return
        record = {"key": key, "part": part, "net": name, "seed": seed, "label": label, "ratio": ratio}
        record |= self._measured(name, seed, retrain, **choice)
        self.keep(record)
        print(key, f"{100 * record['pruned']:.1f} %", f"{record['seconds']:.1f} s", flush=True)

    def keep(self, record: dict[str, Any]) -> None:
        """Append a cell to the file."""
        self.records.append(record)
        with self.file.open("a") as lines:
            lines.write(json.dumps(record) + "\n")

    def _measured(
        self,
        name: str,
        seed: int,
        retrain: bool,
        *,
        pruner: str,
        config: list[dict[str, Any]],
        free_pairs: bool = False,
        curves: bool = False,
        recover: bool = True,
        most: int | None = None,
        **knobs: Any,
    ) -> dict[str, Any]:
        began = time.perf_counter()
        model, bundle, accuracy = self.trained(name, seed)
        images = list(bundle.train.tensors[0][: NETS[name].calibration].split(128))
        given = {"calibration": images, "seed": seed}
        knobs |= {knob: value for knob, value in given.items() if knob in nni_topo.pruner_info(pruner).knobs()}
        own = nni_topo.create_pruner(pruner, copy.deepcopy(model), config, **knobs)
        started = time.perf_counter()
        _, masks = own.compress()
        record: dict[str, Any] = {"prune_seconds": time.perf_counter() - started, "before": accuracy}
        trees = getattr(own, "trees", {})
        record["initial"] = {key.removesuffix(".weight"): len(tree.initial) for key, tree in trees.items()}
        record["depth"] = max((tree.depth for tree in trees.values()), default=0)
        if trees and retrain and seed == 0:
            draw_splits(trees)[0].figure.savefig(self.out / f"splits-{name}.png", dpi=110)
        own.unwrap_model()
        example = images[0][:2]
        dense = nni_topo.to_dense(model, example, masks)
        nets = {"pruned": dense}
        if recover:
            pairs = None if free_pairs else getattr(own, "pairs", None)
            updated = nni_topo.compensate(model, masks, images, method=nni_topo.recovery.Pair(pairs))
            nets["updated"] = nni_topo.to_dense(updated, example, masks)
            nets["rebuilt"] = nni_topo.to_dense(nni_topo.compensate(model, masks, images), example, masks)
        record |= {"widths_before": layer_widths(model), "widths": layer_widths(dense)}
        record |= {"params_before": zoo.count_params(model), "params": zoo.count_params(dense)}
        record["validation"] = zoo.evaluate(dense, TensorDataset(*bundle.validation[:2_000]))
        for row, net in nets.items():
            record |= {row: zoo.evaluate(net, bundle.test), f"error_{row}": output_error(net, model, bundle)}
        if curves:
            record["curves"] = self.curves(name, dense, bundle, seed)
        if retrain:
            record["most"] = most or NETS[name].retrain
            for row, net in (("", "pruned"), ("_updated", "updated")):
                if net in nets:
                    found = epochs_to_recover(nets[net], bundle, self.recipe(name, True, most), accuracy, seed=seed)
                    record[f"epochs{row}"], record[f"retrained{row}"] = found
        record["seconds"] = time.perf_counter() - began
        return record


def output_error(net: nn.Module, original: nn.Module, bundle: zoo.DataBundle) -> float:
    """Return the mean squared error of the outputs on the test images, as a share of their variance."""
    with torch.no_grad():
        wanted, found = (torch.cat([each(x) for x in bundle.test.tensors[0].split(250)]) for each in (original, net))
    return float((found - wanted).square().mean() / wanted.var(0).mean())


def subcluster(bench: Bench, part: str, name: str, seed: int, label: str, **knobs: Any) -> None:
    """Run SubclusterPruner with a network's settings, some of them changed."""
    net = NETS[name]
    model, bundle, _ = bench.trained(name, seed)
    growth = Growth(initial_ratio=net.initial, **knobs.pop("growth", {}))
    settings = {"energy": net.energy, "growth": growth, **knobs}
    config = [{"op_names": net.layers(model, bundle)}]
    retrain = part not in ("statistics", "choice")
    settings = {"recover": retrain, **settings}
    bench.run(part, name, seed, label, "", retrain, pruner="subcluster", config=config, **settings)


def networks(bench: Bench, nets: list[str], seeds: int) -> None:
    """Tables 5.2 to 5.7: nodes per layer, accuracy, epochs."""
    for name, seed in itertools.product(nets, range(seeds)):
        subcluster(bench, "networks", name, seed, "subcluster", curves=seed == 0)


def choice(bench: Bench, nets: list[str], seeds: int) -> None:
    """The same settings by statistic, and in a single pass, without retraining: what the default was chosen by."""
    for name in nets:
        for statistic in STATISTICS:
            subcluster(bench, "choice", name, 0, statistic, growth={"statistic": statistic})
        subcluster(bench, "choice", name, 0, "dispersion, single pass", growth={"recursive": False})


def energies(bench: Bench, nets: list[str], seeds: int) -> None:
    """Tables 5.8 and 5.9: the percentage of energy."""
    for name in _among(nets, "lenet300", "lenet5_like"):
        for energy in (0.1, 0.5, 0.8):
            subcluster(bench, "energy", name, 0, str(energy), energy=energy)


def epochs(bench: Bench, nets: list[str], seeds: int) -> None:
    """Tables 5.9 and 5.10: epochs until the accuracy is back by percentage of energy, without the update."""
    table = {"lenet5_like": ((0.1, 0.5, 0.8), 26), "vgg16_modified": ((0.2, 0.5, 0.8), 28)}
    for name in _among(nets, *table):
        energies, most = table[name]
        for energy in energies:
            subcluster(bench, "epochs", name, 0, str(energy), energy=energy, recover=False, most=most)


def statistics(bench: Bench, nets: list[str], seeds: int) -> None:
    """Neurons kept by energy for each statistic, without retraining."""
    for name in _among(nets, "lenet300", "lenet5_like", "vgg16_modified"):
        for statistic in STATISTICS:
            for energy in (0.1, 0.3, 0.5, 0.8, 0.95):
                label = f"{statistic} {energy}"
                subcluster(bench, "statistics", name, 0, label, energy=energy, growth={"statistic": statistic})


def algorithms(bench: Bench, nets: list[str], seeds: int) -> None:
    """Figures 4.1 and 4.2: clustering algorithms, survivors by bias, with the correlation update."""
    choices = {f"spectral, {graph}": {"algorithm": "spectral", "graph": graph} for graph in GRAPHS}
    choices |= {algorithm: {"algorithm": algorithm} for algorithm in ("kmeans", "ward", "dbscan", "gmm", "gmm_full")}
    for label, knobs in choices.items():
        for name in _among(nets, "lenet300", "lenet5"):
            _clustered(bench, "algorithms", name, seeds, label, survivor="bias_norm", **knobs)


def survivors(bench: Bench, nets: list[str], seeds: int) -> None:
    """Figures 4.3 to 4.5: which node of a cluster stays."""
    pairs = (("lenet300", "kmeans"), ("lenet5", "ward"), ("lenet5", "kmeans"))
    for name, algorithm in (pair for pair in pairs if pair[0] in nets):
        for rule in (
            () if name not in nets else ("random", "center", "weight", "bias", "bias_norm", ("weight", "bias_norm"))
        ):
            label = f"{algorithm}, {rule if isinstance(rule, str) else ' and '.join(rule)}"
            _clustered(bench, "survivors", name, seeds, label, algorithm=algorithm, survivor=rule)


def _among(nets: list[str], *names: str) -> list[str]:
    return [name for name in names if name in nets]


def _clustered(bench: Bench, part: str, name: str, seeds: int, label: str, **knobs: Any) -> None:
    for seed in range(seeds):
        model, bundle, _ = bench.trained(name, seed)
        layers = NETS[name].layers(model, bundle)
        for ratio in (0.3, 0.5, 0.7):
            config = [{"op_names": layers, "sparse_ratio": ratio}]
            bench.run(part, name, seed, label, ratio, False, pruner="cluster", config=config, **knobs)


def baselines(bench: Bench, nets: list[str], seeds: int) -> None:
    """SubclusterPruner beside other pruners at the nodes per layer that it found, with and without the update."""
    for name in _among(nets, "lenet300", "lenet5", "lenet5_like"):
        for seed in range(1 if name == "lenet5_like" else seeds):
            subcluster(bench, "baselines", name, seed, "subcluster", energy=0.8)
            subcluster(bench, "baselines", name, seed, "subcluster, free pairs", energy=0.8, free_pairs=True)
            mine = next(r for r in bench.records if r["key"] == f"baselines/{name}/{seed}/subcluster/")
            config = [
                {"op_names": [layer], "sparse_ratio": (count - mine["widths"][layer] + 0.5) / count}
                for layer, count in mine["widths_before"].items()
                if mine["widths"][layer] < count
            ]
            for pruner in ("l1", "l2", "fpgm", "topological", "cluster", "random"):
                knobs = {"survivor": "weight"} if pruner == "cluster" else {}
                bench.run("baselines", name, seed, pruner, "", True, pruner=pruner, config=config, **knobs)


def rules(bench: Bench, nets: list[str], seeds: int) -> None:
    """Kept nodes by how the histograms are read, on trees that are grown once, beside the text's tables."""
    for name, seed in itertools.product(nets, range(seeds)):
        key = f"rules/{name}/{seed}"
        if any(record["key"] == key for record in bench.records):
            continue
        layers = grown_layers(bench, name, seed)
        widths = [len(net.weight) for net in map(bench.trained(name, seed)[0].get_submodule, layers)]
        record = {"key": key, "part": "rules", "net": name, "seed": seed, "layers": list(layers), "widths": widths}
        bench.keep(record | {"rules": kept_by_rule(layers.values())})
        print(key, flush=True)


def grown_layers(bench: Bench, name: str, seed: int) -> dict[str, GrownLayer]:
    """Return each pruned layer with its clusters split down to single nodes."""
    net = NETS[name]
    model, bundle, _ = bench.trained(name, seed)
    config = [{"op_names": net.layers(model, bundle)}]
    images = list(bundle.train.tensors[0][: net.calibration].split(128))
    growth = Growth(initial_ratio=net.initial)
    pruner = nni_topo.SubclusterPruner(
        copy.deepcopy(model), config, calibration=images, energy=net.energy, growth=growth, seed=seed
    )
    metric = pruner.calculator
    found: dict[str, GrownLayer] = {}

    def note(clouds: Any, context: Any) -> Any:
        for unit in context.units:
            ((lead, _),), (part,) = unit.members, clouds[unit.name]
            cloud = part.without_dead()
            initial = min(len(cloud.names), initial_clusters(net.initial[lead], unit.rows))
            found[lead] = GrownLayer(cloud.points, cloud.covariance, initial, of_layer(metric.energy, unit, 0.5), seed)
        return clusters(clouds, context)

    clusters, metric.cluster = metric.cluster, note
    pruner.compress()
    for lead, layer in found.items():  # the rule that is called the package's is what the package does
        wanted = len(pruner.trees[f"{lead}.weight"].leaves)
        if layer.kept(Reading())[0] != wanted:
            raise RuntimeError(f"the benchmark's rule and the pruner must agree, got {lead} of {name}")
    return found


PARTS = {
    "rules": rules,
    "choice": choice,
    "networks": networks,
    "energy": energies,
    "epochs": epochs,
    "statistics": statistics,
    "baselines": baselines,
}
PARTS |= {"algorithms": algorithms, "survivors": survivors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="fashion-mnist", help="digits, mnist or fashion-mnist (default)")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", action="store_true", help="print what is there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.out, options.data_dir, options.data)
    for part in () if options.report else options.parts:
        PARTS[part](bench, options.nets, options.seeds)
    report(bench.records, bench.out, {name: net.retrain for name, net in NETS.items()})


if __name__ == "__main__":
    main()
