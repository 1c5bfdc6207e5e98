"""The smallest network within a tolerance: a search over shares of the cost, confirmed on images that it never saw.

The images have three parts. The first part is used to choose channels and reconstruct weights, the second judges the
candidates of the search, and the third confirms the result. Candidates within the tolerance are checked on the third
part from the largest network to the smallest, until one fails. In such a fixed sequence each check can use the whole
risk of 5 %, and the chance that the returned network misses its tolerance is still at most 5 % [1]_.

References
----------
.. [1] A. Angelopoulos, S. Bates, E. Candes, M. Jordan and L. Lei, "Learn then test: calibrating predictive algorithms
   to achieve risk control", https://arxiv.org/abs/2110.01052 (fixed sequence testing)
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.maths.limits import limit_of_bounded, limit_of_mean, limit_of_share, observations_needed
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import structure_call, with_whole_batches
from nni_topo.network.speedup.dense import dense_of
from nni_topo.network.speedup.dense_report import dense_report_of
from nni_topo.recovery.likeness import Answers, have_answers
from nni_topo.runs.measurements import UNPRUNED, evaluated
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.settings import Settings
from nni_topo.runs.widths import fewest_channels

if TYPE_CHECKING:
    from nni_topo.runs.prepared import Prepared

MEASURES = ("auto", "outputs", "distance", "evaluate")
PARTS = (0, 1, 2, 0, 2, 1, 0, 2)
"""Of eight images in turn, three are calibration data, two judge the candidates, and three confirm the result."""

_LEAST = 8  # images of each part for distances, for which the tolerance gives no number
_CANDIDATES = 6
_SMALLEST = 1.0 / 64.0  # share of the cost below which no candidate is tried
_STEP = 0.75  # factor of the share of the network that is distilled next
_MORE = 3  # most larger networks that are tried, to be confirmed before the smallest one
_GAP = 1.4  # a network is tried between two others if the quotient of their shares is larger
_NEAR = 1.02  # no candidate is tried between two shares with a smaller quotient
_WORDS = {
    "answers": "share of changed answers",
    "distance": "mean squared distance of the outputs over their variance",
    "evaluate": "fall of what evaluate returns",
}
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Candidate:
    """A network that the search tried, judged on the second or the third part of the images."""

    asked: float  # requested share of the cost
    left: float  # share that is kept
    is_distilled: bool  # otherwise it is the network after weight reconstruction
    difference: float  # from the unpruned network
    limit: float  # upper 95 % limit for the same difference on the images that confirm; NaN: evaluate
    is_within: bool  # whether the limit, or else the difference, is at most the tolerance


@dataclass(frozen=True)
class ToleranceOutcome:
    """The outcome of a search within a tolerance; ``str`` is a sentence."""

    tolerance: float  # the requested one
    # What the tolerance limits. answers: the share of answers, classes or decisions, that change;
    # distance: the mean squared distance of the outputs over their variance; evaluate: the fall of its number.
    measure: str
    kind: str  # the minimized cost: flops, params, latency or memory
    left: float  # share of it that the returned network keeps
    difference: float  # of the returned network, on the images that confirm
    limit: float  # its upper 95 % limit; NaN: evaluate
    held_out: int  # images that confirm, or groups of images where these are known
    judges: int  # images, or groups, that judged the candidates
    candidates: tuple[Candidate, ...]  # all networks that were tried, in the order of the search
    confirmations: tuple[Candidate, ...]  # those checked on the images that confirm, from the largest network on
    is_met: bool  # whether a smaller network was confirmed; otherwise a copy of the unpruned one was returned

    def __str__(self) -> str:
        distilled = sum(each.is_distilled for each in self.candidates)
        tried = f"{len(self.candidates) - distilled} networks were tried, {distilled} of them also distilled"
        if not self.is_met:
            return f"no smaller network was found within the tolerance of {self.tolerance:g}: {tried}"
        found = f"{_WORDS[self.measure]} {self.difference:.3g}"
        if self.measure != "evaluate":
            found += f", at most {self.limit:.3g} with 95 % confidence, on {self.held_out} held-out samples"
            found += " that the search didn't use"
        text = f"the tolerance of {self.tolerance:g} is met: {found}; {self.left:.4g} of the {self.kind} are kept"
        return f"{text} ({tried})"


class Judge:
    """Measures how far networks are from the unpruned one, on the images of the search and on those that confirm.

    ``parts`` are these images; empty for a function ``evaluate``, which has its own data.
    """

    def __init__(
        self,
        model: nn.Module,
        answers: Answers,
        parts: Sequence[Calibration],
        tolerance: float,
        measure: str,
        evaluate: Callable[[nn.Module], float] | None,
    ) -> None:
        self._answers, self._groups = answers, [each.groups for each in parts]
        self._evaluate, self.tolerance, self.measure = evaluate, tolerance, measure
        self.counts = [_units(each) for each in parts] or [0, 0]
        self._unpruned = math.nan if evaluate is None else evaluated(evaluate, model, UNPRUNED)

    def on_search(self, net: nn.Module) -> Judged:
        """Compare on the images of the search; the limit is for the same difference on the images that confirm."""
        return self._judged(net, 1, self.counts[1])

    def confirm(self, net: nn.Module) -> Judged:
        """Compare on the images that confirm."""
        return self._judged(net, 2, None)

    def _judged(self, net: nn.Module, part: int, count: int | None) -> Judged:
        if self._evaluate is not None:
            fall = self._unpruned - evaluated(self._evaluate, net, "smaller")
            return Judged(fall, math.nan, fall <= self.tolerance, fall <= self.tolerance)
        # Part 0 of the answers is the calibration data.
        differences = self._answers.differences(net, part)
        is_broken = ~np.isfinite(differences.distances)
        if self.measure == "answers":
            values = np.where(is_broken, 1.0, 1.0 - np.asarray(differences.agreed))
        else:
            values = np.asarray(differences.distances)
        groups = self._groups[part - 1]
        # Groups of samples are independent. Outputs without an entry per sample have one value per batch, without
        # groups.
        if groups is not None and len(groups) == len(values):
            numbers = groups.numpy()
            values = np.bincount(numbers, weights=values) / np.bincount(numbers)
        count = count or len(values)
        mean = float(values.mean())
        deviation = float(values.std(ddof=1)) if len(values) > 1 and math.isfinite(mean) else math.nan
        are_yes_or_no = set(values.tolist()) <= {0.0, 1.0}

        def limit_at(mean: float, count: int) -> float:
            """Return the upper limit of a mean of ``count`` values."""
            if self.measure == "distance":
                return limit_of_mean(mean, deviation, count)
            return limit_of_share(mean, count) if are_yes_or_no else limit_of_bounded(mean, count)

        limit = limit_at(mean, count)
        highest = limit_at(limit_at(mean, len(values)), count)
        return Judged(mean, limit, limit <= self.tolerance, highest <= self.tolerance)


@dataclass(frozen=True)
class Judged:
    """How far a network is from the unpruned one."""

    difference: float
    limit: float  # upper 95 % limit; NaN: evaluate
    is_within: bool
    is_safe: bool  # whether it would be within the tolerance even if its true difference were the upper limit


@dataclass(frozen=True)
class TriedNetwork:
    """A candidate and its networks."""

    candidate: Candidate
    made: Pipeline
    final: Pipeline  # after distillation, if it was distilled
    is_safe: bool  # whether it is within the tolerance even if its true difference is the upper limit


def checked_tolerance(
    tolerance: float, measure: str, model: nn.Module, images: Calibration, settings: Settings
) -> tuple[str, tuple[Calibration, ...] | None]:
    """Return the measure (``"answers"``, ``"distance"`` or ``"evaluate"``), and the images in three parts.

    A function ``evaluate`` has its own data, so the parts are None. ConfigError if the images can't confirm the
    tolerance.
    """
    structure_call(model, images)  # raises an error that says what to change
    images = with_whole_batches(model, images, PARTS)
    if measure == "evaluate" and settings.evaluate is None:
        raise ConfigError("measure='evaluate' needs a function evaluate, got None (shrink)")
    if measure == "evaluate" or (measure == "auto" and settings.evaluate is not None):
        return "evaluate", None
    parts: Any = images.in_parts(PARTS)
    if measure != "distance":
        has_answers = have_answers(model, parts[0], settings.outputs, settings.objective)
        measure = "answers" if has_answers else "distance"
    unit = images.unit
    counts, total = [0 if part is None else _units(part) for part in parts], _units(images)
    whole = f"; the model runs on whole batches only, of which there are {len(images)}" if images.why_whole else ""
    if measure == "distance":
        if min(counts) < _LEAST:
            enough = _total_for(_LEAST, min(set(PARTS), key=PARTS.count))
            raise ConfigError(f"a tolerance needs at least {enough} {unit}, got {total}{whole} (images)")
        return measure, parts
    needed, got = observations_needed(tolerance), counts[2]
    if got < needed:
        least = f", or a tolerance of at least {math.ceil(1e4 * limit_of_share(0.0, got)) / 1e4:g}" if got else ""
        raise ConfigError(
            f"{needed} held-out {unit} without a change are needed for a tolerance of {tolerance:g}, got {got} of "
            f"{total} {unit}: pass at least {_total_for(needed, 2)} {unit}{least}{whole} (tolerance)"
        )
    return measure, parts


def within_tolerance(prepared: Prepared, tolerance: float, measure: str) -> nn.Module:
    """Search the smallest network within a tolerance, distil and confirm it, and return it with its report.

    The budget names the cost to minimize, and says how it is distributed. If no network is confirmed, a copy of the
    unpruned one is returned.
    """
    images, measured, settings = prepared.images, prepared.measured, prepared.settings
    kind, steps = prepared.budget.kind, prepared.for_search()
    decides, parts = None, [each for each in (images.judges, images.held_out) if each is not None]
    if measure == "evaluate":
        decides, parts = settings.evaluate, []
    judge = Judge(steps.model, measured.answers, parts, tolerance, measure, decides)
    floor = steps.planned_left(fewest_channels(steps.counted, steps.prunable.entries, steps.start.round_to))
    if floor * _NEAR >= 1.0:
        raise ConfigError(
            f"a network must have channels to remove, got one whose fewest channels keep {floor:.4g} of its {kind} "
            "(shrink)"
        )
    steps.tell_cost(_CANDIDATES + _MORE, distilled=2)
    lowest = max(_SMALLEST, floor)
    candidates: list[Candidate] = []
    passed: list[TriedNetwork] = []

    def tried(share: float, plain: Pipeline | None = None) -> TriedNetwork:
        """Make a network without distillation, or distil the one that was made, and judge it."""
        made = steps.make(share) if plain is None else plain
        final = made if plain is None else steps.distil(made)
        found = judge.on_search(final.dense)
        is_distilled = plain is not None
        candidates.append(Candidate(share, made.left, is_distilled, found.difference, found.limit, found.is_within))
        return TriedNetwork(candidates[-1], made, final, found.is_safe)

    # Shares are compared by quotients: halving a large share counts as much as halving a small one.
    low, high = lowest, 1.0
    while len(candidates) < _CANDIDATES and high / low >= _NEAR:
        middle = math.sqrt(low * high)
        found = tried(middle)
        if found.candidate.is_within:
            passed.append(found)
            high = middle
        else:
            low = middle
    if passed and measure != "evaluate":
        # The smallest network may have passed by chance, so larger networks are added to be confirmed.
        _add_larger(passed, tried)
    passed.sort(key=lambda each: -each.candidate.left)
    if passed and settings.distill is not False:
        smallest = passed[-1].candidate.asked
        found = tried(smallest, passed[-1].made)
        if found.candidate.is_within:
            passed[-1] = found
            verdict, share = found.final.verdict, max(smallest * _STEP, lowest)
            # With discarded weights the network is no better than the one that the search found.
            if (verdict is None or verdict.is_kept) and smallest / share >= _NEAR:
                smaller = tried(share, tried(share).made)
                if smaller.candidate.is_within:
                    passed.append(smaller)
            passed.sort(key=lambda each: -each.candidate.left)

    # On the images that confirm, from the largest to the smallest; a function has no other images.
    looks: list[Candidate] = []
    chosen: TriedNetwork | None = None
    for each in passed[-1:] if measure == "evaluate" else passed:
        judged = judge.confirm(each.final.dense)
        look = replace(each.candidate, difference=judged.difference, limit=judged.limit, is_within=judged.is_within)
        looks.append(look)
        if not look.is_within:
            break
        chosen, confirmed = each, look
    left, difference, limit = 1.0, 0.0, math.nan
    if chosen is not None:
        left, difference, limit = chosen.candidate.left, confirmed.difference, confirmed.limit
        if kind == "latency":
            left = prepared.share_left(chosen.made.dense)  # times the network, unless a table was given
    outcome = ToleranceOutcome(
        tolerance=tolerance,
        measure=measure,
        kind=kind,
        left=left,
        difference=difference,
        limit=limit,
        held_out=judge.counts[1],
        judges=judge.counts[0],
        candidates=tuple(candidates),
        confirmations=tuple(looks),
        is_met=chosen is not None,
    )
    warnings: list[str] = []
    if looks and not looks[-1].is_within:
        missed = looks[-1]
        text = (
            f"the candidate with {missed.left:.4g} of the {kind} wasn't confirmed: {_WORDS[measure]} "
            f"{missed.difference:.3g}, at most {missed.limit:.3g} with 95 % confidence, on {outcome.held_out} held-out "
            "samples"
        )
        text += ". The next larger candidate is returned" if outcome.is_met else ""
        warnings.append(f"{text}. More samples let smaller networks be confirmed")
    if not outcome.is_met:
        warnings.append(
            f"{outcome}; a copy of the unpruned network is returned. Pass more samples, or a larger tolerance"
        )
    for text in warnings:
        _logger.warning("%s", text)
    if chosen is None:
        network: nn.Module = dense_of(prepared.model, images.example, {})
        taken, layers = prepared.start, dense_report_of(network)
    else:
        network, taken, layers = chosen.final.dense, chosen.final, chosen.made.layers
        prepared.measure(chosen.made)
        if chosen.candidate.is_distilled:
            measured.add("distilled", network, taken.seconds_of_distillation)
    told = measured.warnings(layers.rows) + tuple(warnings)
    prepared.report(network, taken, told, layers=layers, tolerance=outcome)
    return network


def _add_larger(passed: list[TriedNetwork], tried: Callable[[float], TriedNetwork]) -> None:
    """Try larger networks than the smallest one, and add those within the tolerance.

    If the first check fails, no network is returned. So the largest network must be within the tolerance by a margin:
    the share of each new one is the square root of the largest share so far. Then the widest gaps are filled. If only
    one network passed, a larger one is added whatever its margin, because it is the best of six on the judging images.
    """
    shares = [each.candidate.asked for each in passed]
    largest = max(passed, key=lambda each: each.candidate.asked)
    for _ in range(_MORE):
        share = max(shares) ** 0.5
        if (largest.is_safe and len(passed) > 1) or share * _NEAR >= 1.0:
            ordered = sorted(each.candidate.asked for each in passed)
            gaps = sorted(((large / small, small) for small, large in itertools.pairwise(ordered)), reverse=True)
            middles = [small * quotient**0.5 for quotient, small in gaps if quotient > _GAP]
            for each in shares:
                middles = [middle for middle in middles if max(middle, each) / min(middle, each) >= _NEAR]
            if not middles:
                return
            share = middles[0]
        found = tried(share)
        shares.append(share)
        if found.candidate.is_within:
            passed.append(found)
        if share == max(shares):
            largest = found


def _units(part: Calibration) -> int:
    """Return the number of samples, or of groups of samples if these are known."""
    return part.samples if part.groups is None else int(part.groups.max()) + 1


def _total_for(needed: int, part: int) -> int:
    """Return how many images are needed so that a part gets ``needed`` of them."""
    places = [place for place, own in enumerate(PARTS) if own == part]
    cycles, rest = divmod(needed - 1, len(places))
    return cycles * len(PARTS) + places[rest] + 1
