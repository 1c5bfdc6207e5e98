"""A warning that several steps of a verb give is told once for each call of the verb."""

from __future__ import annotations

import logging

import torch
from torch import nn

import nni_topo
from nni_topo.network.runtime.public import _ONCE, public

LOGGER = logging.getLogger("nni_topo.runs.pipeline")
OTHERS = logging.getLogger("elsewhere")


def warn(*texts: str) -> None:
    for text in texts:
        LOGGER.warning("%s", text)
        LOGGER.info("%s", text)
        OTHERS.warning("%s", text)


def test_the_same_warning_is_told_once_within_a_call_and_again_in_the_next(caplog):
    caplog.set_level(logging.INFO)
    verb = public()(warn)
    verb("a", "b", "a")
    verb("a")
    warn("c", "c")
    told = [(each.name, each.levelname, each.message) for each in caplog.records]
    assert [text for name, level, text in told if (name, level) == (LOGGER.name, "WARNING")] == list("abacc")
    assert [text for name, level, text in told if (name, level) == (LOGGER.name, "INFO")] == list("abaacc")
    assert [text for name, _, text in told if name == "elsewhere"] == list("abaacc")
    assert LOGGER.filters.count(_ONCE) == 1


class Stale(nn.Module):
    """Has an attribute that is said to count channels, and holds another number of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 16), nn.GroupNorm(4, 16), nn.Linear(16, 3)
        self.in_features = 16

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def test_shrink_gives_no_warning_twice(caplog):
    torch.manual_seed(0)
    caplog.set_level(logging.WARNING)
    nni_topo.shrink(Stale().eval(), [torch.randn(64, 8)], {"flops": 0.5}, distill={"steps": 2})
    told = [record.getMessage() for record in caplog.records]
    assert told, "the attribute in_features is stale, in every dense network that was made"
    assert len(told) == len(set(told))
    assert sum("attributes keep" in each for each in told) == 1
