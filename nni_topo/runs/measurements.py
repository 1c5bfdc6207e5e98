"""The network after each step: distances and agreements on held-out images, sizes, times, warnings."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from nni_topo.context import advice
from nni_topo.errors import ConfigError, listed, raised
from nni_topo.network.cost.measure import count_macs, count_params
from nni_topo.network.runtime.copies import evaluating, evaluation_mode, leaves_models_alone, lent_copy
from nni_topo.network.runtime.fits import first_call
from nni_topo.network.runtime.inputs import bind_arguments, returned_by_name, tensors_of
from nni_topo.network.speedup.dense_report import LayerChannels
from nni_topo.recovery.likeness import NO_SCALE, Answers
from nni_topo.recovery.outputs import Outputs
from nni_topo.recovery.report import SMALL
from nni_topo.rules import check_result
from nni_topo.runs.images import ImageParts

# The report says that a network is worse on held-out images than on calibration images if its distance is more than
# _GAP times as large, or its agreement smaller by more than _GAP_OF_AGREEMENT, and the interval of the held-out figure
# excludes the figure on calibration images.
_GAP = 2.0
_GAP_OF_AGREEMENT = 0.05
_MANY = 8  # fewest channels of a layer for which a warning says that only one is left
_logger = logging.getLogger(__name__)

UNPRUNED = "unpruned"


@dataclass(frozen=True)
class Stage:
    """The network after one step. Intervals are of 95 %, over the held-out images."""

    network: str  # unpruned, pruned, reconstructed or distilled
    macs: int  # multiply-accumulates of one sample
    params: int
    distance: float  # mean squared distance from the unpruned network's outputs over their variance, held out
    distance_low: float
    distance_high: float
    agreement: float  # share of equal classes or decisions on held-out images; NaN if outputs have none
    agreement_low: float
    agreement_high: float
    calibration_distance: float  # the same on the calibration images, where networks look better than they are
    calibration_agreement: float
    accuracy: float  # what `evaluate` returns; NaN without it
    seconds: float  # wall time of the step
    # The same as the first figures, where samples have sources, and held-out samples are of new ones: on new samples of
    # the calibration data's sources. NaN without them.
    known_distance: float = math.nan
    known_distance_low: float = math.nan
    known_distance_high: float = math.nan
    known_agreement: float = math.nan
    known_agreement_low: float = math.nan
    known_agreement_high: float = math.nan


class Measurements:
    """Measures the network after each step."""

    @leaves_models_alone
    def __init__(
        self,
        model: nn.Module,
        data: ImageParts,
        evaluate: Callable[[nn.Module], float] | None,
        outputs: Outputs | None = None,
        objective: str = "auto",
    ) -> None:
        # Calibration images first, held-out images last, and in between the images that decide, if they are others.
        parts = [data.learned]
        for part in (data.judges, data.known, data.held_out):
            if part is not None and part is not parts[-1]:
                parts.append(part)
        began = time.perf_counter()
        self.answers = Answers(model, *parts, outputs=outputs, objective=objective)
        self.seconds_of_a_sample = (time.perf_counter() - began) / sum(each.samples for each in parts)
        """Seconds that the unpruned network runs for a sample."""
        self.seconds_of_a_network = 0.0
        """Seconds that measuring the last network took."""
        self._data, self._evaluate = data, evaluate
        self._known = None if data.known is None else len(parts) - 2  # place of these samples among the parts
        self.stages: list[Stage] = []
        self._warnings: list[str] = []
        if self.answers.named.left_out:
            _logger.warning("%s", self.answers.named)
        # Further outputs of a model may be inputs of its next call.
        args, kwargs = first_call(model, data.learned)
        with evaluation_mode(model), torch.no_grad():
            found = model(*args, **kwargs)
        returned = {each.shape for _, each in returned_by_name(found)[1:] if each.is_floating_point()}
        states = []
        for name, value in list(bind_arguments(model, (args, kwargs)).items())[1:]:
            shapes = {each.shape for each in tensors_of(value) if each.is_floating_point()}
            if shapes and shapes <= returned:
                states.append(name)
        if states:
            self._warn(
                f"the network is judged one step at a time, each from the calibration data's {listed(states)}: it "
                "returns tensors of the same shapes, and where these are its next inputs, errors add up; "
                f"{advice('evaluate=', 'in Python, evaluate=')} can run it over streams, as docs/faq.md shows"
            )

    def _warn(self, text: str) -> None:
        _logger.warning("%s", text)
        self._warnings.append(text)

    @leaves_models_alone
    def add(self, name: str, net: nn.Module, seconds: float = 0.0) -> None:
        """Measure a network that took these seconds to make."""
        began = time.perf_counter()
        found = self.answers.likenesses(net)
        solved, held_out = found[0], found[-1]  # the same if none is held out
        accuracy = math.nan if self._evaluate is None else evaluated(self._evaluate, net, name)
        if self._evaluate is not None and not self.stages and not math.isfinite(accuracy):
            raise ConfigError(f"evaluate must return a number for the model as it was given, got {accuracy} (shrink)")
        stage = Stage(
            network=name,
            macs=count_macs(net, self._data.example),
            params=count_params(net),
            distance=held_out.distance.value,
            distance_low=held_out.distance.low,
            distance_high=held_out.distance.high,
            agreement=held_out.agreement.value,
            agreement_low=held_out.agreement.low,
            agreement_high=held_out.agreement.high,
            calibration_distance=solved.distance.value,
            calibration_agreement=solved.agreement.value,
            accuracy=accuracy,
            seconds=seconds,
        )
        if self._known is not None:
            distance, agreement = found[self._known].distance, found[self._known].agreement
            stage = replace(
                stage,
                known_distance=distance.value,
                known_distance_low=distance.low,
                known_distance_high=distance.high,
                known_agreement=agreement.value,
                known_agreement_low=agreement.low,
                known_agreement_high=agreement.high,
            )
        self.stages.append(stage)
        self.seconds_of_a_network = time.perf_counter() - began

    def warnings(self, rows: Iterable[LayerChannels]) -> tuple[str, ...]:
        """Return reasons to doubt the figures of the last network, with advice.

        ``rows``: the layers of that network; a warning names layers with one channel left.
        """
        last, samples = self.stages[-1], self._data.learned.samples
        is_far = last.distance_low > last.calibration_distance and last.distance > _GAP * last.calibration_distance
        agrees_less = (
            last.agreement_high < last.calibration_agreement
            and last.agreement < last.calibration_agreement - _GAP_OF_AGREEMENT
        )
        if math.isinf(last.distance):
            self._warn(NO_SCALE)
        elif self._data.held_out is None:
            self._warn(
                f"none of {samples} samples could be held out, so distance and agreement are those of the calibration "
                "data, on which a network looks better than it is: pass at least "
                f"{self._data.all.least_to_hold_out}, better some hundred samples"
            )
        # If the outputs hardly differ, answers differ only by ties.
        elif last.distance >= SMALL and (is_far or agrees_less):
            figures = (
                f"distance {last.distance:.3g} on held-out samples, {last.calibration_distance:.3g} on the calibration "
                "data"
            )
            if not math.isnan(last.agreement):
                figures += f"; agreement {last.agreement:.3g} and {last.calibration_agreement:.3g}"
            self._warn(
                f"{samples} samples are too few for this network ({figures}): pass more, as different from each other "
                "as the inputs it will be used on, or keep a larger share of the cost"
            )
        gone = [f"{row.name} (of {row.before})" for row in rows if row.after == 1 and row.before >= _MANY]
        if gone:
            cure = advice("give them a max_sparse_ratio (layers)", "name the layers to prune without them (--layers)")
            self._warnings.append(
                f"one channel is left of these layers: {listed(gone)}; ask for a larger share of the cost, or {cure}"
            )
        return tuple(self._warnings)


def evaluated(evaluate: Callable[[nn.Module], float], net: nn.Module, name: str) -> float:
    """Return the number that `evaluate` returns for a network, whose ``name`` is used in messages.

    An error of `evaluate` is logged with the name, and raised again.
    """
    try:
        with lent_copy(net) as copied:
            given: Any = evaluate(evaluating(copied))
    except Exception as error:
        _logger.warning("evaluate failed for the %s network: %s", name, raised(error))
        raise
    found = check_result("evaluate", given, "shrink")
    if not math.isfinite(found) and name != UNPRUNED:
        _logger.warning("evaluate returned %s for the %s network", found, name)
    return found
