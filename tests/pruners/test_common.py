"""Every pruner of the package against every conformance check."""

from __future__ import annotations

import functools

import pytest

import nni_topo
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.pruners.testing.checks import check_masks
from nni_topo.testing import SINGLE_WEIGHT_CHECKS, STRUCTURED_CHECKS, toy_knobs

INFOS = {name: pruner_info(name) for name in list_pruners() if pruner_info(name).origin == "nni_topo"}
CHECKS = {name: STRUCTURED_CHECKS if info.structured else SINGLE_WEIGHT_CHECKS for name, info in INFOS.items()}
# What all structured pruners inherit and takes longest is looked at in two: one by weights, one by data.
LONG, FAST = ("check_half_precision", "check_scheduled"), ("topological", "reconstruction")


@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(
            name,
            check,
            id=f"{check.__name__}-{name}",
            marks=[pytest.mark.slow] * (check.__name__ in LONG and INFOS[name].structured and name not in FAST),
        )
        for name in INFOS
        for check in CHECKS[name]
    ],
)
@pytest.mark.quick_every(3)
def test_pruner_keeps_its_promises(name, check):
    knobs = toy_knobs(INFOS[name].knobs(), INFOS[name].needs)
    if name == "genetic_weight":
        knobs |= {"evaluate": lambda model: 1.0, "search": {"generations": 1, "population_size": 2}}
    check(functools.partial(INFOS[name].load(), **knobs))


class Softened(nni_topo.MatrixPruner):
    """Masks of zeros and halves."""

    def compress(self, *args, **kwargs):
        model, masks = super().compress(*args, **kwargs)
        return model, {name: {key: mask / 2 for key, mask in targets.items()} for name, targets in masks.items()}


def test_a_pruner_of_other_masks_breaks_a_promise():
    with pytest.raises(AssertionError, match="masks of 0 and 1"):
        check_masks(Softened)
