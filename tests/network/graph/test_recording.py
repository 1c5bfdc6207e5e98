"""Graphs of models that only a run can follow."""

from __future__ import annotations

import copy
import gc
import operator
import weakref

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, symbolic_trace
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nni_topo import RandomPruner, create_pruner, dependency_groups, masked_model, to_dense
from nni_topo.errors import LayerError, SpeedupError
from nni_topo.network.channels.rules import FIXED
from nni_topo.network.graph import recording
from nni_topo.network.graph.recording import LayerResults, record
from nni_topo.network.speedup.network import Network


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


class Writing(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        y[:, 0] = 0.0
        return y


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


def test_rows_that_are_numbered_follow_the_number_of_samples():
    class Last(nn.Module):
        """Takes of each sample the place behind which there is padding, as classifiers on decoders do."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x, lengths):
            return self.layer(x)[torch.arange(len(x)), lengths - 1]

    model = Last().eval()
    graph = record(model, {"x": torch.randn(3, 5, 4), "lengths": torch.tensor([5, 2, 3])}).graph_module
    for samples in (1, 2, 7):
        x, lengths = torch.randn(samples, 5, 4), 1 + torch.arange(samples) % 5
        torch.testing.assert_close(graph(x, lengths), model(x, lengths))


def test_arguments_may_be_containers_of_tensors():
    class Levels(nn.Module):
        """Adds the first rows of two levels, numbered, and scales them."""

        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 2)})

        def forward(self, scale, levels):
            rows = [self.layers[key](level)[torch.arange(len(level)), 0] for key, (level,) in levels.items()]
            return sum(rows) * scale["by"]

    def levels(samples):
        return {key: [torch.randn(samples, 3, 4)] for key in "ab"}

    model, scale = Levels().eval(), {"by": 2.0}
    graph = record(model, {"scale": scale, "levels": levels(3)}).graph_module
    for samples in (1, 2, 7):
        given = levels(samples)
        torch.testing.assert_close(graph(given), model(scale, given))


class Routed(nn.Module):
    """Gives each row to the expert that a router chooses."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 2)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        with torch.no_grad():
            self.stem.weight.copy_(torch.eye(4))
            self.stem.bias.zero_()

    def forward(self, x):
        x = self.stem(x)
        chosen = x.argmax(1)
        out = torch.zeros(len(x), x.shape[1], dtype=x.dtype, device=x.device)
        for expert in chosen.unique():
            (rows,) = torch.where(chosen == expert)
            out.index_add_(0, rows, self.experts[expert](x[rows]))
        return self.head(out)


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


def test_of_modules_chosen_by_value_all_have_to_run():
    model = Routed().eval()
    record(model, {"x": torch.eye(4)})
    with pytest.raises(SpeedupError, match=r"all must run, got some that don't \(experts\)"):
        record(model, {"x": torch.eye(4)[:3]})
    config = [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    skipped = dependency_groups(model, torch.eye(4)[:3], config).skipped
    assert {"stem", *(f"experts.{each}" for each in range(4))} <= skipped.keys()


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
    pruner = create_pruner("random", model, groups)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = to_dense(model, every[:4], masks)
    assert dense.mixture.experts[0][0].out_features == 4
    torch.testing.assert_close(dense(every), masked_model(model, every[:4], masks)(every))
    asked = dependency_groups(model, every, config)
    with pytest.raises(LayerError, match=r"must run on the first batch, .* \(mixture\.experts\.2\.0\.weight\)"):
        create_pruner("reconstruction", model, asked, calibration=[every[:4], every]).compress()


@pytest.mark.parametrize(
    "make",
    [
        lambda x, *sizes: torch.full(sizes, 0.5, device=x.device),
        lambda x, *sizes: torch.zeros(*sizes, device=x.device),
        lambda x, *sizes: x.new_full(sizes, 0.5),
        lambda x, *sizes: x.new_ones(*sizes),
    ],
    ids=["full", "zeros", "new_full", "new_ones"],
)
def test_what_is_made_of_sizes_gets_smaller_with_them(make):
    class Gathering(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x).relu()
            samples, places, width = x.shape
            rows = self.second(x).reshape(-1, width)
            out = make(x, samples * places, width)
            if float(x.sum()) > -1:
                out.index_add_(0, torch.arange(rows.shape[0], device=x.device).flip(0), rows)
            return self.last(x + out.view(samples, places, width) * make(x, width))

    torch.manual_seed(0)
    model, inputs = Gathering().eval(), torch.randn(2, 3, 4)
    groups = dependency_groups(model, inputs, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert groups.skipped == {"last": "it gives the model's output"}
    pruner = create_pruner("random", model, groups)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = to_dense(model, inputs, masks)
    assert (dense.first.out_features, dense.second.out_features) == (3, 3)
    torch.testing.assert_close(dense(inputs), masked_model(model, inputs, masks)(inputs))


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


class Folding(nn.Module):
    """Folds images into patches and back, by sizes that it computes of those that it asks for, as MobileViT does."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x).relu() if float(x.abs().sum()) > 0 else x
        samples, channels, height, width = x.shape
        x = x.reshape(samples * channels * (height // 2), 2, width // 2, 2).transpose(1, 2)
        x = x.reshape(samples, channels, -1, 4).transpose(1, 3).reshape(4 * samples, -1, 1 + channels - 1).softmax(1)
        x = x.reshape(samples, 4, -1, (2 * channels) // 2).transpose(1, 3)
        x = x.reshape(channels * samples * (height - height // 2), width // 2, 2, 2).transpose(1, 2)
        rest = 20 // height * height + (9 - height)
        return self.last(x.reshape(samples, 0 + channels, height, -1)) * rest


def test_sizes_that_are_computed_of_others_follow_them():
    model, inputs = Folding().eval(), torch.randn(3, 3, 4, 6)
    graph = record(copy.deepcopy(model), {"x": inputs}).graph_module
    for shape in ((1, 3, 4, 6), (4, 3, 8, 2)):
        x = torch.randn(*shape)
        torch.testing.assert_close(graph(x), model(x))
    groups = dependency_groups(model, inputs, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["first"]]


def test_what_is_written_into_a_part_of_a_tensor_is_in_the_graph():
    model = Writing().eval()
    graph = record(model, {"x": torch.randn(3, 4)}).graph_module
    for samples in (1, 5):
        x = torch.randn(samples, 4)
        torch.testing.assert_close(graph(x), model(x))
    flow = Network.on(nn.Sequential(nn.Linear(2, 4), Writing(), nn.Linear(4, 3)), torch.randn(3, 2)).flow
    assert (flow.group_ids_of("1.layer") == FIXED).all()
    assert not (flow.group_ids_of("0") == FIXED).any()


def test_what_depends_on_the_number_of_samples_in_another_way_is_refused():
    class Odd(nn.Module):
        def forward(self, x):
            return x + len(x) ** 2

    with pytest.raises(SpeedupError, match="multiple of the number of samples, got 9 and 36"):
        record(Odd(), {"x": torch.randn(3, 4)})


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


def test_rows_picked_from_none_are_followed():
    class Picking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = self.first(x)
            rows = x[x.sum(2) > 1e9]
            return self.last(x), rows[rows[:, 0] > 0].sum(0)

    groups = dependency_groups(Picking().eval(), torch.randn(2, 3, 4), [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert groups.skipped.keys() == {"first", "last"}


class Coder(nn.Module):
    """A child has a name that a graph module has itself; ``by_value``: a value decides, so that the run is recorded."""

    def __init__(self, name, by_value):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(5, 6)
        self.add_module(name, nn.Sequential(nn.Linear(8, 5), nn.ReLU()) if by_value else nn.Linear(8, 5))
        self.name, self.by_value = name, by_value

    def forward(self, x):
        x = torch.relu(self.first(x))
        if self.by_value and x.sum() < -1:
            x = x + 1
        return self.last(torch.relu(self.get_submodule(self.name)(x)))


@pytest.mark.parametrize("by_value", [False, True])
@pytest.mark.parametrize("name", ["code", "print_readable", "to_folder", "shape_env"])
def test_children_may_have_names_of_a_graph_modules_own(name, by_value):
    torch.manual_seed(0)
    model, x = Coder(name, by_value).eval(), torch.randn(2, 6)
    groups = dependency_groups(model, x, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    inner = f"{name}.0" if by_value else name
    assert [entry["op_names"] for entry in groups] == [["first"], [inner]]
    masks = {"first": {"weight": torch.ones(8, 6), "bias": torch.ones(8)}}
    for mask in masks["first"].values():
        mask[:4] = 0
    dense = to_dense(model, x, masks)
    assert dense.get_submodule(inner).in_features == 4
    torch.testing.assert_close(dense(x), masked_model(model, x, masks)(x))


IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Shifted(nn.Module):
    """Layers with an operation of its own between them."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.act, self.head = nn.ReLU(inplace), nn.Linear(64, 32)

    def forward(self, x):
        return self.head(self.two(self.act(self.one(x)) + 1.0).flatten(1))


class Computed(TorchFunctionMode):
    """Notes the layers whose functions are computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self._layers = {id(layer.weight): name for name, layer in model.named_modules() if hasattr(layer, "weight")}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (functional.conv2d, functional.linear):
            self.names.append(self._layers[id(args[1])])
        return func(*args, **(kwargs or {}))


def compared(
    model: nn.Module, graph: GraphModule, inputs: torch.Tensor = IMAGES, **knobs: int
) -> tuple[torch.Tensor, list[str]]:
    """Return what a graph puts out behind its model, and the layers that were computed for it."""
    results, computed = LayerResults(model, **knobs), Computed(model)
    with torch.no_grad():
        with results.taken():
            model(IMAGES)
        with computed, results.given():
            output = Interpreter(graph).run(inputs)
    return output, computed.names


@pytest.mark.parametrize("inplace", [False, True])
def test_no_layer_is_computed_twice(inplace):
    model = Shifted(inplace).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == []


def test_a_run_on_twice_the_samples_gets_the_results_twice():
    model = Shifted().eval()
    doubled = torch.cat([IMAGES, IMAGES])
    output, computed = compared(model, symbolic_trace(model), doubled)
    torch.testing.assert_close(output, model(doubled))
    assert computed == []
    others = torch.cat([IMAGES, IMAGES + 0.01])
    output, computed = compared(model, symbolic_trace(model), others)
    torch.testing.assert_close(output, model(others))
    assert computed == ["one", "two", "head"]


def test_a_layer_whose_input_was_written_into_is_computed():
    class Writing(nn.Sequential):
        def forward(self, x):
            x = x * 1.0
            return self[0](x) + x.mul_(2.0).sum()

    model = Writing(nn.Conv2d(3, 4, 3)).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == ["0"]


def test_what_differs_is_computed():
    model = Shifted().eval()
    graph = symbolic_trace(model)
    (added,) = (node for node in graph.graph.nodes if node.op == "call_function" and 1.0 in node.args)
    added.args = (added.args[0], 1.001)
    graph.recompile()
    output, computed = compared(model, graph)
    assert computed == ["two", "head"]
    torch.testing.assert_close(output, Interpreter(graph).run(IMAGES), rtol=0, atol=0)
    assert not torch.allclose(output, model(IMAGES), rtol=1e-4, atol=1e-5)


def test_calls_of_one_layer_are_told_apart():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](x) + self[0](2.0 * x)

    model = Twice(nn.Conv2d(3, 32, 6)).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == []


def test_results_take_no_more_memory_than_the_model_and_what_may_be_spared():
    # 12 weights and 3 biases, and 144 + 72 pixels in and out of the first layer, 72 + 144 of the second, of 4 bytes
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)).eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    first, both = 4 * (216 + 72), 4 * (216 + 72 + 72 + 144)
    for memory, expected in ((both, []), (both - 1, ["1"]), (first - 1, ["0", "1"])):
        output, computed = compared(model, symbolic_trace(model), spare_bytes=memory - weights)
        torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
        assert computed == expected


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
    pruner = RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = to_dense(model, images, masks)
    assert (dense.one.out_channels, dense.two.out_channels, dense.head.in_features) == (4, 4, 64)


def test_a_recording_that_fails_keeps_no_tensor_while_the_next_one_runs():
    made, alive = [], []

    class Failing(nn.Module):
        def forward(self, images):
            gc.collect()
            alive.append(sum(each() is not None for each in made))
            features = images + 1
            made.append(weakref.ref(features))
            raise SpeedupError("not this way")

    with pytest.raises(SpeedupError, match="not this way"):
        record(Failing(), {"images": torch.ones(2, 3)})
    assert len(alive) > 1
    assert set(alive) == {0}


class LastSumUnread(nn.Module):
    """Makes something at the end that nothing reads, as the last block of a WaveNet does of its residual stream."""

    def __init__(self, how):
        super().__init__()
        self.start, self.filter, self.residual = nn.Conv1d(3, 8, 1), nn.Conv1d(8, 8, 2), nn.Conv1d(8, 8, 1)
        self.skip, self.how = nn.Conv1d(8, 2, 1), how

    def forward(self, x):
        x = self.start(x)
        y = torch.tanh(self.filter(x))
        if self.how == "sum":
            x = x[:, :, 1:] + self.residual(y)
        elif self.how == "view":
            self.kept = y.view(-1, 8 * 2)
        return self.skip(y)


@pytest.mark.parametrize(
    ("how", "widths"), [("sum", {"start": 6, "filter": 6, "residual": 6}), ("view", {"start": 6, "filter": 8})]
)
def test_what_nothing_reads_must_fit_in_the_dense_model_too(how, widths):
    torch.manual_seed(0)
    model, x = LastSumUnread(how).eval(), torch.randn(3, 3, 3)
    groups = dependency_groups(model, x, [{"op_types": ["Conv1d"], "sparse_ratio": 0.25}])
    masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = to_dense(model, x, masks)
    assert {name: dense.get_submodule(name).out_channels for name in widths} == widths
    torch.testing.assert_close(dense(x), masked_model(model, x, masks)(x))


def test_a_tensor_with_the_id_of_a_freed_one_came_from_nowhere():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    recorder = recording._Recorder(model, recording._ModuleKinds(model), {"input": torch.randn(4, 6)})
    others = [torch.randn(4, 6) for _ in range(200)]
    again = [each for each in others if id(each) in recorder._givers]
    assert again  # that of an output between the layers
    assert all(recorder.node_of(each) is None for each in again)
    (output,) = (node for node in recorder.graph.nodes if node.op == "output")
    assert recorder.node_of(recorder.outputs) is output.args[0]
