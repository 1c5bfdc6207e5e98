"""Blocks compete with channels: which go, what stays whatever it costs, and that the user's network isn't touched."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace

import pytest
import torch
from block_nets import small_resnet
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.cost.latency import LatencyTable, LayerLatency
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense_report import DenseReport
from nni_topo.pruners.budget import Budget
from nni_topo.recovery.lesson import Judgement
from nni_topo.runs import depth as depth_module
from nni_topo.runs.depth import (
    Depth,
    DepthPath,
    Removable,
    Removal,
    RemovedBlock,
    Shortened,
    cost_saved,
    removable_blocks,
)
from nni_topo.runs.images import ImageParts
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.prepared import Prepared
from nni_topo.runs.settings import Settings
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


def without(model):
    plain = copy.deepcopy(model)
    del plain.stage1[1], plain.stage2[2]
    return plain


def share_of(net, model):
    one, other = (nni_topo.zoo.count_macs(each, images()[0][:2]) for each in (net, model))
    return one / other


@pytest.mark.slow
def test_blocks_that_add_nothing_go_and_the_network_stays_the_same(tmp_path):
    model = resnet(SILENT)
    before, example, left = snapshot(model), images()[0][:2], share_of(without(model), model)
    small = shrunk(model, left + 1e-3)
    require_unchanged(before, model)
    depth = small.report.depth
    assert sorted(each.name for each in depth.removed) == sorted(SILENT)
    assert (len(small.stage1), len(small.stage2)) == (2, 2)
    assert lost(model, small) == pytest.approx(0.0, abs=1e-6)
    chosen = next(each for each in depth.tried if each.is_chosen)
    assert chosen.removed == 2
    assert chosen.left == chosen.kept == small.report.budget.left == pytest.approx(left)
    assert small.report.budget.is_met
    assert "the block stage1.1 is removed" in repr(small.report)
    assert any("stage2.2" in note for note in small.report.layers.notes)
    nni_topo.save(small, tmp_path / "small.safetensors")
    loaded = nni_topo.load(tmp_path / "small.safetensors", resnet).eval()
    assert torch.equal(loaded(example), small(example))


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
    less = share_of(without(model), model)
    silent = [candidate for candidate in found.candidates if candidate.name in SILENT]
    assert sum(map(saved, silent)) == pytest.approx(1.0 - less)
    learned, judges = data.split()
    path = DepthPath(model, learned, judges, None, found, saved)
    count = path.nearest(less)
    assert count == 2
    assert {each.name for each in path.states[2].removed} == set(SILENT)
    assert path.states[2].loss == pytest.approx(0.0, abs=1e-6)
    # All of one stage but one block, and all of the other but the first.
    assert path.nearest(1e-3) == 4
    assert [len(path.states[-1].net.get_submodule(stage)) for stage in ("stage1", "stage2")] == [1, 1]
    assert path.states[-1].left == pytest.approx(share_of(path.states[-1].net, model), rel=1e-6)


@pytest.mark.slow
def test_hooks_outputs_and_named_layers_keep_their_blocks():
    model, data = resnet(), Calibration(list(images()))
    handle = model.stage1[1].conv2.register_forward_hook(lambda *_: None)
    found = removable_blocks(model, data, lambda name: "wanted" if name == "stage2.1" else "")
    handle.remove()
    assert names_of(found) == ["stage1.0", "stage1.2", "stage2.2"]
    assert found.kept == {"stage1.1": "a hook is registered on it", "stage2.1": "wanted"}

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
    assert found.kept == {"net.stage1.2": "its output is an output of the model"}


@pytest.mark.slow
def test_blocks_of_which_no_layer_is_named_stay_and_names_are_those_of_the_unpruned_network():
    model = resnet(SILENT)
    layers = ["stage1.1.conv1", "stage2.1.conv1", "stage2.0.conv1", "stage1.2.conv1"]
    small = shrunk(model, 0.8, layers=layers)
    depth = small.report.depth
    assert depth.kept == dict.fromkeys(["stage1.0", "stage2.2"], "no layer in it is named (layers)")
    assert "stage1.1" in [each.name for each in depth.removed]
    pruned = {row.name for row in small.report.layers.rows if row.after < row.before}
    # What was the third block of the first stage is the second one now.
    assert pruned <= {"stage1.1.conv1", "stage2.0.conv1", "stage2.1.conv1"}
    assert "stage1.2.conv1" not in dict(small.named_modules())


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
    with pytest.raises(
        ConfigError, match=r"depth=True must have a pruner that can be asked for a size, got 'subcluster'"
    ):
        nni_topo.shrink(model, data, {"flops": 0.5}, depth=True, pruner="subcluster")
    entries = [{"op_names": ["stage1.1.conv1"], "max_sparse_ratio": 0.5}]
    with pytest.raises(ConfigError, match=r"depth=True needs layers by name, got an entry .* \(layers, shrink\)"):
        nni_topo.shrink(model, data, {"flops": 0.5}, depth=True, layers=entries)
    one_share = "a budget of latency with depth=True must have a share and no latency_table, got {}"
    with pytest.raises(ConfigError, match=one_share.format("a table")):
        nni_topo.shrink(model, data, {"latency": 0.5, "latency_table": table_of(model, 0.9)}, depth=True)
    with pytest.raises(ConfigError, match=one_share.format("a tolerance")):
        nni_topo.shrink(model, data, "latency", tolerance=0.1, depth=True)
    with pytest.raises(ConfigError, match=one_share.format("shares")):
        nni_topo.frontier(model, data, budget="latency", depth=True)
    with pytest.raises(DataError, match=r"depth=True needs at least 8 samples, of which one judges, got 4"):
        nni_topo.shrink(model, [data[0][:4]], {"flops": 0.5}, depth=True)


@pytest.mark.slow
def test_where_thin_layers_take_as_long_blocks_go_first(monkeypatch):
    """A time is the number of layers, of which a fifth goes with the channels: 15 layers, each block has two."""

    def time_shares(models, whole, *given, **knobs):
        seconds = []
        for net in (whole, *models):
            layers = [each for each in net.modules() if isinstance(each, (nn.Conv2d, nn.Linear))]
            of_channels = sum(each.weight.numel() for each in layers)
            seconds.append((0.8 * len(layers) / 15.0, 0.2 * of_channels))
        fixed, weights = seconds[0]
        return [(own / fixed * 0.8 + 0.2 * size / weights, 0.0) for own, size in seconds[1:]]

    model = resnet()
    for place in ("nni_topo.pruners.budget", "nni_topo.runs.prepared"):
        monkeypatch.setattr(f"{place}.time_shares", time_shares)
    for place in ("nni_topo.pruners.budget", "nni_topo.runs.depth"):
        monkeypatch.setattr(f"{place}.measure_latency", lambda net, example: table_of(net, 0.8))
    small = nni_topo.shrink(model, list(images()), {"latency": 0.6}, depth=True, distill=False)
    depth = small.report.depth
    assert 0.8 <= depth.overhead < 0.85
    # Without blocks the budget can't be met.
    assert all(each.removed >= 2 for each in depth.tried)
    assert small.report.budget.is_met
    names = [name for name, module in small.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert len(names) == 15 - 2 * len(depth.removed)


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
    gone = int(state.removed[0].name[-1])
    assert state.removed[0].replaced_by == (f"blocks.{gone - 1}.mlp.fc2" if gone else "")
    if gone:
        assert torch.equal(state.net.blocks[gone - 1].norm2.weight, model.blocks[gone].norm2.weight)
    plain = copy.deepcopy(model)
    del plain.blocks[gone]
    assert lost(model, state.net) < lost(model, plain)


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


@pytest.mark.slow
def test_parts_whose_attributes_a_fast_path_reads_stay():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    body = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(40, 4)).eval()
    rows = torch.randn(64, 5, 8)
    knobs = {"distill": False, "depth": True, "progress": False}
    small = nni_topo.shrink(model, rows.split(32), {"flops": 0.5}, **knobs)
    assert {name.rpartition(".")[2] for name in small.report.depth.kept} == {"self_attn", "linear2"}
    with torch.no_grad():
        assert small(rows).shape == (64, 4)


class Part(nn.Module):
    """Two layers, whose output is added to their input."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.two(torch.relu(self.one(x)))


class TwoParts(nn.Module):
    """A block of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Part(), Part()

    def forward(self, x):
        x = x + self.first(x)
        return x + self.second(x)


def stack():
    return Blocks().eval(), torch.randn(64, 5)


def row():
    """The blocks without a list around them."""
    torch.manual_seed(0)
    return nn.Sequential(*(TwoParts() for _ in range(3)), nn.Linear(4, 3)).eval(), torch.randn(64, 4)


def path_of(model, rows, wanted):
    """A path on which the wanted candidates go first, since they save most."""
    learned, judges = Calibration([rows]).split()
    found = removable_blocks(model, learned)
    costs = {name: 1e-3 * 1e6 ** (len(wanted) - place) for place, name in enumerate(wanted)}
    return DepthPath(model, learned, judges, None, found, lambda each: costs.get(each.name, 1e-6))


@pytest.mark.parametrize(
    ("make", "gone", "writers"),
    [
        (stack, ["blocks.2.first"], ["blocks.1.second.two"]),
        (stack, ["blocks.0.first"], [""]),
        (stack, ["blocks.1.second", "blocks.2.first"], ["blocks.1.first.two", "blocks.1.first.two"]),
        (row, ["2.first"], ["1.second.two"]),
    ],
)
def test_the_part_before_it_makes_up_for_a_part(make, gone, writers):
    path = path_of(*make(), gone)
    for _ in gone:
        assert path._extend()
    assert path.states[-1].removed == tuple(map(RemovedBlock, gone, ["part"] * len(gone), writers))


class Staged(Depth):
    """Networks that are numbers of blocks that are removed, with costs and losses that are written out."""

    def __init__(self, whole, losses, kept, refused, overhead):
        path = DepthPath.__new__(DepthPath)
        path.removable = Removable((), {}, {"4": "wanted"})
        gone = [RemovedBlock(str(number), "block", "") for number in range(len(losses))]
        path.states = [
            Shortened(None, {}, tuple(gone[:count]), *each)
            for count, each in enumerate(zip(losses, (1.0, 0.8, 0.6, 0.4, 0.2), strict=True))
        ]
        path._extend = lambda: False
        super().__init__(whole, path)
        self.kept, self.refused, self._overhead = kept, refused, overhead

    def overhead(self):
        return self._overhead

    def share_without(self, count):
        return self.path.states[count].left

    def without(self, count, share):
        if count in self.refused:
            raise ConfigError(f"no channels to remove without {count} blocks")
        return replace(self.whole.start, dense=count, layers=DenseReport(()), left=self.kept.get(count, share))


def staged(losses, *, kind="flops", whole=(0.0, 9.0, 9.0, 9.0, 9.0), kept=None, refused=(), overhead=math.nan):
    """Depth for the losses of networks by the number of blocks removed; four blocks save a fifth of the cost each."""
    judges = Calibration([torch.zeros(8, 1)])
    start = Pipeline(Analysis(nn.Identity(), ((torch.zeros(1, 1),), {})))
    images = ImageParts(judges, judges, judges, judges, None)
    asked = Prepared(start, images, Settings(), Budget(**{kind: 0.25}), None, False, is_search=True)
    return Staged(asked, whole, kept or {}, refused, overhead)


@pytest.mark.parametrize(
    ("losses", "knobs", "tried", "best"),
    [
        # Without blocks it is best: fewer go than for half of the saving.
        ({0: 1.0, 2: 2.0, 1: 1.5}, {}, [0, 1, 2], 0),
        ({0: 1.0, 2: math.nan, 1: 2.0}, {}, [0, 1, 2], 0),
        ({0: math.nan, 2: 1.0, 3: 0.5}, {}, [0, 2, 3], 3),
        # Blocks for half of the saving are better: more go.
        ({0: 2.0, 2: 1.0, 3: 0.5}, {}, [0, 2, 3], 3),
        # All of the saving, since the network without so many blocks loses no more than what was tried.
        ({0: 2.0, 2: 1.0, 4: 0.5}, {"whole": (0.0, 9.0, 9.0, 9.0, 1.0)}, [0, 2, 4], 4),
        ({0: 2.0, 2: 1.0, 3: 1.5}, {"whole": (0.0, 9.0, 9.0, 9.0, 1.1)}, [0, 2, 3], 2),
        # No network meets the budget: the one that misses it least is kept, whatever it loses.
        ({0: 1.0, 2: 2.0, 4: 3.0}, {"kept": {0: 0.5, 2: 0.4, 4: 0.3}}, [0, 2, 4], 4),
        # One that meets the budget is better than one that doesn't.
        ({0: 1.0, 2: 2.0, 3: 3.0}, {"kept": {0: 0.5}}, [0, 2, 3], 2),
        # Channels alone aren't fast enough.
        ({2: 1.0, 3: 2.0}, {"overhead": 0.5}, [2, 3], 2),
        ({1: 1.0, 2: 2.0}, {"overhead": 0.3}, [1, 2], 1),
        ({0: 1.0, 1: 2.0}, {"refused": (2,)}, [0, 1], 0),
        ({0: 1.0}, {"refused": (1, 2, 3, 4), "overhead": 0.5}, [0], 0),
    ],
)
def test_numbers_of_blocks_are_tried_where_they_may_help(losses, knobs, tried, best, monkeypatch):
    def judged(model, nets, *given):
        return [Judgement(losses[net], 1.0, 0.0) for net in nets]

    monkeypatch.setattr(depth_module, "judged", judged)
    steps = staged(losses, kind="latency" if "overhead" in knobs else "flops", **knobs)
    chosen = steps.make(0.25)
    assert chosen.dense == best
    assert [each.removed for each in chosen.depth.tried] == tried
    assert [each.left for each in chosen.depth.tried] == [steps.share_without(count) for count in tried]
    assert [each.is_chosen for each in chosen.depth.tried] == [count == best for count in tried]
    assert chosen.depth.kept == {"4": "wanted"}
    assert [each.name for each in chosen.depth.removed] == [str(number) for number in range(best)]
    assert chosen.layers.notes == tuple(map(str, chosen.depth.removed))
    assert math.isnan(chosen.depth.overhead) == ("overhead" not in knobs)


class Blocks(nn.Module):
    """Blocks of two parts in a list, with other ways to run them."""

    def __init__(self, count=3, block=TwoParts) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(block() for _ in range(count))

    def forward(self, x):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def found_in(model, rows=None, **knobs):
    rows = torch.randn(16, 5, generator=torch.Generator().manual_seed(0)) if rows is None else rows
    return removable_blocks(model.eval(), Calibration([rows]), **knobs)


class InPlace(TwoParts):
    """Adds in place what its parts give, which changes its input."""

    def forward(self, x):
        x += self.first(x)
        x += self.second(x)
        return x


class Wide(nn.Module):
    """A block whose first layer is wider than its input, and is run before the second."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return 0.1 * x + self.two(torch.relu(self.one(x)))


WHOLE = ["blocks.0", "blocks.1", "blocks.2"]
PARTS = [name for block in WHOLE for name in (block, f"{block}.first", f"{block}.second")]


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (TwoParts, PARTS),
        (InPlace, PARTS),
        (Wide, WHOLE),
    ],
)
def test_parts_are_what_is_added_up_in_a_block(block, names):
    state = torch.random.get_rng_state()
    model = Blocks(block=block)
    torch.random.set_rng_state(state)
    found = found_in(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (names_of(found), found.kept) == (names, {})
    assert found.candidates[0] == Removal("blocks.0", "blocks.0", 0)
    assert found.parts == ({name: (f"{name}.first", f"{name}.second") for name in WHOLE} if names is PARTS else {})
    assert names_of(found_in(model, whole_blocks=True)) == WHOLE


class Telling(Blocks):
    """Returns what a decoder does: the scores, and what the blocks keep for the next call."""

    def forward(self, x):
        x, kept = self.enter(x), []
        for block in self.blocks:
            x = block(x)
            kept.append(x)
        return {"scores": self.head(x), "past_key_values": kept}


class Indexed(Blocks):
    """Needs all blocks."""

    def forward(self, x):
        x = self.enter(x)
        for number in range(3):
            x = self.blocks[number](x)
        return self.head(x)


def test_what_a_model_does_with_its_blocks_decides_whether_they_can_go():
    found = found_in(Telling())  # its cache is shorter without a block, as it may be
    assert (names_of(found), found.kept) == (PARTS, {})
    found = found_in(Indexed(), whole_blocks=True)
    assert names_of(found) == []
    assert found.kept.keys() == set(WHOLE)
    # Of a list with one block the parts alone can go, of one with two each.
    assert names_of(found_in(Blocks(1))) == PARTS[1:3]
    assert names_of(found_in(Blocks(2))) == PARTS[:6]
    numbered = Blocks()
    for number, block in enumerate(numbered.blocks):
        block.first.layer_idx = number
    # By what the first attention keeps a decoder counts the tokens.
    assert names_of(found_in(numbered)) == [name for name in PARTS if name != "blocks.0.first"]


def short_path(rows=64, costs=lambda _: 0.25, make=Blocks, whole=True, judges=None):
    model = make().eval()
    learned = Calibration([torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))])
    judging = Calibration([torch.randn(judges or 8, 5, generator=torch.Generator().manual_seed(2))])
    found = removable_blocks(model, learned, whole_blocks=whole)
    return DepthPath(model, learned, judging, None, found, costs)


def test_a_path_goes_as_far_as_it_is_asked_for():
    path = short_path()
    assert (path.states[0].loss, path.states[0].left, path.states[0].removed) == (0.0, 1.0, ())
    assert (path.nearest(1.0), len(path.states)) == (0, 1)
    assert (path.nearest(0.75), len(path.states)) == (1, 2)
    assert (path.first_below(0.75), len(path.states)) == (1, 2)
    assert path.nearest(0.88) == 0
    assert path.nearest(0.86) == 1
    # One block stays, and no share is so small that more can go.
    assert path.first_below(0.7) == path.first_below(0.01) == path.nearest(0.01) == 2
    assert path._extend() is False
    assert [len(state.net.blocks) for state in path.states] == [3, 2, 1]

    assert [each.kind for each in path.states[2].removed] == ["block", "block"]
    assert path.states[2].left == 0.5


def choosing(path, *names):
    """Let a path remove these blocks or parts, in this order."""
    wanted = iter(names)
    path.choose = lambda candidates, scores: [each.name for each in candidates].index(next(wanted))
    for _ in names:
        assert path._extend()
    return path.states[-1]


@pytest.mark.parametrize("name", ["blocks.2.first", "blocks.1"])
def test_less_is_lost_where_a_layer_makes_up_for_what_goes(name):
    path = short_path(200, whole=False)
    state = choosing(path, name)
    (candidate,) = [each for each in path.removable.candidates if each.name == name]
    plain, _, _ = path.states[0].without(candidate, None, None)
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        far, near = (float((net(rows) - path._model(rows)).square().mean()) for net in (plain, state.net))
    assert near < 0.7 * far


def test_blocks_that_go_in_a_row_are_made_up_for_together():
    path = short_path(200, make=lambda: Blocks(5))
    for name in ("blocks.2", "blocks.3", "blocks.1"):
        state = choosing(path, name)
    writers = [each.replaced_by for each in state.removed]
    assert writers == ["blocks.1.second.two", "blocks.1.second.two", "blocks.0.second.two"]
