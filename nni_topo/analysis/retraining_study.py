"""Epochs of retraining against theorem 1: the library function behind ``nni-topo analyze retraining``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo import zoo
from nni_topo.analysis import retraining_bound
from nni_topo.analysis.deviation import CONNECTIONS, study_masks
from nni_topo.analysis.retraining import Kind
from nni_topo.errors import ConfigError, check_integer, is_finite
from nni_topo.network.reference import masked_model
from nni_topo.pruners.registry import pruner_info
from nni_topo.runs.plan import DataChoice, ModelChoice, Target
from nni_topo.runs.run import Start, build_model, made_dense, trained


@dataclass(frozen=True)
class RetrainingPoint:
    """One pruned and retrained network.

    Attributes
    ----------
    kind : str
        ``"connection"`` or ``"node"``.
    bound, derived : float
        Epochs by (3.1) as printed and with the ratio of gradients the other way up, with the study's constant.
    epochs : int or None
        Epochs after which the test accuracy was back; None if it never was.
    accuracy_pruned, accuracy_retrained : float
        In [0, 1]: before retraining, and after the last epoch of it.
    """

    pruner: str
    kind: str
    ratio: float
    seed: int
    bound: float
    derived: float
    epochs: int | None
    accuracy_pruned: float
    accuracy_retrained: float


@dataclass(frozen=True)
class RetrainingStudy:
    """All points, the trained network's test accuracy, its epochs, the most epochs of retraining, and gamma."""

    points: list[RetrainingPoint]
    accuracy: float
    trained_epochs: int
    most_epochs: int
    gamma: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, lists and strings."""
        return asdict(self)

    def means(self) -> pd.DataFrame:
        """Return means over seeds by ``pruner``, ``kind`` and ``ratio``, in the order of the points."""
        frame = pd.DataFrame([asdict(point) for point in self.points]).drop(columns="seed")
        # a run that wasn't back counts with the most epochs, and back says how many were
        frame = frame.assign(
            back=frame["epochs"].notna(), epochs=frame["epochs"].fillna(self.most_epochs).astype(float)
        )
        grouped = frame.groupby(["pruner", "kind", "ratio"], sort=False, as_index=False)
        means = grouped.mean()
        # the constant with which (3.1) gives the epochs, for the bound is proportional to it
        return means.assign(back=grouped["back"].sum()["back"], fitted=self.gamma * means["epochs"] / means["bound"])

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``retraining.json`` and ``retraining.png``; return the files."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = folder / "retraining.json"
        document.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        _picture(self.means()).savefig(folder / "retraining.png", dpi=130)
        return [document, folder / "retraining.png"]


def retraining_study(
    model: ModelChoice,
    checkpoint: str | Path | None,
    data: DataChoice,
    pruners: Sequence[str],
    ratios: Sequence[float],
    *,
    seeds: int = 1,
    most_epochs: int = 10,
    images: int = 2048,
    calibration: int = 512,
    gamma: float = 1.0,
    tolerance: float = 0.0,
    seed: int = 0,
    device: str = "cpu",
) -> RetrainingStudy:
    """Prune a trained network, retrain it until its accuracy is back, and compare the epochs with theorem 1."""
    _check(pruners, ratios)
    for knob, value in (
        ("seeds", seeds),
        ("most_epochs", most_epochs),
        ("images", images),
        ("calibration", calibration),
    ):
        check_integer(knob, value, 1, "analyze retraining")
    if not is_finite(gamma) or gamma <= 0.0:
        raise ConfigError(f"gamma must be positive and finite, got {gamma!r} (analyze retraining)")
    if not 0.0 <= tolerance <= 1.0:
        raise ConfigError(f"tolerance must be in [0, 1], got {tolerance!r} (analyze retraining)")
    start = trained(model, data, checkpoint=checkpoint, seed=seed, device=device)
    # where training began: a checkpoint must be what the default recipe and this seed gave
    initial = build_model(model, start.data, seed).to(start.device)
    pictures, labels = (tensor[:images].split(256) for tensor in start.data.train.tensors)
    batches = list(zip(pictures, labels, strict=True))
    case = _Case(start, initial, start.accuracy - tolerance, batches, calibration)
    points = []
    for name in pruners:
        for ratio, each in itertools.product(ratios, range(seed, seed + seeds)):
            points.append(case.point(name, ratio, each, gamma, most_epochs))
    return RetrainingStudy(points, start.accuracy, start.recipe.epochs, most_epochs, gamma)


@dataclass(frozen=True)
class _Case:
    """A trained network and everything that is done to it."""

    start: Start
    initial: nn.Module
    wanted: float
    batches: list[tuple[Tensor, Tensor]]
    calibration: int

    def point(self, name: str, ratio: float, seed: int, gamma: float, most_epochs: int) -> RetrainingPoint:
        """Prune, bound, retrain."""
        start = self.start
        masks = study_masks(name, replace(start, seed=seed), ratio, self.calibration)
        kind: Kind = "node" if name != CONNECTIONS and pruner_info(name).structured else "connection"
        sparse = made_dense(start, masks)[0] if kind == "node" else masked_model(start.net, start.example, masks)
        epochs = start.recipe.epochs
        found = retraining_bound(self.initial, start.net, sparse, cross_entropy, self.batches, epochs, gamma, kind)
        before = start.tested(sparse)
        if kind == "connection":
            _freeze_zeros(sparse)
        # the learning rate falls over the most epochs, however soon the accuracy is back
        taken, after = epochs_back(sparse, start.data, start.recipe.for_retraining(most_epochs), self.wanted, seed=seed)
        return RetrainingPoint(name, kind, ratio, seed, found.epochs, found.derived_epochs, taken, before, after)


class _Back(Exception):  # noqa: N818 - ends a training, no error
    """The accuracy is back."""


def epochs_back(
    model: nn.Module, data: zoo.DataBundle, recipe: zoo.Recipe, wanted: float, *, seed: int
) -> tuple[int | None, float]:
    """Train in place until the test accuracy is ``wanted``; return epochs (None: never) and the last test accuracy."""
    device = next(model.parameters()).device
    reached = [zoo.evaluate(model, data.test, device=device)]
    if reached[0] >= wanted:
        return 0, reached[0]

    def watch(log: zoo.EpochLog) -> None:
        reached.append(zoo.evaluate(model, data.test, device=device))
        if reached[-1] >= wanted:
            raise _Back

    try:
        zoo.train(model, data, recipe, seed=seed, device=device, callback=watch)
    except _Back:
        return len(reached) - 1, reached[-1]
    return None, reached[-1]


def _freeze_zeros(model: nn.Module) -> None:
    """Keep pruned weights at zero in training: without gradients, momentum and weight decay leave them there."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            alive = (parameter != 0).to(parameter)
            parameter.register_hook(alive.mul)


def print_retraining(study: RetrainingStudy, title: str, console: Console) -> None:
    """Print the means over seeds as a table."""
    table = Table("pruner", "kind", title=title, title_justify="left")
    columns = ("ratio", f"bound (3.1), gamma {study.gamma:g}", "gamma that fits", "bound as derived", "epochs taken")
    for column in (*columns, "runs back", "pruned %", "retrained %"):
        table.add_column(column, justify="right")
    for row in study.means().to_dict("records"):
        numbers = [f"{row[key]:.3g}" for key in ("bound", "fitted", "derived")]
        shares = [f"{100 * row[key]:.1f}" for key in ("accuracy_pruned", "accuracy_retrained")]
        epochs = f"{row['epochs']:.1f}", f"{row['back']:g}"
        table.add_row(str(row["pruner"]), str(row["kind"]), f"{row['ratio']:g}", *numbers, *epochs, *shares)
    console.print(table)
    console.print(f"trained for {study.trained_epochs} epochs to {100 * study.accuracy:.1f} %", highlight=False)


def _check(pruners: Sequence[str], ratios: Sequence[float]) -> None:
    if not pruners or not ratios:
        raise ConfigError("a study needs at least one pruner and one ratio, got none (analyze retraining)")
    for name in pruners:
        if name != CONNECTIONS:
            pruner_info(name)
    for ratio in ratios:
        Target("ratio", ratio)


def _picture(means: pd.DataFrame) -> Figure:
    kinds = list(dict.fromkeys(zip(means["pruner"], means["kind"], strict=True)))
    figure = Figure(figsize=(4.5 * len(kinds), 3.8), layout="constrained")
    for axis, (name, kind) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        rows = means[means["pruner"] == name].sort_values("ratio")
        axis.plot(rows["ratio"], rows["epochs"], "ko-", label="epochs taken")
        axis.plot(rows["ratio"], rows["bound"], "s--", label="bound (3.1)")
        axis.plot(rows["ratio"], rows["derived"], "^--", label="bound as derived")
        axis.set(xlabel="ratio", ylabel="epochs of retraining", title=f"{name} ({kind})", yscale="symlog")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    return figure
