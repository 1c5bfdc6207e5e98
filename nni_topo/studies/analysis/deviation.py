"""Net Deviation: the difference of a pruned network's error and the bound of that error.

Source: S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
Technology, 2019, equations 3.12 and 3.13.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from joblib import Parallel, delayed
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.speedup.dependency import dependency_groups
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.registry import PRUNERS, pruner_info
from nni_topo.rules import check_jobs, checked, whole
from nni_topo.runs.choices import PrunerChoice, Target
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, prune
from nni_topo.runs.widths import inner_layers
from nni_topo.studies.analysis.bounds.propagation import ErrorBound, error_bound
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.study import Findings, Found, Names, Tell, TrainedStudy
from nni_topo.studies.tables import table_of

Form = Literal["first_order", "directional", "lipschitz"]


@dataclass(frozen=True)
class NetDeviation:
    """The Net Deviation of a pruned network.

    Attributes
    ----------
    dev : float
        ``||delta Y|| - bound``, equation (3.12).
    sign : float
        ``dev / ||dev||``, equation (3.13) as printed: for a number, only its sign, -1, 0 or 1.
    relative : float
        ``dev / bound``, at least -1: a *normalised* difference of error and bound, as the text describes (3.13). -1: no
        error; 0: the error equals the bound; above 0: the error exceeds the bound, which holds to first order only.
        Infinite for an error with bound 0; 0 if both are 0.
    error, bound : float
        Euclidean norms over the batch.
    """

    dev: float
    sign: float
    relative: float
    error: float
    bound: float


@checked(original=MODEL, pruned=MODEL, inputs=INPUTS)
def net_deviation(
    original: nn.Module, pruned: nn.Module, inputs: Tensor, *, form: Form = "first_order", iterations: int = 100
) -> NetDeviation:
    """Compare the error of a pruned network's output with its bound; smaller is better.

    Parameters
    ----------
    original, pruned : torch.nn.Module
        As in :func:`~nni_topo.analysis.error_bound`.
    inputs : torch.Tensor
        A batch, shape ``(n, ...)``, of the data used for pruning; labels aren't needed.
    form : {"first_order", "directional", "lipschitz"}, default="first_order"
        The bound: (3.9) as printed, its tighter form (B.5), or the Lipschitz bound for changes of any size.
    iterations : int, default=100
        Most steps of each power iteration.

    Returns
    -------
    NetDeviation

    Raises
    ------
    ConfigError, DataError, SpeedupError
        As :func:`~nni_topo.analysis.error_bound` does; ConfigError for an unknown form.

    Notes
    -----
    ``dev`` falls as the bound rises: of two prunings with the same error, the one with the larger bound has the smaller
    deviation. Read it together with ``error``.

    References
    ----------
    .. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
       Technology, 2019, equations 3.12 and 3.13.
    """
    return deviation_of(error_bound(original, pruned, inputs, iterations=iterations), form)


@checked()
def deviation_of(found: ErrorBound, form: Form = "first_order") -> NetDeviation:
    """Return the Net Deviation of an error whose bounds are known."""
    bound = float(getattr(found, form))
    dev = found.error - bound
    sign = 0.0 if dev == 0.0 else dev / abs(dev)
    relative = dev / bound if bound > 0 else (math.inf if dev > 0 else 0.0)
    return NetDeviation(dev, sign, relative, found.error, bound)


# used like a pruner's name: masks of random single weights
CONNECTIONS = "connections"
_ITERATIONS = 50


@dataclass(frozen=True)
class PointsStudy(Findings):
    """A record per pruned network, and the unpruned network's test accuracy in [0, 1]."""

    points: list[Record]
    accuracy: float

    def means(self) -> pd.DataFrame:
        """Return means over seeds by ``pruner`` and ``ratio``, in the order of the points."""
        frame = pd.DataFrame(self.points).drop(columns="seed")
        return frame.groupby(["pruner", "ratio"], sort=False, as_index=False).mean()


@dataclass(frozen=True)
class DeviationStudy(PointsStudy):
    """All points, and the number of images in the batch.

    A point has the removed share of the pruned layers' weights (``pruned``), the norm of the output's change over the
    batch (``error``), the bounds (3.9) and Lipschitz, ``dev``, ``sign`` and ``relative`` as a :class:`NetDeviation`
    with (3.9), and the test accuracy without fine-tuning, in [0, 1].
    """

    stem = "deviation"
    images: int

    def figures(self) -> dict[str, Figure]:
        """Return ``deviation`` and ``accuracy``: both against the share of removed weights."""
        means = self.means()
        columns = {"deviation (3.12)": "dev", "deviation / bound": "relative", "norm of the output's change": "error"}
        accuracy = curves(means.assign(accuracy=100 * means["accuracy"]), {"test accuracy %": "accuracy"})
        accuracy.axes[0].axhline(100 * self.accuracy, color="black", linewidth=0.6, linestyle="--")
        return {"deviation": curves(means, columns), "accuracy": accuracy}


@dataclass(frozen=True, kw_only=True)
class PrunersStudy(TrainedStudy[Found]):
    """A study of one trained network under several pruners, ratios and seeds."""

    pruners: Names = (CONNECTIONS, "level", "random", "cluster", "subcluster")  # connections: random single weights
    ratios: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)  # of every layer, in [0, 1)
    seeds: int = 1  # runs of each pruner, at least 1
    calibration: int = 512  # training images for pruners that need calibration data, at least 1
    n_jobs: int = 1  # networks pruned and measured at a time, at least 1; -1: one per core

    def check(self) -> None:
        """Check the arguments; ConfigError if one is out of its range."""
        if not self.pruners or not self.ratios:
            raise ConfigError(f"a study needs at least one pruner and one ratio, got none ({self.place})")
        for name in self.pruners:
            if name != CONNECTIONS:
                PRUNERS.info(name, "pruners")
        for ratio in self.ratios:
            Target("ratio", ratio)
        for knob in ("seeds", "calibration"):
            whole(1).check(knob, getattr(self, knob), self.place)
        check_jobs(self.n_jobs, self.place)

    def points(self, start: Start, tell: Tell) -> list[Record]:
        """Return the point of every run, ``n_jobs`` measured at a time."""
        known = replace(start, known_accuracy=start.accuracy)  # measured once, not in every run
        runs = list(self.runs())
        tasks = (delayed(self.point)(replace(known, seed=seed), name, ratio) for name, ratio, seed in runs)
        found = []
        for (name, ratio, seed), point in zip(runs, Parallel(self.n_jobs, return_as="generator")(tasks), strict=True):
            tell(f"{name} at {ratio:g}, seed {seed}")
            found.append(point)
        return found

    def runs(self) -> Iterator[tuple[str, float, int]]:
        """Yield pruner, ratio and seed of every run; a pruner without ``seed`` runs once, its runs being equal."""
        for name in self.pruners:
            repeats = self.seeds if name == CONNECTIONS or "seed" in pruner_info(name).knobs() else 1
            for ratio, seed in itertools.product(self.ratios, range(self.seed, self.seed + repeats)):
                yield name, ratio, seed

    def point(self, start: Start, name: str, ratio: float) -> Record:
        """Prune the network with the seed of ``start`` and return what was measured."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AnalyzeDeviation(PrunersStudy[DeviationStudy]):
    """Compare the error of pruned networks with its bound, by pruner."""

    images: int = 64  # training images for the error and its bound, at least 1

    def check(self) -> None:
        """Check the arguments; ConfigError if one is out of its range."""
        super().check()
        whole(1).check("images", self.images, self.place)

    def find(self, tell: Tell) -> DeviationStudy:
        """Prune one trained network in many ways; measure Net Deviation on training images."""
        start = self.start()
        return DeviationStudy(self.points(start, tell), start.accuracy, len(self._batch(start)))

    def point(self, start: Start, name: str, ratio: float) -> Record:
        """Prune the network and measure how much its output differs from the unpruned network's."""
        batch, masks = self._batch(start), study_masks(name, start, ratio, self.calibration)
        changed = masked_model(start.net, batch[:2], masks)
        bound = error_bound(start.net, changed, batch, iterations=_ITERATIONS)
        run = {"pruner": name, "ratio": ratio, "seed": start.seed, "pruned": 1.0 - share_kept(masks)}
        measured = {**asdict(deviation_of(bound)), "lipschitz": bound.lipschitz}
        return {**run, **measured, "accuracy": start.tested(changed)}

    def _batch(self, start: Start) -> Tensor:
        return start.data.train[: self.images][0].to(start.device)

    def show(self, found: DeviationStudy) -> Iterator[RenderableType]:
        """Yield the means over seeds as a table."""
        columns = {
            "pruner": "{pruner}",
            "ratio": "{ratio:g}",
            "weights removed": "{pruned:.3f}",
            "error": "{error:.4g}",
            "bound (3.9)": "{bound:.4g}",
            "dev (3.12)": "{dev:.4g}",
            "dev / bound": "{relative:.4g}",
            "Lipschitz": "{lipschitz:.4g}",
            "accuracy %": "{accuracy:.1%}",
        }
        title = f"Net Deviation of {self.model}, {found.images} images"
        yield table_of(title, found.means().to_dict("records"), columns)


def study_masks(name: str, start: Start, ratio: float, calibration: int) -> Masks:
    """Return masks at a ratio in [0, 1) of every layer but the output, by a registered pruner or ``"connections"``."""
    layers = inner_layers(start.net, start.example)
    if name == CONNECTIONS:
        generator = torch.Generator().manual_seed(start.seed)
        masks: Masks = {}
        for layer in layers:
            weight: Any = start.net.get_submodule(layer).weight
            mask = torch.ones(weight.numel())
            mask[torch.randperm(len(mask), generator=generator)[: int(ratio * len(mask))]] = 0.0
            masks[layer] = {"weight": mask.reshape(weight.shape).to(weight.device)}
        return masks
    info = pruner_info(name)
    # sub-clustering finds the number of neurons itself and starts from the share 1 - ratio
    finds_number = name == "subcluster"
    knobs = {"growth": {"initial_ratio": max(1.0 - ratio, 1e-9)}} if finds_number else {}
    entry = {"op_names": layers} if finds_number else {"op_names": layers, "sparse_ratio": ratio}
    config_list = dependency_groups(start.net, start.example, [entry]) if info.structured else [entry]
    choice = PrunerChoice(name, knobs=knobs, calibration=calibration if "calibration" in info.knobs() else 0)
    return prune(start, choice, config_list).masks


def share_kept(masks: Masks) -> float:
    """Return the share of the masked layers' weights that is kept, in [0, 1]."""
    weights = [targets["weight"] for targets in masks.values() if targets.get("weight") is not None]
    if not weights:
        raise DataError("a pruner must mask weights to be studied, got no mask (masks)")
    return sum(float(mask.sum()) for mask in weights) / sum(mask.numel() for mask in weights)


def curves(means: pd.DataFrame, columns: dict[str, str]) -> Figure:
    """Draw columns, by their labels, against the share of removed weights, a line per pruner."""

    def draw(axis: Axes, column: str) -> None:
        for name, rows in means.groupby("pruner", sort=False):
            ordered = rows.sort_values("pruned")
            axis.plot(100 * ordered["pruned"], ordered[column], "o-", markersize=3, label=str(name))
        finish(axis, "weights removed %")

    return panels(columns.items(), draw, size=(5.0, 3.8))
