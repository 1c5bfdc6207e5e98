"""Every structured pruner of the package against every conformance check."""

from __future__ import annotations

import functools

import pytest

from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.testing import STRUCTURED_CHECKS, toy_knobs

STRUCTURED = [n for n in list_pruners() if pruner_info(n).structured and pruner_info(n).origin == "nni_topo"]


@pytest.mark.parametrize("check", STRUCTURED_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", STRUCTURED)
def test_pruner_keeps_its_promises(name, check):
    info = pruner_info(name)
    check(functools.partial(info.load(), **toy_knobs(info.knobs(), info.needs)))
