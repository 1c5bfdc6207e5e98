"""Networks whose budget was distributed in several ways, compared on held-out images without labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.maths.ties import first_smallest
from nni_topo.network.runtime.calibration import HELD_OUT, Calibration
from nni_topo.pruners.budget import AUTO
from nni_topo.pruners.registry import PRUNERS, pruner_info
from nni_topo.recovery.lesson import judged
from nni_topo.recovery.outputs import Outputs


@dataclass(frozen=True)
class Tried:
    """One way to distribute a budget, and how near the network's outputs are to the unpruned network's."""

    allocation: str  # of nni_topo.Budget
    loss: float  # on the held-out images, as nni_topo.distill counts it; less is better
    agreement: float  # share of them whose largest output is the unpruned network's; NaN unless outputs are logits
    is_chosen: bool

    def __repr__(self) -> str:
        agreed = "" if math.isnan(self.agreement) else f", agreement {self.agreement:.4g}"
        return f"widths {self.allocation}: held out loss {self.loss:.4g}{agreed}" + " (chosen)" * self.is_chosen


def allocations_to_try(pruner: str) -> tuple[str, ...]:
    """Return how a pruner can distribute a budget; ConfigError if there is nothing to choose from."""
    found = pruner_info(pruner).allocations()
    if len(found) < 2:
        able = ", ".join(sorted(name for name, info in PRUNERS.table.items() if len(info.allocations()) > 1))
        raise ConfigError(
            f"a pruner must distribute budgets in several ways ({able}) for allocation={AUTO!r}, got {pruner!r} "
            "(budget)"
        )
    return found


def check_held_out(
    images: Calibration, held_out: Calibration | None, what: str = f"allocation={AUTO!r}"
) -> Calibration:
    """Return the images that judge, or raise DataError where there are none; ``what`` needs them."""
    if held_out is None:
        raise DataError(f"{what} needs at least {HELD_OUT} samples, of which one judges, got {images.samples} (images)")
    return held_out


def compared(
    original: nn.Module, tries: Mapping[str, nn.Module], held_out: Iterable[Any], outputs: Outputs | None = None
) -> tuple[Tried, ...]:
    """Judge dense networks by allocation; of those that lose equally little the first is chosen."""
    found = judged(original, list(tries.values()), held_out, outputs)
    best = first_smallest([each.loss if math.isfinite(each.loss) else math.inf for each in found])
    return tuple(
        Tried(name, each.loss, each.agreement, is_chosen=at == best)
        for at, (name, each) in enumerate(zip(tries, found, strict=True))
    )
