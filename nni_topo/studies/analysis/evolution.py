"""Figures of genetic searches for weights to prune: over generations, and for several searches side by side.

Source: Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
University of Manitoba, 2018, figures 5.1 to 5.14 and A.1 to A.6, tables 5.1 and 5.2.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.console import RenderableType
from scipy.stats import gaussian_kde, kurtosis
from torch import Tensor

from nni_topo.errors import ConfigError
from nni_topo.maths.search.weights import WeightSearch
from nni_topo.pruners.genetic_weight.pruner import GeneticWeightPruner
from nni_topo.rules import NONE, number
from nni_topo.runs.run import pruner_knobs
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.pictures import finish, panels, single
from nni_topo.studies.study import Findings, Names, Tell, TrainedStudy
from nni_topo.studies.tables import NumberTable

_ROWS = 400


@dataclass(frozen=True)
class EvolutionTrial:
    """One genetic search."""

    history: pd.DataFrame  # as `nni_topo.GeneticWeightPruner.history`
    weights: NDArray[np.float32]  # weights before the search, (genes,)
    kept: NDArray[np.bool_]  # weights that the fittest individual keeps, (genes,)
    start_accuracy: float  # accuracy of the unpruned network, in [0, 1]
    alpha: float  # coefficient of accuracy in the fitness
    beta: float  # coefficient of compression in the fitness

    @classmethod
    def of(cls, pruner: GeneticWeightPruner) -> EvolutionTrial:
        """Return a pruner's latest search."""
        search = pruner.evolution
        knobs = search.settings
        kept_genes = search.genes(search.best())
        return cls(pruner.history, pruner.start_weights, kept_genes, search.start_accuracy, knobs.alpha, knobs.beta)

    def summary(self) -> pd.DataFrame:
        """Return lowest, mean and highest values of the first and last generation, (2, 9), as in tables 5.1 and 5.2."""
        columns, ends = ["fitness", "accuracy", "compression"], [0, self.history.generation.max()]
        extremes = self.history.groupby("generation")[columns].agg(["min", "mean", "max"]).loc[ends]
        return extremes.set_axis(["initial", "final"])

    def to_dict(self) -> dict[str, Any]:
        facts = {"start_accuracy": self.start_accuracy, "alpha": self.alpha, "beta": self.beta}
        return facts | {"kept": float(self.kept.mean()), "history": self.history.to_dict("list")}

    def line(self, by: str) -> pd.DataFrame:
        """Return the line of descent, a row per generation, whose last individual is highest in column ``by``."""
        last = self.history[self.history.generation == self.history.generation.max()]
        return self.history[self.history.individual == last.individual[last[by].idxmax()]]


@dataclass(frozen=True)
class EvolutionStudy(Findings):
    """Searches by label, e.g. by damage rate; at least one."""

    stem = "evolution"
    trials: Mapping[str, EvolutionTrial]

    def to_dict(self) -> dict[str, Any]:
        return {label: trial.to_dict() for label, trial in self.trials.items()}

    def figures(self) -> dict[str, Figure]:
        """Return the figures of the thesis.

        ``distributions`` of fitness per generation, ``fitness`` over the generations with the fittest and the most
        accurate line of descent, ``progress`` of accuracy and compression, ``heatmap`` of the kept weights, ``weights``
        before the first search with their kurtosis, ``histograms`` of weights before and after, ``solutions`` in the
        plane of compression and accuracy.
        """
        trials, first = self.trials, next(iter(self.trials.values()))
        measured = [
            (label, (trial, column)) for label, trial in trials.items() for column in ("accuracy", "compression")
        ]
        return {
            "distributions": panels(trials.items(), _distributions),
            "fitness": panels([(label, (trial, "fitness")) for label, trial in trials.items()], _course),
            "progress": panels(measured, _course, columns=2),
            "heatmap": _heatmap(trials),
            "weights": _start(first),
            "histograms": panels(trials.items(), _histograms),
            "solutions": _solutions(trials),
        }


@dataclass(frozen=True, kw_only=True)
class AnalyzeEvolution(TrainedStudy[EvolutionStudy]):
    """Search for removable weights of a layer, once per damage rate, and draw the searches."""

    layers: Names = ()  # names of layers to search together; none: the layer with the most weights
    damage_rates: tuple[float, ...] = (0.1,)  # shares of the weights removed at random in generation 0, in [0, 1]
    population_size: int = WeightSearch.population_size  # individuals, at least 2
    generations: int = WeightSearch.generations  # number of generations after generation 0, at least 1
    max_sparse_ratio: float | None = None  # largest share of the weights that may be removed, in (0, 1); None: all

    def check(self) -> None:
        if not self.damage_rates:
            raise ConfigError(f"a study needs at least one damage rate, got none ({self.place})")
        self._searches()
        (number(0, 1, "neither") | NONE).check("max_sparse_ratio", self.max_sparse_ratio, self.place)

    def _searches(self) -> dict[str, WeightSearch]:
        sizes = {"population_size": self.population_size, "generations": self.generations}
        return {f"damage {100 * rate:g} %": WeightSearch(**sizes, damage_rate=rate) for rate in self.damage_rates}

    def find(self, tell: Tell) -> EvolutionStudy:
        start = self.start()
        sizes = {name: start.net.get_submodule(name).weight for name in inner_layers(start.net, start.example)}
        layers = list(self.layers) or [max(sizes, key=lambda name: cast(Tensor, sizes[name]).numel())]
        config: dict[str, Any] = {"op_names": layers}
        if self.max_sparse_ratio is not None:
            config["max_sparse_ratio"] = self.max_sparse_ratio
        trials = {}
        for label, search in self._searches().items():
            copied = copy.deepcopy(start.net)
            pruner = GeneticWeightPruner(
                copied, [config], search=search, **pruner_knobs("genetic_weight", copied, start)
            )
            pruner.compress()
            trials[label] = EvolutionTrial.of(pruner)
            tell(f"{label}: {100 * (1 - trials[label].kept.mean()):.1f} % of {' + '.join(layers)} removed")
        return EvolutionStudy(trials)

    def show(self, findings: EvolutionStudy) -> Iterator[RenderableType]:
        rows = []
        for label, trial in findings.trials.items():
            for when, row in trial.summary().iterrows():
                for column in ("fitness", "accuracy", "compression"):
                    values = [f"{row[column, end]:.4g}" for end in ("min", "mean", "max")]
                    rows.append((label, str(when), column, *values))
        head = ("search", "generation", "of", "lowest", "mean", "highest")
        yield NumberTable(f"evolution of {self.model}", head, rows, text_columns=3)


def _distributions(axis: Axes, trial: EvolutionTrial) -> None:
    values = trial.history.pivot(index="generation", columns="individual", values="fitness")
    grid = np.linspace(values.to_numpy().min(), values.to_numpy().max(), 300)
    for generation, row in values.iterrows():
        if row.std() > 0:
            density = gaussian_kde(row)(grid)
            axis.plot(grid, density, linewidth=0.8)
            axis.annotate(str(generation), (grid[density.argmax()], density.max()), fontsize="xx-small")
    finish(axis, "fitness", "density")


def _course(axis: Axes, measured: tuple[EvolutionTrial, str]) -> None:
    """Draw range and mean of a column over the generations, and the fittest and most accurate lines of descent."""
    trial, column = measured
    groups = trial.history.groupby("generation")[column]
    axis.fill_between(groups.min().index, groups.min(), groups.max(), alpha=0.2, label="range")
    axis.plot(groups.mean(), "k--", linewidth=1.0, label="mean")
    for by, color in (("fitness", "C3"), ("accuracy", "C2")):
        line = trial.line(by)
        axis.plot(line.generation, line[column], color=color, linewidth=1.2, label=f"top {by}")
    finish(axis, "generation", column)


def _heatmap(trials: Mapping[str, EvolutionTrial]) -> Figure:
    """Draw a column per trial; each cell is the mean magnitude in one section of the layer, removed weights as 0."""
    columns = []
    for trial in trials.values():
        magnitudes = np.where(trial.kept, np.abs(trial.weights), 0.0)
        columns.append([part.mean() for part in np.array_split(magnitudes, min(_ROWS, len(magnitudes)))])
    figure, axis = single(1.2 + 0.9 * len(trials), 5.0)
    picture = axis.imshow(np.array(columns).T, aspect="auto", cmap="magma_r", interpolation="nearest")
    axis.set_xticks(range(len(trials)), list(trials), fontsize="x-small")
    axis.set(ylabel="weights of the layer, in order")
    figure.colorbar(picture, label="mean |w| kept")
    return figure


def _start(trial: EvolutionTrial) -> Figure:
    size = np.abs(trial.weights)
    small = (size <= size.min() + 0.1 * np.ptp(size)).mean()
    figure, axis = single(5.0, 3.6)
    axis.hist(trial.weights, 81)
    title = f"kurtosis {kurtosis(trial.weights, fisher=False):.2f}"
    title += f", {100 * small:.1f} % in the lowest tenth of the magnitudes"
    finish(axis, "weight", "count", title=title)
    return figure


def _histograms(axis: Axes, trial: EvolutionTrial) -> None:
    bins = np.linspace(trial.weights.min(), trial.weights.max(), 81).tolist()
    axis.hist(trial.weights, bins, color="0.7", label="before")
    axis.hist(trial.weights[trial.kept], bins, color="C0", label="after")
    finish(axis, "weight", "count", yscale="log")


def _solutions(trials: Mapping[str, EvolutionTrial]) -> Figure:
    figure, axis = single(6.5, 4.5)
    for label, trial in trials.items():
        last = trial.history[trial.history.generation == trial.history.generation.max()]
        axis.scatter(100 * last.compression, 100 * (last.accuracy - trial.start_accuracy), s=8, label=label)
    first = next(iter(trials.values()))
    if first.alpha > 0:
        axis.plot([0, 100], [0, -100 * first.beta / first.alpha], "k--", linewidth=0.8, label="fitness 0")
    finish(axis, "weights removed, %", "change in accuracy, points", yscale="symlog")
    return figure
