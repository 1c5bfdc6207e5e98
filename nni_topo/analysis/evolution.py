"""Pictures of weight-pruning genetic searches: one generation after another, and several searches side by side.

References
----------
.. [1] Janjic, "Exploring Redundancy in Neural Networks: Pruning by Genetic Algorithm & Filter Energy", MSc thesis,
   University of Manitoba, 2018, figures 5.1 to 5.14 and A.1 to A.6, tables 5.1 and 5.2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import gaussian_kde, kurtosis

from nni_topo.errors import ConfigError
from nni_topo.pruners.genetic_weight.pruner import GeneticWeightPruner

_ROWS = 400


@dataclass(frozen=True)
class EvolutionTrial:
    """One search.

    Attributes
    ----------
    history : pandas.DataFrame
        As :attr:`nni_topo.GeneticWeightPruner.history`.
    weights : numpy.ndarray
        Start weights, ``(genes,)``.
    kept : numpy.ndarray
        Boolean ``(genes,)``: the fittest individual's.
    start_accuracy : float
        Of the undamaged network, in [0, 1].
    alpha, beta : float
        Weights of the fitness.
    """

    history: pd.DataFrame
    weights: NDArray[np.float32]
    kept: NDArray[np.bool_]
    start_accuracy: float
    alpha: float
    beta: float

    @classmethod
    def of(cls, pruner: GeneticWeightPruner) -> EvolutionTrial:
        """Take a pruner's latest search."""
        search = pruner.evolution
        knobs = search.settings
        kept = search.genes(search.best())
        return cls(pruner.history, pruner.start_weights, kept, search.start_accuracy, knobs.alpha, knobs.beta)

    def summary(self) -> pd.DataFrame:
        """Return lowest, mean and highest values of the first and last generation, ``(2, 9)``: tables 5.1, 5.2."""
        columns, ends = ["fitness", "accuracy", "compression"], [0, self.history.generation.max()]
        found = self.history.groupby("generation")[columns].agg(["min", "mean", "max"]).loc[ends]
        return found.set_axis(["initial", "final"])

    def line(self, by: str) -> pd.DataFrame:
        """Return the line of descent that ends highest in a column, one row per generation."""
        last = self.history[self.history.generation == self.history.generation.max()]
        return self.history[self.history.individual == last.individual[last[by].idxmax()]]


def plot_evolution(trials: Mapping[str, EvolutionTrial], folder: str | Path) -> list[Path]:
    """Draw searches as the thesis does.

    Parameters
    ----------
    trials : mapping of str to EvolutionTrial
        By label, e.g. the damage rate; at least one.
    folder : str or Path
        Made if need be; gets PNG files.

    Returns
    -------
    list of Path
        ``distributions`` of fitness per generation, ``fitness`` over the generations with the lines of the fittest and
        the most accurate, ``progress`` of accuracy and compression, ``heatmap`` of the weights that stay,
        ``weights`` at the start of the first trial with their kurtosis, ``histograms`` of weights before and after,
        ``solutions`` in the plane of compression and accuracy; ``lineages_fitness``, ``lineages_compression`` and
        ``lineages_accuracy`` of every individual.

    Raises
    ------
    ConfigError
        If there is no trial.
    """
    if not trials:
        raise ConfigError("pictures need at least one trial, got none (plot_evolution)")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "distributions": _per_trial(trials, _distributions),
        "fitness": _per_trial(trials, lambda trial, axis: _course(trial, axis, "fitness")),
        "progress": _progress(trials),
        "heatmap": _heatmap(trials),
        "weights": _initial(next(iter(trials.values()))),
        "histograms": _per_trial(trials, _histograms),
        "solutions": _solutions(trials),
    }
    for column in ("fitness", "compression", "accuracy"):
        figures[f"lineages_{column}"] = _per_trial(trials, partial(_lineages, column=column))
    files = []
    for name, figure in figures.items():
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=130)
    return files


def _per_trial(trials: Mapping[str, EvolutionTrial], draw: Callable[[EvolutionTrial, Axes], None]) -> Figure:
    columns = min(len(trials), 3)
    rows = -(-len(trials) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (label, trial) in zip(axes, trials.items(), strict=False):
        draw(trial, axis)
        axis.set_title(label)
    for axis in axes[len(trials) :]:
        axis.remove()
    return figure


def _distributions(trial: EvolutionTrial, axis: Axes) -> None:
    values = trial.history.pivot(index="generation", columns="individual", values="fitness")
    grid = np.linspace(values.to_numpy().min(), values.to_numpy().max(), 300)
    for generation, row in values.iterrows():
        if row.std() > 0:
            density = gaussian_kde(row)(grid)
            axis.plot(grid, density, linewidth=0.8)
            axis.annotate(str(generation), (grid[density.argmax()], density.max()), fontsize="xx-small")
    axis.set(xlabel="fitness", ylabel="density")


def _course(trial: EvolutionTrial, axis: Axes, column: str) -> None:
    groups = trial.history.groupby("generation")[column]
    axis.fill_between(groups.min().index, groups.min(), groups.max(), alpha=0.2, label="range")
    axis.plot(groups.mean(), "k--", linewidth=1.0, label="mean")
    for by, color in (("fitness", "C3"), ("accuracy", "C2")):
        line = trial.line(by)
        axis.plot(line.generation, line[column], color=color, linewidth=1.2, label=f"top {by}")
    axis.set(xlabel="generation", ylabel=column)
    axis.legend(fontsize="xx-small")


def _progress(trials: Mapping[str, EvolutionTrial]) -> Figure:
    figure = Figure(figsize=(8.0, 2.8 * len(trials)), layout="constrained")
    axes = figure.subplots(len(trials), 2, squeeze=False)
    for row, (label, trial) in zip(axes, trials.items(), strict=True):
        for axis, column in zip(row, ("accuracy", "compression"), strict=True):
            _course(trial, axis, column)
            axis.set_title(label)
    return figure


def _heatmap(trials: Mapping[str, EvolutionTrial]) -> Figure:
    """A column per trial; each row of the picture is the mean magnitude of a stretch of kept weights."""
    columns = []
    for trial in trials.values():
        kept = np.where(trial.kept, np.abs(trial.weights), 0.0)
        columns.append([part.mean() for part in np.array_split(kept, min(_ROWS, len(kept)))])
    figure = Figure(figsize=(1.2 + 0.9 * len(trials), 5.0), layout="constrained")
    axis = figure.subplots()
    picture = axis.imshow(np.array(columns).T, aspect="auto", cmap="magma_r", interpolation="nearest")
    axis.set_xticks(range(len(trials)), list(trials), fontsize="x-small")
    axis.set(ylabel="weights of the layer, in order")
    figure.colorbar(picture, label="mean |w| left")
    return figure


def _lineages(trial: EvolutionTrial, axis: Axes, column: str) -> None:
    """A line per individual; a line of descent keeps its number."""
    values = trial.history.pivot(index="generation", columns="individual", values=column)
    axis.plot(values.index, values.to_numpy(), linewidth=0.6)
    axis.set(xlabel="generation", ylabel=column)


def _initial(trial: EvolutionTrial) -> Figure:
    size = np.abs(trial.weights)
    weak = (size <= size.min() + 0.1 * np.ptp(size)).mean()
    figure = Figure(figsize=(5.0, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.hist(trial.weights, 81)
    axis.set(xlabel="weight", ylabel="count")
    tail = f"{100 * weak:.1f} % in the lowest tenth of the magnitudes"
    axis.set_title(f"kurtosis {kurtosis(trial.weights, fisher=False):.2f}, {tail}", fontsize="small")
    return figure


def _histograms(trial: EvolutionTrial, axis: Axes) -> None:
    bins = np.linspace(trial.weights.min(), trial.weights.max(), 81).tolist()
    axis.hist(trial.weights, bins, color="0.7", label="before")
    axis.hist(trial.weights[trial.kept], bins, color="C0", label="after")
    axis.set(xlabel="weight", ylabel="count", yscale="log")
    axis.legend(fontsize="xx-small")


def _solutions(trials: Mapping[str, EvolutionTrial]) -> Figure:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axis = figure.subplots()
    for label, trial in trials.items():
        last = trial.history[trial.history.generation == trial.history.generation.max()]
        axis.scatter(100 * last.compression, 100 * (last.accuracy - trial.start_accuracy), s=8, label=label)
    first = next(iter(trials.values()))
    if first.alpha > 0:
        axis.plot([0, 100], [0, -100 * first.beta / first.alpha], "k--", linewidth=0.8, label="fitness 0")
    axis.set(xlabel="weights removed, %", ylabel="change in accuracy, points", yscale="symlog")
    axis.legend(fontsize="x-small")
    axis.grid(alpha=0.3)
    return figure
