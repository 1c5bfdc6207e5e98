"""T3b of HYPOTHESES.md: zigzag persistence between what enters and leaves a block, as one more score of T3.

    python benchmarks/topology/which_blocks_zigzag.py --images runs/fresh/images.npz --out runs/topology

Trains the networks of ``which_blocks.py`` again, measures there what that benchmark measures, scores each block by the
loops that live through it, too, and writes a line per network and block to ``which_blocks_zigzag.jsonl``. The same
command goes on where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_blocks_zigzag.py --out benchmarks/records/topology \
        --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.

Y. Gardinazzi et al., Persistent topological features in large language models, ICML 2025, arXiv:2410.11042.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gudhi
import numpy as np
import torch
import which_blocks
from numpy.typing import NDArray
from registered import CONFIRMATION, EXPLORATION, benchmark, best_of, difference_row
from torch import Tensor, nn
from which_blocks import BASELINES, CEILING, RESNET, RTD_AVERAGED, VIT, WATCHED, averaged, correlations

import nni_topo
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table

SOURCE = "benchmarks/topology/which_blocks_zigzag.py"  # as the comments around a page's tables say
KINDS = (VIT, RESNET)
NEIGHBOURS = (5, 10, 20)
ZIGZAG = tuple(f"zigzag, {count} neighbours{cloud}" for count in NEIGHBOURS for cloud in ("", ", averaged over places"))
COMPARED = (*ZIGZAG, RTD_AVERAGED, *BASELINES)

Record = dict[str, Any]
Edges = set[tuple[int, int]]


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure the networks that aren't there yet, the quicker kind first."""
    which_blocks.expect_first_blocks()
    data = zoo.load_data(str(images), limit=5_000)
    for kind in KINDS:
        for seed in (*EXPLORATION, *CONFIRMATION):
            run(kind, seed, data, out, path)


def run(kind: str, seed: int, data: zoo.DataBundle, out: Path, path: Path) -> None:
    """Remove and score the blocks of the network of a kind and a seed that aren't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    model = which_blocks.untrained(kind, seed, data)
    missing = [name for name in which_blocks.block_names(model) if (kind, seed, name) not in known]
    if not missing:
        return
    # On another processor training rounds differently: the losses and the other scores are those of the same network.
    others = out / "which_blocks.jsonl"
    which_blocks.run(kind, seed, data, out, others)
    measured = {tuple(record["key"]): record for record in read_records(others)}
    which_blocks.train(model, kind, seed, data, out)
    found = block_scores(model, missing, data.train.tensors[0][:WATCHED])
    for name in missing:
        record = measured[kind, seed, name]
        append_record(path, {**record, "scores": {**record["scores"], **found[name]}})
    print(kind, seed, len(missing), flush=True)


def block_scores(model: nn.Module, names: list[str], images: Tensor) -> dict[str, dict[str, float]]:
    """Return by block the zigzag scores of what enters and leaves it."""
    found: dict[str, dict[str, float]] = {}

    def note(name: str, module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
        scores = {}
        for cloud, points in (("", lambda values: values.flatten(1)), (", averaged over places", averaged)):
            for count in NEIGHBOURS:
                graphs = [neighbour_graph(points(values), count) for values in (given[0], output)]
                scores[f"zigzag, {count} neighbours{cloud}"] = lost_loops(*graphs, len(images))
        found[name] = scores

    handles = [model.get_submodule(name).register_forward_hook(functools.partial(note, name)) for name in names]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def neighbour_graph(points: Tensor, count: int) -> Edges:
    """Return the edges between points (n, ...) of which one is among the other's nearest neighbours."""
    distances = nni_topo.topology.pairwise_distances(points.double().cpu().numpy())
    np.fill_diagonal(distances, np.inf)
    nearest: NDArray[np.intp] = distances.argsort(axis=1, kind="stable")[:, :count]
    return {(min(one, int(other)), max(one, int(other))) for one, row in enumerate(nearest) for other in row}


def lost_loops(before: Edges, after: Edges, points: int) -> float:
    """Return which share of the loops of one graph's clique complex doesn't live on in the other's; 0 without loops.

    The complexes and their intersection form a zigzag, one <- both -> other. Homology (degree 1, modulo 2) makes it a
    sum of bars; those over all three are the loops that live on.
    """
    loops = len(before) and betti_numbers(clique_complex(before, set(), points))[1]
    return 1.0 - bars_through(before, after, points) / loops if loops else 0.0


def bars_through(one: Edges, other: Edges, points: int) -> int:
    """Return how many bars of degree 1 the zigzag of two clique complexes and their intersection has over all three.

    With the maps f and g of the intersection's homology into that of both, it is rank f + rank g - rank (f, g). The
    sequence of Mayer and Vietoris gives the last rank from Betti numbers, those of the complexes' union among them.
    """
    both = one & other
    first, second = clique_complex(one, both, points), clique_complex(other, both, points)
    union = gudhi.SimplexTree()
    for tree in (first, second):
        for simplex, _ in tree.get_skeleton(2):
            union.insert(simplex, 0.0)
    ranks = [rank_of_inclusion(tree) for tree in (first, second)]
    numbers = [betti_numbers(tree) for tree in (first, second)]
    (components, _), (components_of_union, loops_of_union) = (
        betti_numbers(tree) for tree in (clique_complex(both, both, points), union)
    )
    joint = sum(loops - pieces for pieces, loops in numbers) - loops_of_union + components_of_union + components
    return sum(ranks) - joint


def clique_complex(edges: Edges, earlier: Edges, points: int) -> Any:
    """Return the triangles, edges and points of a graph: what the earlier edges span at time 0, the rest at time 1."""
    tree = gudhi.SimplexTree()
    for point in range(points):
        tree.insert([point], 0.0)
    for edge in edges:
        tree.insert(list(edge), 0.0 if edge in earlier else 1.0)
    tree.expansion(2)
    return tree


def betti_numbers(tree: Any) -> tuple[int, int]:
    """Return the numbers of components and loops of a whole complex."""
    # Without triangles, loops are the highest degree, which would be left out.
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=tree.dimension() < 2)
    bars = [tree.persistence_intervals_in_dimension(degree) for degree in (0, 1)]
    components, loops = (int(np.isinf(found[:, 1]).sum()) if len(found) else 0 for found in bars)
    return components, loops


def rank_of_inclusion(tree: Any) -> int:
    """Return how many loops of a complex at time 0 are loops of the whole one."""
    betti_numbers(tree)
    bars = tree.persistence_intervals_in_dimension(1)
    return int(((bars[:, 0] == 0.0) & np.isinf(bars[:, 1])).sum()) if len(bars) else 0


def chosen_zigzag(records: list[Record]) -> str:
    """Return the zigzag with the highest mean correlation on validation images of exploration, over the kinds run."""
    explored = [correlations(records, kind, EXPLORATION, "validation", COMPARED) for kind in KINDS]

    def mean(method: str) -> float:
        return float(np.mean([value for by_method in explored for value in by_method.get(method, {}).values()]))

    return max(ZIGZAG, key=mean)


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, and the differences that the hypothesis is about."""
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        found = {kind: correlations(records, kind, seeds, "test", COMPARED) for kind in KINDS}
        found = {kind: by_method for kind, by_method in found.items() if by_method}
        if not found:
            continue
        rows = []
        for method in (*COMPARED, CEILING):
            shown = [interval(list(by_method[method].values())).show(1, 2) for by_method in found.values()]
            rows.append([method, *shown])
        head = ["score", *(f"{kind}, {len(by_method[CEILING])} networks" for kind, by_method in found.items())]
        blocks += [f"**{title}: rank correlation with the loss after a block's removal**", markdown_table(head, rows)]
    blocks += outcome(records)
    return "\n\n".join(blocks)


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences between the chosen zigzag and the other scores on the fresh networks."""
    rows = []
    chosen = chosen_zigzag(records)
    for kind in KINDS:
        fresh = correlations(records, kind, CONFIRMATION, "test", COMPARED)
        explored = correlations(records, kind, EXPLORATION, "validation", COMPARED)
        if len(fresh.get(CEILING, {})) < 2 or not explored:
            continue
        best = best_of(BASELINES, explored)
        for other in (*sorted(BASELINES, key=lambda name: name != best), RTD_AVERAGED):
            label = f"{other} (best baseline)" if other == best else other
            rows.append([kind, label, *difference_row(fresh[chosen], fresh[other], 1.0, 2)])
    if not rows:
        return []
    head = ["network", f"{chosen}, against", "difference of the correlation", "p"]
    return ["**Differences on fresh networks**", markdown_table(head, rows, text_columns=2)]


if __name__ == "__main__":
    main()
