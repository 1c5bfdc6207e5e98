"""``nni-topo analyze retraining``: epochs of fine-tuning compared with the bound of theorem 1."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import nn
from torch.nn.functional import cross_entropy

from nni_topo import zoo
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.registry import pruner_info
from nni_topo.rules import number, whole
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, build_model, made_dense, retrain
from nni_topo.studies.analysis.deviation import CONNECTIONS, PointsStudy, PrunersStudy, study_masks
from nni_topo.studies.analysis.retraining.bound import BoundKind, retraining_bound
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.study import Names, Tell
from nni_topo.studies.tables import table_of


@dataclass(frozen=True)
class RetrainingStudy(PointsStudy):
    """All points, the epochs of training, the most epochs of fine-tuning, and gamma.

    A point has the ``kind`` of its bound, ``"connection"`` or ``"node"``; the ``bound`` in epochs by (3.1) as printed,
    with the study's gamma, and ``derived``, the same with the ratio of gradients inverted; the ``epochs`` after which
    the test accuracy recovered (None: never); and the accuracies in [0, 1] before fine-tuning and after its last epoch.
    """

    stem = "retraining"
    trained_epochs: int
    most_epochs: int
    gamma: float

    def means(self) -> pd.DataFrame:
        """Return means over seeds by ``pruner``, ``kind`` and ``ratio``, in the order of the points."""
        frame = pd.DataFrame(self.points).drop(columns="seed")
        # a run that didn't recover counts with the most epochs; `back` is the number of runs that did
        frame = frame.assign(
            back=frame["epochs"].notna(), epochs=frame["epochs"].fillna(self.most_epochs).astype(float)
        )
        grouped = frame.groupby(["pruner", "kind", "ratio"], sort=False, as_index=False)
        means = grouped.mean()
        # the constant for which (3.1) gives the epochs: the bound is proportional to it
        return means.assign(back=grouped["back"].sum()["back"], fitted=self.gamma * means["epochs"] / means["bound"])

    def figures(self) -> dict[str, Figure]:
        """Return ``retraining``: epochs taken and both bounds by ratio, a panel per pruner."""
        groups = self.means().groupby(["pruner", "kind"], sort=False)
        return {"retraining": panels(((f"{name} ({kind})", rows) for (name, kind), rows in groups), _draw)}


@dataclass(frozen=True, kw_only=True)
class AnalyzeRetraining(PrunersStudy[RetrainingStudy]):
    """Compare the epochs that fine-tuning takes to restore the accuracy with their lower bound.

    A checkpoint must come from the model's own recipe and this seed, because the bound needs the untrained network.
    """

    pruners: Names = (CONNECTIONS, "random")  # registered names; connections: random single weights
    ratios: tuple[float, ...] = (0.1, 0.5, 0.9)  # of every layer, in [0, 1)
    images: int = 2048  # training images for losses and gradients, at least 1
    epochs: int = 10  # most epochs of fine-tuning, at least 1
    gamma: float = 1.0  # the theorem's free constant, positive
    tolerance: float = 0.0  # loss of accuracy that counts as recovered, in [0, 1]

    def check(self) -> None:
        """Check the arguments; ConfigError if one is out of its range."""
        super().check()
        for knob in ("images", "epochs"):
            whole(1).check(knob, getattr(self, knob), self.place)
        number(0.0, closed="neither").check("gamma", self.gamma, self.place)
        number(0, 1).check("tolerance", self.tolerance, self.place)

    def find(self, tell: Tell) -> RetrainingStudy:
        """Prune a trained network, fine-tune it until its accuracy recovers, and compare the epochs with theorem 1."""
        start = self.start()
        points = self.points(start, tell)
        return RetrainingStudy(points, start.accuracy, start.recipe.epochs, self.epochs, self.gamma)

    def runs(self) -> Iterator[tuple[str, float, int]]:
        """Yield pruner, ratio and seed of every run; fine-tuning uses the seed even if the pruner doesn't."""
        yield from itertools.product(self.pruners, self.ratios, range(self.seed, self.seed + self.seeds))

    def point(self, start: Start, name: str, ratio: float) -> Record:
        """Prune the network, compute its bound, and fine-tune it."""
        initial = build_model(self.model_choice, start.data, self.seed).to(start.device)
        pictures, labels = (tensor.split(256) for tensor in start.data.train[: self.images])
        batches = list(zip(pictures, labels, strict=True))
        masks = study_masks(name, start, ratio, self.calibration)
        kind: BoundKind = "node" if name != CONNECTIONS and pruner_info(name).structured else "connection"
        sparse = made_dense(start, masks)[0] if kind == "node" else masked_model(start.net, start.example, masks)
        trained = start.recipe.epochs
        found = retraining_bound(initial, start.net, sparse, cross_entropy, batches, trained, self.gamma, kind)
        before = start.tested(sparse)
        # the learning rate falls over the most epochs, even if the accuracy recovers earlier
        recipe, wanted = start.recipe.for_retraining(self.epochs), start.accuracy - self.tolerance
        taken, after = epochs_to_recover(sparse, start.data, recipe, wanted, seed=start.seed)
        run = {"pruner": name, "kind": kind, "ratio": ratio, "seed": start.seed}
        bounds = {"bound": found.epochs, "derived": found.derived_epochs}
        return {**run, **bounds, "epochs": taken, "accuracy_pruned": before, "accuracy_retrained": after}

    def show(self, found: RetrainingStudy) -> Iterator[RenderableType]:
        """Yield the means over seeds as a table."""
        columns = {
            "pruner": "{pruner}",
            "kind": "{kind}",
            "ratio": "{ratio:g}",
            f"bound (3.1), gamma {found.gamma:g}": "{bound:.3g}",
            "fitted gamma": "{fitted:.3g}",
            "bound as derived": "{derived:.3g}",
            "epochs taken": "{epochs:.1f}",
            "runs recovered": "{back:g}",
            "no recovery %": "{accuracy_pruned:.1%}",
            "fine-tuned %": "{accuracy_retrained:.1%}",
        }
        rows = found.means().to_dict("records")
        yield table_of(f"epochs of fine-tuning of {self.model}", rows, columns, text_columns=2)
        yield f"trained for {found.trained_epochs} epochs to {100 * found.accuracy:.1f} %"


class _Recovered(Exception):  # noqa: N818 - ends a training, no error
    """The accuracy has recovered."""


def epochs_to_recover(
    model: nn.Module, data: zoo.DataBundle, recipe: zoo.Recipe, wanted: float, *, seed: int
) -> tuple[int | None, float]:
    """Fine-tune in place until the test accuracy is ``wanted``; return epochs (None: never) and the last accuracy."""
    device = next(model.parameters()).device
    reached = [zoo.evaluate(model, data.test, device=device)]
    if reached[0] >= wanted:
        return 0, reached[0]

    def watch(log: zoo.EpochLog) -> None:
        reached.append(zoo.evaluate(model, data.test, device=device))
        if reached[-1] >= wanted:
            raise _Recovered

    try:
        retrain(model, data, recipe, seed=seed, callback=watch)
    except _Recovered:
        return len(reached) - 1, reached[-1]
    return None, reached[-1]


def _draw(axis: Axes, rows: pd.DataFrame) -> None:
    rows = rows.sort_values("ratio")
    for column, style, label in (
        ("epochs", "ko-", "epochs taken"),
        ("bound", "s--", "bound (3.1)"),
        ("derived", "^--", "bound as derived"),
    ):
        axis.plot(rows["ratio"], rows[column], style, label=label)
    finish(axis, "ratio", "epochs of fine-tuning", yscale="symlog")
