from __future__ import annotations

import math

import numpy as np
import pytest

from nni_topo.errors import ConfigError, check_between, check_integer


@pytest.mark.parametrize("value", [1, 7, np.int64(2)])
def test_integers_pass(value):
    check_integer("steps", value, 1, "here")


@pytest.mark.parametrize("value", [0, -3, True, 2.0, "2", None, math.nan])
def test_what_does_not_count_is_refused(value):
    with pytest.raises(ConfigError, match=r"steps must be an integer of at least 1, got .* \(here\)"):
        check_integer("steps", value, 1, "here")


@pytest.mark.parametrize("value", [0.5, 1e-9, np.float32(0.25)])
def test_numbers_inside_pass(value):
    check_between("share", value, 0, 1, "here")


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, True, "0.5", None, math.nan])
def test_numbers_outside_are_refused(value):
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\), got .* \(here\)"):
        check_between("share", value, 0, 1, "here")


def test_the_upper_bound_may_be_allowed():
    check_between("share", 1, 0, 1, "here", closed=True)
    with pytest.raises(ConfigError, match=r"share must be in \(0, 1\], got 0 \(here\)"):
        check_between("share", 0, 0, 1, "here", closed=True)
