"""Time and memory of maximum spanning trees over the size of a layer, and how many weights convolutions' trees need.

The dense tree (Kruskal's algorithm on the largest weights) stands beside SciPy's minimum spanning tree of the same
graph, each in a process of its own, so that peaks of memory are their own.

    python benchmarks/trees/bench_trees.py --out trees.json
    python benchmarks/trees/bench_trees.py --model resnet20 --checkpoint FILE --channels 1 --size 28
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import minimum_spanning_tree

from nni_topo import zoo
from nni_topo.pruners.topological_magnitude import TopologicalMagnitudePruner, TreeGraph
from nni_topo.topology import convolution_graph, maximum_spanning_tree, spanning_forest

SIZES = (256, 512, 1024, 2048, 4096)
# Channels and output side of VGG-16's convolutions on 32x32 images.
CONVOLUTIONS = ((64, 32), (128, 16), (256, 8), (512, 4), (512, 2))


def peak_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def scipy_tree(weight: np.ndarray) -> np.ndarray:
    outputs, inputs = weight.shape
    columns = outputs + np.tile(np.arange(inputs, dtype=np.int32), outputs)
    starts = np.minimum(np.arange(outputs + inputs + 1), outputs) * inputs
    graph = csr_matrix((-np.abs(weight).ravel(), columns, starts), shape=(outputs + inputs,) * 2)
    tree = minimum_spanning_tree(graph, overwrite=True).tocoo()
    mask = np.zeros(weight.shape, dtype=bool)
    mask[tree.row, tree.col - outputs] = True
    return mask


def measure(method: str, size: int) -> dict[str, Any]:
    """Time one tree in this process; bytes are what it adds to the peak that the weights left."""
    weight = np.random.default_rng(size).normal(size=(size, size))
    function = {"ours": maximum_spanning_tree, "scipy": scipy_tree}[method]
    before, start = peak_bytes(), time.process_time()
    mask = function(weight)
    seconds = time.process_time() - start
    return {"seconds": seconds, "bytes": peak_bytes() - before, "length": float(np.abs(weight[mask]).sum())}


def in_own_process(method: str, size: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", method, str(size)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def dense_trees(console: Console, repeats: int) -> list[dict[str, Any]]:
    rows = []
    table = Table(title="Maximum spanning tree of an n x n layer (medians)", title_justify="left")
    for heading in ("n", "edges", "ours s", "ours MiB", "SciPy s", "SciPy MiB", "total |w| differs by"):
        table.add_column(heading, justify="right")
    for size in SIZES:
        runs = {method: [in_own_process(method, size) for _ in range(repeats)] for method in ("ours", "scipy")}
        row: dict[str, Any] = {"n": size, "edges": size**2}
        for method, found in runs.items():
            row |= {f"{method}_{key}": float(np.median([run[key] for run in found])) for key in ("seconds", "bytes")}
        row["difference"] = abs(runs["ours"][0]["length"] - runs["scipy"][0]["length"])
        rows.append(row)
        cells = [f"{row[f'{m}_seconds']:.3f} {row[f'{m}_bytes'] / 2**20:.0f}".split() for m in ("ours", "scipy")]
        table.add_row(str(size), f"{size**2:,}", *cells[0], *cells[1], f"{row['difference']:.1e}")
    exponent = np.polyfit(np.log(SIZES), np.log([row["ours_seconds"] for row in rows]), 1)[0]
    console.print(table, f"ours grows as n^{exponent:.2f}")
    return rows


def toeplitz_forests(console: Console) -> list[dict[str, Any]]:
    rows = []
    table = Table(title="Spanning tree of a 3x3 convolution's whole Toeplitz graph", title_justify="left")
    for heading in ("channels", "positions", "edges", "tree edges", "weights", "weights in the tree", "s"):
        table.add_column(heading, justify="right")
    for channels, side in CONVOLUTIONS:
        weight = np.random.default_rng(channels).normal(size=(channels, channels, 3, 3))
        graph = convolution_graph(weight.shape, (side + 2, side + 2))
        start = time.process_time()
        used = len(np.unique(spanning_forest(weight, graph).elements))
        seconds = time.process_time() - start
        rows.append({"channels": channels, "side": side, "edges": graph.edges, "used": used, "seconds": seconds})
        numbers = (graph.edges, graph.forest_edges, graph.elements, used)
        table.add_row(str(channels), f"{side}x{side}", *(f"{n:,}" for n in numbers), f"{seconds:.2f}")
    console.print(table)
    return rows


def conv_graphs(console: Console, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Compare how far each graph of the convolutions lets a net's weights be pruned."""
    arguments = {"num_classes": options.classes, "in_channels": options.channels, "image_size": options.size}
    model = zoo.create_model(options.model, **arguments, seed=0)
    if options.checkpoint:
        zoo.load_checkpoint(options.checkpoint, model)
    images = torch.zeros(1, options.channels, options.size, options.size)
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.0}]
    found: dict[str, dict[str, float]] = {}
    for graph in get_args(TreeGraph):
        knobs = {"conv_graph": graph, "example_inputs": images, "on_subcritical": "clip"}
        pruner = TopologicalMagnitudePruner(model, config, **knobs)
        found[graph] = pruner.critical_ratios()
        pruner.unwrap_model()
    table = Table("layer", title=f"{options.model}: weights / weights of the tree, by graph", title_justify="left")
    for graph in found:
        table.add_column(graph, justify="right")
    sizes = {name: model.get_submodule(name).weight.numel() for name in found["channel"]}
    for name in sizes:
        table.add_row(name, *(f"{ratios[name]:.2f}" for ratios in found.values()))
    total = sum(sizes.values())
    whole = [total / sum(sizes[n] / r for n, r in ratios.items()) for ratios in found.values()]
    table.add_row("all", *(f"{ratio:.2f}" for ratio in whole))
    console.print(table)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--model", help="compare the graphs of this net's convolutions instead")
    parser.add_argument("--checkpoint", type=Path, help="its trained weights; default: untrained")
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    console = Console(width=120)
    figures: dict[str, Any] = {}
    if options.model:
        figures["conv_graphs"] = conv_graphs(console, options)
    else:
        figures["dense"] = dense_trees(console, options.repeats)
        figures["toeplitz"] = toeplitz_forests(console)
    if options.out:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
