"""Epochs of fine-tuning ("retraining" in the source) that restore a pruned network, and a lower bound (theorem 1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.arguments import BATCHES, MODEL, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.fits import call_arguments
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.pruners.registry import pruner_info
from nni_topo.rules import check_knobs, number, whole
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start, build_model, made_dense, retrain
from nni_topo.studies.analysis.pruned import CONNECTIONS, PointsStudy, PrunersStudy, study_masks
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.study import Names, Tell
from nni_topo.studies.tables import table_of

BoundKind = Literal["node", "connection"]
_POSITIVE = number(0.0, closed="neither")


@dataclass(frozen=True)
class RetrainingBound:
    """Theorem 1 for one pruned network."""

    epochs: float  # lower bound on the epochs of fine-tuning, equation (3.1) as printed
    # The same with the ratio of gradients inverted, as (A.2) to (A.5) imply: with equality there, epochs are
    # proportional to ||gradient||^2 / mu. In the node form it is the epochs of training times gamma times the loss gap
    # after pruning divided by the loss gap before training.
    derived_epochs: float
    mu_initial: float  # constants of (3.2) and (3.3), or of (3.4) and (3.5), with equality
    mu_sparse: float
    gradient_initial: float  # squared norms of the gradients, all layers together (3.6)
    gradient_sparse: float
    loss_initial: float  # mean losses
    loss_trained: float
    loss_sparse: float
    gamma: float  # the source's free constant, as given

    def __float__(self) -> float:
        return self.epochs

    def fitted_gamma(self, epochs: float) -> float:
        """Return the gamma for which (3.1) equals ``epochs``; infinite if the bound is 0 for every gamma."""
        if self.epochs <= 0:
            return math.inf
        return epochs * self.gamma / self.epochs


@public(initial=MODEL, trained=MODEL, sparse=MODEL, batches=BATCHES, epochs=_POSITIVE, gamma=_POSITIVE)
def retraining_bound(
    initial: nn.Module,
    trained: nn.Module,
    sparse: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    batches: Iterable[tuple[Any, Any]],
    epochs: float,
    gamma: float = 1.0,
    kind: BoundKind = "node",
) -> RetrainingBound:
    """Compute a lower bound on the epochs of fine-tuning after pruning, by theorem 1.

    Parameters
    ----------
    initial : torch.nn.Module
        The network before training.
    trained : torch.nn.Module
        The network after training.
    sparse : torch.nn.Module
        The network after pruning, not wrapped. For ``"connection"`` its parameters must have full shapes; for
        ``"node"`` it may be dense, or of full size with zeros, whose gradients don't count.
    loss : callable
        ``loss(outputs, targets)``, the mean over a batch, e.g. ``torch.nn.functional.cross_entropy``.
    batches : iterable of (inputs, targets)
        Data for losses and gradients. Inputs: a tensor, a tuple of arguments or a mapping of keyword arguments.
    epochs : float
        Number of epochs of the training, positive.
    gamma : float, default=1.0
        The source's free constant, positive. The source fits it to each case, between 1e-6 and 100; see
        ``fitted_gamma``.
    kind : {"node", "connection"}, default="node"
        Source of the constants. ``"node"``: losses and gradients, (3.4) and (3.5), for both kinds of pruning;
        ``"connection"``: distances of gradients and weights, (3.2) and (3.3).

    Returns
    -------
    RetrainingBound
        ``float(result)`` is the bound.

    Raises
    ------
    ConfigError
        If a number isn't positive, ``kind`` is unknown, a batch isn't a pair, the loss isn't one number, or shapes
        differ for ``"connection"``.
    SpeedupError
        If a model is wrapped by a pruner.
    DataError
        If there is no batch; or if no bound exists because training or pruning changed nothing or a gradient is zero.

    Notes
    -----
    The theorem assumes that the loss is strictly convex, which isn't true for networks, and that epochs are
    proportional to the difference in loss: with a fitted constant it describes epochs, it doesn't predict them.
    Everything is computed in evaluation mode; the models aren't changed.

    References
    ----------
    .. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
       Technology, 2019, section 3.2, theorem 1 and appendix A.
    """
    data: list[tuple[Any, Any]] = []
    for index, batch in enumerate(Calibration.of(batches, "batches")):
        is_sequence = isinstance(batch, (tuple, list))
        if not is_sequence or len(batch) != 2:
            got = f"{type(batch).__name__} of {len(batch)}" if is_sequence else type(batch).__name__
            raise ConfigError(f"a batch must be a pair of inputs and targets, got a {got} (batch {index})")
        data.append((batch[0], batch[1]))
    for model in (initial, trained, sparse):
        check_model(model)
    start, end, pruned = (_state(model, loss, data) for model in (initial, trained, sparse))
    # (3.6): squared norms over all layers; gradients of pruned nodes, which aren't in the network, don't count
    is_kept = pruned.weights != 0 if kind == "node" else 1.0
    initial_norm = float(start.gradients.square().sum())
    sparse_norm = float((pruned.gradients * is_kept).square().sum())
    if min(initial_norm, sparse_norm) == 0.0:
        raise DataError("gradients before training and after pruning must not be zero, got one that is (theorem 1)")
    if kind == "node":
        # (3.4) and (3.5), with equality: |gradient|^2 = mu |loss - trained loss|
        slopes, gaps = [initial_norm, sparse_norm], [abs(state.loss - end.loss) for state in (start, pruned)]
    else:
        if not start.shapes == end.shapes == pruned.shapes:
            raise ConfigError("the connection form needs parameters of the same shapes, got others (kind 'connection')")
        # (3.2) and (3.3), with equality: |gradient - trained gradient| = mu |weights - trained weights|
        slopes = [float((state.gradients - end.gradients).norm()) for state in (start, pruned)]
        gaps = [float((state.weights - end.weights).norm()) for state in (start, pruned)]
    if min(slopes + gaps) == 0.0:
        raise DataError(
            "networks before training and after pruning must differ from the trained network, got an equal one"
        )
    mu_initial, mu_sparse = slopes[0] / gaps[0], slopes[1] / gaps[1]
    constants = gamma * epochs * mu_initial / mu_sparse
    return RetrainingBound(
        epochs=constants * initial_norm / sparse_norm,
        derived_epochs=constants * sparse_norm / initial_norm,
        mu_initial=mu_initial,
        mu_sparse=mu_sparse,
        gradient_initial=initial_norm,
        gradient_sparse=sparse_norm,
        loss_initial=start.loss,
        loss_trained=end.loss,
        loss_sparse=pruned.loss,
        gamma=gamma,
    )


@dataclass(frozen=True)
class _State:
    """A model's mean loss, its parameters and their gradients as vectors, and the parameters' shapes by name."""

    loss: float
    weights: Tensor
    gradients: Tensor
    shapes: dict[str, torch.Size]


def _state(model: nn.Module, loss: Callable[[Any, Any], Tensor], batches: list[tuple[Any, Any]]) -> _State:
    copied = evaluating(detached_copy(model))
    copied.requires_grad_(True)
    copied.zero_grad()
    samples = sum(len(targets) for _, targets in batches)
    if not samples:
        raise DataError("batches must hold at least one sample, got none (was a generator used twice?)")
    device = next(copied.parameters()).device
    total = 0.0
    for inputs, targets in batches:
        args, kwargs = call_arguments(inputs, copied)
        batch_loss = loss(copied(*args, **kwargs), targets.to(device))
        if not isinstance(batch_loss, Tensor) or batch_loss.dim():
            got = f"a {type(batch_loss).__name__}"
            if isinstance(batch_loss, Tensor):
                got = f"one of shape {tuple(batch_loss.shape)}"
            raise ConfigError(f"a loss must be the mean over a batch, got {got} (loss)")
        # weighted, so that the sum is the mean over all samples
        mean = batch_loss * (len(targets) / samples)
        torch.autograd.backward(mean)
        total += mean.item()
    if not math.isfinite(total):
        raise DataError(f"a loss must be finite, got {total} (theorem 1)")
    # parameters that the loss doesn't depend on have no gradient
    reached = {name: p for name, p in copied.named_parameters() if p.grad is not None}
    weights = torch.cat([p.detach().double().flatten() for p in reached.values()])
    gradients = torch.cat([p.grad.double().flatten() for p in reached.values() if p.grad is not None])
    return _State(total, weights, gradients, {name: p.shape for name, p in reached.items()})


@dataclass(frozen=True)
class RetrainingStudy(PointsStudy):
    """All points: the bound in epochs as printed and as derived, and the epochs until recovery, or None."""

    stem = "retraining"
    trained_epochs: int
    most_epochs: int
    gamma: float

    def means(self) -> pd.DataFrame:
        """Return means over seeds by ``pruner``, ``kind`` and ``ratio``, in the order of the points."""
        frame = pd.DataFrame(self.points).drop(columns="seed")
        # a run that didn't recover counts with `most_epochs`; `back` is the number of runs that recovered
        frame = frame.assign(
            back=frame["epochs"].notna(), epochs=frame["epochs"].fillna(self.most_epochs).astype(float)
        )
        grouped = frame.groupby(["pruner", "kind", "ratio"], sort=False, as_index=False)
        means = grouped.mean()
        # `fitted`: the gamma for which (3.1) gives the epochs, because the bound is proportional to gamma
        return means.assign(back=grouped["back"].sum()["back"], fitted=self.gamma * means["epochs"] / means["bound"])

    def figures(self) -> dict[str, Figure]:
        """Return ``retraining``: epochs taken and both bounds by ratio, a panel per pruner."""
        groups = self.means().groupby(["pruner", "kind"], sort=False)
        return {"retraining": panels(((f"{name} ({kind})", rows) for (name, kind), rows in groups), _draw)}


@dataclass(frozen=True, kw_only=True)
class AnalyzeRetraining(PrunersStudy[RetrainingStudy]):
    """Compare the epochs that fine-tuning takes to restore the accuracy with a lower bound.

    A checkpoint must come from the model's default recipe and this seed, because the bound needs the untrained network.
    """

    pruners: Names = (CONNECTIONS, "random")  # registered names; connections: random single weights
    ratios: tuple[float, ...] = (0.1, 0.5, 0.9)  # of every layer, in [0, 1)
    images: int = 2048  # training images for losses and gradients, at least 1
    epochs: int = 10  # maximum number of epochs of fine-tuning, at least 1
    gamma: float = 1.0  # the theorem's free constant, positive
    tolerance: float = 0.0  # loss of accuracy that counts as recovered, in [0, 1]

    def check(self) -> None:
        super().check()
        rules = {"images": whole(1), "epochs": whole(1), "gamma": _POSITIVE, "tolerance": number(0, 1)}
        check_knobs(self.place, vars(self), rules)

    def find(self, tell: Tell) -> RetrainingStudy:
        start = self.start()
        points = self.points(start, tell)
        return RetrainingStudy(points, start.accuracy, start.recipe.epochs, self.epochs, self.gamma)

    def seeds_of(self, name: str) -> range:
        return range(self.seed, self.seed + self.seeds)

    def point(self, start: Start, name: str, ratio: float) -> Record:
        initial = build_model(self.model_choice, start.data, self.seed).to(start.device)
        pictures, labels = (tensor.split(256) for tensor in start.data.train[: self.images])
        batches = list(zip(pictures, labels, strict=True))
        masks = study_masks(name, start, ratio, self.calibration)
        kind: BoundKind = "connection"
        if name != CONNECTIONS and pruner_info(name).structured:
            kind = "node"
            sparse, _ = made_dense(start, masks)
        else:
            sparse = masked_model(start.net, start.example, masks)
        trained = start.recipe.epochs
        bound = retraining_bound(initial, start.net, sparse, cross_entropy, batches, trained, self.gamma, kind)
        bounds = {"kind": kind, "bound": bound.epochs, "derived": bound.derived_epochs}
        before = start.tested(sparse)
        # the learning rate falls over all epochs, even if the accuracy recovers earlier
        recipe, goal = start.recipe.for_retraining(self.epochs), start.accuracy - self.tolerance
        epochs, after = epochs_to_recover(sparse, start.data, recipe, goal, seed=start.seed)
        return {**bounds, "epochs": epochs, "accuracy_pruned": before, "accuracy_retrained": after}

    def show(self, findings: RetrainingStudy) -> Iterator[RenderableType]:
        columns = {
            "pruner": "{pruner}",
            "kind": "{kind}",
            "ratio": "{ratio:g}",
            f"bound (3.1), gamma {findings.gamma:g}": "{bound:.3g}",
            "fitted gamma": "{fitted:.3g}",
            "bound as derived": "{derived:.3g}",
            "epochs taken": "{epochs:.1f}",
            "runs recovered": "{back:g}",
            "no recovery %": "{accuracy_pruned:.1%}",
            "fine-tuned %": "{accuracy_retrained:.1%}",
        }
        rows = findings.means().to_dict("records")
        yield table_of(f"epochs of fine-tuning of {self.model}", rows, columns, text_columns=2)
        yield f"trained for {findings.trained_epochs} epochs to {100 * findings.accuracy:.1f} %"


def epochs_to_recover(
    model: nn.Module, data: zoo.DataBundle, recipe: zoo.Recipe, goal: float, *, seed: int
) -> tuple[int | None, float]:
    """Fine-tune in place until the test accuracy reaches ``goal``; return epochs (None: never) and accuracy."""
    before = zoo.evaluate(model, data.test)
    if before >= goal:
        return 0, before
    # the test images take the place of validation images
    log = retrain(model, replace(data, validation=data.test), recipe, seed=seed, until=goal)
    reached = log.epochs[-1].validation_accuracy or 0.0
    epochs = len(log.epochs) if reached >= goal else None
    return epochs, reached


def _draw(axis: Axes, rows: pd.DataFrame) -> None:
    rows = rows.sort_values("ratio")
    for column, style, label in (
        ("epochs", "ko-", "epochs taken"),
        ("bound", "s--", "bound (3.1)"),
        ("derived", "^--", "bound as derived"),
    ):
        axis.plot(rows["ratio"], rows[column], style, label=label)
    finish(axis, "ratio", "epochs of fine-tuning", yscale="symlog")
