"""Blocks compete with channels: which go, what stays whatever it costs, and that the user's network isn't touched."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from block_nets import small_resnet
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.cost import LatencyTable, LayerLatency
from nni_topo.network.runtime import Calibration
from nni_topo.runs.depth import DepthPath, DepthTried, cost_saved, removable_blocks
from nni_topo.testing import require_unchanged, snapshot, toy_images, toy_model
from nni_topo.zoo.transformers import bert_small, vit_small

SILENT = ("stage1.1", "stage2.2")


def images(count=96, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)).split(32)


def resnet(silent=()):
    """A small ResNet whose silent blocks add nothing, so that the network is the same without them."""
    model = small_resnet(3, 4)
    with torch.no_grad():
        model.fc.weight *= 40.0  # so that the answers differ from image to image
    for name in silent:
        norm = model.get_submodule(name).norm2
        nn.init.zeros_(norm.weight)
        nn.init.zeros_(norm.bias)
    return model


def vit(silent=()):
    """A small ViT whose silent parts add nothing."""
    torch.manual_seed(0)
    model = vit_small(4, 1, 8).eval()
    for name in silent:
        part = model.get_submodule(name)
        last = part.o_proj if hasattr(part, "o_proj") else part.fc2
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model


def shrunk(model, share=0.5, **knobs):
    settings = {"distill": False, "depth": True, "progress": False, **knobs}
    return nni_topo.shrink(model, list(images()), {"flops": share}, **settings)


def lost(model, other):
    with torch.no_grad():
        wanted, found = (net(torch.cat(images(seed=1))) for net in (model, other))
    return float((wanted - found).square().mean() / wanted.var(0).mean())


def names_of(found):
    return [candidate.name for candidate in found.candidates]


def table_of(model, thin):
    """A table in which a layer takes a share of its time however few its channels are, all layers equally long."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            widths = [(1, getattr(module, f"{side}_{kind}")) for side in ("in", "out")
                      for kind in ("channels", "features") if hasattr(module, f"{side}_{kind}")]  # fmt: skip
            entering, leaving = (tuple(dict.fromkeys(each)) for each in widths)
            rows = tuple(
                tuple(thin + (1.0 - thin) * (i * o) / (entering[-1] * leaving[-1]) for o in leaving) for i in entering
            )
            layers[name] = LayerLatency(entering, leaving, rows, activation=1.0)
    return LatencyTable(layers)


def test_blocks_that_add_nothing_go_and_the_network_stays_the_same(tmp_path):
    model = resnet(SILENT)
    before, example = snapshot(model), images()[0][:2]
    # Channels hardly save time here, and blocks do: 11 of 15 layers are left without both.
    given = {"latency": 0.75, "latency_table": table_of(model, 0.9)}
    small = nni_topo.shrink(model, list(images()), given, depth=True, distill=False)
    require_unchanged(before, model)
    depth = small.report.depth
    assert sorted(each.name for each in depth.removed) == sorted(SILENT)
    assert (len(small.stage1), len(small.stage2)) == (2, 2)
    assert lost(model, small) == pytest.approx(0.0, abs=1e-6)
    chosen = next(each for each in depth.tried if each.is_chosen)
    assert chosen.removed == 2
    assert chosen.left == chosen.kept == small.report.budget.left == pytest.approx(11 / 15)
    assert small.report.budget.is_met
    shown = repr(small.report)
    assert "the block stage1.1 is removed: the weights of stage1.0.conv2 make up for it" in shown
    assert "2 blocks removed: 73.33 % of the cost left" in shown
    assert "of the time stays with as few channels as possible" in shown
    assert any("stage2.2" in note for note in small.report.layers.notes)
    assert list(depth.to_frame()["removed"]) == [each.removed for each in depth.tried]
    nni_topo.save(small, tmp_path / "small.safetensors")
    loaded = nni_topo.load(tmp_path / "small.safetensors", resnet).eval()
    assert torch.equal(loaded(example), small(example))


def without(model):
    plain = copy.deepcopy(model)
    del plain.stage1[1], plain.stage2[2]
    return plain


@pytest.mark.slow
def test_parts_of_a_transformer_go_and_the_files_hold_the_rest(tmp_path):
    silent = ("blocks.1.attention", "blocks.2.mlp", "blocks.3.mlp", "blocks.3.attention")
    model = vit(silent)
    small = shrunk(model, 0.6)
    removed = {each.name: each for each in small.report.depth.removed}
    assert len(removed.keys() & {*silent, "blocks.3"}) >= 2
    assert any(each.kind == "part" for each in removed.values())
    assert lost(model, small) < 0.5 * lost(model, shrunk(model, 0.6, depth=False))
    example = images()[0][:3]
    nni_topo.save(small, tmp_path / "small.pt")
    loaded = nni_topo.load(tmp_path / "small.pt", vit).eval()
    assert torch.equal(loaded(example), small(example))
    done = nni_topo.export(small, tmp_path / "small.pt2", example, format="torch.export")
    again = torch.export.load(done.path).module()
    torch.testing.assert_close(again(example), small(example))


@pytest.mark.slow
def test_what_a_path_removes_it_removes_by_loss_for_cost():
    model, data = resnet(SILENT), Calibration(list(images()))
    found = removable_blocks(model, data)
    # The first block of the second stage halves the resolution.
    assert names_of(found) == ["stage1.0", "stage1.1", "stage1.2", "stage2.1", "stage2.2"]
    saved = cost_saved(model, images()[0][:2], "flops")
    example = images()[0][:2]
    whole, less = (nni_topo.zoo.count_macs(net, example) for net in (model, without(model)))
    silent = [candidate for candidate in found.candidates if candidate.name in SILENT]
    assert sum(map(saved, silent)) == pytest.approx(1.0 - less / whole)
    learned, judges = data.split()
    path = DepthPath(model, learned, judges, None, found, saved)
    count = path.nearest(less / whole)
    assert count == 2
    assert {each.name for each in path.states[2].gone} == set(SILENT)
    assert path.states[2].loss == pytest.approx(0.0, abs=1e-6)
    # All of one stage but one block, and all of the other but the first.
    assert path.nearest(1e-3) == 4
    assert [len(path.states[-1].net.get_submodule(stage)) for stage in ("stage1", "stage2")] == [1, 1]
    assert path.states[-1].left == pytest.approx(
        nni_topo.zoo.count_macs(path.states[-1].net, example) / whole, rel=1e-6
    )


def test_the_layer_before_a_block_makes_up_for_what_the_block_adds():
    model, data = resnet(), Calibration(list(images()))
    learned, judges = data.split()
    found = removable_blocks(model, data)
    path = DepthPath(model, learned, judges, None, found, cost_saved(model, images()[0][:2], "flops"))
    path.nearest(0.8)
    state = path.states[1]
    assert state.removed[0].replaced_by
    plain = copy.deepcopy(model)
    parent, _, key = state.gone[0].name.rpartition(".")
    del plain.get_submodule(parent)[int(key)]
    assert lost(model, state.net) < 0.8 * lost(model, plain)


def test_hooks_outputs_and_named_layers_keep_their_blocks():
    model, data = resnet(), Calibration(list(images()))
    handle = model.stage1[1].conv2.register_forward_hook(lambda *_: None)
    found = removable_blocks(model, data, lambda name: "wanted" if name == "stage2.1" else "")
    handle.remove()
    assert names_of(found) == ["stage1.0", "stage1.2", "stage2.2"]
    assert found.kept == {"stage1.1": "a hook meets it", "stage2.1": "wanted"}

    class Telling(nn.Module):
        """Gives what a stage puts out beside the scores."""

        def __init__(self) -> None:
            super().__init__()
            self.net = resnet()

        def forward(self, x):
            """Return the scores and the features of the first stage."""
            net = self.net
            first = net.stage1(net.relu1(net.norm1(net.conv1(x))))
            return net.fc(net.pool(net.stage2(first)).flatten(1)), first[:, :2]

    found = removable_blocks(Telling().eval(), data)
    assert found.kept == {"net.stage1.2": "what it puts out is an output of the model"}
    model = resnet(SILENT)
    # The second convolution of a block writes into the stream, whose channels the others share: it needn't be named.
    layers = ["stage1.1.conv1", "stage2.1.conv1", "stage2.0.conv1", "stage1.2.conv2"]
    bounded = {"op_names": ["stage2.2.conv1"], "max_sparse_ratio": 0.5}
    given = {"latency": 0.8, "latency_table": table_of(model, 0.9)}
    small = nni_topo.shrink(model, list(images()), given, depth=True, distill=False, layers=[*layers, bounded])
    kept = small.report.depth.kept
    assert kept["stage1.0"] == "no layer in it is named (layers)"
    assert kept["stage1.2"] == "stage1.2.conv1 isn't named (layers)"
    assert kept["stage2.2"] == "stage2.2.conv1 has a max_sparse_ratio (layers)"
    assert {each.name for each in small.report.depth.removed} <= {"stage1.1", "stage2.1"}


@pytest.mark.slow
def test_layers_that_a_caller_names_are_those_of_the_unpruned_network():
    model = resnet(SILENT)
    bounded = {"op_names": ["stage1.2.conv1"], "max_sparse_ratio": 0.5}
    layers = ["stage1.1.conv1", bounded, {"op_names_re": [r"stage2\.0\.conv1"]}]
    given = {"latency": 0.8, "latency_table": table_of(model, 0.7)}
    small = nni_topo.shrink(model, list(images()), given, depth=True, layers=layers, distill=False)
    assert [each.name for each in small.report.depth.removed] == ["stage1.1"]
    pruned = {row.name: row.after for row in small.report.layers.rows if row.after < row.before}
    # What was the third block of the first stage is the second one now, and keeps the half.
    assert pruned.keys() <= {"stage1.1.conv1", "stage2.0.conv1"}
    assert pruned
    assert pruned.get("stage1.1.conv1", 6) >= 3
    assert "stage1.2.conv1" not in dict(small.named_modules())


@pytest.mark.parametrize("pruner", [pytest.param("reconstruction", marks=pytest.mark.slow), "l1"])
def test_budgets_of_what_is_tried_are_not_told_only_that_of_the_call(pruner, caplog):
    """Networks without two or three blocks have budgets of their own, which the few channels of this one miss."""
    small = shrunk(resnet(SILENT), pruner=pruner, compensate=None)
    assert len(small.report.depth.tried) == 3
    told = [record.getMessage() for record in caplog.records if "budget" in record.getMessage()]
    assert told == [str(small.report.budget)]


def test_without_a_removable_block_a_warning_tells_and_channels_go(caplog):
    data = list(toy_images(64).split(32))
    with caplog.at_level(logging.WARNING):
        one, other = (
            nni_topo.shrink(toy_model().eval(), data, {"flops": 0.5}, depth=depth, distill=False)
            for depth in (True, False)
        )
    assert "depth=True finds no block that can be removed" in caplog.text
    assert any("finds no block" in text for text in one.report.warnings)
    assert one.report.depth is None
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_plain_layers_in_a_row_are_no_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Dropout(), nn.LayerNorm(6), nn.Linear(6, 3))
    found = removable_blocks(model.eval(), Calibration([torch.randn(8, 6)]))
    assert (found.candidates, found.kept) == ((), {})


def test_bad_requests_are_refused():
    model, data = resnet(), list(images())
    with pytest.raises(ConfigError, match=r"depth must be True or False, got 1 \(shrink\)"):
        nni_topo.shrink(model, data, {"flops": 0.5}, depth=1)
    with pytest.raises(ConfigError, match=r"depth=True needs a pruner that can be asked for a size, got a function"):
        nni_topo.shrink(model, data, {"flops": 0.5}, depth=True, pruner=lambda *_: {})
    with pytest.raises(DataError, match=r"depth=True needs at least 8 samples, of which one judges, got 4"):
        nni_topo.shrink(model, [data[0][:4]], {"flops": 0.5}, depth=True)


@pytest.mark.slow
def test_where_thin_layers_take_as_long_blocks_go_first():
    model = resnet()
    given = {"latency": 0.6, "latency_table": table_of(model, 0.8)}
    small = nni_topo.shrink(model, list(images()), given, depth=True, distill=False)
    depth = small.report.depth
    assert 0.8 <= depth.overhead < 0.85
    assert "of the time stays with as few channels as possible" in repr(small.report)
    # 15 layers of equal time, of which each block has two: without blocks the budget can't be met.
    assert all(each.removed >= 2 for each in depth.tried)
    assert small.report.budget.is_met
    names = [name for name, module in small.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert small.report.budget.left <= 0.63
    assert len(names) == 15 - 2 * len(depth.removed)
    flat = nni_topo.shrink(model, list(images()), given, depth=False, distill=False)
    assert not flat.report.budget.is_met


def test_norms_after_the_sums_become_those_of_the_last_block_that_went():
    torch.manual_seed(0)
    model = bert_small(4, 1, 8).eval()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    learned, judges = Calibration(list(images())).split()
    found = removable_blocks(model, learned)
    assert (names_of(found), found.kept) == ([f"blocks.{number}" for number in range(5)], {})
    path = DepthPath(model, learned, judges, None, found, lambda _: 0.2)
    assert path.nearest(0.8) == 1
    state = path.states[1]
    gone = int(state.gone[0].name[-1])
    assert state.removed[0].replaced_by == (f"blocks.{gone - 1}.mlp.fc2" if gone else "")
    if gone:
        assert torch.equal(state.net.blocks[gone - 1].norm2.weight, model.blocks[gone].norm2.weight)
    plain = copy.deepcopy(model)
    del plain.blocks[gone]
    assert lost(model, state.net) < lost(model, plain)


def test_shared_blocks_stay_and_layers_with_computed_weights_make_up_for_nothing():
    torch.manual_seed(0)

    class Residual(nn.Module):
        """Adds what two layers make of its input."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), weight_norm(nn.Linear(8, 8))

        def forward(self, x):
            """Map (samples, 8)."""
            return x + self.two(torch.relu(self.one(x)))

    shared = Residual()
    model = nn.Sequential(nn.Linear(8, 8), shared, Residual(), shared, Residual(), nn.Linear(8, 3)).eval()
    learned, judges = Calibration([torch.randn(64, 8)]).split()
    found = removable_blocks(model, learned)
    assert names_of(found) == ["2", "4"]
    before = snapshot(model)
    path = DepthPath(model, learned, judges, None, found, lambda _: 0.25)
    assert path.nearest(0.01) == 2
    require_unchanged(before, model)
    assert [each.replaced_by for each in path.states[2].removed] == ["", ""]
    assert torch.equal(path.states[2].net[1].one.weight, shared.one.weight)


@pytest.mark.slow
def test_a_tolerance_and_a_frontier_take_depth():
    model = resnet(SILENT)
    data = list(torch.cat([*images(96), *images(96, 2)]).split(64))
    small = nni_topo.shrink(model, data, tolerance=0.2, measure="distance", depth=True, distill=False)
    found = small.report.tolerance
    assert found.is_met
    assert found.limit <= 0.2
    assert any(each.is_chosen for each in small.report.depth.tried)
    family = nni_topo.frontier(model, list(images()), (0.67, 0.5), depth=True, distill=False)
    assert all(point.left <= point.share + 0.01 for point in family.points[1:])
    assert family[0.67].report.depth.tried[0].removed == 0


@pytest.mark.parametrize("is_contained", [pytest.param(False, marks=pytest.mark.slow), True])
def test_parts_whose_attributes_a_fast_path_reads_stay(is_contained):
    torch.manual_seed(0)

    def layer():
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)

    if is_contained:
        body = nn.TransformerEncoder(layer(), 3, enable_nested_tensor=False)
    else:
        body = nn.Sequential(*(layer() for _ in range(3)))
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(40, 4)).eval()
    rows = torch.randn(64, 5, 8)
    knobs = {"distill": False, "depth": True, "progress": False}
    small = nni_topo.shrink(model, rows.split(32), {"flops": 0.5}, **knobs)
    assert {name.rpartition(".")[2] for name in small.report.depth.kept} == {"self_attn", "linear2"}
    with torch.no_grad():
        assert small(rows).shape == (64, 4)


def test_a_network_with_all_blocks_says_nothing_of_blocks_and_costs_are_per_cent():
    alone, shorter = DepthTried(0, 1.0, 0.25, 0.5, True, True), DepthTried(1, 0.6, 0.25, 0.5, True, False)
    assert str(alone) == "channels alone: 25 % of the cost left, held-out loss 0.5 (chosen)"
    assert str(shorter) == "1 block removed: 60 % of the cost left, 25 % after channels, held-out loss 0.5"
