"""T3 of HYPOTHESES.md: which blocks of a network can go, told from what enters and leaves them.

    python benchmarks/topology/which_blocks.py --images runs/fresh/images.npz --out runs/topology

Trains networks of two kinds, scores each block, removes it alone, lets the layer before it make up for it
(``remove_blocks``), and writes a line per network and block to ``which_blocks.jsonl``. The same command goes on where
it was stopped. ``images.npz`` is made by ``benchmarks/fresh_networks/split.py``.

    python benchmarks/topology/which_blocks.py --out benchmarks/records/topology --into benchmarks/results/topology.md

writes the tables of the records into a page, between the two comments that name this file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import rtd
import torch
from registered import CONFIRMATION, EXPLORATION, benchmark, best_of, difference_row
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax
from torch.utils.data import TensorDataset
from which_ratio import linear_cka

import nni_topo
from nni_topo import zoo
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import interval, markdown_table
from nni_topo.zoo.transformers import FeedForward, SelfAttention, TransformerBlock

SOURCE = "benchmarks/topology/which_blocks.py"  # as the comments around a page's tables say
WATCHED = 256  # unlabelled training images: what enters and leaves blocks, and what remove_blocks solves with
JUDGED = 512  # others, for the loss without a block
VALIDATED, TESTED = 1_000, 3_000
DEPTH, WIDTH, HEADS, HIDDEN, PATCH = 12, 48, 4, 96, 7

Record = dict[str, Any]


class DeepViT(nn.Module):
    """Twelve blocks over the patches of images, norms first, and a linear layer on their mean."""

    def __init__(self, num_classes: int, in_channels: int, image_size: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, WIDTH, PATCH, PATCH)
        self.positions = nn.Parameter(0.02 * torch.randn(1, (image_size // PATCH) ** 2, WIDTH))
        blocks = []
        for _ in range(DEPTH):
            attention = SelfAttention(WIDTH, HEADS, bias=True, causal=False)
            norms = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            blocks.append(TransformerBlock(attention, FeedForward(WIDTH, HIDDEN), norms, first=True))
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits (n, num_classes) of images (n, in_channels, h, w)."""
        states = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(states)).mean(1))
        return logits


def resnet56(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build ResNet-56 with half of its channels."""
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    return zoo.create_model("resnet56", **sizes, width=0.5)


RESNET, VIT = "ResNet-56", "ViT of twelve blocks"
NETWORKS: dict[str, tuple[Callable[..., nn.Module], zoo.Recipe]] = {
    RESNET: (resnet56, zoo.Recipe(epochs=6, lr=0.1)),
    VIT: (DeepViT, zoo.Recipe(epochs=10, lr=2e-3, optimizer="adamw")),
}


def main() -> None:
    """Parse the command line; run what is missing and print the tables."""
    benchmark(__doc__, SOURCE, tables, measure)


def measure(images: Path, out: Path, path: Path) -> None:
    """Measure the networks that aren't there yet."""
    expect_first_blocks()
    data = zoo.load_data(str(images), limit=5_000)
    for seed in (*EXPLORATION, *CONFIRMATION):
        for kind in NETWORKS:
            run(kind, seed, data, out, path)


def expect_first_blocks() -> None:
    """Silence the warning that nothing makes up for the first block of a list, before which there is no layer."""
    logging.getLogger("nni_topo.recovery.blocks").setLevel(logging.ERROR)


def run(kind: str, seed: int, data: zoo.DataBundle, out: Path, path: Path) -> None:
    """Score and remove the blocks of the network of a kind and a seed that aren't there yet."""
    model = untrained(kind, seed, data)
    known = {tuple(record["key"]) for record in read_records(path)}
    missing = [name for name in block_names(model) if (kind, seed, name) not in known]
    if not missing:
        return
    train(model, kind, seed, data, out)
    images = data.train.tensors[0]
    parts = {"validation": TensorDataset(*data.validation[:VALIDATED]), "test": TensorDataset(*data.test[:TESTED])}
    unpruned = {name: zoo.loss_and_accuracy(model, part)[0] for name, part in parts.items()}
    found = stream_scores(model, missing, images[:WATCHED])
    judges = images[WATCHED : WATCHED + JUDGED]
    for name in missing:
        found[name][WITHOUT] = loss_without(model, name, judges)
        short = nni_topo.remove_blocks(model, [name], [images[:WATCHED]])
        record: Record = {"key": [kind, seed, name], "unpruned": unpruned, "scores": found[name]}
        record |= {part_name: zoo.loss_and_accuracy(short, part)[0] for part_name, part in parts.items()}
        append_record(path, record)
        print(*record["key"], f"{record['test']:.3f}", flush=True)


def untrained(kind: str, seed: int, data: zoo.DataBundle) -> nn.Module:
    """Build the network of a kind and a seed."""
    torch.manual_seed(seed)
    build, _ = NETWORKS[kind]
    return build(data.num_classes, data.in_channels, data.image_size)


def train(model: nn.Module, kind: str, seed: int, data: zoo.DataBundle, out: Path) -> None:
    """Train a network in place, or read its weights if it was trained before."""
    path = out / "checkpoints" / f"blocks-{'resnet' if kind == RESNET else 'vit'}-{seed}.pt"
    if path.exists():
        zoo.load_checkpoint(path, model)
    else:
        zoo.train(model, data, NETWORKS[kind][1], seed=seed)
        zoo.save_checkpoint(path, model, {"seed": seed})
    model.eval()


def block_names(model: nn.Module) -> list[str]:
    """Return the names of the blocks that keep the shape of what enters them, in order."""
    names = []
    for parent, module in model.named_children():
        if isinstance(module, nn.Sequential):
            names += [f"{parent}.{key}" for key, block in module.named_children() if _keeps_shape(block)]
    return names


def _keeps_shape(block: nn.Module) -> bool:
    return isinstance(block, TransformerBlock) or getattr(block, "shortcut", block) is None


def stream_scores(model: nn.Module, names: list[str], images: Tensor) -> dict[str, dict[str, float]]:
    """Return by block each score of what enters and leaves it; the larger, the more the block does."""
    found: dict[str, dict[str, float]] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def look(_: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = {score: method(given[0], output) for score, method in STREAM.items()}

        return look

    handles = [model.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return found


def positions(values: Tensor) -> Tensor:
    """Return the vectors (positions of all images, channels) of a stream (n, c, h, w) or (n, tokens, c)."""
    return (values.movedim(1, -1) if values.dim() == 4 else values).flatten(0, -2)


def averaged(values: Tensor) -> Tensor:
    """Return the mean (n, channels) of a stream over the places of each image."""
    return values.flatten(2).mean(2) if values.dim() == 4 else values.mean(1)


def rtd_lite(one: Tensor, other: Tensor) -> float:
    """Return RTD-Lite between the clouds of images (n, ...), flattened, per image."""
    distances = [nni_topo.topology.pairwise_distances(each.flatten(1).double().numpy()) for each in (one, other)]
    return rtd.rtd_lite(*distances) / len(one)


def rtd_lite_averaged(one: Tensor, other: Tensor) -> float:
    """Return RTD-Lite between the clouds of images, each averaged over its places."""
    return rtd_lite(averaged(one), averaged(other))


def block_influence(one: Tensor, other: Tensor) -> float:
    """Return one minus the mean cosine of a position's vectors: X. Men et al., ShortGPT, arXiv:2403.03853."""
    return 1.0 - float(cosine_similarity(positions(one), positions(other), dim=1).mean())


def cka(one: Tensor, other: Tensor) -> float:
    """Return one minus linear CKA of images, flattened."""
    return 1.0 - linear_cka(one.flatten(1).double(), other.flatten(1).double())


def linear_residual(one: Tensor, other: Tensor) -> float:
    """Return which share of the variance of positions' vectors after a block no affine map of those before it gives."""
    before, after = positions(one).double(), positions(other).double()
    before, after = before - before.mean(0), after - after.mean(0)
    # A channel that is always zero makes the products singular.
    solution = torch.linalg.lstsq(before.T @ before, before.T @ after, driver="gelsd").solution
    return float((after - before @ solution).square().sum() / after.square().sum())


def loss_without(model: nn.Module, name: str, images: Tensor) -> float:
    """Return the divergence of the answers without a block from those with it, nothing making up for it."""
    parent, _, key = name.rpartition(".")
    container: Any = model.get_submodule(parent)
    block = container[int(key)]
    answers = []
    with torch.no_grad():
        answers.append(log_softmax(model(images), 1))
        container[int(key)] = nn.Identity()
        answers.append(log_softmax(model(images), 1))
        container[int(key)] = block
    return float(kl_div(answers[1], answers[0], reduction="batchmean", log_target=True))


RTD, RTD_AVERAGED = "RTD-Lite", "RTD-Lite, averaged over places"
COSINE, CKA, RESIDUAL, WITHOUT = "cosine", "CKA", "residual of a linear map", "held-out loss without the block"
STREAM: dict[str, Callable[[Tensor, Tensor], float]] = {
    RTD: rtd_lite,
    RTD_AVERAGED: rtd_lite_averaged,
    COSINE: block_influence,
    CKA: cka,
    RESIDUAL: linear_residual,
}
OURS, BASELINES = (RTD, RTD_AVERAGED), (COSINE, CKA, RESIDUAL, WITHOUT)
METHODS = (*OURS, *BASELINES)
CEILING = "the loss itself on validation images"  # how reproducible the ranks are


def correlations(
    records: list[Record], kind: str, seeds: range, measure: str = "test", methods: tuple[str, ...] = METHODS
) -> dict[str, dict[int, float]]:
    """Return Spearman's rank correlation of each score with the loss after a block's removal, by seed.

    Only networks are counted of which all blocks are there.
    """
    found: dict[str, dict[int, float]] = {}
    for seed in seeds:
        mine = [record for record in records if record["key"][:2] == [kind, seed]]
        if len(mine) < BLOCKS[kind]:
            continue
        losses = [record[measure] for record in mine]
        ranked = {method: [record["scores"][method] for record in mine] for method in methods}
        ranked[CEILING] = [record["validation"] for record in mine]
        for method, values in ranked.items():
            found.setdefault(method, {})[seed] = float(stats.spearmanr(values, losses).statistic)
    return found


BLOCKS = {RESNET: 25, VIT: DEPTH}
"""By kind, the blocks that keep the shape of what enters them."""


def chosen_cloud(records: list[Record]) -> str:
    """Return the cloud of RTD-Lite with the higher mean correlation on the validation images of exploration."""
    explored = [correlations(records, kind, EXPLORATION, "validation") for kind in NETWORKS]

    def mean(method: str) -> float:
        return float(np.mean([value for by_method in explored for value in by_method.get(method, {}).values()]))

    return max(OURS, key=mean)


def tables(records: list[Record]) -> str:
    """Return Markdown: exploration, confirmation, and the differences that the hypothesis is about."""
    blocks = []
    for title, seeds in (("Exploration", EXPLORATION), ("Confirmation", CONFIRMATION)):
        found = {kind: correlations(records, kind, seeds) for kind in NETWORKS}
        found = {kind: by_method for kind, by_method in found.items() if by_method}
        if not found:
            continue
        rows = []
        for method in (*METHODS, CEILING):
            shown = [interval(list(by_method[method].values())).show(1, 2) for by_method in found.values()]
            rows.append([method, *shown])
        head = ["score", *(f"{kind}, {len(by_method[RTD])} networks" for kind, by_method in found.items())]
        blocks += [f"**{title}: rank correlation with the loss after a block's removal**", markdown_table(head, rows)]
    blocks += outcome(records)
    return "\n\n".join(blocks)


def outcome(records: list[Record]) -> list[str]:
    """Return the table of differences between RTD-Lite and each baseline on the fresh networks."""
    rows = []
    for kind in NETWORKS:
        fresh = correlations(records, kind, CONFIRMATION)
        if len(fresh.get(RTD, {})) < 2:
            continue
        ours = chosen_cloud(records)
        best = best_of(BASELINES, correlations(records, kind, EXPLORATION, "validation"))
        for baseline in sorted(BASELINES, key=lambda name: name != best):
            label = f"{baseline} (best baseline)" if baseline == best else baseline
            rows.append([kind, label, *difference_row(fresh[ours], fresh[baseline], 1.0, 2)])
    if not rows:
        return []
    head = ["network", f"{ours} against", "difference of the correlation", "p"]
    return ["**Differences on fresh networks**", markdown_table(head, rows, text_columns=2)]


if __name__ == "__main__":
    main()
