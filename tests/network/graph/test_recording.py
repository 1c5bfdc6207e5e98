"""Graphs of models that only a run can follow."""

from __future__ import annotations

import copy
import operator
from types import SimpleNamespace

import pytest
import torch
from speedup_nets import masks_of
from torch import nn

from nni_topo import RandomPruner, create_pruner, dependency_groups, masked_model, shrink, to_dense
from nni_topo.errors import ConfigError, LayerError, SpeedupError
from nni_topo.network.graph.recording import record


class Wild(nn.Module):
    """Decides by values, counts its samples, makes constants of their number, and works in place."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.start = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x, scale=2.0):
        samples, places, _ = x.shape
        x = torch.cat([self.start.expand(samples, -1, -1), x], 1)
        hidden = self.first(x).view(samples * (places + 1), 6)
        if float(hidden.abs().sum()) > 0:
            hidden = 1.0 - hidden.relu()
        hidden += 1
        steps = torch.ones(samples, places + 1, 1).cumsum(1)
        return {"out": self.last(hidden.reshape(samples, -1, 6) * steps) * scale, "shape": (samples, places)}


def test_a_recorded_model_takes_other_numbers_of_samples():
    torch.manual_seed(0)
    model = Wild().eval()
    graph = record(model, {"x": torch.randn(3, 5, 4), "scale": 0.5}).graph_module
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_module"]
    assert targets == ["first", "last"]
    assert not {node.target for node in graph.graph.nodes} & {operator.iadd, "add_", "__iadd__"}
    for samples in (1, 2, 7):
        inputs = torch.randn(samples, 5, 4)
        torch.testing.assert_close(graph(inputs)[0], model(inputs, 0.5)["out"])


class Freeing(nn.Module):
    """Frees its input's memory, as invertible networks do to save it."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x):
        out = self.head(self.first(x).relu())
        x.untyped_storage().resize_(0)
        return out


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_forward_that_frees_its_inputs_is_refused_and_they_stay(wrapped):
    model, x = Freeing().eval(), torch.randn(4, 5)
    before, batch = x.clone(), (x,) if wrapped else x
    for run in (
        lambda: dependency_groups(model, batch, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]),
        lambda: shrink(model, [batch], {"params": 0.5}),
    ):
        with pytest.raises(ConfigError, match=r"must leave its inputs as they are.*Freeing"):
            run()
        torch.testing.assert_close(x, before)


class Measured(nn.Module):
    """Keeps the size of its input in an object of its own, and reshapes to numbers of other attributes."""

    def __init__(self):
        super().__init__()
        self.heads, self.size, self.last = 4, 3, SimpleNamespace(places=0)
        self.first, self.head = nn.Linear(5, 12), nn.Linear(12, 2)

    def forward(self, x):
        self.last.places = x.shape[1]
        hidden = self.first(x).view(*x.shape[:2], self.heads, self.size)
        weighted = hidden * hidden.mean(-1, keepdim=True).sigmoid()
        return self.head(weighted.reshape(len(x), -1, self.heads * self.size))


@pytest.mark.slow
def test_attributes_stay_traced_while_another_attribute_keeps_a_size():
    torch.manual_seed(0)
    model, x = Measured().eval(), torch.randn(2, 6, 5)
    groups = dependency_groups(model, x, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["first"]]
    masks = {"first": {"weight": torch.ones(12, 5), "bias": torch.ones(12)}}
    for mask in masks["first"].values():
        mask[6:] = 0  # two of four heads
    dense, masked = to_dense(model, x, masks), masked_model(model, x, masks)
    assert (len(dense.first.weight), model.last) == (6, SimpleNamespace(places=0))
    others = torch.randn(3, 4, 5)
    torch.testing.assert_close(dense(others), masked(others), rtol=1e-4, atol=1e-5)


def test_what_a_model_keeps_from_its_last_run_does_not_count():
    class Anchored(nn.Module):
        """Computes places anew where its input has another shape than last time, as detectors do."""

        def __init__(self):
            super().__init__()
            self.layer, self.shape, self.places = nn.Linear(4, 4), None, torch.empty(0)

        def forward(self, x):
            if self.shape != x.shape:
                self.places = torch.arange(x.shape[1], dtype=x.dtype) + 0.5
                self.shape = x.shape
            return self.layer(x * float(x.sum() > -100)) + self.places[:, None]

    model, x = Anchored().eval(), torch.randn(2, 3, 4)
    model(x)
    graph = record(model, {"x": x}).graph_module
    for samples in (2, 5):
        inputs = torch.randn(samples, 3, 4)
        torch.testing.assert_close(graph(inputs), model(inputs))


def test_a_hook_that_changes_what_enters_a_layer_belongs_to_the_layer():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2)).eval(), torch.randn(5, 4)
    model[1].register_forward_pre_hook(lambda layer, args: (2 * args[0],))
    graph = record(model, {"input": torch.randn(3, 4)}).graph_module
    torch.testing.assert_close(graph(x), model(x))


class Mixture(nn.Module):
    """Gives rows to the experts of a loop in which an `if` looks at values."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(4, 3, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)) for _ in range(3))

    def forward(self, x):
        chosen, out = self.router(x).argmax(1), torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = chosen == index
            if rows.any():
                out[rows] = out[rows] + expert(x[rows])
        return out


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.mixture, self.head = nn.Linear(4, 4), Mixture(), nn.Linear(4, 2)
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(4))
            self.stem.bias.zero_()
            self.mixture.router.weight.copy_(torch.eye(3, 4))

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.mixture(x))


def test_layers_before_an_expert_that_was_not_reached_stay():
    # The last sample alone reaches the third expert.
    model, every = Mixed().eval(), torch.eye(4)[[0, 0, 1, 1, 2]]
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    assert dependency_groups(model, every, config).skipped.keys() == {"mixture.router", "head"}
    groups = dependency_groups(model, every[:4], config)
    assert {"stem", "mixture.experts.0.2", "mixture.experts.2.0"} <= groups.skipped.keys()
    masks = masks_of(create_pruner("random", model, groups))
    dense = to_dense(model, every[:4], masks)
    assert dense.mixture.experts[0][0].out_features == 4
    torch.testing.assert_close(dense(every), masked_model(model, every[:4], masks)(every))
    asked = dependency_groups(model, every, config)
    with pytest.raises(LayerError, match=r"must run on the first batch, .* \(mixture\.experts\.2\.0\.weight\)"):
        create_pruner("reconstruction", model, asked, calibration=[every[:4], every]).compress()


class Flattening(nn.Module):
    """Asks tensors for their sizes, as models of Transformers do, and keeps one."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.seen = None

    def forward(self, x):
        self.seen = x.shape
        hidden = self.first(x).relu() if float(x.abs().sum()) > 0 else x
        rows = hidden.reshape(-1, hidden.size(-1))
        return self.last(rows).view(hidden.size(dim=0), *hidden.shape[1:-1], 2) * (hidden.size(dim=1) / hidden.size(1))


def test_sizes_that_a_model_asks_for_are_those_of_fewer_channels():
    model, inputs = Flattening().eval(), torch.randn(3, 5, 4)
    recorded = copy.deepcopy(model)
    graph = record(recorded, {"x": inputs}).graph_module
    assert all(type(size) is int for size in copy.deepcopy(recorded).seen)
    for shape in ((1, 5, 4), (4, 7, 4)):
        x = torch.randn(*shape)
        torch.testing.assert_close(graph(x), model(x))
    groups = dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["first"]]
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs, masks)
    assert dense.first.out_features == 3
    torch.testing.assert_close(dense(inputs), masked_model(model, inputs, masks)(inputs))


class Computing(nn.Module):
    """Does something of its own with what a layer gives, as it is or as integers from 0 to 3."""

    def __init__(self, compute, of_integers=False):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.compute, self.of_integers = nn.Linear(4, 4), compute, of_integers

    def forward(self, x):
        x = self.layer(x)
        return self.compute(x.abs().mul(3).int().clamp(max=3) if self.of_integers else x)


IN_PLACE = ("iadd", "itruediv")
IN_PLACE_OF_INTEGERS = ("iand", "ilshift")


@pytest.mark.parametrize(
    ("compute", "of_integers"),
    [
        *((lambda x, name=name: getattr(operator, name)(x, 2), False) for name in IN_PLACE),
        *((lambda n, name=name: getattr(operator, name)(n, 2), True) for name in IN_PLACE_OF_INTEGERS),
        *((compute, False) for compute in (lambda x: 2 - x, lambda x: 7 // x, lambda x: x**2, lambda x: -x, abs)),
        *((compute, True) for compute in (lambda n: 64 >> n, lambda n: 2 & n, lambda n: n | 4, lambda n: ~n)),
    ],
)
def test_operators_are_in_the_graph_as_they_stand_in_the_forward_and_none_works_in_place(compute, of_integers):
    model = Computing(compute, of_integers).eval()
    graph = record(model, {"x": torch.randn(3, 4)}).graph_module
    in_place = {getattr(operator, name) for name in IN_PLACE + IN_PLACE_OF_INTEGERS}
    assert not in_place & {node.target for node in graph.graph.nodes}
    x = torch.randn(5, 4)
    torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    "change",
    [
        lambda keep, mask: operator.iand(keep, mask),
        lambda keep, mask: keep.logical_or_(mask),
        lambda keep, mask: operator.setitem(keep, mask, True) or keep,
    ],
    ids=["and", "method", "item"],
)
def test_a_mask_that_is_written_into_begins_anew_in_each_run(change):
    model = Computing(lambda x: x * change(torch.tensor([True, True, False, False]), x.sum(0) > 0)).eval()
    generator = torch.Generator().manual_seed(0)
    graph = record(model, {"x": torch.randn(3, 4, generator=generator)}).graph_module
    for _ in range(4):
        x = torch.randn(3, 4, generator=generator)
        torch.testing.assert_close(graph(x), model(x))


def changed(x, change):
    """Return a copy of a tensor after a change in place."""
    x = x.clone()
    change(x)
    return x


def shifted_sums(x):
    """Return the sums of the entries before each, as PyTorch Geometric computes them."""
    sums = x.new_empty(len(x), x.shape[1] + 1)
    sums.narrow(1, 0, 1).zero_()
    torch.cumsum(x, dim=1, out=sums.narrow(1, start=1, length=x.shape[1]))
    return sums


def written_into_zeros(x):
    """Return the sums over samples in the first places of a vector of zeros."""
    table = torch.zeros(6)
    table[1:5].add_(x.sum(0))
    return x.mean(1, keepdim=True) * table


def times_itself(x):
    """Multiply a part, which also has a name of its own."""
    part = x[1:, 1:]
    part *= 2
    part += part[:, :1].clone()


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: changed(x, lambda y: y[:, 1:].mul_(3).add_(1)),
        lambda x: changed(x, lambda y: y[:, 1:][:, 1:].neg_()),
        lambda x: changed(x, times_itself),
        lambda x: changed(x, lambda y: operator.setitem(y[1:], 0, 5.0)),
        lambda x: changed(x, lambda y: operator.setitem(y, (slice(None), 0), operator.iadd(y[:, 0], 1))),
        shifted_sums,
        written_into_zeros,
    ],
    ids=["methods", "part of a part", "named part", "item of a part", "item", "out", "constant"],
)
@torch.no_grad()
def test_what_is_written_into_a_part_of_a_tensor_is_in_the_tensor(compute):
    model = Computing(compute).eval()
    graph = record(model, {"x": torch.randn(3, 4)}).graph_module
    for samples in (2, 3, 7):
        x = torch.randn(samples, 4)
        torch.testing.assert_close(graph(x), model(x))


@torch.jit.script
def snake(x, alpha):
    return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)


class Snake(nn.Module):
    """The activation of codecs for speech and music, with a frequency for each channel and compiled as theirs is."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.rand(1, channels, 1) + 0.5)

    def forward(self, x):
        return snake(x, self.alpha)


def test_channels_go_through_functions_that_torch_jit_has_compiled():
    torch.manual_seed(0)
    layers = [nn.Conv1d(1, 8, 7, padding=3), Snake(8), nn.Conv1d(8, 6, 3), Snake(6), nn.Conv1d(6, 2, 1)]
    model, sounds = nn.Sequential(*layers).eval(), torch.randn(3, 1, 32)
    groups = dependency_groups(model, sounds, [{"op_types": ["Conv1d"], "sparse_ratio": 0.5}])
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, sounds, masks)
    assert [dense[0].out_channels, dense[2].out_channels] == [4, 3]
    assert [dense[1].alpha.shape[1], dense[3].alpha.shape[1]] == [4, 3]
    others = torch.randn(2, 1, 40)
    torch.testing.assert_close(dense(others), masked_model(model, sounds, masks)(others))
    assert isinstance(snake, torch.jit.ScriptFunction)


class OfGraphs(nn.Module):
    """Puts the nodes of several graphs into one padded tensor, as torch_geometric's to_dense_batch does."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, graph):
        x = self.first(x).relu()
        nodes = graph.bincount()
        largest = int(nodes.max())
        before = torch.cat([nodes.new_zeros(1), nodes.cumsum(0)])[graph]
        places = graph * largest + torch.arange(len(graph), device=graph.device) - before
        padded = x.new_zeros(len(nodes) * largest, x.shape[1])
        padded[places] = x
        return self.head(padded.view(len(nodes), largest, -1).mean(1))


def test_a_size_that_is_read_from_values_leaves_channels_to_prune():
    model = OfGraphs().eval()
    inputs = torch.randn(10, 6), torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    groups = dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, inputs, masks)
    assert dense.first.out_features == 4
    others = torch.randn(7, 6), torch.tensor([0, 1, 1, 1, 1, 1, 2])
    torch.testing.assert_close(dense(*others), masked_model(model, inputs, masks)(*others))


@pytest.mark.parametrize(
    ("compute", "is_read"),
    [
        (lambda x: x.nonzero().sum(), True),
        (lambda x: torch.where(x > 0)[0].sum(), True),
        (lambda x: x[x > 0].sum(), True),
        (lambda x: torch.where(x > 0, x, -x).sum(), False),
        (lambda x: x[:, torch.tensor([2, 0])].sum(), False),
    ],
    ids=["nonzero", "where", "by a mask", "one of two", "by numbers"],
)
def test_how_much_an_operation_gives_may_be_up_to_values(compute, is_read):
    assert record(Computing(compute).eval(), {"x": torch.ones(3, 4)}).reads_values == is_read


class Choosing(nn.Module):
    """Runs one of some layers, which ``choose`` takes by whether a sum is negative."""

    def __init__(self, choose, *layers):
        super().__init__()
        self.layers, self.choose = nn.ModuleList(layers), choose
        self.bank = nn.Module()
        self.bank.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.choose(self, x.sum() < 0)(x)


@pytest.mark.parametrize(
    ("choose", "layers", "place"),
    [
        (lambda model, at: model.layers[int(at)], [nn.Linear(4, 4), nn.Linear(4, 4)], "layers"),
        (lambda model, at: model.layers[0][int(at)], [nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])], "layers.0"),
        (lambda model, at: model.layers[int(at)], [nn.Linear(4, 4), nn.Identity()], None),
        (lambda model, at: model.bank.layers[at.long()], [], "bank.layers"),
        # Who reads a value isn't the one whose layers these are.
        (lambda model, at: model.bank.layers[int(at) * 0], [], None),
    ],
    ids=["one of two", "in a list of lists", "or nothing", "by an index, of another's", "of another's"],
)
def test_layers_that_a_value_has_left_out_are_named(choose, layers, place):
    model, inputs = Choosing(choose, *layers).eval(), {"x": torch.ones(2, 4)}
    if place is None:
        assert record(model, inputs).reads_values
        return
    with pytest.raises(SpeedupError, match=rf"got modules that didn't run \({place}\)$"):
        record(model, inputs)


def create_half_mask(states, kind):
    return (states > 0).float() * (kind is not None)


def create_outer_mask(states, kind):
    return create_half_mask(states=states, kind=kind) * 2


def create_numbers(states):
    return states * 3


create_no_mask = "no function"


def test_functions_that_make_masks_are_one_node_each_while_a_model_is_recorded():
    class Masked(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            masks = create_half_mask(states=x, kind=self), create_outer_mask(states=x, kind=self)
            return create_numbers(x) * masks[0] + masks[1]

    model, plain = Masked(4, 4).eval(), (create_half_mask, create_outer_mask)
    graph = record(model, {"x": torch.randn(2, 4)}).graph_module
    made = [node.target.__name__ for node in graph.graph.nodes if getattr(node.target, "makes_mask", False)]
    assert made == ["create_half_mask", "create_outer_mask"]
    x = torch.randn(3, 4)
    torch.testing.assert_close(graph(x), model(x))
    assert (create_half_mask, create_outer_mask) == plain
    assert create_no_mask == "no function"


def test_what_picks_from_lists_by_value_is_not_recorded():
    class Boxes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, rows):
            return [self.layer(each[each[:, 0] > 0]) for each in rows]

    rows = torch.randn(3, 4).abs()
    with pytest.raises(SpeedupError, match="followed part by part"):
        record(Boxes().eval(), {"rows": [rows, rows]})


class FixedBatch(nn.Module):
    """Takes four samples and no other number of them."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))).view(4, -1))


class ShortOfMemory(nn.Module):
    """Runs on two samples, and has no memory for more."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8 * 16, 3)

    def forward(self, x):
        if x.shape[0] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))).flatten(1))


@pytest.mark.parametrize(("make", "samples"), [(FixedBatch, 4), (ShortOfMemory, 2)])
def test_a_model_that_runs_on_no_more_samples_loses_channels_all_the_same(make, samples):
    torch.manual_seed(0)
    model, images = make().eval(), torch.rand(samples, 3, 8, 8)
    groups = dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert groups.skipped == {}
    masks = masks_of(RandomPruner(model, groups, seed=0))
    dense = to_dense(model, images, masks)
    assert (dense.one.out_channels, dense.two.out_channels, dense.head.in_features) == (4, 4, 64)


class LastSumUnread(nn.Module):
    """Makes something at the end that nothing reads, as the last block of a WaveNet does of its residual stream."""

    def __init__(self):
        super().__init__()
        self.start, self.filter, self.residual = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 2), nn.Conv1d(8, 8, 1)
        self.skip = nn.Conv1d(8, 2, 1)

    def forward(self, x):
        x = self.start(x)
        y = torch.tanh(self.filter(x))
        x[:, :, 1:] + self.residual(y)
        return self.skip(y)


def test_what_nothing_reads_must_fit_in_the_dense_model_too():
    torch.manual_seed(0)
    model, x = LastSumUnread().eval(), torch.randn(3, 3, 3)
    groups = dependency_groups(model, x, [{"op_types": ["Conv1d"], "sparse_ratio": 0.25}])
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, x, masks)
    assert [each.out_channels for each in (dense.start, dense.filter, dense.residual)] == [6, 6, 6]
    torch.testing.assert_close(dense(x), masked_model(model, x, masks)(x))


def counted(x):
    """Return the number of samples as a number that nothing follows."""
    return x.detach().numpy().shape[0]


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: x.sum(1) + torch.full((counted(x),), 0.5),
        lambda x: x[:, None] + torch.arange(8.0).view(1, 2, 4).repeat(counted(x), 1, 1),
        lambda x: x[torch.arange(counted(x)), 0],
        lambda x: x.view(2 * counted(x), 2),
        lambda x: x.repeat(3, 1)[: 3 * counted(x) : counted(x), 1:],
        lambda x: torch.cat([x, x + 1]).split([counted(x), counted(x)])[1],
        lambda x: torch.cat([x, x + 1]).narrow(0, start=0, length=counted(x)),
    ],
    ids=["vector", "cubes", "numbers", "view", "step", "list", "named"],
)
@torch.no_grad()
def test_numbers_and_constants_of_each_sample_follow_the_number_of_samples(compute):
    model = Computing(compute).eval()
    graph = record(model, {"x": torch.randn(3, 4)}).graph_module
    for samples in (1, 2, 7):
        x = torch.randn(samples, 4)
        torch.testing.assert_close(graph(x), model(x))


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (lambda x: x + (counted(x) + 1), "multiple of the samples, got 4 and 7"),
        (lambda x: x[torch.arange(counted(x)) % 4], "constant of a model must not depend on the number"),
        (lambda x: x.relu() if counted(x) > 3 else x.tanh(), "the same whatever the number of samples, got two graphs"),
    ],
    ids=["number", "constant", "function"],
)
def test_what_no_number_of_samples_gives_is_refused(compute, words):
    with pytest.raises(SpeedupError, match=words):
        record(Computing(compute).eval(), {"x": torch.randn(3, 4)})


@torch.no_grad()
def test_constants_of_another_device_follow_the_number_of_samples_there(far):
    model = Computing(lambda x: x[torch.arange(x.shape[0], device=x.device), 0]).eval().to(far)
    graph = record(model, {"x": torch.randn(3, 4).to(far)}).graph_module
    x = torch.randn(5, 4).to(far)
    torch.testing.assert_close(graph(x).cpu(), model(x).cpu())
