"""The energy study: the filters each threshold removes from each layer, and the accuracy that costs.

Source: Janjic, MSc thesis, University of Manitoba, 2018, sections 4.2 and 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

from matplotlib.figure import Figure
from torch import Tensor, nn

from nni_topo import zoo
from nni_topo.errors import ConfigError
from nni_topo.network.cost.cost import NetworkCost
from nni_topo.network.layers.kinds import kept_channels, output_channels
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import dense_of, to_dense
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.energy import EnergyFilterPruner
from nni_topo.pruners.hooks import Masks, unit_scores
from nni_topo.rules import instance, number
from nni_topo.runs.provenance import Record
from nni_topo.studies.pictures import finish, single
from nni_topo.studies.study import Findings
from nni_topo.zoo.labelled import LabelledImages

THRESHOLDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
MANY = 0.2
"""Share of a layer's filters; removing at least this share counts as many."""
LITTLE = 0.02
"""Loss of accuracy, a fraction, that counts as little: the two points of the thesis."""
_ALONE = "this layer alone pruned"


@dataclass(frozen=True)
class Quality:
    """How good a classifier is."""

    loss: float  # mean cross entropy in nats
    accuracy: float  # in [0, 1]


EvaluateQuality = Callable[[nn.Module], Quality]


def quality_of(evaluate: EvaluateQuality, model: nn.Module) -> Quality:
    """Evaluate a model; ConfigError if the result is no Quality."""
    found = evaluate(model)
    instance(Quality).check("what evaluate returns", found, "evaluate")
    return found


@dataclass(frozen=True)
class LayerEnergy:
    """One layer, or the layers of one dependency group, at every threshold."""

    layers: tuple[str, ...]  # module names
    filters: int
    shares: tuple[float, ...]  # cumulative energy shares, ascending, the last one 1
    removed: dict[float, int]  # number of removed filters, by threshold
    alone: dict[float, Quality]  # the network with this layer alone pruned, by threshold; empty without evaluation

    @property
    def name(self) -> str:
        """The first layer's name, and how many more there are."""
        return short_name(self.layers)

    def compression(self, threshold: float) -> float:
        """Return the share of the filters that are removed, in [0, 1)."""
        return self.removed[threshold] / self.filters


@dataclass(frozen=True)
class WholeNetwork:
    """The dense network with all layers pruned."""

    removed: int  # filters
    macs: float  # share of the MACs kept, in (0, 1]
    quality: Quality | None  # None if nothing was evaluated


@dataclass(frozen=True)
class EnergyStudy(Findings):
    """The effect of energy-based pruning on a network."""

    stem, unwritten = "energy", ("masks", "more", "pictures", "file")
    thresholds: tuple[float, ...]  # ascending
    baseline: Quality | None  # of the unpruned network
    layers: list[LayerEnergy]  # in the network's order
    together: dict[float, WholeNetwork]  # all layers at once, by threshold
    masks: dict[float, Masks]  # of all layers, by threshold
    more: Record = field(default_factory=dict)  # of the command: the suggestion on test images, the parts' records
    pictures: dict[str, Figure] = field(default_factory=dict)  # of the parts
    file: str = ""  # text of suggested.yaml; empty: none

    def to_dict(self) -> Record:
        """Return the study's numbers, with a verdict on each layer, and those of its parts."""
        content = super().to_dict()
        for row, layer in zip(content["layers"], self.layers, strict=True):
            row["verdict"] = self.verdict(layer)
        return {**content, **self.more}

    def figures(self) -> dict[str, Figure]:
        """Return the pictures ``compression`` and, with an evaluation, ``accuracy``, ``loss`` and ``fitness``.

        They have a line per threshold. The fitness, of figures A.7 and A.8, is 100 times the change of accuracy plus
        the share removed.
        """
        values: dict[str, tuple[str, Callable[[LayerEnergy, float], float]]] = {
            "compression": ("filters removed %", lambda layer, t: 100.0 * layer.compression(t))
        }
        levels: dict[str, float] = {}
        if self.baseline is not None:
            values |= {
                "accuracy": (f"accuracy %, {_ALONE}", lambda layer, t: 100.0 * layer.alone[t].accuracy),
                "loss": (f"loss (nats), {_ALONE}", lambda layer, t: layer.alone[t].loss),
                "fitness": (f"fitness, {_ALONE}", lambda layer, t: layer.compression(t) - 100.0 * self.lost(layer, t)),
            }
            levels = {"accuracy": 100.0 * self.baseline.accuracy, "loss": self.baseline.loss}
        figures = {}
        for name, (label, value) in values.items():
            lines = {t: [value(layer, t) for layer in self.layers] for t in self.thresholds}
            named = {f"{100.0 * t:g} % of the energy": line for t, line in lines.items()}
            figures[name] = layer_plot(self.layers, named, label)
        for name, level in levels.items():
            figures[name].axes[0].axhline(level, color="black", linestyle="--", linewidth=1)
        return figures | self.pictures

    def texts(self) -> dict[str, str]:
        """Return ``suggested.yaml``, if there is one."""
        return {"suggested.yaml": self.file} if self.file else {}

    def lost(self, layer: LayerEnergy, threshold: float) -> float:
        """Return the accuracy lost by pruning a layer alone, a fraction to nine decimals; negative if it rose."""
        if self.baseline is None:
            raise ConfigError("losses need an evaluation, got none (study_energy)")
        # Without rounding, five images of 500 would be more than 1 %.
        return round(self.baseline.accuracy - layer.alone[threshold].accuracy, 9)

    def verdict(self, layer: LayerEnergy) -> str:
        """Return ``"redundant"``, ``"saturated"`` or ``""``.

        The lowest threshold that removes many filters (20 %) decides: if little accuracy is lost there (0.02), the
        layer is redundant, else it is saturated: its filters' energies lie close together and all are needed. A layer
        that loses many filters under no threshold is neither.
        """
        deep = next((t for t in self.thresholds if layer.compression(t) >= MANY), None)
        if deep is None or self.baseline is None:
            return ""
        return "redundant" if self.lost(layer, deep) <= LITTLE else "saturated"

    def suggestion(self, max_drop: float = 0.01) -> dict[str, float]:
        """Return, by layer, the highest threshold up to which pruning it alone loses at most ``max_drop``.

        ``max_drop`` is an accuracy as a fraction, at least 0. Layers that lose no filter are left out. ConfigError if
        nothing was evaluated.
        """
        number(0.0).check("max_drop", max_drop, "suggestion")
        found = {}
        for layer in self.layers:
            best = None
            for threshold in self.thresholds:
                if self.lost(layer, threshold) > max_drop:
                    break
                if layer.removed[threshold]:
                    best = threshold
            if best is not None:
                found.update(dict.fromkeys(layer.layers, best))
        return found


def check_thresholds(thresholds: tuple[float, ...]) -> None:
    """Raise ConfigError unless filters can be pruned at these shares of the energy."""
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
        Convolutions to prune; those of a dependency group are pruned together.
    example_inputs : Any
        Inputs of the model.
    evaluate : callable or None, default=None
        Maps a model to its :class:`Quality`. None: counts only.
    thresholds : sequence of float, default=(0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
        Energy shares in (0, 1), ascending.
    together : bool, default=True
        Whether all layers at once are made dense, which traces the network once per threshold.
    **knobs
        Of :class:`~nni_topo.EnergyFilterPruner`.

    Returns
    -------
    EnergyStudy

    Raises
    ------
    ConfigError, DataError
        As the pruner does; also if the thresholds aren't in (0, 1) or don't ascend.

    Notes
    -----
    A layer pruned alone is masked in a copy of the model, batch norm included; the dense model would compute the same.
    Equal masks are evaluated once.
    """
    thresholds = tuple(thresholds)
    check_thresholds(thresholds)
    entry = {"op_names": list(layers), "sparse_threshold": float(thresholds[0])}
    config_list = dependency_groups(model, example_inputs, [entry])
    pruner = EnergyFilterPruner(detached_copy(model), config_list, example_inputs=example_inputs, **knobs)
    metrics = pruner._calculate_metrics(pruner._collect_data())
    every_space = [space for spaces in pruner._target_spaces.values() for space in spaces.values()]
    masks: dict[float, Masks] = {}
    for threshold in thresholds:
        for space in every_space:
            if space.sparse_threshold is not None:
                space.sparse_threshold = float(threshold)
        masks[threshold] = pruner._generate_sparsity(metrics)
    rows = []
    for unit in pruner.context.units:
        names = tuple(dict.fromkeys(module for module, _ in unit.members))
        scores = unit_scores(unit, metrics)
        gone = {t: int((~_kept(model, names[0], found)).sum()) for t, found in masks.items()}
        rows.append(LayerEnergy(names, len(scores), tuple(scores.sort().values.tolist()), gone, {}))
    baseline = None
    if evaluate is not None:
        baseline = quality_of(evaluate, model)
        for row in rows:
            known = {0: baseline}
            for threshold, count in row.removed.items():
                if count not in known:
                    net = masked_model(model, example_inputs, masks_of(row.layers, masks[threshold]))
                    known[count] = quality_of(evaluate, net)
                row.alone[threshold] = known[count]
    networks: dict[float, WholeNetwork] = {}
    if together:
        analysis = Analysis.on(model, example_inputs)
        cost = NetworkCost(analysis)
        for threshold, selected in masks.items():
            macs = cost({name: _kept(model, name, selected).numpy() for row in rows for name in row.layers}).macs
            dense = dense_of(model, example_inputs, selected, facts=analysis.facts)
            quality = None if evaluate is None else quality_of(evaluate, dense)
            removed = sum(row.removed[threshold] for row in rows)
            networks[threshold] = WholeNetwork(removed, macs / cost({}).macs, quality)
    return EnergyStudy(thresholds, baseline, rows, networks, masks)


@dataclass(frozen=True)
class Step:
    """One step: the layers pruned in it, the number of filters removed, and the network's quality after it."""

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
    """Prune one layer after the other by energy and measure the network after each.

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
        Energy share, in (0, 1).
    retrain : callable or None, default=None
        Trains the dense network in place after each layer, before it is measured and its next layer pruned. None:
        nothing is trained.
    **knobs
        Of :class:`~nni_topo.EnergyFilterPruner`.

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
        dense = to_dense(dense, example_inputs, masks)
        if retrain is not None:
            retrain(dense)
        after = output_channels(dense.get_submodule(names[0])) or 0
        steps.append(Step(names, before - after, quality_of(evaluate, dense)))
    return steps


def quality_on(net: nn.Module, images: LabelledImages) -> Quality:
    """Return a network's quality on images with labels."""
    return Quality(*zoo.loss_and_accuracy(net, images, device=next(net.parameters()).device))


def short_name(layers: Sequence[str]) -> str:
    """Return the first name, and how many more there are."""
    return f"{layers[0]} +{len(layers) - 1}" if len(layers) > 1 else layers[0]


def masks_of(layers: Sequence[str], masks: Masks) -> Masks:
    """Return the masks of some layers only."""
    return {name: masks[name] for name in layers}


def _kept(model: nn.Module, layer: str, masks: Masks) -> Tensor:
    return cast(Tensor, kept_channels(model.get_submodule(layer), masks[layer]))


def layer_plot(layers: Sequence[LayerEnergy], lines: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Draw lines by name, each with one value per layer."""
    figure, axis = single(max(6.0, 2.0 + 0.42 * len(layers)), 4.5)
    for index, (name, values) in enumerate(lines.items()):
        axis.plot(range(len(layers)), values, "o-", color=f"C{index % 10}", markersize=3, label=name)
    axis.set_xticks(range(len(layers)), [layer.name for layer in layers], rotation=60, ha="right", fontsize="x-small")
    finish(axis, ylabel=label)
    return figure
