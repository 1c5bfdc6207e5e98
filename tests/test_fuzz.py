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


def test_every_knob_of_every_pruner_is_drawn():
    assert {knob for name in fuzzing.NAMES for knob in fuzzing.pruner_info(name).knobs()} <= fuzzing.KNOBS.keys()


@pytest.mark.parametrize("cases", [60, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_requests_end_in_right_masks_or_a_named_error_and_leave_the_model_as_it_was(cases):
    @settings(max_examples=cases, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(fuzzing.requests())
    def serve(request):
        net, name, config_list, knobs = request
        fuzzing.outcome(net, name, config_list, knobs)

    serve()
