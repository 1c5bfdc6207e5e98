"""Norms over the channels that are left, against norms over the original width: what narrower networks lose.

    python benchmarks/norms_left.py --data-dir DIR --out runs/norms_left

trains a ViT, a BERT, a ConvNeXt and a ResNet-20 with group norms as ``bench_block.py`` does, and cuts the width of what
their norms read to three quarters and to half (least squares). Weights are reconstructed twice: where norms count the
removed channels as zeros, and where they don't see them. Both networks are measured, distilled for 300 steps and
measured again. A third row is the first network with its norms replaced after its weights were reconstructed: the mean
ratio of both deviations over the calibration rows goes into the weight, the mean difference of both means into the
bias. A line per network goes to ``norms_left.jsonl``; the same command goes on where it was stopped. `norms_left.md`
says what was written down before the runs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bench_block import TrainedNet
from bench_equal_time import shown
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import nni_topo
from nni_topo import zoo
from nni_topo.network.layers.original_width import (
    ChannelsFirstLayerNorm,
    OriginalWidthGroupNorm,
    OriginalWidthLayerNorm,
    OriginalWidthRMSNorm,
)
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.studies.records import append_record, read_records

TITLES = {
    "vit_small": "ViT, small",
    "bert_small": "BERT, small",
    "norms_left:convnext_like": "ConvNeXt, small",
    "norms_left:groupnorm_resnet20": "ResNet-20, group norms",
}
FIRST = {"vit_small": "patches", "bert_small": "patches"}
"""The layer whose channels are the width that all norms read; of the others all coupled layers are cut."""
RECIPES = {
    "norms_left:convnext_like": zoo.Recipe(8, lr=2e-3, weight_decay=0.05, optimizer="adamw"),
    "norms_left:groupnorm_resnet20": zoo.Recipe(12, lr=0.1),
}
"""How networks are trained for which the zoo has no recipe."""
SHARES, SEEDS = (0.75, 0.5), range(1, 11)
STAGES = ("reconstructed", "distilled")
ROWS = ("original", "left", "replaced")
Norm = OriginalWidthLayerNorm | OriginalWidthRMSNorm | OriginalWidthGroupNorm


def convnext_like(num_classes: int, in_channels: int) -> nn.Module:
    """Build a ConvNeXt with five blocks in three stages, from images (n, in_channels, h, w) to logits."""
    stages = [CNBlockConfig(32, 64, 1), CNBlockConfig(64, 128, 2), CNBlockConfig(128, None, 2)]
    model = ConvNeXt(stages, num_classes=num_classes)
    model.features[0][0] = nn.Conv2d(in_channels, 32, 2, 2)
    return model


def groupnorm_resnet20(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build a ResNet-20 with four groups in each norm."""
    model = zoo.create_model("resnet20", num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.GroupNorm(4, child.num_features))
    return model


class _Net(TrainedNet):
    """A trained network, and the masks that cut its width."""

    def recipe(self) -> zoo.Recipe:
        """Return how the network is trained."""
        return RECIPES.get(self.name) or super().recipe()

    def masks_of_width(self, share: float) -> Any:
        """Prune the layers that write what norms read."""
        net = copy.deepcopy(self.net)
        asked = [{"op_types": ["Linear", "Conv2d", "Embedding"], "sparse_ratio": 1.0 - share}]
        groups = nni_topo.dependency_groups(net, self.batches[0][:2], asked)
        coupled = [entry for entry in groups if entry.get("dependency_group_id") is not None]
        if self.name in FIRST:
            own = {each["dependency_group_id"] for each in coupled if FIRST[self.name] in each["op_names"]}
            coupled = [each for each in coupled if each["dependency_group_id"] in own]
        knobs = {"calibration": self.batches, "example_inputs": self.batches[0][:2]}
        return nni_topo.create_pruner("reconstruction", net, groups.with_entries(coupled), **knobs).compress()[1]


def over_what_is_left(dense: nn.Module, batches: Sequence[Tensor]) -> nn.Module:
    """Return a copy whose norms are PyTorch's, over the channels that are left, fitted to those of the network."""
    norms = {name: module for name, module in dense.named_modules() if isinstance(module, Norm)}
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    count = 0

    def measured(name: str) -> Any:
        def look(entering: Tensor) -> None:
            own = ratio_and_shift(norms[name], entering)
            known = sums.get(name, (0.0, 0.0))
            sums[name] = known[0] + own[0], known[1] + own[1]

        return look

    with torch.no_grad(), watched([(module, measured(name)) for name, module in norms.items()]):
        for batch in batches:
            dense(batch)
            count += 1
    copied = copy.deepcopy(dense)
    for name, norm in norms.items():
        parent, _, own = name.rpartition(".")
        setattr(copied.get_submodule(parent), own, plain(norm, *(each / count for each in sums[name])))
    return copied


def ratio_and_shift(norm: Norm, entering: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean ratio of the deviations, left over original, and the mean difference of the means, by group."""
    if isinstance(norm, OriginalWidthGroupNorm):
        rows, count = entering.unflatten(1, (norm.num_groups, -1)), norm.counted
        values = rows.flatten(2).transpose(0, 1).double()  # (groups, samples, channels and places)
        share = rows.shape[2] / count
    else:
        dim = getattr(norm, "dim", -1)
        values = entering.movedim(dim, -1).flatten(0, -2)[None].double()
        share = values.shape[2] / norm.counted
    mean, square = values.mean(2), values.square().mean(2)
    eps = norm.eps or torch.finfo(entering.dtype).eps
    if isinstance(norm, OriginalWidthRMSNorm):
        return ((square + eps) / (share * square + eps)).sqrt().mean(1), torch.zeros(1)
    original = (share * square - (share * mean).square() + eps).sqrt()
    left = (square - mean.square() + eps).sqrt()
    return (left / original).mean(1), ((1.0 - share) * mean / original).mean(1)


def plain(norm: Norm, ratio: Tensor, shift: Tensor) -> nn.Module:
    """Return PyTorch's norm over what is left."""
    made: nn.Module
    if isinstance(norm, OriginalWidthGroupNorm):
        made = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps)
        each = norm.num_channels // norm.num_groups
        ratio, shift = ratio.repeat_interleave(each), shift.repeat_interleave(each)
    elif isinstance(norm, OriginalWidthRMSNorm):
        made = nn.RMSNorm(norm.normalized_shape, norm.eps)
    else:
        kind = ChannelsFirstLayerNorm if norm.dim == 1 else nn.LayerNorm
        made = kind(norm.normalized_shape, norm.eps)
    own: Any = made
    with torch.no_grad():
        own.weight.copy_(norm.weight * ratio.to(norm.weight))
        if getattr(own, "bias", None) is not None:
            own.bias.copy_(norm.bias + norm.weight * shift.to(norm.weight))
    return made.train(norm.training)


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--nets", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--limit", type=int, default=4_000, help="rows to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "norms_left.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for seed, name, share in itertools.product(options.seeds, options.nets, SHARES):
        if (name, seed, share) not in done:
            record = {"key": (name, seed, share), **measured_on(_Net(name, seed, options), share)}
            append_record(path, record)
            print(record, flush=True)
    print(table(read_records(path)))


@contextmanager
def removed_unseen() -> Iterator[None]:
    """Let PyTorch's layer and group norms leave out channels that are zero everywhere, as removed ones are."""
    whole = functional.layer_norm, functional.group_norm

    def layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        kept = x.flatten(0, -2).ne(0).any(0).nonzero().flatten()
        weight, bias = (None if each is None else each[kept] for each in (weight, bias))
        normed = whole[0](x[..., kept], (len(kept),), weight, bias, eps)
        return torch.zeros_like(x).index_copy(-1, kept, normed)

    def group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Tensor:
        kept = x.transpose(0, 1).flatten(1).ne(0).any(1).nonzero().flatten()
        weight, bias = (None if each is None else each[kept] for each in (weight, bias))
        return torch.zeros_like(x).index_copy(1, kept, whole[1](x[:, kept], groups, weight, bias, eps))

    patched: Any = functional
    patched.layer_norm, patched.group_norm = layer_norm, group_norm
    try:
        yield
    finally:
        patched.layer_norm, patched.group_norm = whole


def measured_on(start: _Net, share: float) -> dict[str, Any]:
    """Return what the networks are worth at each stage."""
    masks = start.masks_of_width(share)
    original, _ = start.recovered(masks, "reconstruct")
    with removed_unseen():
        left = with_plain_norms(start.recovered(masks, "reconstruct")[0])
    found: dict[str, Any] = {"unpruned": start.unpruned}
    for norms, net in (("original", original), ("left", left)):
        distilled, _ = start.distilled(net)
        found[norms] = {"reconstructed": start.worth(net), "distilled": start.worth(distilled)}
    found["replaced"] = {"reconstructed": start.worth(over_what_is_left(original, start.batches))}
    return found


def with_plain_norms(dense: nn.Module) -> nn.Module:
    """Return a copy whose norms are PyTorch's, over the channels that are left, with their weights as they are."""
    copied = copy.deepcopy(dense)
    for name, norm in dense.named_modules():
        if isinstance(norm, Norm):
            groups = getattr(norm, "num_groups", 1)
            parent, _, own = name.rpartition(".")
            setattr(copied.get_submodule(parent), own, plain(norm, torch.ones(groups), torch.zeros(groups)))
    return copied


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, width and stage: points lost, and by how many fewer without removed channels."""
    rows = []
    for name, share in dict.fromkeys((each["key"][0], each["key"][2]) for each in records):
        mine = [each for each in records if (each["key"][0], each["key"][2]) == (name, share)]
        for stage in STAGES:
            lost = {
                row: [100.0 * (each["unpruned"] - each[row][stage]) for each in mine if stage in each[row]]
                for row in ROWS
            }
            better = [one - other for one, other in zip(lost["original"], lost["left"], strict=True)]
            figures = [shown(values, 1) if values else "" for values in (*lost.values(), better)]
            rows.append([TITLES[name], f"{100 * share:g} %", stage, str(len(mine)), *figures])
    head = ["network", "width kept", "after", "seeds", "points lost, original width", "over what is left"]
    return markdown_table([*head, "replaced afterwards", "what is left is better by"], rows, text_columns=4)


if __name__ == "__main__":
    main()
