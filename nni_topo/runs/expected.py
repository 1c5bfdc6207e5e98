"""The agreement that distillation is expected to reach, by the agreement after weight reconstruction.

Of the accuracy that classifiers lack after weight reconstruction, distillation leaves a share that the records of a
comparison tell. `benchmarks/fresh_networks/left_by_distillation.py` makes the table from these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

RECORDED = (
    (0.5, 0.03, 1.0),
    (0.25, 0.08, 1.0),
    (0.1, 0.12, 1.0),
    (0.03, 0.14, 1.0),
)
"""Share of the multiply-accumulates that networks keep, and the range of the share of the lost accuracy that is left.

The range is a prediction interval of 90 % for a network of another kind than the recorded ones, by the differences
between these. Each network is a classifier of images, with one class for an image.
"""
_FARTHEST = math.sqrt(2.0)  # largest ratio to the largest or smallest recorded share
_ROUNDING = 1e-9


@dataclass(frozen=True, repr=False)
class Expectation:
    """What distillation was expected to reach before it began; its ``repr`` is a sentence."""

    reconstructed: float  # agreement after weight reconstruction, on the held-out samples
    low: float  # range of the agreement after distillation
    high: float
    distilled: float = math.nan  # agreement after distillation

    @property
    def holds(self) -> bool:
        """Whether the agreement after distillation is in the range."""
        return self.low <= self.distilled <= self.high

    def __repr__(self) -> str:
        text = f"reconstructed: {self.reconstructed:.3g} of the answers; distilled, by the recorded networks, "
        text += f"{self.low:.3g} to {self.high:.3g}"
        if math.isnan(self.distilled):
            return text
        return f"{text}: that {'held' if self.holds else 'did not hold'}, it is {self.distilled:.3g}"


def share_left(share: float) -> tuple[float, float] | None:
    """Return the range of the share of a loss that distillation leaves, for a share of the multiply-accumulates.

    None if no network of about that size is recorded.
    """
    if not RECORDED[-1][0] / _FARTHEST <= share <= RECORDED[0][0] * _FARTHEST:
        return None
    _, low, high = min(RECORDED, key=lambda row: abs(math.log(share / row[0])))
    return low, high


def expected(agreement: float, share: float, samples: int) -> Expectation | None:
    """Return the agreement that distillation is expected to reach, in whole samples.

    None if all answers agree already, or no network of about that size is recorded.
    """
    changed, left = samples * (1.0 - agreement), share_left(share)
    if left is None or not changed > _ROUNDING:
        return None
    least = math.floor(left[0] * changed + _ROUNDING)
    most = math.ceil(left[1] * changed - _ROUNDING)
    return Expectation(agreement, 1.0 - most / samples, 1.0 - least / samples)
