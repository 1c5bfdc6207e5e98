"""Recovery methods by name: every registered one keeps what compensation promises, and users add theirs."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch

import nni_topo
from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.recovery import (
    Reconstruct,
    RecoveryInfo,
    RecoveryMethod,
    compensate,
    compensation,
    list_recoveries,
    recovery_info,
    register_recovery,
)
from nni_topo.recovery.reconstruct import ReconstructTask
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.testing import RECOVERY_CHECKS


@dataclass(frozen=True)
class FirstLayers(RecoveryMethod):
    """Solve so many layers and leave the others as they are."""

    count: int = 1

    def tasks(self, plan, networks):
        return [ReconstructTask(each, networks.pruned, networks.result) for each in plan.equations[: self.count]]


@pytest.mark.parametrize("check", RECOVERY_CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("method", list_recoveries())
@pytest.mark.quick_every(3)
def test_every_method_keeps_its_promises(method, check):
    check(method)


def test_a_method_of_a_user_is_taken_as_it_is_by_its_name_and_by_its_path(residual_net, images, halves, monkeypatch):
    masks = halves(residual_net, "conv1", "conv3")
    every = compensation(residual_net, masks, images, method=Reconstruct(refine=0)).report.layers
    one = compensation(residual_net, masks, images, method=FirstLayers(1))
    assert len(every) > 1
    assert [layer.layer for layer in one.report.layers] == [every[0].layer]
    assert one.report.layers[0].error_after == every[0].error_after
    monkeypatch.setattr(RECOVERIES, "table", dict(RECOVERIES.table))
    register_recovery(RecoveryInfo("first", f"{__name__}:FirstLayers", "solves the first layer"))
    assert "first" in nni_topo.list_recoveries("f*")
    for name in ("first", f"{__name__}:FirstLayers"):
        named = compensate(residual_net, masks, images, method=name)
        torch.testing.assert_close(named.state_dict(), one.model.state_dict(), rtol=0, atol=0)
    with pytest.raises(ConfigError, match="a method's name must be free, got 'first'"):
        register_recovery(RecoveryInfo("first", "elsewhere:Class", "another"))


@pytest.mark.parametrize("path", ["nowhere:Class", "nni_topo.recovery:NoClass", "nni_topo.recovery:compensate", "text"])
def test_a_path_that_leads_to_no_method_is_told(path):
    with pytest.raises(ConfigError, match="a method must be a class"):
        RecoveryInfo("bad", path, "nothing").load()
    if ":" in path:
        with pytest.raises(ConfigError, match="a method must be a class"):
            recovery_info(path)


@dataclass(frozen=True)
class NeedsCount(RecoveryMethod):
    count: int


def test_a_method_by_name_needs_defaults(residual_net, images, halves):
    with pytest.raises(ConfigError, match=r"a method's settings must have defaults if it is named, got .*'count'"):
        compensate(residual_net, halves(residual_net, "conv1"), images, method=f"{__name__}:NeedsCount")


def test_an_unknown_name_is_told_with_the_nearest():
    with pytest.raises(ConfigError, match=r"method must be a known name, got 'reconstuct'.*reconstruct"):
        recovery_info("reconstuct")


FACTORS = itertools.count(2)


class BrokenTask(ReconstructTask):
    def __init__(self, equation, networks, fault):
        super().__init__(equation, networks.pruned, networks.result)
        self.fault = fault

    def apply(self, net, found):
        super().apply(net, found)
        layer = net.get_submodule(self.layer.name)
        with torch.no_grad():
            if self.fault == "other each time":
                layer.weight.mul_(next(FACTORS))
            if self.fault == "not finite":
                layer.weight.fill_(torch.nan)


@dataclass(frozen=True)
class Broken(RecoveryMethod):
    fault: str

    def tasks(self, plan, networks):
        return [BrokenTask(plan.equations[-1], networks, self.fault)]


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("other each time", "check_repeatable"),
        ("not finite", "check_same_shapes"),
        ("not finite", "check_few_images"),
        ("not finite", "check_dense"),
    ],
)
@pytest.mark.quick_every(2)
def test_checks_find_methods_that_break_a_promise(fault, check):
    (found,) = [each for each in RECOVERY_CHECKS if each.__name__ == check]
    with pytest.raises((AssertionError, NniTopoError)):
        found(Broken(fault))
    found(Broken("none"))


@pytest.mark.parametrize(("method", "is_measured"), [("recalibrate", True), (FirstLayers(), False)])
def test_statistics_of_norms_are_measured_anew_where_a_method_says_so(
    method, is_measured, residual_net, images, halves
):
    found = compensate(residual_net, halves(residual_net, "conv1"), images, method=method)
    assert torch.equal(found.norm2.running_var, residual_net.norm2.running_var) != is_measured
    assert torch.equal(found.conv2.weight, residual_net.conv2.weight) == is_measured
