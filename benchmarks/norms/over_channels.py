"""What it costs that means, maxima and response norms run over the channels that are left.

    python -m benchmarks.norms.over_channels --data-dir DIR --out runs/over_channels

trains two networks as ``trained_nets.py`` does: a ResNet-20 whose blocks have CBAM's gates (means and maxima over
channels), and a CNN with local response norms. Each is made to keep a share of its MACs by least squares, and is
measured after weight reconstruction and after distillation. Until commit e4c4fc05 all channels stayed that such an
operation reads; ``--as stay`` names the records of that commit's code, so that both are paired by network. A line per
network goes to ``over_channels.jsonl``, trained nets to files beside it; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.budgets.bench_equal_time import shown
from benchmarks.transformers.trained_nets import TrainedNet
from nni_topo import zoo
from nni_topo.network.runtime.reports import markdown_table
from nni_topo.studies.records import append_record, read_records

TITLES = {
    "over_channels:cbam_resnet20": "ResNet-20, CBAM (mean, maximum)",
    "over_channels:response_cnn": "CNN, local response norms",
}
SHARES, SEEDS = (0.5, 0.25), range(5)
VERSIONS = ("go", "stay")
"""Whether channels that these operations read can be removed."""


class CbamGates(nn.Module):
    """CBAM's gates of channels and of places: https://arxiv.org/abs/1807.06521."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )
        self.places = PlaceGate()

    def forward(self, x: Tensor) -> Tensor:
        """Return features (n, channels, h, w), gated."""
        gate = torch.sigmoid(self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), keepdim=True)))
        gated: Tensor = self.places(x * gate)
        return gated


class PlaceGate(nn.Module):
    """The gate of places, from the mean and the maximum over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 1, 3, padding=1, bias=False), nn.BatchNorm2d(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return features (n, channels, h, w), gated."""
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.norm(self.conv(pooled)))


def cbam_resnet20(num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    """Build a ResNet-20 with gates at the end of each residual."""
    model = zoo.create_model("resnet20", num_classes=num_classes, in_channels=in_channels, image_size=image_size)
    for module in list(model.modules()):
        if isinstance(norm := getattr(module, "norm2", None), nn.BatchNorm2d):
            module.norm2 = nn.Sequential(norm, CbamGates(norm.num_features))
    return model


def response_cnn(num_classes: int, in_channels: int) -> nn.Module:
    """Build a CNN with the response norms of AlexNet after its first two convolutions."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 32, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0),
        nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.LocalResponseNorm(5, 1e-2, 0.75, 2.0),
        nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(256, 96), nn.ReLU(), nn.Linear(96, num_classes),
    )  # fmt: skip


class Net(TrainedNet):
    """A trained network."""

    def recipe(self) -> zoo.Recipe:
        """Return how the network is trained."""
        return zoo.Recipe(8, lr=2e-3, weight_decay=0.01, optimizer="adamw")


def measured_on(start: Net, share: float) -> dict[str, Any]:
    """Return what the network is worth after weight reconstruction and after distillation, and its MACs."""
    dense = nni_topo.shrink(start.net, start.batches, {"flops": share}, distill=False, seed=start.seed, progress=False)
    distilled, _ = start.distilled(dense)
    example = start.batches[0][:2]
    return {
        "unpruned": start.unpruned,
        "reconstructed": start.worth(dense),
        "distilled": start.worth(distilled),
        "macs": zoo.count_macs(dense, example) / zoo.count_macs(start.net, example),
    }


def main() -> None:
    """Parse the command line, run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, help="folder of Fashion-MNIST's files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--as", dest="version", default="go", choices=VERSIONS, help="name of this code's records")
    parser.add_argument("--nets", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--limit", type=int, default=4_000, help="rows to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "over_channels.jsonl"
    done = {tuple(record["key"]) for record in read_records(path)}
    for seed, name, share in itertools.product(options.seeds, options.nets, SHARES):
        key = (name, seed, share, options.version)
        if key not in done:
            record = {"key": key, **measured_on(Net(name, seed, options), share)}
            append_record(path, record)
            print(record, flush=True)
    print(table(read_records(path)))


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network, share and stage: points lost both ways, and by how many fewer now."""
    by_key = {tuple(record["key"]): record for record in records}
    rows = []
    for name, share in itertools.product(TITLES, SHARES):
        seeds = [key[1] for key in by_key if (key[0], key[2], key[3]) == (name, share, "go")]
        pairs = [[by_key[name, seed, share, version] for seed in seeds] for version in ("stay", "go")]
        macs = [shown([100.0 * each["macs"] for each in mine], 0) for mine in pairs]
        for stage in ("reconstructed", "distilled"):
            before, after = ([100.0 * (each["unpruned"] - each[stage]) for each in mine] for mine in pairs)
            better = [one - other for one, other in zip(before, after, strict=True)]
            figures = [shown(values, 1) for values in (before, after, better)]
            rows.append([TITLES[name], f"{100 * share:g} %", stage, str(len(seeds)), *macs, *figures])
    head = ["network", "MACs asked for", "after", "seeds", "MACs before, %", "MACs now, %"]
    return markdown_table([*head, "points lost before", "now", "now is better by"], rows, text_columns=4)


if __name__ == "__main__":
    main()
