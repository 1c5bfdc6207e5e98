"""Dense networks compute what masked ones do, whatever lies between two layers; `make reliability` prints counts."""

from __future__ import annotations

import copy
import logging
import time

import pytest
import torch
from reliability.networks import NETWORKS
from reliability.operators import OPERATORS
from reliability.roads import all_roads, follow
from reliability.serving import BAD, MUST_GO, REQUESTS, by_hand, check, require_gone, serve

import nni_topo
from nni_topo.errors import SpeedupError

CASES = [*OPERATORS, *NETWORKS]
# of all cases one in five in `make test`, with one request each, in turns
LIGHT = [(case, list(REQUESTS)[turn % len(REQUESTS)]) for turn, case in enumerate(CASES[::5])]


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("case", "request_name"), LIGHT, ids=[f"{case.name}-{name}" for case, name in LIGHT])
@pytest.mark.quick_every(18)
def test_requests_end_in_the_masked_network_or_a_named_reason(case, request_name):
    outcome = serve(case, request_name)
    if outcome.kind in BAD:
        pytest.fail(str(outcome))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_each_request_of_each_case(case):
    outcomes = [serve(case, request) for request in REQUESTS]
    bad = [str(outcome) for outcome in outcomes if outcome.kind in BAD]
    if bad:
        pytest.fail("\n".join(bad))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("road", all_roads(), ids=lambda road: f"{road.topic}-{road.name}")
@pytest.mark.quick_every(5)
def test_roads_end_well(road):
    outcome = follow(road)
    if outcome.kind in BAD:
        pytest.fail(str(outcome))


def test_every_case_has_a_row_of_what_must_go():
    assert {case.name for case in CASES} == {name for name in MUST_GO if name.startswith(("operators/", "networks/"))}


def _dense(case, model):
    masks = by_hand(case, model)
    return masks, nni_topo.to_dense(model, case.example(), masks)


def _wrong(case, model):
    masks, dense = _dense(case, model)
    with torch.no_grad():
        dense.b.weight[0, 0] += 0.1
    check(case, model, masks, dense)


def _wrong_after_a_step(case, model):
    masks, dense = _dense(case, model)
    dense.b.bias.requires_grad_(False)
    check(case, model, masks, dense)


def _unasked(case, model):
    masks, dense = _dense(case, model)
    masks["a"] = {"weight": torch.ones_like(model.a.weight)}
    check(case, model, masks, dense)


def _changed(case, model):
    model.register_buffer("more", torch.zeros(1))


def _keeps(case, model):
    require_gone(case, model, copy.deepcopy(model))


def _refuses(case, model):
    raise SpeedupError("a poor rule")


def _hangs(case, model):
    time.sleep(10)


@pytest.mark.parametrize(
    ("request_made", "kind", "words"),
    [
        (_wrong, "wrong", "scale 1, shift 0"),
        (_wrong_after_a_step, "wrong", "after a step"),
        (_unasked, "wrong", "of a went, which its mask keeps"),
        (_changed, "changed", "more"),
        (_keeps, "lost", "a must lose channels; 4/14 channels must go, got 0/14"),
        (_refuses, "lost", "refused: SpeedupError: a poor rule"),
        (_hangs, "hang", "1 s"),
    ],
)
@pytest.mark.quick_every(2)
def test_what_goes_wrong_is_noticed(monkeypatch, request_made, kind, words):
    monkeypatch.setitem(REQUESTS, "made", request_made)
    case = next(case for case in OPERATORS if case.name == "operators/relu")
    outcome = serve(case, "made", seconds=1 if kind == "hang" else 60)
    assert outcome.kind == kind
    assert words in outcome.text
