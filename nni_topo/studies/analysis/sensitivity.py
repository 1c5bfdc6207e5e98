"""Sensitivity: accuracy by ratio if one layer, or one group of coupled layers, is pruned at a time.

NNI 2 had such a tool, NNI 3 doesn't. Coupled layers can only be pruned together, so they share a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import nn

from nni_topo import zoo
from nni_topo.errors import DataError
from nni_topo.network.layers.kinds import CONVOLUTIONS, check_names
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.runtime.copies import detached_copy, lent_copy
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import groups_of
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.registry import PRUNERS, check_pruner_knobs, create_pruner, pruner_info
from nni_topo.rules import all_of, check_result, instance, number
from nni_topo.runs.run import pruner_knobs
from nni_topo.studies.pictures import finish, single
from nni_topo.studies.study import Findings, Names, Tell, TrainedStudy
from nni_topo.studies.tables import NumberTable
from nni_topo.zoo.labelled import subset

_CALIBRATION = 512
_ROUNDING = 1e-12  # tolerance for rounding errors in differences of accuracies
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
Evaluate = Callable[[nn.Module], float]
Progress = Callable[[str, float, float], None]
Knobs = Mapping[str, Any] | Callable[[nn.Module], Mapping[str, Any]]


@dataclass(frozen=True)
class SensitivityCurve:
    """Scores of the network by ratio, with one layer or one group of coupled layers pruned."""

    layers: tuple[str, ...]  # names of the pruned layers
    accuracy: dict[float, float]  # score by ratio

    def highest_ratio(self, least: float) -> float:
        """Return the highest measured ratio up to which all scores are at least ``least``; 0 if none is."""
        highest = 0.0
        for ratio, accuracy in sorted(self.accuracy.items()):
            if accuracy < least:
                break
            highest = ratio
        return highest


@dataclass(frozen=True)
class Sensitivity(Findings):
    """The result of :func:`sensitivity`."""

    stem, unwritten = "sensitivity", ("knobs",)
    pruner: str  # registered name
    knobs: dict[str, Any]  # the pruner's arguments
    baseline: float  # score of the unpruned network
    curves: list[SensitivityCurve]  # in network order
    budget: float  # largest drop of the score that the suggestion may cause
    suggested: list[dict[str, Any]]  # config_list with a ratio for each curve whose layers the budget allows to prune
    suggested_accuracy: float  # score of the network pruned by `suggested`, without fine-tuning

    def figures(self) -> dict[str, Figure]:
        """Return ``sensitivity``: a curve per layer, with the unpruned score and the budget."""
        figure, axis = single(7.0, 4.5)
        for index, curve in enumerate(self.curves):
            points = sorted({0.0: self.baseline, **curve.accuracy}.items())
            style = ("-", "--", ":")[index // 10 % 3]
            axis.plot(*zip(*points, strict=True), f".{style}", color=f"C{index % 10}", label="+".join(curve.layers))
        axis.axhline(self.baseline - self.budget, color="0.5", linewidth=0.8, label="budget")
        title, columns = f"sensitivity, {self.pruner}", 1 + len(self.curves) // 14
        finish(axis, "sparse_ratio of these layers alone", "score", columns=columns, title=title)
        return {"sensitivity": figure}

    def texts(self) -> dict[str, str]:
        """Return ``suggested.yaml``, for ``nni-topo prune``."""
        head = (
            f"# All ratios together score {self.suggested_accuracy:.4f} of {self.baseline:.4f} before fine-tuning "
            f"(budget {self.budget:g}).\n# Run with nni-topo prune --config THIS.\n"
        )
        plain = {name: value for name, value in self.knobs.items() if isinstance(value, (str, int, float, bool))}
        content: dict[str, Any] = {"pruner": self.pruner, "knobs": plain, "config_list": self.suggested}
        if isinstance(self.knobs.get("calibration"), list):
            content["calibration"] = sum(len(batch) for batch in self.knobs["calibration"])
        return {"suggested.yaml": head + yaml.safe_dump(content, sort_keys=False)}


@public(model=MODEL, example_inputs=INPUTS)
def sensitivity(
    model: nn.Module,
    example_inputs: Any,
    evaluate: Evaluate,
    ratios: Sequence[float] = RATIOS,
    pruner: str = "l1",
    *,
    layers: Sequence[str] | None = None,
    knobs: Knobs | None = None,
    budget: float = 0.01,
    on_progress: Progress | None = None,
) -> Sensitivity:
    """Prune one layer or dependency group at a time, measure the score, and suggest a ratio for each.

    Parameters
    ----------
    model : torch.nn.Module
        Trained model. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model.
    evaluate : callable
        Maps a model to its score, where larger is better, e.g. the accuracy in [0, 1] on validation data.
    ratios : sequence of float, default=(0.1, 0.2, ..., 0.9)
        Ratios in (0, 1); measured in rising order.
    pruner : str, default="l1"
        Any registered pruner that takes a ``sparse_ratio``.
    layers : sequence of str or None, default=None
        Names of layers. None: all convolutions and linear layers; for pruners of channels, except layers that compute
        the model's output.
    knobs : mapping, callable or None, default=None
        The pruner's arguments, or a function that returns them for a copy of the model. Use a function if arguments
        belong to one model, as NNI's evaluators do. ``example_inputs`` is added if the pruner takes it.
    budget : float, default=0.01
        Largest drop of the score that the suggestion may cause with all layers pruned at once, at least 0.
    on_progress : callable or None, default=None
        Called after each measurement with the layers' names (joined by ``+``), the ratio and the score.

    Returns
    -------
    Sensitivity

    Raises
    ------
    ConfigError
        If a ratio, a name or the budget can't be used.
    DataError
        If a score isn't finite.

    Notes
    -----
    The suggestion starts with one tolerance for all layers: each layer gets the highest ratio at which pruning it alone
    lowers the score by at most the tolerance. Bisection finds the largest tolerance whose measured *joint* drop is
    within the budget. Then single layers are pruned further, one ratio at a time, in the order of their drops alone, as
    long as the joint drop, measured again, stays within the budget. Cost: one pruning and one evaluation per curve and
    ratio, about six for the bisection, and one per further step and per curve.
    """
    ratios = sorted(set(map(float, ratios)))
    _check_knobs(ratios, budget)
    info = PRUNERS.info(pruner, "sensitivity")
    if knobs is None:
        knobs = {}
    if isinstance(knobs, Mapping):
        check_pruner_knobs(pruner, knobs, "sensitivity")
    used: dict[str, Any] = {} if callable(knobs) else dict(knobs)
    analysis = Analysis.on(model, example_inputs)

    def score(net: nn.Module) -> float:
        with lent_copy(net) as copied:
            value = check_result("evaluate", evaluate(copied), "sensitivity")
        if not math.isfinite(value):
            raise DataError(f"an evaluation must return a finite number, got {value} (sensitivity)")
        return value

    def score_pruned(chosen: Mapping[tuple[str, ...], float]) -> float:
        """Return the score of a copy in which layers are pruned at the chosen ratios."""
        config: list[dict[str, Any]] = [{"op_names": list(n), "sparse_ratio": ratio} for n, ratio in chosen.items()]
        if info.structured:
            config = groups_of(analysis, config)
        copied = detached_copy(model)
        if callable(knobs):
            chosen_knobs = knobs(copied)
            instance(Mapping).check("what knobs returns", chosen_knobs, "sensitivity")
            used.clear()
            used.update(chosen_knobs)
        sizes = {"example_inputs": example_inputs} if "example_inputs" in info.knobs() else {}
        made_pruner = create_pruner(pruner, copied, config, **{**sizes, **used})
        _, masks = made_pruner.compress()
        made_pruner.unwrap_model()
        return score(masked_model(copied, example_inputs, masks))

    baseline = score(model)
    curves = []
    for names in _groups(analysis, info.structured, layers):
        accuracy: dict[float, float] = {}
        for ratio in ratios:
            accuracy[ratio] = score_pruned({names: ratio})
            if on_progress is not None:
                on_progress("+".join(names), ratio, accuracy[ratio])
        curves.append(SensitivityCurve(names, accuracy))
    best, joint = _suggestion(score_pruned, curves, baseline, budget)
    chosen = [curve.layers for curve in curves if curve.layers in best]
    suggested = [{"op_names": list(names), "sparse_ratio": best[names]} for names in chosen]
    return Sensitivity(pruner, used, baseline, curves, budget, suggested, joint)


def _groups(analysis: Analysis, structured: bool, layers: Sequence[str] | None) -> list[tuple[str, ...]]:
    """Return tuples of layer names; coupled layers are in one tuple."""
    model, flow = analysis.model, analysis.flow
    if layers is None:
        layers = [
            name
            for name in flow.layers
            if isinstance(model.get_submodule(name), (nn.Linear, *CONVOLUTIONS))
            and not (structured and flow.reaches_output(name))
        ]
    config_entry: dict[str, Any] = {"op_names": list(layers)}
    check_names(model, [config_entry], "layers")
    if not structured:
        return [(name,) for name in config_entry["op_names"]]
    groups: dict[str, list[str]] = {}
    for config in groups_of(analysis, [{**config_entry, "sparse_ratio": 0.5}]):
        (name,) = config["op_names"]
        groups.setdefault(config.get("dependency_group_id", name), []).append(name)
    return [tuple(names) for names in groups.values()]


def _suggestion(
    score_pruned: Callable[[Mapping[tuple[str, ...], float]], float],
    curves: list[SensitivityCurve],
    baseline: float,
    budget: float,
) -> tuple[dict[tuple[str, ...], float], float]:
    """Return ratios whose joint drop of the score is within the budget, and their joint score."""
    # First find the largest common tolerance whose joint drop is within the budget.
    drops = {baseline - accuracy for curve in curves for accuracy in curve.accuracy.values()}
    tolerances = sorted(drop for drop in {0.0, *drops} if drop <= budget)
    best, joint = dict[tuple[str, ...], float](), baseline
    low, high = 0, len(tolerances)
    while low < high:
        middle = (low + high) // 2
        least = baseline - tolerances[middle] - _ROUNDING
        ratios = {curve.layers: ratio for curve in curves if (ratio := curve.highest_ratio(least)) > 0.0}
        score = baseline
        if ratios:
            score = score_pruned(ratios)
        if score >= baseline - budget - _ROUNDING:
            best, joint, low = ratios, score, middle + 1
        else:
            high = middle
    # Then raise single layers to their next measured ratio, the smallest drop alone first; a layer whose step exceeds
    # the joint budget isn't raised again.
    steps: dict[tuple[str, ...], list[tuple[float, float]]] = {}  # by layers, ratio and drop alone, by rising ratio
    for curve in curves:
        higher = [ratio for ratio in sorted(curve.accuracy) if ratio > best.get(curve.layers, 0.0)]
        steps[curve.layers] = [(ratio, baseline - curve.accuracy[ratio]) for ratio in higher]
    while any(steps.values()):
        cheapest = min((layers for layers in steps if steps[layers]), key=lambda layers: steps[layers][0][1])
        ratio, cost = steps[cheapest].pop(0)
        tried = {**best, cheapest: ratio}
        score = -math.inf
        if cost <= budget + _ROUNDING:
            score = score_pruned(tried)
        if score >= baseline - budget - _ROUNDING:
            best, joint = tried, score
        else:
            steps[cheapest].clear()
    return best, joint


def _check_knobs(ratios: Sequence[float], budget: float) -> None:
    """Raise ConfigError if a ratio or the budget is out of its range."""
    all_of(number(0, 1, "neither"), Sequence, least=1).check("ratios", ratios, "sensitivity")
    number(0.0).check("budget", budget, "sensitivity")


@dataclass(frozen=True, kw_only=True)
class AnalyzeSensitivity(TrainedStudy[Sensitivity]):
    """Measure accuracy with one layer pruned at a time, and suggest a ratio for each."""

    pruner: str = "l1"  # any registered pruner
    ratios: tuple[float, ...] = RATIOS  # of each layer, in (0, 1)
    layers: Names = ()  # names of layers; none: all layers that can be pruned
    budget: float = 0.01  # largest drop of accuracy that the suggestion may cause, at least 0
    calibration: int | None = None  # training images for the pruner; None: 512 if it needs them
    images: int | None = None  # validation images used; None: all

    def check(self) -> None:
        PRUNERS.info(self.pruner, self.place)
        _check_knobs(self.ratios, self.budget)

    def find(self, tell: Tell) -> Sensitivity:
        start = self.start()
        needs = any("calibration" in need for need in pruner_info(self.pruner).needs)
        calibration = self.calibration
        if calibration is None:
            calibration = _CALIBRATION * needs
        watched = subset(start.data.validation, slice(self.images))
        return sensitivity(
            start.net,
            start.example,
            lambda pruned: zoo.evaluate(pruned, watched, device=start.device),
            self.ratios,
            self.pruner,
            layers=self.layers or None,
            knobs=lambda copied: pruner_knobs(self.pruner, copied, start, calibration),
            budget=self.budget,
            on_progress=lambda layers, ratio, accuracy: tell(f"{layers} at {ratio:g}: {100 * accuracy:.1f} %"),
        )

    def show(self, findings: Sensitivity) -> Iterator[RenderableType]:
        ratios = list(findings.curves[0].accuracy)
        chosen = {tuple(config["op_names"]): f"{config['sparse_ratio']:g}" for config in findings.suggested}
        head = ("layers", *(f"{ratio:g}" for ratio in ratios), "suggested")
        rows = []
        for curve in findings.curves:
            shown = [f"{100 * accuracy:.1f}" for accuracy in curve.accuracy.values()]
            rows.append([" + ".join(curve.layers), *shown, chosen.get(curve.layers, "0")])
        yield NumberTable(f"sensitivity of {self.model}, {self.pruner}, validation accuracy in %", head, rows)
        before, after = 100 * findings.baseline, 100 * findings.suggested_accuracy
        yield f"unpruned {before:.1f} %, all suggested ratios at once {after:.1f} %, without fine-tuning"
