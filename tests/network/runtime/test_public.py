"""A warning that several steps of a verb give is told once for each call of the verb."""

from __future__ import annotations

import logging

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
