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
from nni_topo.runs.streaming.journal import Journal
from nni_topo.runs.streaming.report import BlockRow


class Blocks(list):
    def name_of(self, index):
        return f"layers.{index}"


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


class Summed:
    """Processes of which all others have the same sums as this one, in double precision on the CPU."""

    def add(self, tensors, what):
        for tensor in tensors:
            assert (tensor.dtype, tensor.device.type) == (torch.float64, "cpu")
            tensor.mul_(2)


def test_states_are_grouped_as_the_samples_are():
    samples = Calibration([torch.ones(4, 1)], groups=[0, 0, 1, 1])
    states = [{"hidden_states": torch.ones(4, 2, 3)}]
    found = shrinking._Run._data(SimpleNamespace(_samples=samples), states)
    assert (found.groups.tolist(), found.processes, found.samples) == ([0, 0, 1, 1], None, 4)
    assert found.held_out(8).tolist() == samples.held_out(8).tolist() == [False, False, True, True]


ROW = BlockRow("layers.0", 8, 4, distance=0.2, calibration_distance=0.1, is_distilled=False, seconds=1.0)


def likeness(distance):
    return Likeness(distance=Estimate(distance, distance, distance), agreement=Estimate(1.0, 1.0, 1.0))


def test_figures_of_few_samples_are_doubtful():
    held_out = Calibration([torch.ones(1, 1)])
    assert shrinking._warnings([ROW], held_out, likeness(0.5)) == ()
    worse = replace(ROW, distance=0.25)
    assert shrinking._warnings([worse, ROW], held_out, likeness(0.5)) == ()
    (told,) = shrinking._warnings([ROW, worse], held_out, likeness(0.5))
    assert "0.25 on held-out samples, 0.1 on calibration data" in told
    (told,) = shrinking._warnings([worse], None, likeness(0.5))
    assert told.startswith("no sample could be held out: ")
    assert shrinking._warnings([worse], None, likeness(math.inf)) == (shrinking.NO_SCALE,)


def scored(after, going, mask=None, processes=None):
    """The blocks that stay of those that turn the states, which point along the first axis, to the given ones."""

    def unpruned_through(index, states):
        for state in states:
            before = torch.zeros_like(after[index])
            before[..., 0] = 1.0
            state["unpruned_states"] = before
            yield state, ((), {} if mask is None else {"attention_mask": mask}), after[index]

    class Reads(torch.nn.Module):
        def forward(self, attention_mask=None):
            pass

    skeleton = Blocks(range(len(after)))
    skeleton.model = Reads()
    run = SimpleNamespace(
        _skeleton=skeleton,
        _going=going,
        _journal=SimpleNamespace(states=lambda batches: [{} for _ in range(batches)]),
        _calls=[None],
        _samples=SimpleNamespace(processes=processes),
        _unpruned_through=unpruned_through,
    )
    with torch.device("meta"):  # sums lie on the CPU, whatever PyTorch's default is
        return shrinking._Run._blocks_that_stay(run)


def test_blocks_go_whose_states_turn_least():
    # by block one sample of two places, whose cosines with the first axis are the first entries
    angles = [[(0.1, 1.0), (0.1, 1.0)], [(0.9, 0.1), (1.0, 0.0)], [(1.0, 0.0), (0.0, 1.0)], [(0.9, 0.5), (0.8, 0.2)]]
    after = [torch.tensor([places]) for places in angles]
    assert scored(after, 0) == [0, 1, 2, 3]
    assert scored(after, ["layers.2", "layers.3"]) == [0, 1]
    for processes in (None, Summed()):
        assert scored(after, 1, processes=processes) == [0, 2, 3]
        assert scored(after, 2, processes=processes) == [0, 2]
        assert scored(after, 3, processes=processes) == [0]
    # without the second place, which is padding, the third block leaves the states as they are
    mask = torch.tensor([[1, 0]])
    assert scored(after, 1, mask) == [0, 1, 3]
    # a mask that isn't one of places is none
    assert scored(after, 1, torch.tensor([[1, 0, 1]])) == [0, 2, 3]


def test_a_block_keeps_what_its_budget_leaves_it():
    def share(asked, kept=2, costs=(10.0, 2.0)):
        run = SimpleNamespace(
            _budget=Budget(params=asked),
            _costs=lambda work, example: costs,
            _journal=SimpleNamespace(kept=[0, 1, 2][:kept]),
            _skeleton=Blocks(range(4)),
        )
        return shrinking._Run._block_share(run, None, None)

    # of a cost of 8 in four blocks 2 are left, or 5
    assert (share(0.4), share(0.7, kept=3)) == pytest.approx((0.5, 5 / 6))
    assert share(0.9) == 1.0
    for asked in (0.2, 0.1):
        with pytest.raises(ConfigError, match=rf"got {asked} of the params where 0.2 lie outside of the blocks"):
            share(asked)


def test_blocks_need_layers_whose_work_can_be_counted():
    def costs(own):
        skeleton = Blocks([0, 1])
        skeleton.blocks = [torch.nn.ReLU(), torch.nn.ReLU()]
        run = SimpleNamespace(
            _skeleton=skeleton,
            _budget=Budget(flops=0.5),
            _cost_of=lambda net, example: own,
            _macs_of_rest=lambda: 3.0,
        )
        work = SimpleNamespace(entered=SimpleNamespace(block=torch.nn.ReLU()))
        return shrinking._Run._costs(run, work, None)

    assert costs(1) == (5.0, 3.0)
    with pytest.raises(ConfigError, match=r"must have linear layers or convolutions .*, got none \(ReLU\)"):
        costs(0)


class Scaled(torch.nn.Module):
    """A block that multiplies the states by a number, or fails."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.seen = []

    def forward(self, states):
        self.seen.append((len(states), states.dtype))
        if isinstance(self.factor, BaseException):
            raise self.factor
        return states * self.factor


def compared(pruned, built, states):
    """Compare a pruned block with the one that a config builds."""

    class Reads:
        device = torch.device("cpu")
        model = Scaled(1.0)

        def name_of(self, index):
            return f"layers.{index}"

        def entering(self, call, index):
            return (call[0][0],), {}

        def filled(self, number, tensors):
            return built

    run = SimpleNamespace(
        _journal=SimpleNamespace(kept=[0, 2], states=lambda batches: [{"hidden_states": states}][:batches]),
        _calls=[((states,), {})],
        _skeleton=Reads(),
    )
    shrinking._Run._check_computes(run, 1, Reads(), SimpleNamespace(block=pruned), {})


@pytest.mark.parametrize(
    ("pruned", "built", "got"),
    [
        # one per cent of what the block adds, and a hundred-thousandth of what it puts out
        (2.0, 2.0, None),
        (2.0, 2.0099, None),
        (2.0, 2.0102, r"differ by 0\.01 times what the block adds to the states"),
        (5.0, 5.04, None),
        (5.0, 5.041, r"differ by 0\.01 times what the block adds to the states"),
        (1.0, 1.000009, None),
        (1.0, 1.0001, r"differ by 0\.001;"),
        (1.0, -1.0, "differ by 20;"),
        (1.0, math.nan, "differ by nan;"),
    ],
)
def test_a_block_may_differ_from_the_built_one_by_rounding(pruned, built, got):
    states = torch.full((3, 25, 2), 1.0, dtype=torch.float64)
    other = Scaled(built)
    if got is None:
        compared(Scaled(pruned), other, states)
    else:
        with pytest.raises(ConfigError, match=rf"got outputs that {got}.*\(layers.2, Scaled\)"):
            compared(Scaled(pruned), other, states)
    assert other.seen == [(2, torch.float64)]


def test_an_error_of_the_built_block_alone_is_told():
    states = torch.ones(1, 2, 2)
    error = RuntimeError("no such\n width")
    with pytest.raises(ConfigError, match=r"got RuntimeError: no such.*\(layers\)"):
        compared(Scaled(1.0), Scaled(error), states)
    with pytest.raises(RuntimeError, match="no such\n width"):
        compared(Scaled(error), Scaled(1.0), states)
    full = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        compared(Scaled(1.0), Scaled(full), states)


class Described(torch.nn.Module):
    """A model whose config says how wide the first layer of its blocks is."""

    @classmethod
    def _from_config(cls, config):
        if config.width % 2 or (config.width == 4 and not hasattr(config, "pruned_heads")):
            raise ValueError(f"no\n width {config.width}")
        model = cls()
        model.layers = torch.nn.ModuleList(
            block(config.width, 8) for _ in range(getattr(config, "num_hidden_layers", 3))
        )
        return model


def block(first, second, heads=4):
    layers = {"up": torch.nn.Linear(4, first), "gate": torch.nn.Linear(4, second)}
    return torch.nn.ModuleDict(layers | {"attention": torch.nn.MultiheadAttention(8, heads)})


def described(config, pruned, kept=(0, 1, 2), layers=("up", "gate")):
    skeleton = Blocks(range(3))
    skeleton.blocks_name, skeleton.model = "layers", Described()
    skeleton.stored = lambda block, index: dict(block.state_dict())
    run = SimpleNamespace(_skeleton=skeleton, _journal=SimpleNamespace(kept=list(kept)))
    unpruned, dense = SimpleNamespace(block=block(8, 8)), SimpleNamespace(block=pruned, config=config)
    return shrinking._Run._described(run, unpruned, dense, layers)


def config_of(width, **others):
    return SimpleNamespace(width=width, is_encoder_decoder=False, **others)


def test_a_config_tells_the_widths_the_number_of_blocks_and_at_need_the_heads():
    pytest.importorskip("accelerate")
    config = config_of(6, num_hidden_layers=3)
    assert described(config, block(6, 8)) == config
    less = described(config, block(6, 8), kept=(0, 2))
    assert (less.num_hidden_layers, config.num_hidden_layers) == (2, 3)
    assert not hasattr(less, "pruned_heads")
    heads = described(config_of(4, num_hidden_layers=3), block(4, 8, heads=2), kept=(0, 2))
    assert heads.pruned_heads == {0: [0, 1], 1: [0, 1]}
    assert described(config_of(6), block(6, 8)) == config_of(6)
    with pytest.raises(ConfigError, match=r"must have the number of blocks as num_hidden_layers, .*got none"):
        described(config_of(6), block(6, 8), kept=(0, 2))


def test_a_config_may_refuse_its_own_numbers():
    pytest.importorskip("accelerate")

    class Checked(SimpleNamespace):
        def validate(self):
            raise ValueError("too narrow")

    config = Checked(**vars(config_of(6, num_hidden_layers=3)))
    with pytest.raises(ConfigError, match="got too narrow; prune other layers only"):
        described(config, block(6, 8))


class Reading(torch.nn.Module):
    """A block's network that multiplies the states of one kind."""

    def __init__(self, name, factor):
        super().__init__()
        self.name, self.factor = name, factor

    def forward(self, hidden_states, unpruned_states, attention_mask=None):
        return (hidden_states if self.name == "hidden_states" else unpruned_states) * self.factor


def advanced(folder, batches, pruned, wanted, is_held_out=True):
    """Write the states after a block; return its distances and what was written."""
    journal = Journal(folder, {})
    run = SimpleNamespace(_journal=journal, _samples=Calibration(batches), _is_held_out=is_held_out)
    net = Reading("unpruned_states", wanted)
    work = SimpleNamespace(name="layers.3", batches=batches, entered=net, wanted=net)
    found = shrinking._Run._advance(run, 0, work, Reading("hidden_states", pruned))
    journal.note(1)
    return found, journal.states(len(batches))


def test_states_after_a_block_are_written_in_the_precision_of_the_model(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [
        {name: torch.rand(count, 2, 3, generator=generator) for name in ("hidden_states", "unpruned_states")}
        for count in (5, 11)
    ]
    batches[0]["attention_mask"] = torch.tensor([[1, 0], *[[1, 1]] * 4])
    batches[1]["attention_mask"] = torch.ones(11, 2, dtype=torch.long)
    together = {name: torch.cat([batch[name] for batch in batches]).double() for name in batches[0]}
    is_real, held_out = together.pop("attention_mask").bool(), torch.zeros(16, dtype=torch.bool)
    held_out[7::8] = True
    expected = []
    for chosen in (~held_out, held_out):
        reached, wanted = (
            factor * each[chosen][is_real[chosen]] for factor, each in zip((2, 3), together.values(), strict=True)
        )
        expected.append(float((wanted - reached).square().mean() / wanted.var(unbiased=False)))
    (tmp_path / "1").mkdir()
    found, states = advanced(tmp_path / "1", batches, 2.0, 3.0)
    assert found == pytest.approx(tuple(expected), rel=1e-5)
    for batch, after in zip(batches, states, strict=True):
        assert torch.equal(after["hidden_states"], 2 * batch["hidden_states"])
        assert torch.equal(after["unpruned_states"], 3 * batch["unpruned_states"])
    few = [{name: value[:1] for name, value in batches[0].items()}]
    (tmp_path / "2").mkdir()
    (learned, same), _ = advanced(tmp_path / "2", few, 2.0, 3.0, is_held_out=False)
    assert learned == same > 0.0


@pytest.mark.parametrize(("pruned", "wanted", "whose"), [(2.0, 1.0, "pruned"), (1.0, 2.0, "unpruned")])
def test_states_that_the_precision_of_the_model_does_not_hold_are_told(pruned, wanted, whose, tmp_path):
    small, large = (torch.full((1, 2, 3), value, dtype=torch.float16) for value in (1.0, 40_000.0))
    batches = [{"hidden_states": each, "unpruned_states": each} for each in (small, large)]
    words = rf"torch.float16, got NaN or infinity after the {whose} block \(layers.3, batch 1\)"
    with pytest.raises(DataError, match=words):
        advanced(tmp_path, batches, pruned, wanted, is_held_out=False)
