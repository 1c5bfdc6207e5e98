"""Whole blocks taken out: what is constant or linear in them comes back exactly, bad requests are refused."""

from __future__ import annotations

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from block_nets import small_resnet
from torch import nn

from nni_topo import Calibration, remove_blocks
from nni_topo.errors import ConfigError
from nni_topo.maths.least_squares.normal import Solution
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


@pytest.mark.parametrize("names", [["blocks.3"], ["blocks.1", "blocks.3"], ["blocks.4"]])
@pytest.mark.quick_every(2)
def test_other_blocks_are_made_up_for_in_part(names):
    model = make()
    plain = copy.deepcopy(model)
    for name in sorted(names, reverse=True):
        del plain.blocks[int(name[-1])]
    assert lost(model, remove_blocks(model, names, images(200).split(50))) < 0.8 * lost(model, plain)


def test_at_the_beginning_nothing_makes_up_for_a_block(caplog):
    model = make()
    with caplog.at_level(logging.WARNING):
        small = remove_blocks(model, ["blocks.0"], [images()])
    assert "nothing makes up" in caplog.text
    assert len(small.blocks) == 4
    assert torch.equal(small.blocks[1].mlp.fc2.weight, model.blocks[2].mlp.fc2.weight)


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
    with pytest.raises(ConfigError, match=r"a block must put out what enters it, changed, got shapes .*4.* and .*5"):
        remove_blocks(model, ["0"], [torch.randn(8, 4)])


def marks(*values):
    return torch.tensor(values, dtype=torch.bool)


def test_rows_of_a_linear_layer_are_the_real_positions_of_some_samples():
    layer, values = nn.Linear(2, 2), torch.arange(12.0).reshape(2, 3, 2)
    real = torch.tensor([[True, False, True], [True, True, False]])
    three = values, 2 * values, 3 * values
    for held, mask, expected in (
        (marks(True, True), None, values.flatten(0, 1)),
        (marks(False, True), None, values[1]),
        (marks(False, True), real, values[1, :2]),
        (marks(True, False), real[:, :2], values[0]),  # not of these positions
    ):
        rows = blocks._rows(layer, three, held, mask)
        assert [each.tolist() for each in rows] == [(factor * expected)[None].tolist() for factor in (1, 2, 3)]
    assert blocks._rows(layer, three, marks(False, False), None) is None
    assert blocks._rows(layer, three, marks(True, True), torch.zeros(2, 3, dtype=torch.bool)) is None
    flat = tuple(each[:, 0] for each in three)
    assert blocks._rows(layer, flat, marks(True, False), None)[0].tolist() == [values[:1, 0].tolist()]


def test_rows_of_a_convolution_are_those_of_64_positions_an_image():
    layer, values = nn.Conv2d(2, 3, 1), torch.randn(3, 2, 9, 9, generator=torch.Generator().manual_seed(0))
    wanted = torch.cat([values, values[:, :1]], 1)
    entering, lacking, meant = blocks._rows(layer, (values, -wanted, wanted), marks(True, False, True), None)
    assert entering.shape == (1, 128, 2)
    torch.testing.assert_close(lacking, -meant)
    torch.testing.assert_close(meant[..., :2], entering)
    torch.testing.assert_close(meant[..., 2], entering[..., 0])
    assert blocks._rows(layer, (values, wanted, wanted), marks(False, False, False), None) is None


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d(3, eps=0.1), nn.BatchNorm1d(3, affine=False)])
def test_a_writer_adds_a_solution_to_the_stream(has_bias, norm):
    torch.manual_seed(0)
    layer = nn.Linear(2, 3, bias=has_bias)
    layer.weight.requires_grad_(False)
    norm = copy.deepcopy(norm)
    if norm is not None:
        norm.running_var.copy_(torch.tensor([1.0, 4.0, 0.25]))
        norm.eval()
    is_affine = norm is not None and norm.affine
    if is_affine:
        nn.init.normal_(norm.weight)
        with torch.no_grad():
            norm.weight[2] = 0.0  # nothing gets through
    net = nn.Sequential(layer, *([] if norm is None else [norm]))
    inputs, before = torch.randn(5, 2), dict(net.named_parameters())
    writer = blocks.Writer(layer, norm, blocks.Stream(net, None))
    assert writer.has_intercept is (has_bias or is_affine)
    solution = Solution(torch.randn(1, 2, 3).double(), torch.randn(1, 3).double())
    with torch.no_grad():
        expected = net(inputs)
        shift = solution.shift[0] if writer.has_intercept and (norm is None or is_affine or has_bias) else 0.0
        more = (inputs.double() @ solution.weights[0] + shift).float()
        if is_affine:
            more[:, 2] = 0.0
        writer.add(solution)
        torch.testing.assert_close(net(inputs), expected + more, rtol=1e-4, atol=1e-4)
    assert layer.weight is not before["0.weight"]
    assert not layer.weight.requires_grad


class Adds(nn.Module):
    """A block that adds to the stream what a layer makes of it."""

    def __init__(self, size=4):
        super().__init__()
        self.layer = nn.Linear(size, size)

    def forward(self, values):
        return values + self.layer(values)


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
    model.front[0].layer.bias.requires_grad_(False)
    small = remove_blocks(model, names, rows().chunk(batches), ridge=0)
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("front", "back"):
        removed = sum(each.startswith(name) for each in names)
        assert len(small.get_submodule(name)) == len(model.get_submodule(name)) - removed
    torch.testing.assert_close(small(rows(seed=2)), model(rows(seed=2)), rtol=1e-7, atol=1e-7)
    flags = small.front[0].layer.weight.requires_grad, small.front[0].layer.bias.requires_grad
    assert flags == (True, False)


def test_the_ridge_that_is_given_holds_weights_back():
    model = streams()
    held, free = (remove_blocks(model, ["front.1"], [rows()], ridge=ridge).front[0].layer for ridge in (1e9, "auto"))
    before = model.front[0].layer
    torch.testing.assert_close(held.weight, before.weight, atol=1e-6, rtol=0)
    first, second = before.weight, model.front[1].layer.weight
    torch.testing.assert_close(free.weight, first + second + second @ first, atol=1e-4, rtol=0)


def test_a_gap_that_nothing_can_fill_leaves_the_others(caplog):
    model = streams()
    small = remove_blocks(model, ["front.0", "front.3", "back.0"], [rows()])
    warnings = [message for message in caplog.messages if "nothing makes up" in message]
    assert warnings == [
        f"nothing makes up for the blocks 0 to 0 of {name}: no sum before them" for name in ("front", "back")
    ]
    assert torch.equal(small.front[0].layer.weight, model.front[1].layer.weight)
    assert not torch.equal(small.front[1].layer.weight, model.front[2].layer.weight)


def test_processes_that_share_the_rows_add_up_their_sums(one_process):
    model, shared = streams(), Calibration([rows()])
    shared.processes = one_process
    found, alone = (remove_blocks(model, ["front.1"], each) for each in (shared, [rows()]))
    torch.testing.assert_close(found.state_dict(), alone.state_dict(), rtol=0, atol=0)


class Skipped(nn.Module):
    """A list of blocks of which the last is never called."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(3))

    def forward(self, values):
        return self.blocks[1](self.blocks[0](values))


def test_a_block_that_is_never_called_is_refused():
    with pytest.raises(ConfigError, match=r"got shapes None and None \(blocks\.2\)"):
        remove_blocks(Skipped().double(), ["blocks.2"], [rows()])


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
    "one sample without a batch": (lambda b, x: x + b.fc(x), {"fc": line()}, (4,), "fc", None),
    "large values": (lambda b, x: 10000.0 * x + b.fc(x), {"fc": line()}, LINE, "fc", None),
    "half of a layer": (lambda b, x: x + 0.5 * b.fc(x), {"fc": line()}, LINE, None, None),
    "a layer called twice": (lambda b, x: x + b.fc(x) + b.fc(2 * x), {"fc": line()}, LINE, None, None),
    "a narrow layer before": (
        lambda b, x: x + b.up(b.down(x)),
        {"down": line(4, 2), "up": line(2, 4)},
        LINE,
        "up",
        None,
    ),
    "a layer of one output": (
        lambda b, x: x + b.fc(x) + b.gate(x),
        {"fc": line(), "gate": line(4, 1)},
        LINE,
        "fc",
        None,
    ),
    "a ReLU after the sum": (lambda b, x: b.end(x + b.fc(x)), {"fc": line(), "end": nn.ReLU()}, LINE, "fc", "end"),
    "a ReLU before the sum": (lambda b, x: x + b.act(b.fc(x)), {"fc": line(), "act": nn.ReLU()}, LINE, None, None),
    "a convolution": (lambda b, x: x + b.conv(x), {"conv": conv(3)}, IMAGE, "conv", None),
    "a convolution without a batch": (lambda b, x: x + b.conv(x), {"conv": conv(3)}, IMAGE[1:], None, None),
    "a grouped convolution": (lambda b, x: x + b.conv(x), {"conv": conv(groups=2)}, IMAGE, None, None),
    "another padding": (lambda b, x: x + b.conv(x), {"conv": conv(3, padding_mode="circular")}, IMAGE, None, None),
    "one of two": (
        lambda b, x: x + b.large(x) + b.small(x),
        {"large": conv(3, groups=2), "small": conv()},
        IMAGE,
        "small",
        None,
    ),
    "the larger of two": (
        lambda b, x: x + b.small(x) + b.large(x),
        {"small": conv(), "large": conv(3)},
        IMAGE,
        "large",
        None,
    ),
    "a norm": (lambda b, x: x + b.norm(b.conv(x)), {"conv": conv(), "norm": nn.BatchNorm2d(4)}, IMAGE, "conv", None),
    "a norm of the batch": (
        lambda b, x: x + b.norm(b.conv(x)),
        {"conv": conv(), "norm": nn.BatchNorm2d(4, track_running_stats=False)},
        IMAGE,
        None,
        None,
    ),
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


def test_streams_after_other_kinds_of_ends_are_not_made_of_one_another():
    torch.manual_seed(0)
    plain, rectified = (
        Block(lambda b, x: x + b.fc(x), fc=line()),
        Block(lambda b, x: b.end(x + b.fc(x)), fc=line(), end=nn.ReLU()),
    )
    call = ((torch.randn(2, 4),), {})
    for result, wanted, is_possible in (
        (plain, plain, True), (rectified, rectified, True), (plain, rectified, False), (rectified, plain, False)
    ):  # fmt: skip
        gap = blocks.gap_after(nn.Sequential(result), result, nn.Sequential(wanted), wanted, call)
        assert (gap is not None) is is_possible
        assert gap is None or not gap.is_whole


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


@pytest.mark.parametrize(
    ("end", "wanted_end", "is_whole", "is_taken"),
    [(True, True, False, True), (True, True, True, False), (True, False, False, False), (False, True, False, False)],
)
def test_a_gap_hands_the_norm_after_it_to_the_block_before_it(end, wanted_end, is_whole, is_taken):
    torch.manual_seed(0)
    layer, norms = nn.Linear(2, 2), [nn.LayerNorm(2) for _ in range(2)]
    nn.init.normal_(norms[1].weight)
    norms[1].bias.requires_grad_(False)
    block, before = nn.Sequential(layer), layer.weight.detach().clone()
    writer = blocks.Writer(layer, None, blocks.Stream(block, norms[0] if end else None))
    gap = blocks.Gap(writer, blocks.Stream(block, norms[1] if wanted_end else None), is_whole)
    gap.fill(Solution(torch.ones(1, 2, 2).double(), torch.zeros(1, 2).double()))
    torch.testing.assert_close(layer.weight, before + 1.0)
    assert torch.equal(norms[0].weight, norms[1].weight) is is_taken
    assert [each.requires_grad for each in norms[0].parameters()] == [True, not is_taken]
    assert norms[0].weight is not norms[1].weight


@pytest.mark.parametrize("device", ["far"], indirect=True)
def test_rows_of_a_convolution_lie_where_its_values_do(device):
    layer = nn.Conv2d(2, 3, 3)
    values = torch.randn(3, 2, 11, 11, generator=torch.Generator().manual_seed(0))
    wanted = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(1))
    held = marks(True, False, True)
    expected = blocks._rows(layer, (values, -wanted, wanted), held, None)
    values, wanted = values.to(device), wanted.to(device)
    found = blocks._rows(copy.deepcopy(layer).to(device), (values, -wanted, wanted), held, None)
    for one, other in zip(found, expected, strict=True):
        assert one.device == device
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize(("names", "kinds"), [(["front.1", "front.4"], "acdfg"), (["front.0", "back.1"], "abcdefg")])
def test_a_config_tells_the_blocks_that_stay_of_one_list(names, kinds):
    model = streams()
    model.config = SimpleNamespace(num_hidden_layers=7, is_encoder_decoder=False, layer_types=list("abcdefg"))
    config = remove_blocks(model, names, [rows()]).config
    assert (config.num_hidden_layers, "".join(config.layer_types)) == (len(kinds), kinds)
    assert model.config.num_hidden_layers == 7


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
