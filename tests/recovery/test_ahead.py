"""Several layers ahead, on small nets: what is met, what stays, and that bad knobs change nothing."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from every_sample import every
from torch import nn
from torch.autograd import forward_ad
from torch.fx import symbolic_trace

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.speedup.equivalence import masked_model
from nni_topo.recovery import Ahead, Reconstruct, ahead, compensate, compensation, windows
from nni_topo.recovery.networks import build_networks, plan_of
from nni_topo.recovery.replay import Replay
from nni_topo.recovery.windows import Segment, Stretch, Window, entering, segments


def error(found, model, masks, images):
    """Return the squared error of a masked model's outputs on all images."""
    batch = torch.cat(images)
    with torch.no_grad():
        return float((masked_model(found, images[0], masks)(batch) - model(batch)).square().mean())


def reports(found):
    """Return the reports of what was met ahead."""
    return [layer for layer in found.report.layers if ", " in layer.layer or layer.place == "output"]


@pytest.mark.slow
def test_the_error_ahead_falls_below_that_of_the_closed_form(residual_net, images, halves):
    masks = halves(residual_net, "stem", "conv1", "conv2", "conv3")
    closed = compensate(residual_net, masks, every(images))
    found = compensation(residual_net, masks, every(images), method="ahead")
    assert error(found.model, residual_net, masks, images) < 0.8 * error(closed, residual_net, masks, images)
    steps = reports(found)
    assert all(step.error_after <= step.error_before for step in steps)
    assert any(step.error_after < 0.9 * step.error_before for step in steps)


def test_removed_channels_stay_out_and_the_model_and_masks_as_they_were(residual_net, images, halves):
    masks = halves(residual_net, "stem", "conv1", "conv2", "conv3")
    before, asked = copy.deepcopy(residual_net.state_dict()), copy.deepcopy(masks)
    found = compensate(residual_net, masks, images[:1], method="ahead")
    torch.testing.assert_close(residual_net.state_dict(), before, rtol=0, atol=0)
    torch.testing.assert_close(masks, asked, rtol=0, atol=0)
    # Kept channels read no removed ones, and the weights of the removed ones are what they were.
    assert not found.conv1.weight[:4, 4:].any()
    assert torch.equal(found.conv1.weight[4:], residual_net.conv1.weight[4:])
    assert torch.equal(found.stem.weight, residual_net.stem.weight)


@pytest.mark.slow
def test_the_same_call_gives_the_same_weights_whatever_is_kept_in_memory(residual_net, images, halves):
    masks = halves(residual_net, "conv1", "conv3")
    found = [
        compensate(residual_net, masks, every(images), method="ahead", cache_bytes=size).state_dict()
        for size in (2**30, 2**30, 0)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    # Sums in another order: steps with more unknowns than values let their rounding grow.
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=2e-5)


class Saturated(nn.Module):
    """A layer whose outputs are read over a sigmoid, and of which half are the other half, mirrored."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)
        self.third = nn.Linear(4, 3)

    def forward(self, values):
        return self.third(torch.sigmoid(self.second(self.first(values))))


def test_what_can_be_met_is_met():
    torch.manual_seed(0)
    model = Saturated().double().eval()
    with torch.no_grad():
        model.first.weight[4:] = -2 * model.first.weight[:4]
        model.first.bias[4:] = -2 * model.first.bias[:4]
    mask = torch.ones_like(model.first.weight)
    mask[4:] = 0
    masks = {"first": {"weight": mask}}
    batches = list(torch.randn(256, 6, dtype=torch.float64).split(64))
    # A ridge leaves something to be met ahead.
    closed = compensate(model, masks, batches, ridge=1e-2)
    found = compensation(model, masks, batches, method="ahead", ridge=1e-2)
    assert error(closed, model, masks, batches) > 1e-8
    assert error(found.model, model, masks, batches) < 0.05 * error(closed, model, masks, batches)
    assert found.report.layers[-1].error_after < 1e-6


@pytest.mark.parametrize("layers", [0, -1, 1.5, True, "far", None])
def test_bad_numbers_of_layers_are_told(layers):
    with pytest.raises(ConfigError, match="layers must be an integer of at least 1"):
        Ahead(layers=layers)


def test_blocks_begin_where_everything_flows_through_one_value_and_places_lie_ahead(residual_net, images):
    graph = symbolic_trace(residual_net).graph
    nodes = list(graph.nodes)
    names = ("conv1", "conv2", "conv3", "conv4", "shortcut", "head")
    layers = [node for node in nodes if node.name in names]
    touched = set(nodes[nodes.index(layers[0]) :])

    cut = segments(nodes, touched, layers, 1)
    blocks = [([layer.name for layer in each.layers], each.place.name) for each in cut]
    first, second = ["conv1", "conv2"], ["conv3", "conv4", "shortcut"]
    assert blocks == [([*first, *second], "output"), ([*second, "head"], "output"), (["head"], "output")]
    alone = [
        ([layer.name for layer in each.layers], each.place.name) for each in segments(nodes, touched, layers, 0, 1)
    ]
    assert alone == [(first, "relu_"), (second, "mean"), (["head"], "output")]
    # conv3's output isn't all that is read: the shortcut reads what entered it.
    assert nodes[cut[1].first - 1].name == "relu_"


class Recurrent(nn.Module):
    """A layer in front of an LSTM, which PyTorch has no forward derivatives of."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 8)
        self.between = nn.Linear(8, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, values):
        return self.head(self.lstm(self.between(self.inner(values)))[0])


def test_what_has_no_derivatives_stays_as_the_closed_form_leaves_it(caplog):
    torch.manual_seed(0)
    model = Recurrent().eval()
    mask = torch.ones_like(model.inner.weight)
    mask[::2] = 0
    batches = [torch.randn(16, 5, 4) for _ in range(4)]
    found = compensate(model, {"inner": {"weight": mask}}, batches, method=Ahead(layers=9))
    closed = compensate(model, {"inner": {"weight": mask}}, batches)
    assert torch.equal(found.between.weight, closed.between.weight)
    assert "an operation has no forward derivative" in caplog.text


@pytest.mark.parametrize("cache_bytes", [300, 500, 1000, 2000])
@pytest.mark.quick_every(2)
def test_a_small_memory_that_holds_some_batches_gives_what_a_large_one_does(cache_bytes):
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)]
    net, batches = nn.Sequential(*layers).eval(), every(torch.randn(16, 4).split(8))
    masks = {"2": {"weight": (torch.arange(8) < 4).float()[:, None].expand(8, 8)}}
    small, large = (
        compensate(net, masks, batches, method=Ahead(layers=1), cache_bytes=each) for each in (cache_bytes, 2**30)
    )
    torch.testing.assert_close(small.state_dict(), large.state_dict())


@pytest.mark.parametrize(
    ("ends", "layers", "borders"),
    [
        ([0, 3, 6], [1, 4, 7], [0, 6]),  # blocks hold two layers
        ([0, 1, 2, 3], [1, 2, 4, 5], [0, 3]),
        ([], [1, 2, 3], [-1]),
        ([3], [1, 2, 3, 4, 5], [-1, 3]),
        ([1], [1, 2, 3], [-1]),
        ([0], [1], [0]),
    ],
)
def test_blocks_begin_right_before_a_layer_and_hold_two(ends, layers, borders):
    assert windows._borders(ends, layers) == borders


def test_values_are_alive_where_they_differ_between_images_of_all_batches():
    first = [torch.tensor([[1.0, 2.0], [1.0, 3.0]]), torch.tensor([[1.0], [2.0]])]
    second = [torch.tensor([[4.0, 3.0]]), torch.tensor([[1.0, 2.0]])]
    assert [each.tolist() for each in windows.alive([first])] == [[False, True], [True]]
    varied, other = windows.alive([first, second])
    assert (varied.tolist(), other) == ([True, True], None)  # of another shape
    back = windows.alive([first, second, first])
    assert (back[0].tolist(), back[1]) == ([True, True], None)
    low = windows.alive([[torch.tensor([[4.0, 4.0]])], [torch.tensor([[4.0, 1.0]])]])
    assert low[0].tolist() == [False, True]
    assert windows.alive([]) == []


def test_moments_are_the_count_the_sum_and_the_squares():
    assert windows.moments(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).tolist() == [4.0, 10.0, 30.0]
    assert windows.moments(torch.tensor([300.0], dtype=torch.float16)).tolist() == [1.0, 300.0, 90000.0]
    values = {"a": torch.ones(2), "b": [torch.arange(2), torch.zeros(1)]}
    assert [each.tolist() for each in windows.floats(values)] == [[1.0, 1.0], [0.0]]


def test_types_of_half_precision_become_single():
    found = [windows._in_single(each) for each in (torch.float16, torch.bfloat16, torch.float64, 3, None)]
    assert found == [torch.float32, torch.float32, torch.float64, 3, None]


class Passes(ahead._Data):
    """Counts how often all batches are read."""

    count = 0

    def __iter__(self):
        self.count += 1
        return super().__iter__()


class Products(Window):
    """Counts how often it is called for derivatives."""

    count = 0

    def __call__(self, entering, unknowns):
        self.count += forward_ad.unpack_dual(unknowns[0]).tangent is not None
        return super().__call__(entering, unknowns)


def opened(model, masks, batches, cache_bytes=2**30):
    """Return a stretch of all layers that are solved, its window and its data."""
    networks = build_networks(model.eval(), ((batches[0],), {}), masks)
    replay = Replay(model, networks.unpruned, networks.pruned, batches, 2**30)
    tasks = Reconstruct(refine=0).tasks(plan_of(networks, replay.touched_nodes), networks)
    by_node = {task.layer.node: task for task in tasks}
    (segment, *_) = segments(replay.nodes, replay.touched_nodes, by_node, 0, 9)
    data = Passes(replay, segment, entering(segment, replay.nodes), set(), cache_bytes)
    return segment, Products(segment, networks.pruned, by_node), data, networks


def chain(*sizes):
    """Return linear layers in double precision, and masks that remove the last channel of the first."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(*each) for each in zip(sizes, sizes[1:]))).double()  # noqa: B905, RUF007
    mask = (torch.arange(sizes[1]) < sizes[1] - 1).double()
    return model, {"0": {"weight": mask[:, None].expand(sizes[1], sizes[0]), "bias": mask}}


def doubles(count, size, columns):
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(count * size, columns, dtype=torch.float64, generator=generator).split(size))


def test_batches_are_kept_where_the_memory_just_holds_them_all():
    model, masks = chain(3, 4, 2)
    nbytes = 3 * 10 * (4 + 2 + 2) * 8  # three batches of ten: what enters, what is wanted and what is reached
    for cache_bytes, is_kept in ((nbytes, True), (nbytes - 1, False), (0, False)):
        data = opened(model, masks, doubles(3, 10, 3), cache_bytes)[2]
        first, again = list(data), list(data)
        assert sum(batch.nbytes for batch in first) == nbytes
        assert (data._kept is not None) is is_kept
        assert [one is other for one, other in zip(first, again, strict=True)] == [is_kept] * 3
        for one, other in zip(first, again, strict=True):
            assert torch.equal(one.wanted[0], other.wanted[0])


def products_of(rows, wanted, change, scale):
    """Return half the second derivative of the squared error of a linear layer, times a change of its weights."""
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
    moved = rows @ change.T
    return scale * moved.T @ rows


@pytest.mark.parametrize(("images", "stride"), [(60, 1), (255, 1), (256, 2), (400, 3), (10**6, 6)])
def test_steps_are_those_of_all_images_and_their_products_those_of_some(images, stride):
    """Of six batches every so many is taken, others at each step; a linear layer's are known in closed form."""
    model, masks = chain(3, 4, 2)
    batches = doubles(6, 10, 3)
    segment, window, data, _ = opened(model, masks, batches)
    assert [layer.name for layer in segment.layers] == ["_1"]
    problem = ahead._Problem(window, data, images)
    assert problem.samples == 60 * 2
    with torch.no_grad():
        rows = [model[0](batch)[:, :3] for batch in batches]
        wanted = [model(batch) for batch in batches]
        change = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        weight = torch.cat([model[1].weight[:, :3], model[1].bias[:, None]], 1) + change
    spread = (torch.cat(wanted) - torch.cat(wanted).mean()).square().sum()
    at = [change[None, :, :3, None].reshape(window.start()[0].shape), change[None, :, 3]]
    off = [torch.cat([each, torch.ones(10, 1).double()], 1) @ weight.T - meant for each, meant in zip(rows, wanted)]  # noqa: B905
    assert problem.error(at) == pytest.approx(float(torch.cat(off).square().sum() / spread), rel=1e-9)
    for turn in range(2 * stride):
        found = problem.gradient(at)
        slope = sum(each.T @ torch.cat([row, torch.ones(10, 1).double()], 1) for each, row in zip(off, rows)) / spread  # noqa: B905
        torch.testing.assert_close(torch.cat([found[0].reshape(2, 3), found[1].T], 1), slope)
        taken = [number for number in range(6) if (number + turn) % stride == 0]
        expected = sum(products_of(rows[number], wanted[number], change, stride / spread) for number in taken)
        made = problem.product(at, at)
        torch.testing.assert_close(torch.cat([made[0].reshape(2, 3), made[1].T], 1), expected)


def test_a_block_takes_four_steps_of_seven_products_and_is_reported():
    model, masks = chain(20, 30, 4)
    segment, window, data, networks = opened(model, masks, doubles(3, 20, 20))
    with torch.no_grad():
        networks.pruned.get_submodule("1").weight += 0.5  # far from the best
    unknowns, report = ahead._solved(segment, window, data, 60, 0)
    assert window.count == 4 * 7 * 3
    assert (report.layer, report.place, report.samples, report.unknowns) == ("1", "output", 60 * 4, 4 * 29 + 4)
    assert report.ridge == 0.01
    assert math.isnan(report.error_held_out)
    assert report.error_after < 0.5 * report.error_before
    assert 0.0 < report.seconds < 60.0
    window.put((networks.pruned, networks.result), unknowns)
    images = torch.cat(doubles(3, 20, 20))
    with torch.no_grad():
        wanted, found = model(images), networks.pruned(images)
    error = (found - wanted).square().sum() / (wanted - wanted.mean()).square().sum()
    assert report.error_after == pytest.approx(float(error), rel=1e-6)


def test_constants_that_nobody_can_take_stay_zero():
    model, masks = chain(3, 4, 2)
    model[1].bias = None
    model[1].weight.data *= 1e-3
    _, window, data, networks = opened(model, masks, doubles(2, 10, 3))
    problem, start = ahead._Problem(window, data, 20), window.start()
    images = torch.cat(doubles(2, 10, 3))
    with torch.no_grad():
        wanted, found = model(images), networks.pruned(images)
    spread = (wanted - wanted.mean()).square().sum()  # far below one
    assert problem.error(start) == pytest.approx(float((found - wanted).square().sum() / spread), rel=1e-6)
    weights, constants = problem.gradient(start)
    assert weights.any()
    assert not constants.any()
    moved = problem.product(start, [torch.ones_like(each) for each in start])
    assert (bool(moved[0].any()), bool(moved[1].any())) == (True, False)
    window.put((networks.pruned,), [torch.ones_like(each) for each in start])
    torch.testing.assert_close(networks.pruned.get_submodule("1").weight[:, :3], model[1].weight[:, :3] + 1.0)


def test_values_that_are_not_finite_name_the_place():
    model, masks = chain(3, 4, 2)
    batches = doubles(2, 5, 3)
    batches[1][0, 0] = math.inf
    segment, window, data, _ = opened(model, masks, batches)
    with pytest.raises(DataError, match=r"activations must be finite, got NaN or infinity \(output\)"):
        ahead._solved(segment, window, data, 10, 0)


def test_what_counts_is_alive_and_real():
    problem = ahead._Problem.__new__(ahead._Problem)
    values = torch.arange(1.0, 13.0).reshape(2, 3, 2)
    real = torch.tensor([[True, False, True], [True, True, False]])

    def counted(value, lives=None, real=None):
        problem._lives = [lives]
        (found,) = problem._unpadded([value], ahead._Batch({}, [], [], real))
        return found

    assert torch.equal(counted(values), values)
    assert counted(values[:, :, 0], torch.tensor([True, False, True])).tolist() == [[1.0, 0.0, 5.0], [7.0, 0.0, 11.0]]
    assert counted(values, real=real).tolist() == [[1.0, 2.0], [5.0, 6.0], [7.0, 8.0], [9.0, 10.0]]
    assert torch.equal(counted(values[:, 0], real=real), values[:, 0])  # of no positions
    assert counted(values.bfloat16()).dtype == torch.float32
    assert counted(values.double()).dtype == torch.float64
    problem._weights = [0.5, 2.0]
    assert float(problem._squares([torch.tensor([1.0, 2.0]), torch.tensor([3.0])])) == 0.5 * 5.0 + 2.0 * 9.0
    one, other = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -1.0])
    assert [each.tolist() for each in ahead._summed([one, one], [other, None])] == [[6.0, 1.0], [1.0, 2.0]]


class Stopped(nn.Module):
    """Layers in front of an LSTM, which has no forward derivatives, and four after it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 5)
        self.lstm = nn.LSTM(5, 4, batch_first=True)
        self.third, self.fourth, self.fifth, self.sixth = (
            nn.Linear(*each) for each in ((4, 8), (8, 5), (5, 8), (8, 3))
        )

    def forward(self, values):
        values = self.fourth(torch.tanh(self.third(self.lstm(self.second(self.first(values)))[0])))
        return self.sixth(torch.tanh(self.fifth(torch.tanh(values))))


def test_blocks_after_one_without_derivatives_are_solved(caplog):
    torch.manual_seed(0)
    model = Stopped().eval()
    mask = (torch.arange(8) < 4).float()
    masks = {
        name: {"weight": mask[:, None].expand_as(model.get_submodule(name).weight)}
        for name in ("first", "third", "fifth")
    }
    batches = [torch.randn(16, 5, 4) for _ in range(2)]
    with caplog.at_level(logging.WARNING):
        found = compensation(model, masks, batches, method=Ahead(layers=1)).report
    assert sum("no forward derivative" in message for message in caplog.messages) == 1
    assert [layer.layer for layer in found.layers if layer.ridge == 0.01 and "," in layer.layer][-1].endswith("sixth")


@pytest.mark.parametrize(
    ("layers", "together", "expected"),
    [
        (0, 1, [(1, 2, "_1", "0 1"), (3, 4, "_3", "2 3"), (5, 7, "output", "4 5")]),
        (1, 1, [(1, 2, "_3", "0 1"), (3, 4, "output", "2 3"), (5, 7, "output", "4 5")]),
        (2, 1, [(1, 2, "_3", "0 1"), (3, 4, "output", "2 3"), (5, 7, "output", "4 5")]),
        (3, 1, [(1, 2, "output", "0 1"), (3, 4, "output", "2 3"), (5, 7, "output", "4 5")]),
        (0, 2, [(1, 4, "_3", "0 1 2 3"), (3, 7, "output", "2 3 4 5"), (5, 7, "output", "4 5")]),
        (0, 9, [(1, 7, "output", "0 1 2 3 4 5"), (3, 7, "output", "2 3 4 5"), (5, 7, "output", "4 5")]),
    ],
)
def test_segments_of_a_chain(layers, together, expected):
    nodes = list(symbolic_trace(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))).graph.nodes)
    found = segments(nodes, set(nodes[1:]), nodes[6:0:-1], layers, together)
    assert [
        (each.first, each.last, each.place.name, " ".join(str(layer.target) for layer in each.layers)) for each in found
    ] == expected
    by_default = segments(nodes, set(nodes[1:]), nodes[1:7], layers)
    assert by_default == segments(nodes, set(nodes[1:]), nodes[1:7], layers, 2)


class Crossing(nn.Module):
    """A layer, a sum over a layer with a factor of the network's own, and a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.factor = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, values):
        first = self.first(values)
        return self.third(torch.tanh(first) + self.factor * self.second(first))


def test_a_stretch_is_what_the_network_computes_from_what_enters_it():
    torch.manual_seed(0)
    graph = symbolic_trace(Crossing())
    nodes = list(graph.graph.nodes)
    names = [node.name for node in nodes]
    assert names == ["values", "first", "tanh", "factor", "second", "mul", "add", "third", "output"]
    # Everything flows through the first layer, the sum and what comes after it.
    ends = windows._ends(nodes, set(nodes[1:]), {node: rank for rank, node in enumerate(nodes)})
    assert [names[rank] for rank in ends] == ["values", "first", "add", "third", "output"]
    values = {"values": torch.randn(4, 3)}
    with torch.no_grad():
        values["first"] = graph.first(values["values"])
        values["tanh"] = torch.tanh(values["first"])
        values["add"] = values["tanh"] + 2.0 * graph.second(values["first"])
        values["output"] = values["third"] = graph.third(values["add"])
    for first, place, enter in (
        ("first", "add", ["values"]),
        ("tanh", "add", ["first"]),
        ("second", "add", ["first", "tanh"]),
        ("second", "output", ["first", "tanh"]),
        ("mul", "third", None),
        ("third", "third", ["add"]),
    ):
        at = names.index(first)
        segment = Segment(at, names.index(place), nodes[names.index(place)], ())
        found = entering(segment, nodes)
        if enter is None:
            assert [node.name for node in found] == ["tanh", "second"]
            continue
        assert [node.name for node in found] == enter
        inputs = [values[name] for name in enter]
        with torch.no_grad():
            torch.testing.assert_close(Stretch(graph, segment)(*inputs), values[place])
            window = Window(segment, graph, {})
            torch.testing.assert_close(window(dict(zip(enter, inputs, strict=True)), []), values[place])
            half, double = copy.deepcopy(graph).bfloat16(), copy.deepcopy(graph).double()
            assert Stretch(half, segment)(*inputs).dtype == torch.float32
            assert Stretch(double, segment)(*(each.double() for each in inputs)).dtype == torch.float64


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32, torch.float64])
def test_unknowns_have_single_precision_at_least(kind):
    model, masks = chain(3, 4, 2)
    masks = {"0": {name: mask.to(kind) for name, mask in masks["0"].items()}}
    window = opened(model.to(kind), masks, [each.to(kind) for each in doubles(2, 5, 3)])[1]
    wide = torch.promote_types(kind, torch.float32)
    assert [(tuple(each.shape), each.dtype) for each in window.start()] == [((1, 2, 3), wide), ((1, 2), wide)]


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d(3), (4, 3)), (nn.BatchNorm1d(3), (4, 3, 5)), (nn.BatchNorm2d(3), (4, 3, 5, 2))]
)
def test_a_batch_norm_moves_its_values_and_their_derivatives_by_channel(norm, shape):
    torch.manual_seed(0)
    norm = copy.deepcopy(norm).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2.0)
    values, tangent = torch.randn(*shape), torch.randn(*shape)
    factors = windows._affine(norm)
    with torch.no_grad():
        torch.testing.assert_close(windows._per_channel(factors, values), norm(values))
        with forward_ad.dual_level():
            moved = forward_ad.unpack_dual(windows._per_channel(factors, forward_ad.make_dual(values, tangent)))
            expected = forward_ad.unpack_dual(norm(forward_ad.make_dual(values, tangent)))
            for one, other in zip(moved, expected, strict=True):
                torch.testing.assert_close(one, other)


def test_norms_of_the_batch_run_as_they_are():
    torch.manual_seed(0)
    graph = symbolic_trace(nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))).eval()
    nodes, values = list(graph.graph.nodes), torch.randn(5, 3)
    window = Window(Segment(1, 3, nodes[3], ()), graph, {})
    assert set(window._norms) == {"1"}
    with torch.no_grad():
        torch.testing.assert_close(window({"input_1": values}, []), graph(values))


WINDOWS = {
    "linear": (nn.Linear(3, 5), nn.Linear(5, 4), (6, 3)),
    "tokens": (nn.Linear(3, 5), nn.Linear(5, 4), (6, 4, 3)),
    "convolution": (nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 3, padding=1), (6, 3, 4, 4)),
    "groups": (nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 3, padding=1, groups=2), (6, 3, 4, 4)),
    "transposed": (nn.Conv1d(3, 5, 1), nn.ConvTranspose1d(5, 4, 2, stride=2), (6, 3, 4)),
    "norm": (nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1, bias=False), (6, 3, 4, 4), nn.BatchNorm2d(4)),
}


@pytest.mark.parametrize("case", WINDOWS)
def test_a_window_gives_for_changes_what_the_network_does_once_they_are_put(case):
    first, second, shape, *norms = copy.deepcopy(WINDOWS[case])
    torch.manual_seed(0)
    model = nn.Sequential(first, second, *norms).eval()
    for norm in norms:
        norm.running_var.uniform_(0.5, 2.0)
    mask = torch.ones(len(first.weight))
    mask[[0, -1]] = 0.0
    masks = {"0": {"weight": mask.view(-1, *[1] * (first.weight.dim() - 1)).expand_as(first.weight), "bias": mask}}
    images = torch.randn(*shape)
    _, window, _, networks = opened(model, masks, [images])
    changes = [torch.randn_like(each) for each in window.start()]
    with torch.no_grad():
        inputs = {"_0": networks.pruned.get_submodule("0")(images), "input_1": images}
        torch.testing.assert_close(window(inputs, window.start()), networks.pruned(images))
        expected = window(inputs, changes)
        nets = networks.pruned, networks.result
        before = [net.get_submodule("1").weight.clone() for net in nets]
        window.put(nets, changes)
        torch.testing.assert_close(networks.pruned(images), expected)
        moved, same = (net.get_submodule("1").weight - old for net, old in zip(nets, before, strict=True))
        torch.testing.assert_close(moved, same)
        assert moved.any()


def test_settings_have_their_defaults_and_bounds():
    assert (Ahead().layers, Ahead().refine) == (4, 2)
    assert Ahead(layers=1, refine=0).layers == 1
    with pytest.raises(ConfigError, match=r"refine must be an integer of at least 0, got -1 \(ahead\)"):
        Ahead(refine=-1)
