"""Whole blocks taken out: what is constant or linear in them comes back exactly, bad requests are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from block_nets import small_resnet
from torch import nn

from nni_topo import Calibration, remove_blocks
from nni_topo.errors import ConfigError
from nni_topo.recovery import blocks
from nni_topo.zoo.transformers import bert_small, vit_small


def images(count=40, seed=0):
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def make(build=vit_small):
    torch.manual_seed(0)
    return build(3, 1, 8).eval()


def lost(model, other):
    with torch.no_grad():
        return float((model(images(seed=1)) - other(images(seed=1))).square().sum())


def test_blocks_that_add_a_constant_go_into_the_layer_before_them():
    model = make()
    for block in model.blocks[2:4]:
        for layer in (block.attention.o_proj, block.mlp.fc2):
            nn.init.zeros_(layer.weight)
            nn.init.normal_(layer.bias)
    before = copy.deepcopy(model.state_dict())
    small = remove_blocks(model, ["blocks.2", "blocks.3"], [images()])
    assert len(small.blocks) == 3
    assert lost(model, small) < 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_norm_after_the_sum_becomes_that_of_the_removed_block():
    model = make(bert_small)
    for block in model.blocks:
        nn.init.normal_(block.norm2.weight, 1.0, 0.3)
    plain = copy.deepcopy(model)
    del plain.blocks[2]
    small = remove_blocks(model, ["blocks.2"], images(200).split(50))
    assert torch.equal(small.blocks[1].norm2.weight, model.blocks[2].norm2.weight)
    assert lost(model, small) < 0.8 * lost(model, plain)


def test_a_residual_block_that_adds_nothing_leaves_no_trace():
    model = small_resnet(3, 3)
    nn.init.zeros_(model.stage1[1].norm2.weight)
    nn.init.zeros_(model.stage1[1].norm2.bias)
    small = remove_blocks(model, ["stage1.1"], [images()])
    assert len(small.stage1) == 2
    assert lost(model, small) == 0.0


def test_the_convolution_before_the_gap_makes_up_for_a_residual_block():
    model = small_resnet(3, 3)
    plain = copy.deepcopy(model)
    del plain.stage2[1]
    small = remove_blocks(model, ["stage2.1"], images(200).split(50))
    # The largest layer that writes into the stream: not the shortcut.
    assert not torch.equal(small.stage2[0].conv2.weight, model.stage2[0].conv2.weight)
    assert torch.equal(small.stage2[0].shortcut[0].weight, model.stage2[0].shortcut[0].weight)
    assert lost(model, small) < 0.8 * lost(model, plain)


@pytest.mark.parametrize(
    ("names", "knobs", "message"),
    [
        ([], {}, "at least one block's name, got"),
        ("blocks.1", {}, "names must be a sequence, each value a str, got 'blocks.1'"),
        (["blocks.9"], {}, r"blocks\.9"),
        (["head"], {}, "a block must lie in a ModuleList or Sequential, got one of PatchTransformer"),
        ([f"blocks.{number}" for number in range(5)], {}, r"at least one block must stay, got all 5 \(blocks\)"),
        (["blocks.1"], {"ridge": -1.0}, "ridge must be 'auto' or a finite number of at least 0, got -1"),
    ],
)
def test_bad_requests_are_refused(names, knobs, message):
    with pytest.raises(ConfigError, match=message):
        remove_blocks(make(), names, [images()], **knobs)


def test_a_block_that_changes_the_shape_is_refused():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with pytest.raises(ConfigError, match=r"a block to remove must have .*, got .*4.* and .*5"):
        remove_blocks(model, ["0"], [torch.randn(8, 4)])


class Adds(nn.Module):
    """A block that adds to the stream what a layer, and a norm after it, make of it."""

    def __init__(self, norm=None):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), norm or nn.Identity()

    def forward(self, values):
        return values + self.norm(self.layer(values))


class Streams(nn.Module):
    """Two lists of blocks, the first of seven."""

    def __init__(self):
        super().__init__()
        self.front = nn.Sequential(*(Adds() for _ in range(7)))
        self.back = nn.Sequential(*(Adds() for _ in range(3)))

    def forward(self, values):
        return self.back(self.front(values))


def streams():
    torch.manual_seed(0)
    return Streams().double().eval()


def rows(count=30, seed=1):
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "names",
    [
        ["front.1"],
        ["front.1", "front.3", "front.4", "front.6"],
        ["front.1", "front.2", "front.5", "back.1"],
        ["back.2", "front.2", "back.1"],
    ],
)
@pytest.mark.parametrize("batches", [1, 3])
def test_blocks_that_are_linear_come_back_exactly_whatever_the_gaps(names, batches):
    model, state = streams(), torch.get_rng_state()
    model.requires_grad_(False)
    small = remove_blocks(model, names, rows().chunk(batches), ridge=0)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("front", "back"):
        removed = sum(each.startswith(name) for each in names)
        assert len(small.get_submodule(name)) == len(model.get_submodule(name)) - removed
    torch.testing.assert_close(small(rows(seed=2)), model(rows(seed=2)), rtol=1e-7, atol=1e-7)
    assert not any(parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_layer_before_a_batch_norm_takes_a_linear_block_up_exactly(has_bias):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, eps=0.1)
    nn.init.normal_(norm.weight)
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25, 9.0]))
    model = nn.Sequential(Adds(norm), Adds(), Adds()).double().eval()
    if not has_bias:
        model[0].layer.bias = None
    small = remove_blocks(model, ["1"], [rows()], ridge=0)
    torch.testing.assert_close(small(rows(seed=2)), model(rows(seed=2)), rtol=1e-7, atol=1e-7)


class Padded(nn.Module):
    """Blocks on the places of texts, beside a mask of their padding."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Adds(), Adds(), Adds())

    def forward(self, values, attention_mask):
        return torch.tanh(self.blocks(values))


def test_padding_does_not_count():
    torch.manual_seed(0)
    model, mask = Padded().double().eval(), (torch.arange(5) < 3).long().expand(30, 5)
    found = []
    for filler in (0.0, 9.0):
        values = torch.where(mask[..., None] > 0, rows(150).view(30, 5, 4), filler)
        batch = {"values": values, "attention_mask": mask}
        found.append(remove_blocks(model, ["blocks.1"], [batch], ridge=1e-3).blocks[0].layer.weight)
    assert torch.equal(*found)
    assert not torch.equal(found[0], model.blocks[0].layer.weight)


def test_a_gap_that_nothing_can_fill_leaves_the_others(caplog):
    model = streams()
    small = remove_blocks(model, ["front.0", "front.1", "front.4", "back.0"], [rows()])
    warnings = [message for message in caplog.messages if "nothing makes up" in message]
    assert warnings == [
        f"nothing makes up for the blocks 0 to {last} of {name}: no sum before them"
        for name, last in (("front", 1), ("back", 0))
    ]
    assert torch.equal(small.front[0].layer.weight, model.front[2].layer.weight)
    assert not torch.equal(small.front[1].layer.weight, model.front[3].layer.weight)


class Block(nn.Module):
    """A block whose output is what a function makes of its input and its parts."""

    def __init__(self, work, **parts):
        super().__init__()
        self.work = work
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, values):
        return self.work(self, values)


def line(inputs=4, outputs=4):
    return nn.Linear(inputs, outputs)


def conv(size=1, **knobs):
    return nn.Conv2d(4, 4, size, padding=size // 2, **knobs)


LINE, IMAGE = (2, 4), (2, 4, 3, 5)
WRITERS = {
    "a layer": (lambda b, x: x + b.fc(x), {"fc": line()}, LINE, "fc", None),
    "half of a layer": (lambda b, x: x + 0.5 * b.fc(x), {"fc": line()}, LINE, None, None),
    "a narrow layer before": (
        lambda b, x: x + b.up(b.down(x)),
        {"down": line(4, 2), "up": line(2, 4)},
        LINE,
        "up",
        None,
    ),
    "a ReLU after the sum": (lambda b, x: b.end(x + b.fc(x)), {"fc": line(), "end": nn.ReLU()}, LINE, "fc", "end"),
    "a convolution": (lambda b, x: x + b.conv(x), {"conv": conv(3)}, IMAGE, "conv", None),
    "a grouped convolution": (lambda b, x: x + b.conv(x), {"conv": conv(groups=2)}, IMAGE, None, None),
    "the larger of two": (
        lambda b, x: x + b.small(x) + b.large(x),
        {"small": conv(), "large": conv(3)},
        IMAGE,
        "large",
        None,
    ),
    "a norm": (lambda b, x: x + b.norm(b.conv(x)), {"conv": conv(), "norm": nn.BatchNorm2d(4)}, IMAGE, "conv", None),
}


@pytest.mark.parametrize("case", WRITERS)
def test_a_writer_is_a_layer_all_of_which_is_added_to_the_stream(case):
    work, parts, shape, writer, end = WRITERS[case]
    torch.manual_seed(0)
    block = Block(work, **copy.deepcopy(parts)).eval()
    values, state = torch.randn(*shape), torch.get_rng_state()
    found = blocks.find_writer(nn.Sequential(block), block, ((values,), {}))
    assert torch.equal(torch.get_rng_state(), state)
    if writer is None:
        assert found is None
        return
    assert found.layer is block.get_submodule(writer)
    assert found.norm is getattr(block, "norm", None)
    assert found.stream.end is (None if end is None else block.get_submodule(end))


@pytest.mark.parametrize("is_whole", [False, True])
def test_behind_a_relu_what_it_lets_through_is_solved_for(is_whole):
    """Inputs are positive numbers: of those that are wanted, the first two and a half pass the ReLU."""
    made, wanted = (
        nn.Sequential(nn.Linear(1, 5, bias=False), nn.ReLU(), nn.Identity()).double() for _ in range(2)
    )  # fmt: skip
    factors = {made: (1.0, -1.0, 2.0, -2.0, -1.0), wanted: (3.0, 2.0, -1.0, -3.0, 0.0)}
    for net, values in factors.items():
        net[0].weight.data = torch.tensor(values, dtype=torch.float64)[:, None]
    writer = blocks.Writer(made[0], None, blocks.Stream(made, made[1]))
    gap = blocks.Gap(writer, blocks.Stream(wanted, wanted[1]), is_whole)
    batches = Calibration(torch.linspace(0.1, 0.6, 20, dtype=torch.float64)[:, None].split(7))
    (found,) = blocks.solutions((wanted, made), [gap], batches, 0.0)
    # Where the ReLU lets nothing through, what the layer makes is taken away if it is above zero.
    lacking = [3.0, 2.0, -1.0, -3.0, 0.0] if is_whole else [2.0, 3.0, -2.0, 0.0, 0.0]
    torch.testing.assert_close(found.weights[0, 0], torch.tensor(lacking, dtype=torch.float64))
    assert not found.shift.any()


@pytest.mark.parametrize("sizes", [[10], [3, 3, 4], [7, 3]])
@pytest.mark.parametrize(("odd", "is_changed"), [(9, False), (7, True)])
def test_samples_that_are_held_out_say_whether_anything_changes(sizes, odd, is_changed):
    """Of ten samples the fifth and the last are held out. One is far off what the others ask for."""
    made = nn.Sequential(nn.Linear(1, 1, bias=False)).double()
    wanted = Block(lambda _, x: torch.where(x > 0.0, x, -2.0 * x))
    nn.init.zeros_(made[0].weight)
    values = 1.0 + 0.1 * torch.arange(10, dtype=torch.float64)[:, None]
    values[odd] *= -1.0
    writer = blocks.Writer(made[0], None, blocks.Stream(made, None))
    gap = blocks.Gap(writer, blocks.Stream(wanted, None), is_whole=False)
    (found,) = blocks.solutions((wanted, made), [gap], Calibration(list(values.split(sizes))), "auto")
    assert bool(found.weights.any()) is is_changed


class PlacesFirst(nn.Module):
    """Residual blocks on (places, samples, channels), as CLIP's are, in a network that takes samples first."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(*[Residual() for _ in range(3)])

    def forward(self, x):
        return self.blocks(x.transpose(0, 1)).transpose(0, 1)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return x + self.out(torch.tanh(self.into(x)))


@pytest.mark.parametrize("places", [3, 9])
def test_blocks_whose_samples_are_second_are_removed(places):
    model, batches = PlacesFirst().eval(), list(torch.randn(40, places, 4).split(4))
    # Nothing is missing where the block adds nothing, so that nothing is solved for.
    with torch.no_grad():
        model.blocks[1].out.weight.zero_()
        model.blocks[1].out.bias.zero_()
    small = remove_blocks(model, ["blocks.1"], batches)
    assert len(small.blocks) == 2
    torch.testing.assert_close(small(batches[0]), model(batches[0]), rtol=1e-4, atol=1e-5)
