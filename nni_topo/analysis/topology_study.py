"""Studies of one model by name: the library functions behind ``nni-topo analyze``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nni_topo.analysis import TopologyStudy, study_topology
from nni_topo.network.dependency import dependency_groups
from nni_topo.pruners.budget import Budget
from nni_topo.runs.plan import DataChoice, ModelChoice, Target
from nni_topo.runs.run import trained
from nni_topo.runs.widths import inner_layers


def topology_study(
    model: ModelChoice,
    checkpoint: str | Path | None,
    data: DataChoice,
    target: Target,
    *,
    degrees: tuple[int, ...] = (0, 1),
    calibration: int = 0,
    seed: int = 0,
    device: str = "cpu",
) -> TopologyStudy:
    """Compare the clouds of a model's layers before and after topological pruning."""
    start = trained(model, data, checkpoint=checkpoint, seed=seed, device=device)
    net, example = start.net, start.example
    # death times deal out a share of the MACs
    knobs: dict[str, Any] = {"seed": seed}
    entry: dict[str, Any] = {"op_names": inner_layers(net, example)}
    if target.kind == "flops":
        budget = Budget(flops=target.value, allocation="topological")
        knobs |= {"budget": budget, "example_inputs": example}
    else:
        entry["sparse_ratio"] = target.value
    if calibration:
        knobs["calibration"] = start.images(calibration)
    return study_topology(net, dependency_groups(net, example, [entry]), degrees=degrees, **knobs)


def print_topology(study: TopologyStudy, title: str, console: Console) -> None:
    """Print a row per layer: points before and after, distances of the diagrams, Hausdorff distance."""
    table = Table("layer", title=title, title_justify="left")
    degrees = study.layers[0].bottleneck if study.layers else {}
    for name in ("points", "kept", *(f"bottleneck H{degree}" for degree in degrees), "Hausdorff"):
        table.add_column(name, justify="right")
    for layer in study.layers:
        distances = [f"{distance:.4f}" for distance in layer.bottleneck.values()]
        table.add_row(layer.name, str(layer.points), str(layer.kept), *distances, f"{layer.hausdorff:.4f}")
    console.print(table)
