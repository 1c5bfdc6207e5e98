"""Networks of several sizes from one run, and the loss of each."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.disk import finite, plain
from nni_topo.errors import ConfigError, shown
from nni_topo.maths.knee import knee
from nni_topo.maths.ties import first_smallest
from nni_topo.network.cost.measure import TimedPair, time_shares
from nni_topo.network.runtime.arguments import BATCHES, MODEL, ROUND_TO
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.public import Running, public
from nni_topo.pruners.budget import budget_outcome
from nni_topo.recovery import RecoveryMethod
from nni_topo.recovery.distilling import course_on
from nni_topo.recovery.lesson import judged
from nni_topo.recovery.outputs import Outputs
from nni_topo.rules import ANYTHING, is_finite
from nni_topo.runs.headline import headline
from nni_topo.runs.measurements import Stage
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.prepared import Prepared, plain_weights, prepare
from nni_topo.runs.report import ShrinkReport, parts_of
from nni_topo.runs.settings import LEAVE_OUT, Settings, cost_without_share

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

    from nni_topo.runs.page import Part

SHARES = (0.75, 0.5, 0.25, 0.1)
_LEAST_STEPS = 40
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FrontierPoint:
    """One of the networks, its cost and its loss. Intervals are of 95 %, over the held-out images."""

    share: float  # requested share of the cost; 1.0 is the unpruned network
    left: float  # share of the cost that is kept
    macs: int  # multiply-accumulates of one sample
    params: int
    changed: float  # share of answers, classes or decisions, on held-out images that change; NaN: outputs have none
    changed_low: float
    changed_high: float
    distance: float  # mean squared distance from the unpruned network's outputs over their variance, held out
    distance_low: float
    distance_high: float
    accuracy: float  # what `evaluate` returns; NaN without it
    start: float  # share of the network that this one was made from: 1.0, or the share of a larger one
    is_distilled: bool  # whether learned weights were kept
    is_knee: bool  # whether the curve of the losses has its knee here
    seconds: float  # wall time
    # Without distillation, the range of `changed` that distillation is expected to leave, by recorded networks; else
    # NaN, as where no network is like this one.
    distilled_low: float = math.nan
    distilled_high: float = math.nan


class Frontier(dict[float, nn.Module]):
    """Networks of several sizes by their requested share of the cost, e.g. ``found[0.25]``.

    Attributes
    ----------
    points : tuple of FrontierPoint
        The unpruned network and the others, in descending size.
    kind : {"flops", "params", "latency", "memory"}
        The cost that the shares refer to.
    measure : {"answers", "distance"}
        What the curve shows: the share of changed answers, or the distance if outputs are neither classes nor
        decisions.
    images, held_out : int
        Number of calibration images, and of held-out images, which give the figures. As many others decide whether a
        network starts from a larger one, and whether distilled weights are kept. With fewer than eight images in all it
        is 0, and the calibration images give the figures.
    read_as : str
        What the compared outputs hold, in words, and what an answer is.
    """

    def __init__(
        self,
        networks: Mapping[float, nn.Module],
        points: Sequence[FrontierPoint],
        kind: str,
        measure: str,
        images: int,
        held_out: int,
        read_as: str = "",
    ) -> None:
        super().__init__(networks)
        self.points, self.kind, self.measure = tuple(points), kind, measure
        self.images, self.held_out, self.read_as = images, held_out, read_as

    def __missing__(self, share: float) -> nn.Module:
        raise KeyError(f"share must be one of the frontier's, got {share}; known: {', '.join(map(str, self))}")

    @property
    def knee(self) -> float | None:
        """The share of the network at the knee of the curve: smaller ones lose more than they save; or None."""
        return next((point.share for point in self.points if point.is_knee), None)

    def to_frame(self) -> pandas.DataFrame:
        """Return the points as a table, one row each."""
        import pandas

        return pandas.DataFrame([asdict(point) for point in self.points])

    @property
    def sentence(self) -> str:
        """What is left of the cost, and of the answers, at the knee or, without one, of the smallest network."""
        point = next((point for point in self.points[1:] if point.is_knee), self.points[-1])
        time = self._time_of(point)
        count, which = (self.held_out, "held-out") if self.held_out else (self.images, "calibration")
        gain = headline(
            time=math.nan if time is None else time.share[0],
            macs=point.macs / self.points[0].macs if self.points[0].macs else math.nan,
            params=point.params / self.points[0].params if self.kind == "params" else math.nan,
            answers=1.0 - point.changed,
            error=math.sqrt(point.distance) if math.isfinite(point.distance) else math.nan,
            measured_on=f"{count} {which} samples",
        )
        return f"at a share of {point.share:g}: {gain}"

    def _time_of(self, point: FrontierPoint) -> TimedPair | None:
        """Return the times of a point's network and the unpruned one, if they were measured."""
        network = self.get(point.share)
        report = None if network is None else getattr(network, "report", None)
        return report.time if isinstance(report, ShrinkReport) else None

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, and the sentences of the report, as values that JSON can hold."""
        document = {"sentence": self.sentence, "kind": self.kind, "points": self.points, "notes": self._notes()}
        values: dict[str, Any] = finite(plain(document))
        return values

    def to_markdown(self, title: str = "") -> str:
        """Return the report in Markdown."""
        from nni_topo.runs.page import markdown_page

        return markdown_page(title, [self.sentence], self._parts())

    def to_html(self, title: str = "Networks of several sizes") -> str:
        """Return the report, with the curve and each network's report, as an HTML page that needs no other file."""
        from nni_topo.runs.page import html_page, picture_part

        table, *others = self._parts()
        return html_page(title, [self.sentence], [table, picture_part("What each size loses", self.plot()), *others])

    def _parts(self) -> list[Part]:
        """Return the tables and notes of the report's page."""
        from nni_topo.runs.page import Part

        rows = self._rows()
        parts = [Part("Networks", list(rows[0]), [list(row.values()) for row in rows]), Part(notes=self._notes())]
        for share, network in self.items():
            report = getattr(network, "report", None)
            if isinstance(report, ShrinkReport):
                first = parts_of(report.to_dict())[0]
                parts.append(replace(first, title=f"Steps of the network of share {share:g}", folded=True))
        return parts

    def plot(self) -> Figure:
        """Draw the loss of the networks against their cost, with 95 % intervals and the knee."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(5.0, 3.6), layout="constrained")
        axis = figure.subplots()
        percent = 100.0 if self.measure == "answers" else 1.0
        loss = "changed" if self.measure == "answers" else "distance"
        left, values, low, high, bend = [], [], [], [], None
        for row in map(asdict, self.points):
            if math.isfinite(row[loss]):
                left.append(100.0 * row["left"])
                values.append(percent * row[loss])
                low.append(percent * max(row[loss] - row[f"{loss}_low"], 0.0))
                high.append(percent * max(row[f"{loss}_high"] - row[loss], 0.0))
                bend = (left[-1:], values[-1:]) if row["is_knee"] else bend
        axis.errorbar(left, values, yerr=[low, high], fmt="o-", capsize=3, label=f"{self.held_out} held-out samples")
        if bend is not None:
            axis.plot(*bend, "D", color="C3", markersize=8, zorder=3, label="knee")
        lost = "changed answers %" if self.measure == "answers" else "distance / variance"
        axis.set(xlabel=f"{'MACs' if self.kind == 'flops' else self.kind} kept %", ylabel=lost, xlim=(0, 105))
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
        return figure

    def _rows(self) -> list[dict[str, str]]:
        """Return the table's rows by the names of its columns, with numbers as text."""
        rows = []
        times = [time for time in map(self._time_of, self.points) if time is not None]
        unpruned_ms = times[0].unpruned_ms[0] if times else math.nan
        for point in self.points:
            time = self._time_of(point)
            smaller_ms = math.nan if time is None else time.ms[0]
            numbers = {
                "share": point.share,
                "kept": point.left,
                "MACs": point.macs,
                "parameters": point.params,
                "ms": unpruned_ms if point.share == 1.0 else smaller_ms,
                "changed": point.changed,
                "expected from": point.distilled_low,
                "expected to": point.distilled_high,
                "distance": point.distance,
                "accuracy": point.accuracy,
                "made from": point.start,
                "seconds": point.seconds,
            }
            cells = {name: _cell(number) for name, number in numbers.items()}
            cells["distilled"] = "yes" if point.is_distilled else "no"
            rows.append(cells)
        filled = [name for name in rows[0] if any(row[name] for row in rows)]
        return [{name: row[name] for name in filled} for row in rows]

    def _notes(self) -> list[str]:
        """Return the sentences below the table."""
        if self.held_out:
            notes = [
                f"measured on {self.held_out} held-out samples, by which nothing was chosen; {self.images} others are "
                "calibration data"
            ]
        else:
            notes = [f"measured on the {self.images} calibration samples, on which networks look better than they are"]
        if self.read_as:
            notes.append(self.read_as)
        if any(math.isfinite(point.changed) for point in self.points):
            notes.append("changed is the share of answers that differ from the unpruned network's")
        if any(math.isfinite(point.distilled_low) for point in self.points):
            notes.append(
                "expected from and to is the range of the answers that change after distillation, by the recorded "
                "networks"
            )
        if self.knee is None:
            notes.append("the curve has no knee")
        else:
            notes.append(f"the knee is at a share of {self.knee:g}: smaller networks lose more for what they save")
        return notes

    def __repr__(self) -> str:
        import pandas

        table = pandas.DataFrame(self._rows()).to_string(index=False)
        return "\n".join([self.sentence, table, *self._notes()])


def _cell(number: float) -> str:
    """Return a number as a table shows it; an empty text for NaN."""
    if isinstance(number, int):
        return str(number)
    return "" if math.isnan(number) else f"{number:.4g}"


@public(
    Running(leaves_out=LEAVE_OUT),
    model=MODEL,
    images=BATCHES,
    shares=ANYTHING,
    budget=ANYTHING,
    round_to=ROUND_TO,
)
def frontier(
    model: nn.Module,
    images: Iterable[Any] | Evaluator,
    shares: Sequence[float] = SHARES,
    *,
    budget: Mapping[str, Any] | str = "flops",
    pruner: str = "reconstruction",
    knobs: Mapping[str, Any] | None = None,
    layers: Iterable[str | Mapping[str, Any]] | None = None,
    compensate: str | RecoveryMethod | None = "reconstruct",
    distill: Mapping[str, Any] | bool = True,
    depth: bool = False,
    outputs: Outputs | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    round_to: int | None = None,
    time: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> Frontier:
    """Make networks of several sizes from one trained network, from unlabelled images alone.

    Like :func:`nni_topo.shrink` for several budgets, but work that doesn't depend on the budget is done once.

    Parameters
    ----------
    model, images
        As for :func:`nni_topo.shrink`.
    shares : sequence of float, default=(0.75, 0.5, 0.25, 0.1)
        Shares of the cost to keep, in (0, 1) and descending.
    budget : str or mapping, default="flops"
        The cost that the shares refer to, by name or with other settings, as for :func:`nni_topo.shrink` with a
        ``tolerance``.
    pruner : str, default="reconstruction"
        As for :func:`nni_topo.shrink`: a structured pruner that accepts a budget, or one of NNI's.
    knobs, layers, compensate, outputs, evaluate, round_to, time, seed, progress
        As for :func:`nni_topo.shrink`.
    depth : bool, default=False
        As for :func:`nni_topo.shrink`; the order of the blocks is found once. No network then starts from a larger one.
    distill : mapping or bool, default=True
        As for :func:`nni_topo.shrink`. Unless ``steps`` or ``seconds`` of each network are given, all networks share
        the steps of a single one, and smaller ones get more of them. With False the points of a classifier have the
        range of changed answers that distillation is expected to leave, by recorded networks.

    Returns
    -------
    Frontier
        The networks by their share, with ``to_frame()``, ``plot()`` and, for a file, ``to_html()``. Each network has
        a ``report``, a :class:`ShrinkReport <nni_topo.runs.report.ShrinkReport>`.

    Raises
    ------
    ConfigError
        If the shares aren't descending numbers in (0, 1), or a name or a knob is invalid.
    DataError, SpeedupError
        As for :func:`nni_topo.shrink`.

    See Also
    --------
    nni_topo.shrink : One network; with a tolerance, the smallest one that it allows.

    Notes
    -----
    If the distilled weights of a network were kept, the next smaller one is made both from it and from the unpruned
    network. The one with the smaller loss on the images that judge, as in :func:`nni_topo.distill`, is used.

    The knee is the point farthest below the straight line between the unpruned and the smallest network, where both
    axes are scaled to [0, 1] [1]_.

    References
    ----------
    .. [1] Satopaa et al., "Finding a 'kneedle' in a haystack", ICDCS Workshops 2011.

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> found = frontier(model, [torch.randn(256, 16)], (0.5, 0.25), distill=False)
    >>> list(found)
    [0.5, 0.25]
    >>> found[0.25](torch.randn(2, 16)).shape
    torch.Size([2, 4])
    """
    settings = Settings.among(locals(), "frontier")
    try:
        wanted = [] if isinstance(shares, (str, Mapping)) else list(shares)
    except TypeError:  # a number
        wanted = []
    in_range = all(is_finite(share) and 0.0 < share < 1.0 for share in wanted)
    if not wanted or not in_range or not all(one > other for one, other in itertools.pairwise(wanted)):
        raise ConfigError(
            f"shares must be descending numbers in (0, 1), at least one, got {shown(shares)} (shares, frontier)"
        )
    wanted = [float(share) for share in wanted]
    calibration = batches_of(images, model, "images")
    template = settings.checked(model, cost_without_share(budget, "frontier", "shares"), "shares")
    steps = prepare(model, calibration, settings, template, is_timed=time).for_search()
    measured, data = steps.measured, steps.images
    model, kind = steps.model, template.kind
    # Unless their number is given, all networks share the steps of a single one; smaller networks get more of them.
    own_steps: list[int | None] = [None] * len(wanted)
    given = settings.distillation_knobs
    if distill is not False and given.get("steps") is None and given.get("seconds") is None:
        total, _ = course_on(model, data.learned, given.get("batch_size", 64))
        removed = [1.0 - share for share in wanted]
        own_steps = [max(_LEAST_STEPS, round(total * each / sum(removed))) for each in removed]
    # Bounds of layers are shares of the unpruned network's channels.
    bounds = {"min_sparse_ratio", "max_sparse_ratio"}
    has_bounds = any(bounds & each.keys() for each in settings.layers or () if isinstance(each, Mapping))
    can_start_from_larger = kind != "latency" and not depth and not has_bounds

    networks: dict[float, nn.Module] = {}
    points = [_point(1.0, 1.0, measured.stages[0], 1.0, False)]
    for share, count in zip(wanted, own_steps, strict=True):
        began = perf_counter()
        made, start, larger = steps.make(share), 1.0, points[-1]
        # A larger network without learned weights is no better start than the unpruned one.
        if can_start_from_larger and larger.is_distilled:
            other = _made_from_larger(networks[larger.share], larger.left, share, steps, made)
            # A network that keeps more of the cost would have an unfair advantage.
            most = made.left + budget_outcome(kind, share, made.left, "").tolerance
            if other is not None and other.left <= most and data.judges is not None:
                losses = [
                    each.loss for each in judged(model, [other.dense, made.dense], data.judges, outputs, steps.kinds)
                ]
                if first_smallest([loss if math.isfinite(loss) else math.inf for loss in losses]) == 0:
                    made, start = other, larger.share
        outcome = steps.outcome(share, made)
        final = steps.distil(made, steps=count)
        measured.add("reconstructed" if final is made else "distilled", final.dense, perf_counter() - began)
        stages = (measured.stages[0], measured.stages[-1])
        expectation = steps.expect() if distill is False and compensate is not None else None
        steps.report(final.dense, final, stages=stages, budget=outcome, expectation=expectation)
        networks[share] = final.dense
        point = _point(share, made.left, stages[1], start, final.verdict is not None and final.verdict.is_kept)
        if expectation is not None:
            low, high = 1.0 - expectation.high, 1.0 - expectation.low
            point = replace(point, distilled_low=low, distilled_high=high)
        points.append(point)
    if kind == "latency" and template.latency_table is None:
        times = time_shares(list(networks.values()), model, steps.batch, wanted[-1])
        timed = [replace(point, left=left) for point, (left, _) in zip(points[1:], times, strict=True)]
        points = [points[0], *timed]
    measure = "answers" if measured.answers.have_answers else "distance"
    losses = [point.changed if measure == "answers" else point.distance for point in points]
    bend = knee([point.left for point in points], losses)
    if bend is not None:
        points[bend] = replace(points[bend], is_knee=True)
    held_out = 0 if data.held_out is None else data.held_out.samples
    return Frontier(networks, points, kind, measure, data.learned.samples, held_out, measured.answers.read_as)


def _made_from_larger(larger: nn.Module, left: float, share: float, steps: Prepared, made: Pipeline) -> Pipeline | None:
    """Prune a larger network further, to the same share of the unpruned one's cost; None if that isn't possible."""
    try:
        larger, _ = plain_weights(larger)
        own = Prepared.of(larger, steps.images, steps.settings, steps.budget)
        other = own.recover(min(share / left, 1.0))
    except ConfigError as error:  # no more channels can be removed
        _logger.info("the network of share %g isn't made from a larger one: %s", share, error)
        return None
    left_now = steps.share_left(other.dense)
    # Replace the larger network's sizes in the report by the unpruned network's.
    before = {row.name: row.before for row in made.layers.rows}
    rows = tuple(replace(row, before=before.get(row.name, row.before)) for row in other.layers.rows)
    planned = other.planned and budget_outcome(own.budget.kind, share, other.planned.left * left, other.planned.why)
    return replace(other, layers=replace(other.layers, rows=rows), planned=planned, left=left_now)


def _point(share: float, left: float, stage: Stage, start: float, is_distilled: bool) -> FrontierPoint:
    """Return the point of a network after its last step."""
    return FrontierPoint(
        share=share,
        left=left,
        macs=stage.macs,
        params=stage.params,
        changed=1.0 - stage.agreement,
        changed_low=1.0 - stage.agreement_high,
        changed_high=1.0 - stage.agreement_low,
        distance=stage.distance,
        distance_low=stage.distance_low,
        distance_high=stage.distance_high,
        accuracy=stage.accuracy,
        start=start,
        is_distilled=is_distilled,
        is_knee=False,
        seconds=stage.seconds,
    )
