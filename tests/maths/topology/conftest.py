"""Both ways to compute, where numba is installed."""

from __future__ import annotations

import pytest

from nni_topo.maths.topology.kernels import numba_available


@pytest.fixture(params=[False, True] if numba_available() else [False], ids=lambda on: "numba" if on else "numpy")
def compiled(request):
    """Both ways to compute, where numba is installed."""
    return request.param
