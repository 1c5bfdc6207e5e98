"""Studies of the topology of weights: what ``nni-topo analyze compression`` and ``persistence`` compute and print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nni_topo import zoo
from nni_topo.analysis import (
    CriticalCompression,
    NeuralPersistence,
    PersistenceTracker,
    critical_compression_ratio,
)
from nni_topo.analysis.compression import Convention
from nni_topo.errors import ConfigError
from nni_topo.runs.plan import DataChoice, ModelChoice
from nni_topo.runs.run import build_model, load_model_data, resolve_device


def compression_study(
    model: ModelChoice, input_size: Sequence[int], *, classes: int = 10, convention: Convention = "theorem"
) -> CriticalCompression:
    """Count the critical compression ratios of a model by name; ``input_size`` is of one input, without the batch."""
    if not input_size or min(input_size) < 1:
        raise ConfigError(f"input_size must be one or more numbers of at least 1, got {tuple(input_size)}")
    # a model from outside may take any dimensions
    if model.name in zoo.list_models() and (len(input_size) != 3 or input_size[1] != input_size[2]):
        raise ConfigError(f"input_size must be channels, height and width of a square, got {tuple(input_size)}")
    net = zoo.create_model(
        model.name,
        num_classes=classes,
        in_channels=input_size[0],
        image_size=input_size[-1],
        width=model.width,
        seed=0,
    )
    return critical_compression_ratio(net, torch.zeros(1, *input_size), convention)


def print_compression(found: CriticalCompression, title: str, console: Console) -> None:
    """Print a row per layer: edges, tree edges, critical ratio, and how far a mask of weights can go."""
    table = Table("layer", "kind", title=title, title_justify="left")
    for name in ("edges", "tree edges", "critical ratio", "weights", "channel tree", "ratio of weights"):
        table.add_column(name, justify="right")
    for name, count in found.counts.items():
        numbers = (str(count.edges), str(count.tree_edges), f"{count.ratio:.5f}")
        weights = (str(count.weights), str(count.channel_tree), f"{count.weight_ratio:.5f}")
        table.add_row(escape(name), count.kind, *numbers, *weights)
    counts = found.counts.values()
    total, tree = sum(c.weights for c in counts), sum(c.channel_tree for c in counts)
    edges, tree_edges = sum(c.edges for c in counts), sum(c.tree_edges for c in counts)
    table.add_section()
    table.add_row(
        "all", "", str(edges), str(tree_edges), f"{found.final:.5f}", str(total), str(tree), f"{total / tree:.5f}"
    )
    console.print(table)
    console.print("by kind:", ", ".join(f"{kind} {ratio:.4f}" for kind, ratio in found.by_kind().items()))
    if found.skipped:
        console.print("left out:", ", ".join(f"{name} ({why})" for name, why in found.skipped.items()), markup=False)


@dataclass(frozen=True)
class PersistenceStudy:
    """Neural persistence before and after each epoch of a training, or of one trained model."""

    history: list[NeuralPersistence]

    def to_dict(self) -> dict[str, Any]:
        """Return the trend of every layer and of the whole, and the last state in full."""
        return {
            "totals": [record.total for record in self.history],
            "layers": {name: [record.layers[name] for record in self.history] for name in self.history[-1].layers},
            "last": self.history[-1].to_dict(),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``persistence.json`` and ``persistence.png``; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document, picture = folder / "persistence.json", folder / "persistence.png"
        document.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        self._figure().savefig(picture, dpi=130)
        return [document, picture]

    def _figure(self) -> Figure:
        """Draw the layers' trends, and the deaths of the last state."""
        figure = Figure(figsize=(10.0, 4.0), layout="constrained")
        trend, deaths = figure.subplots(1, 2)
        last = self.history[-1]
        for index, name in enumerate(last.layers):
            color = f"C{index % 10}"
            trend.plot([record.layers[name] for record in self.history], ".-", color=color, label=name)
            curve = last.deaths[name]
            deaths.plot([(i + 1) / len(curve) for i in range(len(curve))], curve, color=color)
        trend.set(xlabel="epoch", ylabel="normalized neural persistence" if last.normalized else "neural persistence")
        trend.legend(fontsize="xx-small", ncols=1 + len(last.layers) // 12)
        deaths.set(xlabel="share of the tree's edges", ylabel="|w| / max |w|", title="last state")
        for axis in (trend, deaths):
            axis.grid(alpha=0.3)
        return figure


def persistence_study(
    model: ModelChoice,
    checkpoint: str | Path | None,
    data: DataChoice,
    *,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> PersistenceStudy:
    """Compute neural persistence (its arguments: ``options``), along a training where there is no checkpoint."""
    place = resolve_device(device)
    bundle = load_model_data(model, data)
    net = build_model(model, bundle, seed).to(place)
    if checkpoint is not None:
        zoo.load_checkpoint(checkpoint, net)
    tracker = PersistenceTracker(net, bundle.test.tensors[0][:1].to(place), **options)
    if checkpoint is None:
        zoo.train(net, bundle, zoo.default_recipe(model.name, data.name), seed=seed, device=place, callback=tracker)
    return PersistenceStudy(tracker.history)


def print_persistence(study: PersistenceStudy, title: str, console: Console) -> None:
    """Print a row per layer: its persistence at the beginning and at the end, and its tree's edges."""
    first, last = study.history[0], study.history[-1]
    table = Table("layer", title=title, title_justify="left")
    for name in ("tree edges", "first", "last"):
        table.add_column(name, justify="right")
    for name, value in last.layers.items():
        table.add_row(escape(name), str(len(last.deaths[name])), f"{first.layers[name]:.4f}", f"{value:.4f}")
    table.add_section()
    table.add_row("sum", "", f"{first.total:.4f}", f"{last.total:.4f}")
    console.print(table)
    if last.skipped:
        console.print("left out:", ", ".join(f"{name} ({why})" for name, why in last.skipped.items()), markup=False)
