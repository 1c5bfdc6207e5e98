"""The weights of a whole network as one graph: its spanning tree under global pruning, and its loops.

    python benchmarks/trees/bench_network_topology.py --data-dir FASHION_MNIST --parts tree
    python benchmarks/trees/bench_network_topology.py --parts loops

``tree``: critical ratios, overlaps and their bounds when the tree and the largest weights are chosen over the whole
network. ``loops``: persistence in degree 1 along a training, beside the same weights shuffled within each layer. Tables
are printed as Markdown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.analysis import connectivity, neural_persistence, overlap_bound
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.run import build_model, load_model_data
from nni_topo.studies.analysis.layers import weight_layers
from nni_topo.studies.tables import interval, markdown_table
from nni_topo.topology import rips_diagram

NETS = ("lenet300", "mnist_fcn")
IMAGES = 5_000
EPOCHS = 8
RANDOM_NETWORKS = 5
LOOPS_NET = "lenet300"
MEASURED = (0, 1, 2, 5, 10, 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder with Fashion-MNIST's idx files, for the part 'tree'")
    parser.add_argument("--parts", nargs="*", default=["tree", "loops"], choices=["tree", "loops"])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if "tree" in options.parts:
        print(markdown_table(*counts_table()))
        records = [tree_record(net, options.data_dir, seed) for net in NETS for seed in range(options.seeds)]
        print(markdown_table(*tree_table(records)))
    if "loops" in options.parts:
        courses = [list(loops_course(seed)) for seed in range(options.seeds)]
        print(markdown_table(*loops_table(courses), text_columns=0))


def network_tree(weights: Sequence[NDArray[Any]]) -> list[NDArray[np.bool_]]:
    """Mark the weights, ``(n_1, n_0), (n_2, n_1), ...``, of the maximum spanning tree of the whole network.

    Its nodes are the inputs, the neurons of every layer and the outputs, its edges the |w| of all layers. Of equal |w|
    the first in the network's order is taken.
    """
    lengths = np.concatenate([np.abs(weight).ravel() for weight in weights])
    ranks = np.empty(len(lengths))
    ranks[np.argsort(-lengths, kind="stable")] = np.arange(1, len(lengths) + 1)
    sources, targets, first = [], [], 0
    for weight in weights:
        rows, columns = np.divmod(np.arange(weight.size), weight.shape[1])
        sources.append(first + columns)
        first += weight.shape[1]
        targets.append(first + rows)
    nodes = first + len(weights[-1])
    graph = csr_matrix((ranks, (np.concatenate(sources), np.concatenate(targets))), shape=(nodes, nodes))
    kept = np.isin(ranks, minimum_spanning_tree(graph).data)
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [part.reshape(weight.shape) for part, weight in zip(np.split(kept, ends), weights, strict=True)]


def network_tree_overlap(weights: Sequence[NDArray[Any]]) -> float:
    """Return the share of the tree among the largest weights of all layers, as many as it has."""
    tree = np.concatenate([mask.ravel() for mask in network_tree(weights)])
    lengths = np.concatenate([np.abs(weight).ravel() for weight in weights])
    largest = np.argsort(-lengths, kind="stable")[: int(tree.sum())]
    return float(tree[largest].mean())


def network_overlap_bound(widths: Sequence[int]) -> float:
    """Bound from below the expected share of a network's tree among its largest weights, from its layers' widths.

    All N weights are independent and identically distributed. The i-th largest one belongs to the tree for certain if
    none of the larger ones touches its ends. A weight between two layers has c other weights at its ends, so that it is
    the i-th largest and untouched with probability ``1/N * product over j < i of (N - 1 - c - j) / (N - 1 - j)``. The
    bound is the sum over all weights and the first ``nodes - 1`` places, divided by these.
    """
    sizes = list(widths)
    counts = [entering * leaving for entering, leaving in pairwise(sizes)]
    total, alpha = sum(counts), sum(sizes) - 1
    padded = [0, *sizes, 0]
    places = np.arange(alpha, dtype=np.float64)
    certain = 0.0
    for layer, count in enumerate(counts):
        before, entering, leaving, after = padded[layer : layer + 4]
        # the input end has weights to both neighbouring layers, and so has the output end; each counts the weight once
        others = (before + leaving) + (entering + after) - 2
        factors = np.maximum(0.0, total - 1 - others - places[:-1]) / (total - 1 - places[:-1])
        untouched = np.cumprod(np.concatenate([[1.0], factors]))
        certain += count / total * float(untouched.sum())
    return certain / alpha


def counts_table() -> tuple[list[str], list[list[str]]]:
    """Return critical ratios and bounds: of the single layers and of the whole network."""
    head = ["net", "weights", "trees of the layers", "critical ratio", "tree of the network", "critical ratio"]
    rows = []
    for net in NETS:
        widths = widths_of(weights_of(zoo.create_model(net, num_classes=10, in_channels=1, image_size=28, seed=0)))
        layers = list(pairwise(widths))
        weights = sum(m * n for m, n in layers)
        trees, tree = sum(m + n - 1 for m, n in layers), sum(widths) - 1
        by_layer = ", ".join(f"{100 * overlap_bound(*layer):.1f}" for layer in layers)
        same_form = ", ".join(f"{100 * network_overlap_bound(layer):.1f}" for layer in layers)
        row = [net, f"{weights:,}", str(trees), f"{weights / trees:.1f}", str(tree), f"{weights / tree:.1f}"]
        rows.append([*row, by_layer, same_form, f"{100 * network_overlap_bound(widths):.1f}"])
    return [*head, "bounds of the layers % (3.3)", "in the network's form", "bound of the network %"], rows


def tree_record(net: str, data_dir: Path | None, seed: int) -> dict[str, Any]:
    """Train a network and measure how its tree and its largest weights overlap, and what either leaves connected."""
    choice = ModelChoice(net)
    data = load_model_data(choice, DataChoice("fashion-mnist", str(data_dir), IMAGES, 2_000))
    model = build_model(choice, data, seed)
    record: dict[str, Any] = {"net": net, "untrained": network_tree_overlap(weights_of(model))}
    zoo.train(model, data, replace(zoo.default_recipe(net, "fashion-mnist"), epochs=EPOCHS), seed=seed)
    weights, example = weights_of(model), data.test.tensors[0][:2]
    rng = np.random.default_rng(seed)
    random = [[rng.normal(size=weight.shape) for weight in weights] for _ in range(RANDOM_NETWORKS)]
    record["random"] = float(np.mean([network_tree_overlap(each) for each in random]))
    record["accuracy"] = zoo.evaluate(model, data.test)
    for scale, chosen in (("trained", weights), ("scaled", [weight / np.abs(weight).max() for weight in weights])):
        record[scale] = network_tree_overlap(chosen)
        tree = network_tree(chosen)
        for name, masks in (("tree", tree), ("largest", largest_weights(chosen, sum(map(np.sum, tree))))):
            found = connectivity(model, example, masks_of(model, masks))
            record[f"{scale} {name}"] = {"outputs": found.outputs, "channels": found.channels}
    return record


def tree_table(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return measured overlaps, and the shares of outputs and channels that the tree or the largest weights keep."""
    head = ["net", "\\|w\\|", "overlap, random weights %", "untrained %", "trained %"]
    for name in ("tree", "largest weights"):
        head += [f"{name}: outputs reached %", "channels connected %"]
    rows = []
    for net in dict.fromkeys(record["net"] for record in records):
        runs = [record for record in records if record["net"] == net]
        for scale, label in (("trained", "as it is"), ("scaled", "over the layer's largest")):
            row = [net, label, _shown([run["random"] for run in runs])]
            row += [_shown([run["untrained"] for run in runs]) if scale == "trained" else ""]
            row += [_shown([run[scale] for run in runs])]
            for name in ("tree", "largest"):
                row += [
                    f"{100 * np.mean([run[f'{scale} {name}'][key] for run in runs]):.1f}"
                    for key in ("outputs", "channels")
                ]
            rows.append(row)
    return head, rows


def loops_course(seed: int) -> Iterator[dict[str, float]]:
    """Train on the digits and yield, at some epochs, the network's persistence in degrees 0 and 1."""
    choice = ModelChoice(LOOPS_NET)
    data = load_model_data(choice, DataChoice("digits"))
    model = build_model(choice, data, seed)
    records = [measured(model, data, 0, seed)]

    def note(log: zoo.EpochLog) -> None:
        if log.epoch in MEASURED:
            records.append(measured(model, data, log.epoch, seed))

    recipe = replace(zoo.default_recipe(LOOPS_NET, "digits"), epochs=MEASURED[-1])
    zoo.train(model, data, recipe, seed=seed, callback=note)
    yield from records


def measured(model: nn.Module, data: zoo.DataBundle, epoch: int, seed: int) -> dict[str, float]:
    """Return accuracy and persistence, and that of the same weights shuffled within each layer."""
    began = time.process_time()
    weights, rng = weights_of(model), np.random.default_rng(seed)
    found: dict[str, float] = {"epoch": epoch, "accuracy": zoo.evaluate(model, data.test)}
    found["degree 0"] = neural_persistence(model, normalized=True).mean
    shuffled = [rng.permuted(weight.ravel()).reshape(weight.shape) for weight in weights]
    for name, chosen in (("", weights), ("shuffled ", shuffled)):
        found |= {f"{name}{key}": value for key, value in loops(chosen).items()}
    found["seconds"] = time.process_time() - began
    return found


def relevance_distances(weights: Sequence[np.ndarray]) -> np.ndarray:
    """Return the distances between all neurons of a chain of linear layers ``(out, in)``: inputs first, then by layer.

    Neurons of different layers are as far apart as 1 less the largest product of ``|w| / max |w|``, each layer divided
    by its own maximum, along a path between them; neurons of one layer have distance 1.
    """
    scaled = [(np.abs(weight) / np.abs(weight).max()).T for weight in weights]
    firsts = np.cumsum([0, *(layer.shape[0] for layer in scaled), scaled[-1].shape[1]])
    spans = [slice(start, end) for start, end in pairwise(firsts)]
    distances = np.ones((firsts[-1], firsts[-1]))
    for start in range(len(scaled)):
        relevance = scaled[start]
        for end in range(start + 1, len(spans)):
            if end > start + 1:
                # The largest product over the neurons between.
                strongest = np.zeros((len(relevance), scaled[end - 1].shape[1]))
                for before, after in zip(relevance.T, scaled[end - 1], strict=True):
                    np.maximum(strongest, np.outer(before, after), out=strongest)
                relevance = strongest
            distances[spans[start], spans[end]] = 1.0 - relevance
            distances[spans[end], spans[start]] = 1.0 - relevance.T
    np.fill_diagonal(distances, 0.0)
    return distances


def loops(weights: Sequence[np.ndarray]) -> dict[str, float]:
    """Return the number of loops that a path fills, the sum of their lengths, and the number of those never filled."""
    bars = rips_diagram(distances=relevance_distances(weights), dimension=1)
    lengths = bars[:, 1] - bars[:, 0]
    filled = (bars[:, 1] < 1.0) & (lengths > 0.0)
    open_ones = (bars[:, 1] == 1.0) & (lengths > 0.0)
    return {"filled": float(filled.sum()), "sum": float(lengths[filled].sum()), "open": float(open_ones.sum())}


def loops_table(courses: Sequence[list[dict[str, float]]]) -> tuple[list[str], list[list[str]]]:
    """Return a row per epoch, means and intervals over seeds."""
    head = ["epoch", "test %", "degree 0", "loops filled", "sum of lengths", "never filled"]
    head += ["shuffled: filled", "sum of lengths", "sum, trained - shuffled"]
    rows = []
    for runs in zip(*courses, strict=True):
        row = [f"{runs[0]['epoch']:g}", _shown([run["accuracy"] for run in runs])]
        row += [interval([run["degree 0"] for run in runs]).show(1, digits=3)]
        row += [f"{np.mean([run[key] for run in runs]):.1f}" for key in ("filled", "sum", "open")]
        row += [f"{np.mean([run[f'shuffled {key}'] for run in runs]):.1f}" for key in ("filled", "sum")]
        row += [interval([run["sum"] - run["shuffled sum"] for run in runs]).show(1, sign=True)]
        rows.append(row)
    return head, rows


def weights_of(model: nn.Module) -> list[np.ndarray]:
    """Return the weights of a chain of linear layers."""
    return [layer.weight for layer in weight_layers(model)[0]]


def widths_of(weights: Sequence[np.ndarray]) -> list[int]:
    """Return the numbers of inputs, neurons and outputs."""
    return [weights[0].shape[1], *(len(weight) for weight in weights)]


def largest_weights(weights: Sequence[np.ndarray], count: int) -> list[np.ndarray]:
    """Mark the largest |w| of all layers; of equal ones the first."""
    flat = np.concatenate([np.abs(weight).ravel() for weight in weights])
    mask = np.zeros(len(flat), dtype=np.bool_)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    ends = np.cumsum([weight.size for weight in weights])[:-1]
    return [part.reshape(weight.shape) for part, weight in zip(np.split(mask, ends), weights, strict=True)]


def masks_of(model: nn.Module, masks: Sequence[np.ndarray]) -> dict[str, dict[str, Tensor]]:
    """Return masks by layer and target."""
    names = [layer.name for layer in weight_layers(model)[0]]
    return {name: {"weight": torch.from_numpy(mask).float()} for name, mask in zip(names, masks, strict=True)}


def _shown(values: Sequence[float]) -> str:
    return interval(values).show(100)


if __name__ == "__main__":
    main()
