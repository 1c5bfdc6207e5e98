"""Whether `shrink` should remove units of recurrent layers where nobody names them: both ways at equal MACs.

    python benchmarks/recovery/bench_recurrent.py

trains networks that read scikit-learn's digits row by row (8 steps of 8 numbers): two linear layers, an LSTM or a GRU,
and two more linear layers. `shrink` makes each as small as a share of its MACs, once from the linear layers alone and
once from the recurrent layer too. Calibration data are the training images, without labels; the accuracy is that of 450
images that nothing else has used. Prints a table in Markdown: points lost of the unpruned network, mean and 95 %
interval over the seeds, and their difference by seed.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.studies.tables import interval

KINDS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "LSTM": (nn.LSTM, {}),
    "GRU": (nn.GRU, {}),
    "LSTM of 2 levels, both directions": (nn.LSTM, {"num_layers": 2, "bidirectional": True}),
}
SHARES = (0.65, 0.3)
SEEDS = (0, 1, 2)
EPOCHS, BATCH, UNITS = 30, 32, 48


class Reader(nn.Module):
    """Reads an image row by row, and names its class from the last output."""

    def __init__(self, kind: type[nn.RNNBase], knobs: dict[str, Any]) -> None:
        super().__init__()
        directions = 2 if knobs.get("bidirectional") else 1
        self.embed = nn.Sequential(nn.Linear(8, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU())
        self.body = kind(64, UNITS, batch_first=True, **knobs)
        self.head = nn.Sequential(nn.Linear(directions * UNITS, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, rows: Tensor) -> Tensor:
        """Compute the classes' scores, ``(samples, 10)``, of ``(samples, 8, 8)``."""
        states: Tensor = self.body(self.embed(rows))[0]
        scores: Tensor = self.head(states.mean(1))
        return scores


def accuracy(net: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the percentage of images whose class is right."""
    with torch.no_grad():
        return 100.0 * float((net.eval()(images).argmax(1) == labels).float().mean())


def trained(kind: str, seed: int, images: Tensor, labels: Tensor) -> nn.Module:
    """Train a network on the images."""
    torch.manual_seed(seed)
    net = Reader(*KINDS[kind])
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval()


def main() -> None:
    """Train, shrink both ways and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--no-distill", action="store_true", help="stop after weight reconstruction")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = load_digits()
    images, labels = torch.tensor(found.images, dtype=torch.float32) / 16.0, torch.tensor(found.target)
    rows = train_test_split(range(len(images)), test_size=450, random_state=0, stratify=labels)
    train, test = (torch.tensor(each) for each in rows)
    print("| network | MACs kept | linear layers alone | units too | difference |\n|---|---:|---:|---:|---:|")
    for kind in options.kinds:
        nets = [trained(kind, seed, images[train], labels[train]) for seed in options.seeds]
        for share in SHARES:
            lost: dict[bool, list[float]] = {False: [], True: []}
            for seed, net in zip(options.seeds, nets, strict=True):
                for with_units in lost:
                    names = ["embed.0", "head.0"] + ["body"] * with_units
                    try:
                        small = nni_topo.shrink(
                            net, images[train].split(256), {"flops": share}, layers=names, seed=seed,
                            distill=not options.no_distill, progress=False,
                        )  # fmt: skip
                    except nni_topo.errors.ConfigError:
                        continue  # the linear layers alone have too few MACs to lose
                    kept = zoo.count_macs(small, images[:1]) / zoo.count_macs(net, images[:1])
                    if kept > 1.03 * share:
                        continue
                    before, after = (accuracy(each, images[test], labels[test]) for each in (net, small))
                    lost[with_units].append(before - after)
            gained = [one - other for one, other in zip(lost[False], lost[True], strict=False)]
            cells = [told(lost[False]), told(lost[True]), told(gained, sign=True)]
            print(f"| {kind} | {share:.2f} | {' | '.join(cells)} |", flush=True)


def told(values: list[float], *, sign: bool = False) -> str:
    """Write a mean and its 95 % interval; what a budget didn't allow is named."""
    return interval(values).show(sign=sign) if values else "can't be met"


if __name__ == "__main__":
    main()
