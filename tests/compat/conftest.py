"""Fixtures of the compat tests."""

from __future__ import annotations

import pytest

from nni_topo import compat


@pytest.fixture(scope="session", autouse=True)
def compat_report() -> compat.CompatReport:
    return compat.enable()
