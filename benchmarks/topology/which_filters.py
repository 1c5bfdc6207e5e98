"""T6 of HYPOTHESES.md: selection criteria where weights are frozen and batch norms are recalibrated.

    python benchmarks/topology/which_filters.py --images runs/fresh/images.npz --out runs/topology

Trains networks of four convolutions with batch norms, removes the same number of filters of every layer by each
criterion, recalibrates the batch norms, and writes a line per network, criterion and share to ``which_filters.jsonl``.
The same command goes on where it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_filters.py --out benchmarks/records/topology --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metric_magnitude import magnitude_subset
from numpy.typing import NDArray
from registered import CONFIRMATION, EXPLORATION, benchmark, best_of, difference_row
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table, show_accuracies

SOURCE = "benchmarks/topology/which_filters.py"  # as the comments around a page's tables say
SHARES = (0.5, 0.25)  # of every layer's filters that stay
SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # over the median distance
IMAGES = 512  # unlabelled, for every criterion and the recalibration
WIDTHS = (24, 24, 48, 48)
BASELINES = ("random", "l1", "fpgm", "functional Hausdorff", "least squares")
MAGNITUDE, ACTIVATIONS, LARGEST = "magnitude, contributions", "magnitude, activations", "largest contribution"

Record = dict[str, Any]


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure the exploration, choose the scales from it, and measure the confirmation."""
    data = zoo.load_data(str(images), limit=5_000)
    for seed in EXPLORATION:
        run(seed, data, out, path, SCALES)
    scales = {name: chosen_scale(read_records(path), name) for name in (MAGNITUDE, ACTIVATIONS)}
    for seed in CONFIRMATION:
        run(seed, data, out, path, scales)


def four_convolutions(
    num_classes: int, in_channels: int, widths: tuple[int, ...] = WIDTHS, pooled: tuple[int, ...] = (1, 3)
) -> nn.Module:
    """Build four 3x3 convolutions with batch norms and ReLUs, averaged, and a linear layer; some are pooled."""
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise((in_channels, *widths))):
        layers += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        if index in pooled:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))


def trained(seed: int, data: zoo.DataBundle, out: Path) -> nn.Module:
    """Return the network of a seed, trained for six epochs."""
    torch.manual_seed(seed)
    model = four_convolutions(data.num_classes, data.in_channels)
    path = out / "checkpoints" / f"four-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
    else:
        zoo.train(model, data, zoo.Recipe(epochs=6, batch_size=128, lr=0.1), seed=seed)
        zoo.save_checkpoint(path, model, {"seed": seed})
    return model.eval()


def run(seed: int, data: zoo.DataBundle, out: Path, path: Path, scales: tuple[float, ...] | dict[str, float]) -> None:
    """Measure every criterion on the network of a seed, and keep what isn't there yet."""
    known = {tuple(record["key"]) for record in read_records(path)}
    rows = [*BASELINES, LARGEST]
    for name in (MAGNITUDE, ACTIVATIONS):
        each = (scales[name],) if isinstance(scales, dict) else scales
        rows += [f"{name}, {scale:g}" for scale in each]
    missing = [(share, row) for share in SHARES for row in rows if (seed, share, row) not in known]
    if not missing:
        return
    model = trained(seed, data, out)
    images = data.train.tensors[0][:IMAGES]
    unpruned = zoo.evaluate(model, data.test)
    clouds = {MAGNITUDE: list(contributions(model, images)), ACTIVATIONS: list(activations(model, images))}
    for share, row in missing:
        dense = nni_topo.to_dense(model, images[:2], masks_of(row, share, model, images, clouds, seed))
        dense = nni_topo.recalibrate_batch_norm(dense, list(images.split(128)))
        record = {
            "key": [seed, share, row],
            "unpruned": unpruned,
            "validation": zoo.evaluate(dense, data.validation),
            "test": zoo.evaluate(dense, data.test),
        }
        append_record(path, record)
        print(*record["key"], f"{100 * record['test']:.1f} %", flush=True)


def masks_of(
    row: str, share: float, model: nn.Module, images: Tensor, clouds: dict[str, list[Tensor]], seed: int
) -> dict[str, dict[str, Tensor]]:
    """Return masks that keep a share of every convolution's filters."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    if row in BASELINES:
        return pruner_masks(row, share, model, names, images, seed)
    masks = {}
    for place, name in enumerate(names):
        weight = model.get_submodule(name).weight
        keep = round(share * len(weight))
        if row == LARGEST:
            kept = clouds[MAGNITUDE][place].diagonal().argsort(descending=True, stable=True)[:keep]
        else:
            kind, scale = row.rsplit(", ", 1)
            kept = most_magnitude(clouds[kind][place], keep, float(scale))
        mask = torch.zeros_like(weight)
        mask[kept] = 1.0
        masks[name] = {"weight": mask}
    return masks


def pruner_masks(
    row: str, share: float, model: nn.Module, names: list[str], images: Tensor, seed: int, **more: Any
) -> dict[str, dict[str, Tensor]]:
    """Return the masks of a pruner of NNI or of the package."""
    names_of_rows = {
        "functional Hausdorff": "topological",
        "least squares": "reconstruction",
        "least squares with exchanges": "exchange:ExchangePruner",
    }
    name = names_of_rows.get(row, row)
    given = {"calibration": list(images.split(128)), "seed": seed}
    knobs = {knob: value for knob, value in given.items() if knob in nni_topo.pruner_info(name).knobs()}
    # in the middle between two numbers of filters, so that rounding down decides nothing
    config = []
    for layer in names:
        filters = len(model.get_submodule(layer).weight)
        config.append({"op_names": [layer], "sparse_ratio": (filters - round(share * filters) + 0.5) / filters})
    pruner = nni_topo.create_pruner(name, model, config, **knobs, **more)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def reader_inputs(
    model: nn.Module, images: Tensor, readers: list[nn.Module] | None = None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield of each reader its inputs (images, channels), averaged over places, and its weights.

    The weights have shape (channels, weights that read the channel). Readers are all layers but the first one, unless
    others are given.
    """
    if readers is None:
        readers = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][1:]
    found: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found[module] = given[0]

    handles = [layer.register_forward_pre_hook(note) for layer in readers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    for reader in readers:
        values = found[reader]
        weight = reader.get_parameter("weight").detach()
        yield values.flatten(2).mean(2) if values.dim() == 4 else values, weight.transpose(0, 1).flatten(1)


def contributions(model: nn.Module, images: Tensor, readers: list[nn.Module] | None = None) -> Iterator[Tensor]:
    """Yield of each reader the Gram matrix (channels, channels) of what its input channels bring it."""
    for values, weights in reader_inputs(model, images, readers):
        centred = (values - values.mean(0)).double()
        yield (centred.T @ centred / len(values)) * (weights.double() @ weights.double().T)


def activations(model: nn.Module, images: Tensor) -> Iterator[Tensor]:
    """Yield of each convolution the Gram matrix (channels, channels) of its activations, not centred."""
    for values, _ in reader_inputs(model, images):
        yield values.double().T @ values.double() / len(values)


def most_magnitude(gram: Tensor, keep: int, scale: float) -> Tensor:
    """Return the channels to keep by the magnitude of their cloud and the origin; scale over the median distance."""
    distances = cloud_distances(gram)
    median = float(np.median(distances[np.triu_indices(len(distances), 1)]))
    kept = magnitude_subset(distances, keep + 1, scale / median, base=0)
    return torch.from_numpy(kept[1:] - 1)


def cloud_distances(gram: Tensor) -> NDArray[np.float64]:
    """Return the distances (channels + 1, channels + 1) between the origin, which comes first, and the channels."""
    channels = len(gram)
    with_origin = torch.zeros(channels + 1, channels + 1, dtype=torch.float64)
    with_origin[1:, 1:] = gram
    norms = with_origin.diagonal()
    squares = norms[:, None] + norms[None, :] - with_origin - with_origin.T
    distances: NDArray[np.float64] = squares.clamp(min=0.0).sqrt().fill_diagonal_(0.0).numpy()
    return distances


def chosen_scale(records: list[Record], name: str) -> float:
    """Return the scale with the highest mean accuracy on the validation images of the exploration."""
    explored = by_row(records, EXPLORATION, "validation")

    def mean(scale: float) -> float:
        return float(np.mean([explored[share, f"{name}, {scale:g}"][seed] for share in SHARES for seed in EXPLORATION]))

    return max(SCALES, key=mean)


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, and the difference that the hypothesis is about."""
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        found = by_row(records, seeds)
        networks = {record["key"][0] for record in records if record["key"][0] in seeds}
        if not networks:
            continue
        unpruned = [next(r["unpruned"] for r in records if r["key"][0] == seed) for seed in sorted(networks)]
        lines = [["unpruned", *[show_accuracies(unpruned)] * len(SHARES)]]
        for row in dict.fromkeys(row for _, row in found):
            shown = [show_accuracies(list(found[share, row].values())) for share in SHARES]
            lines.append([row, *shown])
        head = ["criterion", *(f"{100 * share:g} % of every layer kept, %" for share in SHARES)]
        blocks += [f"**{title}, {len(networks)} networks**", markdown_table(head, lines)]
    blocks += outcome(records)
    return "\n\n".join(blocks)


def by_row(records: list[Record], seeds: range, measure: str = "test") -> dict[tuple[float, str], dict[int, float]]:
    """Return accuracies by share and criterion, then by seed."""
    found: dict[tuple[float, str], dict[int, float]] = {}
    for record in records:
        seed, share, row = record["key"]
        if seed in seeds:
            found.setdefault((share, row), {})[seed] = record[measure]
    return found


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences from the best baseline and from each other baseline on the fresh networks."""
    fresh = by_row(records, CONFIRMATION)
    if not fresh:
        return []
    explored = by_row(records, EXPLORATION, "validation")
    ours = f"{MAGNITUDE}, {chosen_scale(records, MAGNITUDE):g}"
    lines = []
    for share in SHARES:
        best = best_of(BASELINES, {row: explored[share, row] for row in BASELINES})
        for baseline in sorted(BASELINES, key=lambda row: row != best):
            label = f"{baseline} (best baseline)" if baseline == best else baseline
            row = difference_row(fresh[share, ours], fresh[share, baseline])
            lines.append([f"{100 * share:g} %", label, *row])
    head = ["kept", f"{ours} against", "difference, points", "p"]
    networks = len(fresh[SHARES[0], ours])
    return [f"**Differences on {networks} fresh networks**", markdown_table(head, lines, text_columns=2)]


if __name__ == "__main__":
    main()
