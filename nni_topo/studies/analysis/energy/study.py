"""The energy study: the filters that each threshold removes from each layer, and the accuracy lost.

Source: Janjic, MSc thesis, University of Manitoba, 2018, sections 4.2 and 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, cast

import yaml
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.disk import plain
from nni_topo.errors import ConfigError
from nni_topo.maths.signals import Chirp
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.layers.kinds import kept_channels, output_channels
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import dense_of
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.energy import EnergyFilterPruner
from nni_topo.pruners.hooks import Masks, unit_scores
from nni_topo.rules import instance, number
from nni_topo.runs.provenance import Record
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.pictures import finish, single
from nni_topo.studies.study import Findings, Tell, TrainedStudy
from nni_topo.studies.tables import NumberTable
from nni_topo.zoo.labelled import LabelledImages, subset

_CHIRP = Chirp()
THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MANY = 0.2
"""Removing at least this share of a layer's filters counts as many."""
LITTLE = 0.02
"""Loss of accuracy, as a fraction, that counts as little: two percentage points in the thesis."""


@dataclass(frozen=True)
class Quality:
    """Loss and accuracy of a classifier."""

    loss: float  # mean cross entropy in nats
    accuracy: float  # in [0, 1]


EvaluateQuality = Callable[[nn.Module], Quality]


def quality_of(evaluate: EvaluateQuality, model: nn.Module) -> Quality:
    """Evaluate a model; ConfigError if the result isn't a Quality."""
    quality = evaluate(model)
    instance(Quality).check("what evaluate returns", quality, "evaluate")
    return quality


@dataclass(frozen=True)
class LayerEnergy:
    """One layer, or the layers of one dependency group, at every threshold."""

    layers: tuple[str, ...]  # module names
    filters: int
    shares: tuple[float, ...]  # cumulative energy shares, ascending; the last is 1
    removed: dict[float, int]  # number of removed filters, by threshold
    alone: dict[float, Quality]  # of the network with only this layer pruned, by threshold; empty without evaluation

    @property
    def name(self) -> str:
        """The first layer's name, and the number of other layers."""
        return short_name(self.layers)

    def compression(self, threshold: float) -> float:
        """Return the share of removed filters, in [0, 1)."""
        return self.removed[threshold] / self.filters


@dataclass(frozen=True)
class WholeNetwork:
    """The dense network with all layers pruned."""

    removed: int  # number of removed filters
    macs: float  # share of the MACs kept, in (0, 1]
    quality: Quality | None  # None if nothing was evaluated


@dataclass(frozen=True)
class EnergyStudy(Findings):
    """The effect of energy-based pruning on a network."""

    stem, unwritten = "energy", ("masks", "more", "file")
    thresholds: tuple[float, ...]  # ascending
    baseline: Quality | None  # of the unpruned network
    layers: list[LayerEnergy]  # in the network's order
    together: dict[float, WholeNetwork]  # all layers at once, by threshold
    masks: dict[float, Masks]  # of all layers, by threshold
    more: Record = field(default_factory=dict)  # the command's facts: model, data, seed, suggestion on test images
    file: str = ""  # text of suggested.yaml; empty: no suggestion

    def to_dict(self) -> Record:
        """Return the study's numbers, with a verdict on each layer."""
        content = super().to_dict()
        for row, layer in zip(content["layers"], self.layers, strict=True):
            row["verdict"] = self.verdict(layer)
        return {**content, **self.more}

    def figures(self) -> dict[str, Figure]:
        """Return the pictures ``compression`` and, with an evaluation, ``accuracy``, ``loss`` and ``fitness``.

        They have a line per threshold. The fitness, as in figures A.7 and A.8, is 100 times the change of accuracy plus
        the share of removed filters.
        """
        drawn: list[tuple[str, str, Callable[[LayerEnergy, float], float], float | None]] = [
            ("compression", "filters removed %", lambda layer, t: 100.0 * layer.compression(t), None)
        ]
        if self.baseline is not None:
            of, accuracy = ", this layer alone pruned", 100.0 * self.baseline.accuracy
            drawn += [
                ("accuracy", f"accuracy %{of}", lambda layer, t: 100.0 * layer.alone[t].accuracy, accuracy),
                ("loss", f"loss (nats){of}", lambda layer, t: layer.alone[t].loss, self.baseline.loss),
                ("fitness", f"fitness{of}", lambda layer, t: layer.compression(t) - 100.0 * self.lost(layer, t), None),
            ]
        figures = {}
        for name, label, value, level in drawn:
            lines = {f"{100.0 * t:g} % of the energy": [value(row, t) for row in self.layers] for t in self.thresholds}
            figures[name] = layer_plot(self.layers, lines, label)
            if level is not None:
                figures[name].axes[0].axhline(level, color="black", linestyle="--", linewidth=1)
        return figures

    def texts(self) -> dict[str, str]:
        """Return ``suggested.yaml``, if thresholds are suggested."""
        if not self.file:
            return {}
        return {"suggested.yaml": self.file}

    def lost(self, layer: LayerEnergy, threshold: float) -> float:
        """Return the accuracy lost by pruning a layer alone, as a fraction with nine decimals; negative if it rose."""
        if self.baseline is None:
            raise ConfigError("losses need an evaluation, got none (study_energy)")
        # Without rounding, a loss of 5 of 500 images could exceed 1 %.
        return round(self.baseline.accuracy - layer.alone[threshold].accuracy, 9)

    def verdict(self, layer: LayerEnergy) -> str:
        """Return ``"redundant"``, ``"saturated"`` or ``""``.

        The lowest threshold that removes many filters (20 %) decides: if little accuracy is lost there (0.02), the
        layer is redundant, else saturated: its filters' energies are similar and all filters are needed. A layer that
        loses many filters at no threshold is neither.
        """
        deep = next((t for t in self.thresholds if layer.compression(t) >= MANY), None)
        if deep is None or self.baseline is None:
            return ""
        if self.lost(layer, deep) <= LITTLE:
            return "redundant"
        return "saturated"

    def suggestion(self, max_drop: float = 0.01) -> dict[str, float]:
        """Return, by layer, the highest threshold up to which pruning it alone loses at most ``max_drop``.

        ``max_drop`` is an accuracy as a fraction, at least 0. Layers that lose no filter are omitted. ConfigError
        without an evaluation.
        """
        number(0.0).check("max_drop", max_drop, "suggestion")
        suggested: dict[str, float] = {}
        for layer in self.layers:
            for threshold in self.thresholds:
                if self.lost(layer, threshold) > max_drop:
                    break
                if layer.removed[threshold]:
                    suggested |= dict.fromkeys(layer.layers, threshold)
        return suggested


def check_thresholds(thresholds: tuple[float, ...]) -> None:
    """Check that the thresholds are in (0, 1) and ascend."""
    if not thresholds or any(low >= high for low, high in pairwise((0.0, *thresholds, 1.0))):
        raise ConfigError(f"thresholds must be one or more in (0, 1) that ascend, got {thresholds} (study_energy)")


@public(model=MODEL, example_inputs=INPUTS)
def study_energy(
    model: nn.Module,
    layers: Sequence[str],
    example_inputs: Any,
    evaluate: EvaluateQuality | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    together: bool = True,
    **knobs: Any,
) -> EnergyStudy:
    """Prune each layer alone, then all at once, at each threshold.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model; it isn't changed.
    layers : sequence of str
        Convolutions to prune; the layers of a dependency group are pruned together.
    example_inputs : Any
        Inputs of the model.
    evaluate : callable or None, default=None
        Maps a model to its :class:`Quality`. None: counts only.
    thresholds : sequence of float, default=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
        Energy shares in (0, 1), ascending.
    together : bool, default=True
        Whether to also prune all layers at once and make the network dense, once per threshold.
    **knobs
        Arguments of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    EnergyStudy

    Raises
    ------
    ConfigError, DataError
        As in the pruner; also if the thresholds aren't in (0, 1) or don't ascend.

    Notes
    -----
    A layer pruned alone is masked in a copy of the model, batch norm included, which gives the dense model's outputs.
    Equal masks are evaluated once.
    """
    thresholds = tuple(thresholds)
    check_thresholds(thresholds)
    config = {"op_names": list(layers), "sparse_threshold": float(thresholds[0])}
    config_list = dependency_groups(model, example_inputs, [config])
    pruner = EnergyFilterPruner(detached_copy(model), config_list, example_inputs=example_inputs, **knobs)
    metrics = pruner.score_blocks(pruner.collect_data())
    masks: dict[float, Masks] = {}
    for threshold in thresholds:
        masks[threshold] = pruner.masks_from(metrics, sparse_threshold=float(threshold))
    rows = []
    for unit in pruner.context.units:
        names = tuple(dict.fromkeys(module for module, _ in unit.members))
        scores = unit_scores(unit, metrics)
        gone = {}
        for threshold in thresholds:
            is_kept = _kept_channels(model, names[0], masks[threshold])
            gone[threshold] = int((~is_kept).sum())
        rows.append(LayerEnergy(names, len(scores), tuple(scores.sort().values.tolist()), gone, {}))
    baseline = None
    if evaluate is not None:
        baseline = quality_of(evaluate, model)
        for row in rows:
            quality_by_count = {0: baseline}
            for threshold, count in row.removed.items():
                if count not in quality_by_count:
                    net = masked_model(model, example_inputs, masks_of(row.layers, masks[threshold]))
                    quality_by_count[count] = quality_of(evaluate, net)
                row.alone[threshold] = quality_by_count[count]
    networks: dict[float, WholeNetwork] = {}
    if together:
        analysis = Analysis.on(model, example_inputs)
        cost = NetworkCost(analysis)
        for threshold, selected in masks.items():
            channels = {name: _kept_channels(model, name, selected).numpy() for row in rows for name in row.layers}
            macs = cost(channels).macs
            dense = dense_of(model, example_inputs, selected, facts=analysis.facts)
            quality = None if evaluate is None else quality_of(evaluate, dense)
            removed = sum(row.removed[threshold] for row in rows)
            networks[threshold] = WholeNetwork(removed, macs / cost({}).macs, quality)
    return EnergyStudy(thresholds, baseline, rows, networks, masks)


@dataclass(frozen=True)
class Step:
    """One step: the pruned layers, the number of removed filters, and the network's quality afterwards."""

    layers: tuple[str, ...]
    removed: int
    quality: Quality


@public(model=MODEL, example_inputs=INPUTS)
def accumulate_energy(
    model: nn.Module,
    layers: Sequence[tuple[str, ...]],
    example_inputs: Any,
    evaluate: EvaluateQuality,
    *,
    threshold: float = 0.01,
    retrain: Callable[[nn.Module], object] | None = None,
    **knobs: Any,
) -> list[Step]:
    """Prune layers one after another by energy and measure the network after each.

    Source: Janjic, section 6.1 and the chapter on future work.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model; it isn't changed.
    layers : sequence of tuple of str
        Layers in the order of pruning; the layers of one tuple are pruned together.
    example_inputs : Any
        Inputs of the model.
    evaluate : callable
        Maps a model to its :class:`~nni_topo.analysis.Quality`.
    threshold : float, default=0.01
        Energy share of the removed filters, in (0, 1).
    retrain : callable or None, default=None
        Fine-tunes the dense network in place after each pruned layer, before it is measured. None: no fine-tuning.
    **knobs
        Arguments of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    list of Step
        One per tuple.
    """
    steps, dense = [], model
    for names in layers:
        config_list = dependency_groups(
            dense, example_inputs, [{"op_names": list(names), "sparse_threshold": threshold}]
        )
        pruner = EnergyFilterPruner(detached_copy(dense), config_list, example_inputs=example_inputs, **knobs)
        _, masks = pruner.compress()
        before = output_channels(dense.get_submodule(names[0])) or 0
        dense = dense_of(dense, example_inputs, masks)
        if retrain is not None:
            retrain(dense)
        after = output_channels(dense.get_submodule(names[0])) or 0
        steps.append(Step(names, before - after, quality_of(evaluate, dense)))
    return steps


def quality_on(net: nn.Module, images: LabelledImages) -> Quality:
    """Return a network's quality on images with labels."""
    return Quality(*zoo.loss_and_accuracy(net, images, device=next(net.parameters()).device))


def short_name(layers: Sequence[str]) -> str:
    """Return the first name, and the number of others."""
    if len(layers) == 1:
        return layers[0]
    return f"{layers[0]} +{len(layers) - 1}"


def masks_of(layers: Sequence[str], masks: Masks) -> Masks:
    """Return the masks of some layers."""
    return {name: masks[name] for name in layers}


def _kept_channels(model: nn.Module, layer: str, masks: Masks) -> Tensor:
    return cast(Tensor, kept_channels(model.get_submodule(layer), masks[layer]))


def layer_plot(layers: Sequence[LayerEnergy], lines: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Draw named lines with one value per layer."""
    figure, axis = single(max(6.0, 2.0 + 0.42 * len(layers)), 4.5)
    for index, (name, values) in enumerate(lines.items()):
        axis.plot(range(len(layers)), values, "o-", color=f"C{index % 10}", markersize=3, label=name)
    axis.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=60, ha="right", fontsize="x-small")
    finish(axis, ylabel=label)
    return figure


@dataclass(frozen=True, kw_only=True)
class AnalyzeEnergy(TrainedStudy[EnergyStudy]):
    """Prune filters at several energy thresholds, measure the accuracy, and suggest a threshold per layer.

    Everything is measured on validation images; the suggestion is then measured on the test images.
    """

    thresholds: tuple[float, ...] = THRESHOLDS  # energy shares in (0, 1), ascending
    images: int | None = None  # number of validation images, and of test images, at least 1; None: all
    max_drop: float = 0.01  # accuracy that each suggested threshold may cost alone, at least 0
    sweep: str = _CHIRP.sweep  # sweep of the chirp: nyquist or thesis
    direction: str = _CHIRP.direction  # direction of the chirp: mean, radial or diagonal

    def check(self) -> None:
        check_thresholds(self.thresholds)
        chirp: dict[str, Any] = {"sweep": self.sweep, "direction": self.direction}
        replace(_CHIRP, **chirp)  # the constructor checks the fields
        number(0.0).check("max_drop", self.max_drop, self.place)

    def find(self, tell: Tell) -> EnergyStudy:
        start = self.start(self.images)
        net, example = start.net, start.example
        # the pruner's arguments, as in YAML
        knobs: dict[str, Any] = {"signal": {"sweep": self.sweep, "direction": self.direction}}
        layers = [name for name in inner_layers(net, example) if not isinstance(net.get_submodule(name), nn.Linear)]
        evaluate = partial(quality_on, images=subset(start.data.validation, slice(self.images)))
        study = study_energy(net, layers, example, evaluate, thresholds=self.thresholds, **knobs)
        study.more.update({"model": self.model_choice.label, "data": self.data, "seed": self.seed})
        thresholds = study.suggestion(self.max_drop)
        if thresholds:
            # all layers at once, measured on the test images
            masks: Masks = {}
            for name, threshold in thresholds.items():
                masks |= masks_of([name], study.masks[threshold])
            dense = dense_of(net, example, masks)
            study.more["suggested"] = plain(
                {
                    "thresholds": thresholds,
                    "macs": zoo.count_macs(dense, example[:1]) / zoo.count_macs(net, example[:1]),
                    "quality": quality_on(dense, start.data.test),
                    "quality_before": quality_on(net, start.data.test),
                }
            )
            study = replace(study, file=self._suggestion(study.more, knobs))
        return study

    def show(self, findings: EnergyStudy) -> Iterator[RenderableType]:
        return show_energy(findings.to_dict())

    def _suggestion(self, record: Record, knobs: dict[str, Any]) -> str:
        """Return a file for ``nni-topo prune``."""
        suggested, thresholds = record["suggested"], record["suggested"]["thresholds"]
        entries = [
            {"op_names": [name for name in thresholds if thresholds[name] == threshold], "sparse_threshold": threshold}
            for threshold in sorted(set(thresholds.values()))
        ]
        content: dict[str, Any] = {"pruner": "energy", "config_list": entries, "knobs": knobs}
        before, accuracy = (100.0 * suggested[key]["accuracy"] for key in ("quality_before", "quality"))
        comment = (
            f"# {record['model']} on {record['data']}: per layer the highest energy threshold that, alone, costs at "
            f"most {100.0 * self.max_drop:g} points\n# on validation images. All at once, without fine-tuning, on test "
            f"images: {accuracy:.1f} % ({before:.1f} % before) at {100.0 * suggested['macs']:.1f} % of the MACs.\n"
            "# Run with nni-topo prune --config THIS.\n"
        )
        return comment + yaml.safe_dump(content, sort_keys=False)


def show_energy(record: Record) -> Iterator[NumberTable | str]:
    """Yield the tables and lines of a study's record."""
    base, layers = record["baseline"], record["layers"]
    thresholds = [str(threshold) for threshold in record["thresholds"]]
    heads = [f"{100 * threshold:g} %" for threshold in record["thresholds"]]
    together = [record["together"][t] for t in thresholds]
    rows, losses = [], []
    for layer in layers:
        alone = [layer["alone"][t] for t in thresholds]
        counts = zip((layer["removed"][t] for t in thresholds), alone, strict=True)
        cells = [f"{removed}: {100 * quality['accuracy']:.1f}" for removed, quality in counts]
        rows.append([short_name(layer["layers"]), str(layer["filters"]), *cells])
        losses.append([short_name(layer["layers"]), *(f"{quality['loss']:.3f}" for quality in alone)])
    cells = [f"{row['removed']}: {100 * row['quality']['accuracy']:.1f}" for row in together]
    totals = [
        ["all at once", str(sum(layer["filters"] for layer in layers)), *cells],
        ["MACs kept %", "", *(f"{100 * row['macs']:.1f}" for row in together)],
    ]
    before = f"{100 * base['accuracy']:.1f} %, loss {base['loss']:.3f}"
    yield f"{record['model']} on {record['data']}: {before}; filters removed: accuracy %"
    yield NumberTable(None, ["layer", "filters", *heads], rows, totals, text_columns=2)
    yield "loss (nats), this layer alone pruned"
    all_losses = ["all at once", *(f"{row['quality']['loss']:.3f}" for row in together)]
    yield NumberTable(None, ["layer", *heads], losses, [all_losses])
    for verdict in ("saturated", "redundant"):
        names = [short_name(layer["layers"]) for layer in layers if layer["verdict"] == verdict]
        yield f"{verdict}: {', '.join(names) or 'none'}"
    if "suggested" in record:
        suggested = record["suggested"]
        accuracy = f"{100 * suggested['quality']['accuracy']:.1f} %"
        yield f"suggested, all at once: {accuracy} at {100 * suggested['macs']:.1f} % of the MACs"
