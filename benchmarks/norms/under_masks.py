"""What networks lose that were trained under NNI's masks, when the masked channels are removed.

    python -m benchmarks.norms.under_masks --data-dir DIR --out runs/under_masks

trains a ViT, a BERT, a ConvNeXt, a ResNet-20 with group norms and a LeNet with sigmoids as ``trained_nets.py`` does,
masks a quarter or a half of the channels by NNI's ``L1NormPruner`` (of the first four the width that norms read, of the
LeNet all inner layers), trains three more epochs under the masks, and makes the network dense: as it is, and with
``constants="keep"``. A line per network goes to ``under_masks.jsonl``; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import copy
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from nni.compression.pruning import L1NormPruner
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import nni_topo
from benchmarks.budgets.bench_equal_time import shown
from benchmarks.transformers.trained_nets import TrainedNet
from nni_topo import zoo
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.studies.records import append_record, read_records

TITLES = {
    "vit_small": "ViT, small",
    "bert_small": "BERT, small",
    "under_masks:convnext_like": "ConvNeXt, small",
    "under_masks:groupnorm_resnet20": "ResNet-20, group norms",
    "under_masks:sigmoid_lenet": "LeNet, sigmoids",
}
FIRST = {"vit_small": "patches", "bert_small": "patches"}
"""The layer whose channels are the width that all norms read; of the next two all coupled layers are cut."""
RECIPES = {
    "under_masks:convnext_like": zoo.Recipe(8, lr=2e-3, weight_decay=0.05, optimizer="adamw"),
    "under_masks:groupnorm_resnet20": zoo.Recipe(12, lr=0.1),
    "under_masks:sigmoid_lenet": zoo.Recipe(12, lr=2e-3, optimizer="adamw"),
}
"""How networks are trained for which the zoo has no recipe."""
SHARES, SEEDS = (0.75, 0.5), range(1, 11)
WAYS = ("zero", "keep")


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


def sigmoid_lenet(num_classes: int, in_channels: int) -> nn.Module:
    """Build a small CNN whose activations aren't zero at zero."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.Sigmoid(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Sigmoid(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(128, 64), nn.Sigmoid(), nn.Linear(64, num_classes),
    )  # fmt: skip


class Net(TrainedNet):
    """A trained network, and the layers of it that are masked."""

    def recipe(self) -> zoo.Recipe:
        """Return how the network is trained."""
        return RECIPES.get(self.name) or super().recipe()

    def entries(self, net: nn.Module, share: float) -> Any:
        """Return a config_list of the layers that write what norms read; without norms over channels, of all layers."""
        asked = [{"op_types": ["Linear", "Conv2d", "Embedding"], "sparse_ratio": 1.0 - share}]
        groups = nni_topo.dependency_groups(net, self.batches[0][:2], asked)
        coupled = [entry for entry in groups if entry.get("dependency_group_id") is not None]
        if self.name in FIRST:
            own = {each["dependency_group_id"] for each in coupled if FIRST[self.name] in each["op_names"]}
            coupled = [each for each in coupled if each["dependency_group_id"] in own]
        return groups.with_entries(coupled) if coupled else groups


def measured_on(start: Net, share: float) -> dict[str, Any]:
    """Return what the network is worth under masks, and dense."""
    net = copy.deepcopy(start.net)
    pruner = L1NormPruner(net, start.entries(net, share))
    _, masks = pruner.compress()
    recipe = start.recipe()
    zoo.train(net, start.data, replace(recipe, epochs=3, lr=0.3 * recipe.lr), seed=start.seed, progress=False)
    net.eval()
    found = {"unpruned": start.unpruned, "masked": start.worth(net)}
    pruner.unwrap_model()
    for way in WAYS:
        found[way] = start.worth(nni_topo.to_dense(net, start.batches[0], masks, constants=way))
    return found


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
    path = options.out / "under_masks.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for seed, name, share in itertools.product(options.seeds, options.nets, SHARES):
        if (name, seed, share) not in done:
            record = {"key": (name, seed, share), **measured_on(Net(name, seed, options), share)}
            append_record(path, record)
            print(record, flush=True)
    print(table(read_records(path)))


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network and width: accuracy under masks, and points that the dense networks lose to it."""
    rows = []
    for name, share in dict.fromkeys((each["key"][0], each["key"][2]) for each in records):
        mine = [each for each in records if (each["key"][0], each["key"][2]) == (name, share)]
        lost = []
        for way in (*WAYS, "original"):
            values = [100.0 * (each["masked"] - each[way]) for each in mine if way in each]
            lost.append(shown(values, 1) if values else "")
        accuracies = [shown([100.0 * each[key] for each in mine], 1) for key in ("unpruned", "masked")]
        rows.append([TITLES[name], f"{100 * share:g} %", str(len(mine)), *accuracies, *lost])
    head = ["network", "channels kept", "seeds", "unpruned", "trained under masks", "dense loses"]
    head += ['dense loses, `constants="keep"`', "norms over the original width lost"]
    return markdown_table(head, rows, text_columns=3)


def table_of_norms(records: list[dict[str, Any]]) -> str:
    """Return the table of ``norms_left.jsonl``: points lost by norms, and by how many fewer over what is left."""
    titles = {name.partition(":")[2] or name: title for name, title in TITLES.items()}
    rows = []
    for name, share in dict.fromkeys((each["key"][0], each["key"][2]) for each in records):
        mine = [each for each in records if (each["key"][0], each["key"][2]) == (name, share)]
        for stage in ("reconstructed", "distilled"):
            lost = {
                norms: [100.0 * (each["unpruned"] - each[norms][stage]) for each in mine if stage in each[norms]]
                for norms in ("original", "left", "replaced")
            }
            better = [one - other for one, other in zip(lost["original"], lost["left"], strict=True)]
            figures = [shown(values, 1) if values else "" for values in (*lost.values(), better)]
            rows.append([titles[name.partition(":")[2] or name], f"{100 * share:g} %", stage, str(len(mine)), *figures])
    head = ["network", "width kept", "after", "seeds", "points lost, original width", "over what is left"]
    return markdown_table([*head, "replaced afterwards", "what is left is better by"], rows, text_columns=4)


if __name__ == "__main__":
    main()
