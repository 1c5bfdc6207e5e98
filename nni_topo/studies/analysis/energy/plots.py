"""Pictures of an energy study: compression, accuracy and loss per layer, a line per threshold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from matplotlib.figure import Figure

from nni_topo.studies.analysis.energy.study import EnergyStudy, LayerEnergy, Quality
from nni_topo.studies.pictures import finish, single

_WIDTH_PER_LAYER = 0.42


def energy_figures(study: EnergyStudy) -> dict[str, Figure]:
    """Return the pictures by name: ``compression`` and, with an evaluation, ``accuracy``, ``loss``, ``fitness``."""
    figures = {"compression": compression_plot(study)}
    if study.baseline is not None:
        figures["accuracy"] = _quality_plot(study, "accuracy %", lambda quality: 100.0 * quality.accuracy)
        figures["loss"] = _quality_plot(study, "loss (nats)", lambda quality: quality.loss)
        figures["fitness"] = fitness_plot(study)
    return figures


def compression_plot(study: EnergyStudy) -> Figure:
    """Draw the share of filters removed per layer, a line per threshold."""
    lines = {t: [100.0 * layer.compression(t) for layer in study.layers] for t in study.thresholds}
    return layer_plot(study.layers, {_percent(t): values for t, values in lines.items()}, "filters removed %")


def fitness_plot(study: EnergyStudy) -> Figure:
    """Draw each layer's fitness, 100 times the change of accuracy plus the share removed: figures A.7 and A.8."""
    lines = {
        _percent(t): [layer.compression(t) - 100.0 * study.lost(layer, t) for layer in study.layers]
        for t in study.thresholds
    }
    return layer_plot(study.layers, lines, "fitness, this layer alone pruned")


def layer_plot(layers: Sequence[LayerEnergy], lines: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Draw lines by name, each with one value per layer."""
    figure, axis = single(max(6.0, 2.0 + _WIDTH_PER_LAYER * len(layers)), 4.5)
    for index, (name, values) in enumerate(lines.items()):
        axis.plot(range(len(layers)), values, "o-", color=f"C{index % 10}", markersize=3, label=name)
    axis.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=60, ha="right", fontsize="x-small")
    finish(axis, ylabel=label)
    return figure


def _quality_plot(study: EnergyStudy, label: str, value: Callable[[Quality], float]) -> Figure:
    lines = {_percent(t): [value(layer.alone[t]) for layer in study.layers] for t in study.thresholds}
    figure = layer_plot(study.layers, lines, f"{label}, this layer alone pruned")
    if study.baseline is not None:
        figure.axes[0].axhline(value(study.baseline), color="black", linestyle="--", linewidth=1)
    return figure


def _percent(threshold: float) -> str:
    return f"{100.0 * threshold:g} % of the energy"
