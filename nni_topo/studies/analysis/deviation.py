"""Net Deviation: the difference between a pruned network's error and its bound."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import RenderableType
from torch import Tensor, nn

from nni_topo.network.runtime.arguments import INPUTS, MODEL
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.rules import checked, whole
from nni_topo.runs.provenance import Record
from nni_topo.runs.run import Start
from nni_topo.studies.analysis.bounds.propagation import ErrorBound, error_bound
from nni_topo.studies.analysis.pruned import PointsStudy, PrunersStudy, share_kept, study_masks
from nni_topo.studies.pictures import finish, panels
from nni_topo.studies.study import Tell
from nni_topo.studies.tables import table_of

Form = Literal["first_order", "directional", "lipschitz"]


@dataclass(frozen=True)
class NetDeviation:
    """The Net Deviation of a pruned network; its norms are Euclidean, over the batch."""

    dev: float  # ||delta Y|| - bound, equation (3.12)
    sign: float  # dev / ||dev||, equation (3.13) as printed, which is the sign of dev: -1, 0 or 1
    # dev / bound, the *normalised* difference that the text of (3.13) describes. -1: no error; 0: the error equals the
    # bound; above 0: the error exceeds the bound, which holds to first order only. Infinite if only the bound is 0; 0
    # if both are 0.
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
        Maximum number of steps of each power iteration.

    Returns
    -------
    NetDeviation

    Raises
    ------
    ConfigError, DataError, SpeedupError
        As in :func:`~nni_topo.analysis.error_bound`; ConfigError for an unknown form.

    Notes
    -----
    ``dev`` falls as the bound rises: of two pruned networks with the same error, the network with the larger bound has
    the smaller deviation. Read it together with ``error``.

    References
    ----------
    .. [1] S. S. John, "Sub-clustering based neurogenetic pruning", MTech thesis, Indian Institute of Space Science and
       Technology, 2019, equations 3.12 and 3.13.
    """
    return _of_bound(error_bound(original, pruned, inputs, iterations=iterations), form)


def _of_bound(bound_of_error: ErrorBound, form: Form) -> NetDeviation:
    """Return the Net Deviation of an error with known bounds."""
    bound = float(getattr(bound_of_error, form))
    dev = bound_of_error.error - bound
    sign = 0.0 if dev == 0.0 else dev / abs(dev)
    relative = math.inf if dev > 0 else 0.0
    if bound > 0:
        relative = dev / bound
    return NetDeviation(dev, sign, relative, bound_of_error.error, bound)


_ITERATIONS = 50


@dataclass(frozen=True)
class DeviationStudy(PointsStudy):
    """All points: removed share, the fields of :class:`NetDeviation` with (3.9), Lipschitz bound, test accuracy."""

    stem = "deviation"
    images: int

    def figures(self) -> dict[str, Figure]:
        """Return ``deviation`` and ``accuracy``, both against the share of removed weights."""
        means = self.means()
        columns = {"deviation (3.12)": "dev", "deviation / bound": "relative", "norm of the output's change": "error"}
        accuracy = _curves(means.assign(accuracy=100 * means["accuracy"]), {"test accuracy %": "accuracy"})
        accuracy.axes[0].axhline(100 * self.accuracy, color="black", linewidth=0.6, linestyle="--")
        return {"deviation": _curves(means, columns), "accuracy": accuracy}


@dataclass(frozen=True, kw_only=True)
class AnalyzeDeviation(PrunersStudy[DeviationStudy]):
    """Compare the error of pruned networks with its bound, by pruner."""

    images: int = 64  # training images for the error and its bound, at least 1

    def check(self) -> None:
        super().check()
        whole(1).check("images", self.images, self.place)

    def find(self, tell: Tell) -> DeviationStudy:
        start = self.start()
        return DeviationStudy(self.points(start, tell), start.accuracy, len(start.data.train[: self.images][0]))

    def point(self, start: Start, name: str, ratio: float) -> Record:
        batch = start.data.train[: self.images][0].to(start.device)
        masks = study_masks(name, start, ratio, self.calibration)
        changed = masked_model(start.net, batch[:2], masks)
        bound = error_bound(start.net, changed, batch, iterations=_ITERATIONS)
        return {
            "pruned": 1.0 - share_kept(masks),
            **asdict(_of_bound(bound, "first_order")),
            "lipschitz": bound.lipschitz,
            "accuracy": start.tested(changed),
        }

    def show(self, findings: DeviationStudy) -> Iterator[RenderableType]:
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
        title = f"Net Deviation of {self.model}, {findings.images} images"
        yield table_of(title, findings.means().to_dict("records"), columns)


def _curves(means: pd.DataFrame, columns: dict[str, str]) -> Figure:
    """Draw columns (label to name) against the share of removed weights, a panel per column and a line per pruner."""

    def draw(axis: Axes, column: str) -> None:
        for name, rows in means.groupby("pruner", sort=False):
            ordered = rows.sort_values("pruned")
            axis.plot(100 * ordered["pruned"], ordered[column], "o-", markersize=3, label=str(name))
        finish(axis, "weights removed %")

    return panels(columns.items(), draw, size=(5.0, 3.8))
