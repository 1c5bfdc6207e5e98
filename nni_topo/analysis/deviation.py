"""Net Deviation: how far a pruned network's error lies from what its pruning could have done.

References
----------
.. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
   Technology, 2019, equations 3.12 and 3.13.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from nni_topo.analysis.bounds.propagation import ErrorBound, error_bound
from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.network.dependency import dependency_groups
from nni_topo.network.reference import masked_model
from nni_topo.pruners.hooks import Masks
from nni_topo.pruners.registry import pruner_info
from nni_topo.runs.plan import DataChoice, ModelChoice, PrunerChoice, Target
from nni_topo.runs.run import Start, prune, trained
from nni_topo.runs.widths import inner_layers

Form = Literal["first_order", "directional", "lipschitz"]
_FORMS = ("first_order", "directional", "lipschitz")


@dataclass(frozen=True)
class NetDeviation:
    """The Net Deviation of a pruned network.

    Attributes
    ----------
    dev : float
        ``||delta Y|| - bound``, equation (3.12).
    sign : float
        ``dev / ||dev||``, equation (3.13) as printed: for a number this is its sign, -1, 0 or 1, and nothing more.
    relative : float
        ``dev / bound``, at least -1: what (3.13) is described as, a *normalised* difference of error and bound. -1: no
        error; 0: all of the bound is used up; above 0: the bound, which holds to first order, is broken, infinitely
        where it is 0. 0 if there is neither error nor bound.
    error, bound : float
        Euclidean norms over the batch.
    """

    dev: float
    sign: float
    relative: float
    error: float
    bound: float


def net_deviation(
    original: nn.Module, pruned: nn.Module, inputs: Tensor, *, form: Form = "first_order", iterations: int = 100
) -> NetDeviation:
    """Compare the error of a pruned network's output with its bound; less is better.

    Parameters
    ----------
    original, pruned : torch.nn.Module
        As in :func:`~nni_topo.analysis.error_bound`.
    inputs : torch.Tensor
        A batch, shape ``(n, ...)``, of the data used for pruning; labels aren't needed.
    form : {"first_order", "directional", "lipschitz"}, default="first_order"
        The bound: (3.9) as printed, its tighter form (B.5), or the one that always holds.
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
    ``dev`` grows with the bound: a pruning whose bound is larger has the lower deviation at the same error. Read it
    beside ``error`` itself.

    References
    ----------
    .. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
       Technology, 2019, equations 3.12 and 3.13.
    """
    if form not in _FORMS:
        raise unknown_name("form", str(form), _FORMS)
    return deviation_of(error_bound(original, pruned, inputs, iterations=iterations), form)


def deviation_of(found: ErrorBound, form: Form = "first_order") -> NetDeviation:
    """Return the Net Deviation of an error whose bounds are known."""
    bound = float(getattr(found, form))
    dev = found.error - bound
    sign = 0.0 if dev == 0.0 else dev / abs(dev)
    relative = dev / bound if bound > 0 else (math.inf if dev > 0 else 0.0)
    return NetDeviation(dev, sign, relative, found.error, bound)


# in the place of a pruner's name: single weights at random
CONNECTIONS = "connections"
_ITERATIONS = 50


@dataclass(frozen=True)
class DeviationPoint:
    """One pruned network; shares and accuracies in [0, 1].

    Attributes
    ----------
    pruned : float
        Share of the pruned layers' weights that is gone.
    error, bound, lipschitz : float
        Norm of the output's change over the batch, its bound (3.9), and the bound that always holds.
    dev, sign, relative : float
        See :class:`~nni_topo.analysis.NetDeviation`; with (3.9).
    accuracy : float
        On the test images, without retraining.
    """

    pruner: str
    ratio: float
    seed: int
    pruned: float
    error: float
    bound: float
    lipschitz: float
    dev: float
    sign: float
    relative: float
    accuracy: float


@dataclass(frozen=True)
class DeviationStudy:
    """All points, the unpruned network's test accuracy and the number of images in the batch."""

    points: list[DeviationPoint]
    accuracy: float
    images: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings."""
        return asdict(self)

    def means(self) -> pd.DataFrame:
        """Return means over seeds by ``pruner`` and ``ratio``, in the order of the points."""
        frame = pd.DataFrame([asdict(point) for point in self.points]).drop(columns="seed")
        return frame.groupby(["pruner", "ratio"], sort=False, as_index=False).mean()

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``deviation.json``, ``deviation.png`` and ``accuracy.png``; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = folder / "deviation.json"
        document.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        means = self.means()
        columns = {"dev": "deviation (3.12)", "relative": "deviation / bound", "error": "norm of the output's change"}
        _curves(means, columns).savefig(folder / "deviation.png", dpi=130)
        figure = _curves(means.assign(accuracy=100 * means["accuracy"]), {"accuracy": "test accuracy %"})
        figure.axes[0].axhline(100 * self.accuracy, color="black", linewidth=0.6, linestyle="--")
        figure.savefig(folder / "accuracy.png", dpi=130)
        return [document, folder / "deviation.png", folder / "accuracy.png"]


def deviation_study(
    model: ModelChoice,
    checkpoint: str | Path | None,
    data: DataChoice,
    pruners: Sequence[str],
    ratios: Sequence[float],
    *,
    seeds: int = 1,
    images: int = 64,
    calibration: int = 512,
    seed: int = 0,
    device: str = "cpu",
) -> DeviationStudy:
    """Prune one trained network by several pruners, seeds and ratios; measure Net Deviation on training images."""
    _check(pruners, ratios, seeds, images, calibration)
    start = trained(model, data, checkpoint=checkpoint, seed=seed, device=device)
    net = start.net
    batch = start.data.train.tensors[0][:images].to(start.device)
    points = []
    for name in pruners:
        # without a seed every run would be the same
        repeats = seeds if name == CONNECTIONS or "seed" in pruner_info(name).knobs() else 1
        for ratio, each in itertools.product(ratios, range(seed, seed + repeats)):
            masks = study_masks(name, replace(start, seed=each), ratio, calibration)
            changed = masked_model(net, batch[:2], masks)
            kept = start.tested(changed)
            bound = error_bound(net, changed, batch, iterations=_ITERATIONS)
            points.append(_point(name, ratio, each, _share(masks), bound, kept))
    return DeviationStudy(points, start.accuracy, len(batch))


def _point(name: str, ratio: float, seed: int, pruned: float, found: ErrorBound, accuracy: float) -> DeviationPoint:
    deviation = deviation_of(found)
    return DeviationPoint(
        pruner=name,
        ratio=ratio,
        seed=seed,
        pruned=pruned,
        error=found.error,
        bound=found.first_order,
        lipschitz=found.lipschitz,
        dev=deviation.dev,
        sign=deviation.sign,
        relative=deviation.relative,
        accuracy=accuracy,
    )


def study_masks(name: str, start: Start, ratio: float, calibration: int) -> Masks:
    """Return masks by a registered name, or ``"connections"``, at a ratio in [0, 1) of every layer but the output."""
    layers = inner_layers(start.net, start.example)
    if name == CONNECTIONS:
        return _random_connections(start.net, layers, ratio, start.seed)
    info = pruner_info(name)
    # it finds the number of neurons itself, and begins with 1 - ratio of them
    finds_number = name == "subcluster"
    knobs = {"growth": {"initial_ratio": max(1.0 - ratio, 1e-9)}} if finds_number else {}
    entry = {"op_names": layers} if finds_number else {"op_names": layers, "sparse_ratio": ratio}
    config_list = dependency_groups(start.net, start.example, [entry]) if info.structured else [entry]
    choice = PrunerChoice(name, knobs=knobs, calibration=calibration if "calibration" in info.knobs() else 0)
    return prune(start, choice, config_list)[0]


def _random_connections(model: nn.Module, layers: list[str], ratio: float, seed: int) -> Masks:
    generator = torch.Generator().manual_seed(seed)
    masks: Masks = {}
    for name in layers:
        weight: Any = model.get_submodule(name).weight
        mask = torch.ones(weight.numel())
        mask[torch.randperm(len(mask), generator=generator)[: int(ratio * len(mask))]] = 0.0
        masks[name] = {"weight": mask.reshape(weight.shape).to(weight.device)}
    return masks


def print_deviation(study: DeviationStudy, title: str, console: Console) -> None:
    """Print the means over seeds as a table."""
    table = Table("pruner", title=title, title_justify="left")
    columns = ("ratio", "weights gone", "error", "bound (3.9)", "dev (3.12)", "dev / bound", "Lipschitz", "accuracy %")
    for column in columns:
        table.add_column(column, justify="right")
    for row in study.means().to_dict("records"):
        numbers = (f"{row[key]:.4g}" for key in ("error", "bound", "dev", "relative", "lipschitz"))
        shares = f"{row['ratio']:g}", f"{row['pruned']:.3f}"
        table.add_row(str(row["pruner"]), *shares, *numbers, f"{100 * row['accuracy']:.1f}")
    console.print(table)


def _check(pruners: Sequence[str], ratios: Sequence[float], seeds: int, images: int, calibration: int) -> None:
    if not pruners or not ratios:
        raise ConfigError("a study needs at least one pruner and one ratio, got none (analyze deviation)")
    for name in pruners:
        if name != CONNECTIONS:
            pruner_info(name)
    for ratio in ratios:
        Target("ratio", ratio)
    for knob, value in (("seeds", seeds), ("images", images), ("calibration", calibration)):
        if value < 1:
            raise ConfigError(f"{knob} must be at least 1, got {value} (analyze deviation)")


def _share(masks: Masks) -> float:
    weights = [targets["weight"] for targets in masks.values() if targets.get("weight") is not None]
    if not weights:
        raise DataError("a pruner must mask weights to be studied, got no mask (analyze deviation)")
    return 1.0 - sum(float(mask.sum()) for mask in weights) / sum(mask.numel() for mask in weights)


def _curves(means: pd.DataFrame, columns: dict[str, str]) -> Figure:
    """Draw columns against the share of weights that is gone, a line per pruner."""
    figure = Figure(figsize=(5.0 * len(columns), 3.8), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, (column, label) in zip(axes, columns.items(), strict=True):
        for name, rows in means.groupby("pruner", sort=False):
            ordered = rows.sort_values("pruned")
            axis.plot(100 * ordered["pruned"], ordered[column], "o-", markersize=3, label=str(name))
        axis.set(xlabel="weights gone %", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="x-small")
    return figure
