"""Fixtures of the compat tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import nni_topo
from nni_topo import compat


@pytest.fixture(scope="session", autouse=True)
def compat_report() -> compat.CompatReport:
    return compat.enable()


@pytest.fixture(autouse=True)
def _back_to_nni() -> Iterator[None]:
    yield
    nni_topo.disable_strict()
