"""What `shrink_pretrained` makes of its arguments, and the figures of a run."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nni_topo import Calibration
from nni_topo.errors import ConfigError, DataError
from nni_topo.pruners.budget import Budget
from nni_topo.recovery.likeness import Estimate, Likeness
from nni_topo.runs.streaming import shrinking
from nni_topo.runs.streaming.report import BlockRow


def test_layers_are_named_by_a_list_or_one_word():
    assert shrinking._checked_layers(None) is None
    assert shrinking._checked_layers("mlp") == ["mlp"]
    assert shrinking._checked_layers(each for each in ("b", "a")) == ["b", "a"]
    for wrong in ([], ["a", 1]):
        with pytest.raises(ConfigError, match=r"layers must name layers within a block, got .* \(layers, shrink_pre"):
            shrinking._checked_layers(wrong)


def test_blocks_to_remove_are_a_number_or_names():
    assert [shrinking._checked_blocks(given) for given in (0, 3)] == [0, 3]
    assert shrinking._checked_blocks(("b", "a", "b")) == ["a", "b"]
    for wrong in (-1, True, 1.0, None, "a", [], ["a", 1]):
        with pytest.raises(ConfigError, match=r"remove_blocks must be an integer of at least 0 or a list of names of"):
            shrinking._checked_blocks(wrong)


class Blocks(list):
    def name_of(self, index):
        return f"layers.{index}"


def test_all_but_the_first_block_can_be_removed():
    blocks = Blocks(range(3))
    for good in (0, 2, ["layers.1", "layers.2"]):
        shrinking._check_blocks_of(blocks, good)
    for wrong, words in (
        (3, "the first of 3 blocks must stay, got 3 to remove"),
        (["layers.0", "layers.1"], "the first block must stay, got its name, layers.0"),
        (["layers.1", "layers.3"], "got 'layers.3'"),
    ):
        with pytest.raises(ConfigError, match=words):
            shrinking._check_blocks_of(blocks, wrong)


def test_batches_have_the_same_inputs():
    one, two, named = ((1,), {}), ((1, 2), {}), ((1,), {"b": 1, "a": 1})
    shrinking._check_alike([one, one])
    shrinking._check_alike([named, ((2,), {"a": 1, "b": 2})])
    with pytest.raises(DataError, match=r"got 2 and 1 without a name \(batches 2 and 0\)"):
        shrinking._check_alike([one, one, two])
    for calls in ([one, named], [named, one]):
        with pytest.raises(DataError, match=r"got a in one of two alone; .*\(batches 1 and 0\)"):
            shrinking._check_alike(calls)


def test_processes_have_the_same_inputs():
    call = (1, 2), {"b": 1, "a": 1}

    def among(*found):
        told = []
        processes = SimpleNamespace(gather=lambda value, what: told.append(value) or list(found))
        shrinking._check_alike_everywhere(call, processes)
        return told

    assert among((2, ["a", "b"]), (2, ["a", "b"])) == [(2, ["a", "b"])]
    words = "got 2 without a name and a, b by name in rank 0, 1 without a name and none by name in rank 2"
    with pytest.raises(DataError, match=words):
        among((2, ["a", "b"]), (2, ["a", "b"]), (1, []))


def test_a_digest_tells_values_types_shapes_and_names_order_apart():
    ones = torch.ones(2, 3)
    same = [((ones,), {"a": 1, "b": ones}), ((torch.ones(3, 2).T,), {"b": ones, "a": 1})]
    others = [
        ((ones,), {"a": 1, "b": 2 * ones}),
        ((ones,), {"a": 2, "b": ones}),
        ((ones.reshape(3, 2),), {"a": 1, "b": ones}),
        ((ones.view(torch.int32),), {"a": 1, "b": ones}),
        ((ones,), {"a": ones, "b": 1}),
    ]
    assert len({shrinking._digest([call]) for call in same}) == 1
    assert len({shrinking._digest([call]) for call in (same[0], *others)}) == 1 + len(others)
    assert shrinking._digest([same[0]]) != shrinking._digest([same[0], same[0]])
    assert shrinking._as_text({"b": object(), "a": 1}) == {"a": "1", "b": "<object object>"}


def test_a_budget_is_counted_block_by_block():
    for good in ({"flops": 0.5}, {"params": 0.5}):
        shrinking._check_budget(Budget(**good), "l1")
    for wrong, words in (
        ({"memory": 0.5}, r"needs a budget of flops or params, got memory"),
        ({"params": 0.5, "allocation": "error"}, "by the allocation 'uniform', got 'error'"),
    ):
        with pytest.raises(ConfigError, match=words):
            shrinking._check_budget(Budget(**wrong), "l1")
    with pytest.raises(ConfigError, match="shrink_pretrained needs"):
        shrinking._check_budget(Budget(params=0.5), "subcluster")


class Summed:
    """Processes of which all others have the same sums as this one."""

    def add(self, tensors, what):
        for tensor in tensors:
            tensor.mul_(2)


def test_distances_are_over_the_variance_and_without_padding():
    generator = torch.Generator().manual_seed(0)
    wanted, reached = (torch.randn(3, 4, 2, generator=generator) for _ in range(2))
    real = torch.ones(3, 4, dtype=torch.bool)
    real[1, 2:] = False
    for mask, chosen in ((None, slice(None)), (real, real), (real[:, :2], slice(None))):
        found = shrinking._Distance()
        assert math.isnan(found.share)
        found.add(wanted[:2], reached[:2], None if mask is None else mask[:2])
        found.add(wanted[2:], reached[2:], None if mask is None else mask[2:])
        one, other = wanted[chosen].double(), reached[chosen].double()
        share = float((one - other).square().mean() / one.var(unbiased=False))
        assert found.share == pytest.approx(share)
        with torch.device("meta"):  # sums lie on the CPU, whatever PyTorch's default is
            found.pool(Summed())
        assert found.share == pytest.approx(share)
        assert found._count == 2 * one.numel()
    constant = shrinking._Distance()
    constant.add(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), None)
    assert math.isnan(constant.share)


def test_states_that_are_not_finite_are_told():
    shrinking._check_finite(torch.ones(2), "layers.1", 3)
    for value in (torch.nan, torch.inf):
        with pytest.raises(DataError, match=r"of the unpruned model .*got NaN or infinity \(layers.1, batch 3\)"):
            shrinking._check_finite(torch.tensor([1.0, value]), "layers.1", 3)


ROW = BlockRow("layers.0", 8, 4, distance=0.2, calibration_distance=0.1, is_distilled=False, seconds=1.0)


def likeness(distance):
    return Likeness(distance=Estimate(distance, distance, distance), agreement=Estimate(1.0, 1.0, 1.0))


def test_figures_of_few_samples_are_doubtful():
    held_out = Calibration([torch.ones(1, 1)])
    assert shrinking._warnings([ROW], held_out, likeness(0.5)) == ()
    worse = replace(ROW, distance=0.25)
    assert shrinking._warnings([worse, ROW], held_out, likeness(0.5)) == ()
    (told,) = shrinking._warnings([ROW, worse], held_out, likeness(0.5))
    assert "distance after the last block 0.25 on held-out samples, 0.1 on calibration data" in told
    (told,) = shrinking._warnings([worse], None, likeness(0.5))
    assert told.startswith("no sample could be held out: ")
    assert told.endswith("pass 8 or more")
    assert shrinking._warnings([worse], None, likeness(math.inf)) == (shrinking.NO_SCALE,)
