"""Random requests: masks that keep their promises, or an error of this package; `make fuzz` serves many more."""

from __future__ import annotations

import logging

import fuzzing
import pytest
from hypothesis import HealthCheck, given, settings


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@settings(max_examples=200, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(fuzzing.requests())
@pytest.mark.filterwarnings("ignore")
def test_requests_end_in_right_masks_or_a_named_error_and_leave_the_model_as_it_was(request_):
    net, name, config_list, knobs = request_
    fuzzing.outcome(net, name, config_list, knobs)
