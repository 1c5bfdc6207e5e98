"""T2b of HYPOTHESES.md: how wide each layer should be, without data, told by the accuracy at equal MACs.

    python benchmarks/topology/which_widths.py --images runs/fresh/images.npz --out runs/topology

Trains networks of four convolutions, counts the different filters of each layer by each method of
``how_many_filters.py``, scales the counts to the same MACs, removes the other filters by a rule that is the same for
all methods and looks at no image, and writes a line per network, share of the MACs, method and rule to
``which_widths.jsonl``. The same command goes on where it was stopped. ``images.npz`` is made by
``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_widths.py --out benchmarks/records/topology --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from how_many_filters import BASELINES as NAMED
from how_many_filters import GAPS, METHODS, SILHOUETTE, Points
from registered import CONFIRMATION, EXPLORATION, benchmark, best_of, difference_row
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from which_filters import four_convolutions

import nni_topo
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table, show_accuracies

SOURCE = "benchmarks/topology/which_widths.py"  # as the comments around a page's tables say
WIDTHS = (24, 24, 48, 48)  # four times 6, 6, 12 and 12
POOLED = (0, 1)
SHARES = (0.5, 0.25)  # of the MACs
PRIMARY = SHARES[0]
TESTED = 2_500  # of the test images
MERGED, PLAIN = "merged", "not merged"
RULES = (MERGED, PLAIN)
BASELINES = (*NAMED, SILHOUETTE)
IMAGES = 512  # for the rows with recalibrated batch norms, which decide nothing

Record = dict[str, Any]
Clusters = list[tuple[int, list[int]]]
"""Of each cluster of a layer's filters, in the medoids' order, the medoid and all members."""


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure every method on the networks that aren't there yet; first the share of the MACs that decides."""
    data = zoo.load_data(str(images), limit=5_000)
    for share in SHARES:
        for seed in (*EXPLORATION, *CONFIRMATION):
            run(seed, share, data, out, path)


def run(seed: int, share: float, data: zoo.DataBundle, out: Path, path: Path) -> None:
    """Measure every method on the network of a seed with a share of its MACs, and keep what isn't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    keys = [(seed, share, method, rule) for method in METHODS for rule in RULES]
    missing = [key for key in keys if key not in known]
    if not missing:
        return
    model = trained(seed, data, out)
    places = output_places(model, data.train.tensors[0][:1])
    test = TensorDataset(*data.test[:TESTED])
    unpruned = zoo.evaluate(model, test)
    clouds = [folded_filters(convolution, norm) for convolution, norm in convolutions(model)]
    counts = {name: [method(points) for points in clouds] for name, method in METHODS.items()}
    images = list(data.train.tensors[0][:IMAGES].split(128))
    for key in missing:
        _, _, method, rule = key
        widths = scaled_widths(counts[method], places, data, share)
        clusters = [clusters_of(points, width) for points, width in zip(clouds, widths, strict=True)]
        small = narrowed(model, clusters, data, merge=rule == MERGED)
        recalibrated = nni_topo.recalibrate_batch_norm(small, images)
        record = {
            "key": list(key),
            "counts": counts[method],
            "widths": widths,
            "macs": macs(widths, places, data) / macs(WIDTHS, places, data),
            "unpruned": unpruned,
            "test": zoo.evaluate(small, test),
            "recalibrated": zoo.evaluate(recalibrated, test),
        }
        if seed in EXPLORATION:
            record["validation"] = zoo.evaluate(small, data.validation)
        append_record(path, record)
        print(*key, widths, f"{100 * record['test']:.1f} %, {100 * record['recalibrated']:.1f} %", flush=True)


def trained(seed: int, data: zoo.DataBundle, out: Path) -> nn.Module:
    """Return the network of a seed, trained for six epochs."""
    torch.manual_seed(seed)
    model = four_convolutions(data.num_classes, data.in_channels, WIDTHS, POOLED)
    path = out / "checkpoints" / f"wide-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
    else:
        zoo.train(model, data, zoo.Recipe(epochs=6, batch_size=128, lr=0.1), seed=seed)
        zoo.save_checkpoint(path, model, {"seed": seed})
    return model.eval()


def convolutions(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Return each convolution with its batch norm, in order."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return list(zip(layers, norms, strict=True))


def output_places(model: nn.Module, image: Tensor) -> list[int]:
    """Return the number of places of each convolution's outputs."""
    found: list[int] = []
    handles = [
        layer.register_forward_hook(lambda _, given, output: found.append(output[0, 0].numel()))
        for layer, _ in convolutions(model)
    ]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return found


def folded_filters(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Points:
    """Return a layer's filters with their batch norm folded in, and the bias as the last coordinate, by row."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().double()
    biases = norm.bias.detach().double() - scale * norm.running_mean.double()
    filters = scale[:, None] * convolution.weight.detach().flatten(1).double()
    points: Points = torch.cat([filters, biases[:, None]], 1).cpu().numpy()
    return points


def macs(widths: tuple[int, ...] | list[int], places: list[int], data: zoo.DataBundle) -> int:
    """Return the multiplications for an image of a network of four convolutions with these widths."""
    inputs = [data.in_channels, *widths[:-1]]
    counted = sum(9 * before * after * area for before, after, area in zip(inputs, widths, places, strict=True))
    return counted + widths[-1] * data.num_classes


def scaled_widths(counts: list[int], places: list[int], data: zoo.DataBundle, share: float) -> list[int]:
    """Return the counts times the largest factor with which the network has at most a share of the MACs.

    Widths are rounded, at least one and at most the layer's filters.
    """
    limit = share * macs(WIDTHS, places, data)

    def widths(factor: float) -> list[int]:
        return [min(max(round(factor * count), 1), most) for count, most in zip(counts, WIDTHS, strict=True)]

    low, high = 0.0, float(max(WIDTHS))
    for _ in range(60):
        middle = (low + high) / 2
        if macs(widths(middle), places, data) <= limit:
            low = middle
        else:
            high = middle
    return widths(low)


def clusters_of(points: Points, count: int) -> Clusters:
    """Return Ward's clusters of a layer's filters; the medoid is nearest to the others, of equal ones the first."""
    labels = fcluster(linkage(points, "ward"), count, "maxclust")
    distances = nni_topo.topology.pairwise_distances(points)
    found = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        medoid = members[distances[np.ix_(members, members)].sum(axis=1).argmin()]
        found.append((int(medoid), members.tolist()))
    return sorted(found)


def narrowed(model: nn.Module, clusters: list[Clusters], data: zoo.DataBundle, *, merge: bool) -> nn.Module:
    """Return a network of the medoids; if asked, readers have the sum of the weights that read a medoid's cluster."""
    widths = tuple(len(layer) for layer in clusters)
    small = four_convolutions(data.num_classes, data.in_channels, widths, POOLED).eval()
    inputs: Clusters = [(channel, [channel]) for channel in range(data.in_channels)]
    layers = zip(convolutions(model), convolutions(small), clusters, strict=True)
    with torch.no_grad():
        for (old, old_norm), (new, new_norm), outputs in layers:
            medoids = [medoid for medoid, _ in outputs]
            new.weight.copy_(read_weights(old.weight, inputs, merge=merge)[medoids])
            state = {}
            for name, value in old_norm.state_dict().items():
                state[name] = value[medoids] if value.dim() else value
            new_norm.load_state_dict(state)
            inputs = outputs
        (old_head,) = (module for module in model.modules() if isinstance(module, nn.Linear))
        (new_head,) = (module for module in small.modules() if isinstance(module, nn.Linear))
        new_head.weight.copy_(read_weights(old_head.weight, inputs, merge=merge))
        new_head.bias.copy_(old_head.bias)
    return small


def read_weights(weight: Tensor, inputs: Clusters, *, merge: bool) -> Tensor:
    """Return a reader's weights (outputs, clusters, ...) for the medoids of its inputs."""
    return torch.stack([weight[:, members if merge else [medoid]].sum(1) for medoid, members in inputs], 1)


def figures(records: list[Record], seeds: range, share: float, rule: str, measure: str) -> dict[str, dict[int, float]]:
    """Return a measure by method, then by seed."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        seed, share_of, method, rule_of = record["key"]
        if seed in seeds and share_of == share and rule_of == rule:
            found.setdefault(method, {})[seed] = record[measure]
    return found


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, and the differences that the hypothesis is about.

    A network counts with a share of the MACs if it was measured with every method and rule.
    """
    measured = Counter(tuple(record["key"][:2]) for record in records)
    records = [record for record in records if measured[tuple(record["key"][:2])] == len(METHODS) * len(RULES)]
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        for share in SHARES:
            mine = {r["key"][0]: r["unpruned"] for r in records if r["key"][0] in seeds and r["key"][1] == share}
            if not mine:
                continue
            rows = []
            for method in METHODS:
                cells = [
                    method,
                    interval(list(figures(records, seeds, share, MERGED, "macs")[method].values())).show(100),
                ]
                for measure in ("test", "recalibrated"):
                    found = [figures(records, seeds, share, rule, measure)[method] for rule in RULES]
                    cells += [show_accuracies(list(by_seed.values())) for by_seed in found]
                rows.append(cells)
            unpruned = show_accuracies(list(mine.values()))
            networks = "1 network" if len(mine) == 1 else f"{len(mine)} networks"
            blocks.append(f"**{title}: at most {100 * share:g} % of the MACs, {networks}, unpruned {unpruned} %**")
            head = ["widths by", "MACs, %", *(f"{rule}, %" for rule in RULES)]
            head += [f"{rule}, recalibrated, %" for rule in RULES]
            blocks.append(markdown_table(head, rows))
    blocks += outcome(records)
    return "\n\n".join(blocks)


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences between the largest gap and each baseline on the fresh networks."""
    rows = []
    for share in SHARES:
        fresh = figures(records, CONFIRMATION, share, MERGED, "test")
        explored = figures(records, EXPLORATION, share, MERGED, "validation")
        networks = len(fresh.get(GAPS[0], {}))
        if networks < 2 or not explored:
            continue
        ours, best = chosen_gap(records), best_of(BASELINES, explored)
        for baseline in sorted(BASELINES, key=lambda name: name != best):
            label = f"{baseline} (best baseline)" if baseline == best else baseline
            rows.append([f"{100 * share:g} %", str(networks), label, *difference_row(fresh[ours], fresh[baseline])])
    if not rows:
        return []
    head = ["MACs", "networks", f"{chosen_gap(records)} against", "difference, points", "p"]
    title = "**Differences on fresh networks, merged, not recalibrated**"
    return [title, markdown_table(head, rows, text_columns=3)]


def chosen_gap(records: list[Record]) -> str:
    """Return the gap with the higher mean accuracy on validation images of exploration, at the share that decides."""
    return best_of(GAPS, figures(records, EXPLORATION, PRIMARY, MERGED, "validation"))


if __name__ == "__main__":
    main()
