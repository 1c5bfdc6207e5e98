"""``nni-topo profile``: measure a network before and after pruning."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console

import nni_topo
from nni_topo.network.cost.measure import profile
from nni_topo.rules import whole
from nni_topo.runs.run import resolve_device
from nni_topo.studies.study import ModelVerb
from nni_topo.studies.tables import NumberTable
from nni_topo.zoo import create_model


@dataclass(frozen=True, kw_only=True)
class Profile(ModelVerb):
    """Measure one model before and after pruning, in turns: time, throughput, memory, MACs, parameters."""

    dense: Path | None = None  # file of nni_topo.save; None: the model is pruned at random
    ratio: float = 0.5  # without a file: share of the channels to prune at random, in [0, 1)
    round_to: int | None = None  # layers keep a multiple of so many channels
    batch_size: int = 1  # samples in a batch, at least 1
    image_size: int = 32  # height and width in pixels
    in_channels: int = 3  # channels of the images
    classes: int = 10  # classes of the output
    runs: int = 30  # timed passes, at least 1
    threads: int = 1  # threads on the CPU, at least 1

    def run(self, console: Console) -> int:
        """Print a row for each network."""
        for name in ("batch_size", "image_size", "in_channels", "classes", "runs", "threads"):
            whole(1).check(name, getattr(self, name), "nni-topo profile")
        sizes = {"num_classes": self.classes, "in_channels": self.in_channels, "image_size": self.image_size}
        torch.manual_seed(self.seed)
        model = create_model(self.model, width=self.width, **sizes).eval()
        images = torch.rand(self.batch_size, self.in_channels, self.image_size, self.image_size)
        if self.dense:
            dense = nni_topo.load(self.dense, model)
        else:
            config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": self.ratio}]
            pruner = nni_topo.RandomPruner(model, nni_topo.dependency_groups(model, images, config), seed=self.seed)
            _, masks = pruner.compress()
            pruner.unwrap_model()
            dense = nni_topo.to_dense(model, images, masks, round_to=self.round_to)
        place = resolve_device(self.device)
        nets = {"unpruned": model.to(place), "dense": dense.to(place)}
        rows = profile(nets, images.to(place), runs=self.runs, threads=self.threads)
        head = ("network", "ms", "samples/s", "peak MB", "MACs (M)", "parameters (k)")
        title = f"{self.model}, batch of {self.batch_size}, {place}"
        shown = []
        for row in rows:
            measured = f"{row.latency_ms:.2f}", f"{row.throughput:.0f}", f"{row.peak_bytes / 1e6:.1f}"
            shown.append((row.network, *measured, f"{row.macs / 1e6:.1f}", f"{row.params / 1e3:.1f}"))
        self.put_out(console, [asdict(row) for row in rows], [NumberTable(title, head, shown, text_columns=1)])
        return 0
