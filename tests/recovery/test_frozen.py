"""Parameters that don't require gradients: no recovery changes them, unless the whole network is frozen."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.recovery import compensate, compensation, distillation, recalibrate_batch_norm, remove_blocks


class Net(nn.Module):
    """Three convolutions with batch norms, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.second, self.norm2 = nn.Conv2d(16, 16, 3, bias=False), nn.BatchNorm2d(16)
        self.third, self.norm3 = nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
        for norm in (self.norm1, self.norm2, self.norm3):
            nn.init.normal_(norm.weight, 1.0, 0.2)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        self.eval()

    def forward(self, x):
        x = self.norm1(self.first(x)).relu()
        x = self.norm2(self.second(x)).relu()
        x = self.norm3(self.third(x)).relu()
        return self.head(x.mean((2, 3)))


IMAGES = torch.randn(320, 3, 11, 11, generator=torch.Generator().manual_seed(1))
BATCHES = IMAGES.split(64)
FROZEN = ("second", "norm2", "norm3")


def frozen_net(layers=FROZEN):
    model = Net()
    for name in layers:
        model.get_submodule(name).requires_grad_(False)
    return model


def masks_of(model, layers=("first", "second", "third")):
    config_list = nni_topo.dependency_groups(model, IMAGES[:2], [{"op_names": list(layers), "sparse_ratio": 0.5}])
    return nni_topo.create_pruner("l1", copy.deepcopy(model), config_list).compress()[1]


def changed(before, after):
    """Names of the modules whose parameters or buffers differ."""
    new = after.state_dict()
    old = before.state_dict().items()
    return {name.rpartition(".")[0] for name, value in old if not torch.equal(value, new[name])}


@pytest.mark.parametrize(
    ("method", "expected", "left_alone"),
    [
        ("reconstruct", {"third", "head"}, {"second"}),
        ("pair", {"third", "head"}, {"second"}),
        ("recalibrate", {"norm1"}, {"second", "norm2", "norm3"}),
    ],
)
def test_compensate_changes_no_frozen_layer_and_reports_it(method, expected, left_alone):
    model = frozen_net()
    done = compensation(model, masks_of(model), BATCHES, method=method)
    assert changed(model, done.model) == expected
    assert set(done.report.left_alone) == left_alone
    assert all("requires_grad=False" in reason for reason in done.report.left_alone.values())
    free = compensation(Net(), masks_of(model), BATCHES, method=method)
    assert changed(model, free.model) > expected
    assert not free.report.left_alone


@pytest.mark.parametrize("method", ["reconstruct", "pair", "recalibrate"])
def test_compensate_recovers_a_network_that_is_frozen_as_a_whole(method):
    model = frozen_net([""])
    done, free = (compensate(net, masks_of(model), BATCHES, method=method) for net in (model, Net()))
    assert not changed(done, free)
    assert not any(parameter.requires_grad for parameter in done.parameters())


def test_a_frozen_bias_stays_while_its_weight_is_solved():
    model = Net()
    model.third.bias.requires_grad_(False)
    repaired = compensate(model, masks_of(model), BATCHES)
    assert torch.equal(repaired.third.bias, model.third.bias)
    assert not torch.equal(repaired.third.weight, model.third.weight)


def test_frozen_batch_norms_keep_their_statistics(caplog):
    model = frozen_net()
    with caplog.at_level(logging.WARNING, "nni_topo"):
        measured = recalibrate_batch_norm(model, BATCHES)
    assert changed(model, measured) == {"norm1"}
    assert "norm2, norm3" in caplog.text
    assert changed(model, recalibrate_batch_norm(frozen_net([""]), BATCHES)) == {"norm1", "norm2", "norm3"}


def test_distill_keeps_frozen_batch_norms_as_they_are():
    model = frozen_net()
    masked = nni_topo.masked_model(model, IMAGES[:2], masks_of(model))
    done = distillation(masked, model, BATCHES, steps=30, lr=1e-3)
    assert done.is_kept
    assert changed(masked, done.model) == {"first", "norm1", "third", "head"}
    assert done.frozen == FROZEN
    assert "second, norm2, norm3" in str(done)


@pytest.mark.parametrize("frozen", [FROZEN, ("",)])
def test_shrink_keeps_the_weights_of_frozen_layers(frozen):
    model = frozen_net(frozen)
    knobs = {"distill": {"steps": 20, "lr": 1e-3}, "progress": False}
    small = nni_topo.shrink(model, BATCHES, {"flops": 0.4}, **knobs)
    widths = [small.get_submodule(name).out_channels for name in ("first", "second", "third")]
    assert sum(widths) < 40
    # Each remaining weight of the layer is one of the unpruned layer's.
    is_kept = bool(torch.isin(small.second.weight, model.second.weight).all())
    is_partly_frozen = frozen == FROZEN
    assert is_kept is is_partly_frozen
    assert ("of second, norm2, norm3" in str(small.report)) is is_partly_frozen
    assert small.report.frozen == (FROZEN if is_partly_frozen else ())
    if is_partly_frozen:
        for name in ("norm2", "norm3"):
            norm, old = small.get_submodule(name), model.get_submodule(name)
            for key in ("weight", "bias", "running_mean", "running_var"):
                assert bool(torch.isin(getattr(norm, key), getattr(old, key)).all())
    assert small(torch.randn(3, 3, 14, 14)).shape == (3, 5)


def test_the_dense_network_computes_what_the_compensated_masked_one_does():
    model = frozen_net()
    masks = masks_of(model)
    repaired = compensate(model, masks, BATCHES)
    dense = nni_topo.to_dense(repaired, IMAGES[:2], masks)
    assert [dense.get_submodule(name).out_channels for name in ("first", "second", "third")] == [8, 8, 8]
    images = torch.randn(5, 3, 15, 13)
    expected = nni_topo.masked_model(repaired, IMAGES[:2], masks)(images)
    torch.testing.assert_close(dense(images), expected, rtol=1e-4, atol=1e-5)


class Adds(nn.Module):
    def __init__(self, end: nn.Module | None = None) -> None:
        super().__init__()
        self.inner, self.layer = nn.Linear(6, 12), nn.Linear(12, 6)
        self.end = end

    def forward(self, x):
        x = x + self.layer(self.inner(x).tanh())
        return x if self.end is None else self.end(x)


def blocks_net(end=lambda: None):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Sequential(*[Adds(end()) for _ in range(4)]), nn.Linear(6, 3)).eval()


ROWS = torch.randn(256, 4, generator=torch.Generator().manual_seed(2)).split(32)


def changed_by_removal(model, frozen):
    """What removing the third of four blocks changes, if some modules are frozen."""
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    small = remove_blocks(model, ["1.2"], ROWS)
    before = nn.Sequential(model[0], nn.Sequential(*[model[1][index] for index in (0, 1, 3)]), model[2])
    return changed(before, small)


def test_removed_blocks_change_no_frozen_layer(caplog):
    assert changed_by_removal(blocks_net(), []) == {"1.1.layer"}
    assert changed_by_removal(blocks_net(), [""]) == {"1.1.layer"}
    assert not caplog.text
    assert changed_by_removal(blocks_net(), ["1.1"]) == set()
    assert "1.1.inner, 1.1.layer" in caplog.text


def test_a_frozen_norm_at_the_end_of_a_block_stays():
    def norm():
        made = nn.LayerNorm(6)
        nn.init.normal_(made.weight)
        return made

    assert changed_by_removal(blocks_net(norm), []) == {"1.1.layer", "1.1.end"}
    assert changed_by_removal(blocks_net(norm), ["1.1.end"]) == set()


def test_a_frozen_bias_before_a_gap_stays():
    model = blocks_net()
    model[1][1].layer.bias.requires_grad_(False)
    small = remove_blocks(model, ["1.2"], ROWS)
    assert torch.equal(small[1][1].layer.bias, model[1][1].layer.bias)
    assert not torch.equal(small[1][1].layer.weight, model[1][1].layer.weight)


def test_blocks_that_are_removed_for_a_budget_leave_frozen_layers_as_they_are():
    model = blocks_net()
    for index in range(3):
        model[1][index].layer.requires_grad_(False)
    knobs = {"distill": {"steps": 10}, "layers": ["1.0.inner", "1.1.inner"], "progress": False}
    small = nni_topo.shrink(model, ROWS, {"params": 0.5}, depth=True, **knobs)
    removed = small.report.depth.removed
    assert removed
    assert not any(block.replaced_by in {f"1.{index}.layer" for index in range(3)} for block in removed)
    assert "1.0.layer, 1.1.layer, 1.2.layer" in str(small.report)
