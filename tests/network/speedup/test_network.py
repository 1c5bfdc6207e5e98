"""A Network: one trace for many questions, and never an answer about a model as it was."""

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nni_topo import RandomPruner, TopologicalPruner, compensate, dependency_groups, to_dense
from nni_topo.network.channels.rules import FIXED
from nni_topo.network.graph import tracing
from nni_topo.network.runtime import left_alone
from nni_topo.network.speedup import network as module
from nni_topo.network.speedup.network import Network, _has, _replacements, _shown
from nni_topo.pruners.testing.toys import toy_images, toy_model

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def traces(monkeypatch):
    """The models that were traced, by class name."""
    done = []
    record = tracing.record

    def counted(model, *args, **kwargs):
        done.append(type(model).__name__)
        return record(model, *args, **kwargs)

    monkeypatch.setattr(tracing, "record", counted)
    return done


def two_layers(width=4):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 2, 3, groups=2)).eval()


class Switched(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
        self.together, self.mix = True, torch.add
        self.settings = {"scale": 1.0}
        self.register_buffer("on", torch.tensor(True))

    def forward(self, x):
        if self.together and self.settings["scale"] and self.on:
            return torch.relu(self.mix(self.one(x), self.other(x)))
        return torch.relu(self.one(x))


def test_a_call_traces_a_model_once(traces):
    model, images = toy_model(), toy_images(2)
    config = dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert len(traces) == 1
    pruner = TopologicalPruner(model, config, calibration=[images])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert len(traces) == 3  # when it is made, and when it chooses
    better = compensate(model, masks, [images])
    assert len(traces) == 4
    to_dense(better, images, masks)
    assert len(traces) == 5


class Noting(nn.Module):
    """Followed part by part, and noting sizes at its first run, as detectors' pooling does."""

    def __init__(self):
        super().__init__()
        self.backbone = two_layers()
        self.head = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, x):
        places = self.backbone(x).flatten(2).transpose(1, 2).flatten(0, 1)
        if not hasattr(self, "seen"):
            self.seen = tuple(places.shape)
        return self.head(torch.stack([place * float(place.sum()) for place in places]))  # which no graph could hold


def test_parts_are_traced_once_though_a_model_notes_something_at_its_first_run(traces):
    model = Noting().eval()
    with left_alone(model):
        config = dependency_groups(model, IMAGES, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
        count = len(traces)
        assert count > 0
        assert "seen" not in vars(model)
        pruner = RandomPruner(model, config, seed=0)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        assert to_dense(model, IMAGES, masks).head[0].out_features == 3  # of 5
        assert len(traces) == count


def test_another_size_of_batch_is_traced_by_itself(traces):
    model = two_layers()
    with left_alone(model):
        for count in (1, 2, 1):
            assert set(Network.on(model, torch.rand(count, 3, 8, 8)).flow.layers) == {"0", "2"}
    assert len(traces) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "together", False),
        lambda model: model.settings.update(scale=0.0),
        lambda model: model.on.fill_(False),
    ],
    ids=["attribute", "settings", "buffer"],
)
def test_a_model_that_goes_another_way_is_traced_anew(change):
    model = Switched()
    assert set(Network.on(model, IMAGES).flow.layers) == {"one", "other"}
    assert len(dependency_groups(model, IMAGES, [{"op_names": ["one", "other"], "sparse_ratio": 0.5}])) == 2
    change(model)
    assert set(Network.on(model, IMAGES).flow.layers) == {"one"}


def test_a_model_whose_function_is_another_is_traced_anew():
    model = Switched()
    config = [{"op_names": ["one", "other"], "sparse_ratio": 0.5}]
    before = dependency_groups(model, IMAGES, config)
    assert len({entry["dependency_group_id"] for entry in before}) == 1
    model.mix = lambda one, other: one  # the other one still runs, and nothing reads it
    after = dependency_groups(model, IMAGES, config)
    assert len(after) == 2
    assert all("dependency_group_id" not in entry for entry in after)


def test_a_part_with_another_forward_is_traced_anew():
    model = nn.Sequential(Switched())
    assert set(Network.on(model, IMAGES).flow.layers) == {"0.one", "0.other"}
    model[0].forward = torch.relu
    assert not Network.on(model, IMAGES).flow.layers


def test_a_part_with_a_hook_is_traced_anew():
    model = nn.Sequential(Switched(), nn.Conv2d(4, 2, 1))
    assert FIXED not in Network.on(model, IMAGES).flow.entering_group_ids("1")
    with model[0].register_forward_hook(lambda module, inputs, output: output + torch.ones(4, 1, 1)):
        assert FIXED in Network.on(model, IMAGES).flow.entering_group_ids("1")
    assert FIXED not in Network.on(model, IMAGES).flow.entering_group_ids("1")


class Nested:
    __slots__ = ("inner",)

    def __init__(self, inner):
        self.inner = inner


SHARED = {"other": True}


class Depending(nn.Module):
    """Uses its second layer, or not, by what no walk over the model's attributes shows."""

    uses_other = True

    def __init__(self):
        super().__init__()
        self.one, self.other, self.last = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.nested = Nested({"a": {"b": {"c": True}}})
        self.factor = [torch.ones(8, 8)]
        told = {"other": True}
        self.asks = lambda: told["other"]

    def forward(self, x):
        asked = (type(self).uses_other, SHARED["other"], self.nested.inner["a"]["b"]["c"], self.asks())
        if all(asked) and self.one.weight.requires_grad:
            return self.last(torch.relu(self.one(x) * self.factor[0] + self.other(x)))
        return self.last(torch.relu(self.one(x) * self.factor[0]))


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(type(model), "uses_other", False),
        lambda model: SHARED.update(other=False),
        lambda model: model.nested.inner["a"]["b"].update(c=False),
        lambda model: model.asks.__closure__[0].cell_contents.update(other=False),
        lambda model: model.one.requires_grad_(False),
    ],
    ids=["class", "global", "nested", "closure", "frozen"],
)
@pytest.mark.quick_every(2)
def test_another_call_sees_all_that_changed_since(change, monkeypatch):
    monkeypatch.setattr(Depending, "uses_other", True)
    monkeypatch.setitem(SHARED, "other", True)
    model, asked = Depending().eval(), [{"op_names": ["one", "other"], "sparse_ratio": 0.5}]
    assert all("dependency_group_id" in entry for entry in dependency_groups(model, IMAGES, asked))
    masks = {"one": {"weight": (torch.arange(4) < 2).float()[:, None, None, None]}}
    change(model)
    assert not any("dependency_group_id" in entry for entry in dependency_groups(model, IMAGES, asked))
    dense = to_dense(model, IMAGES, masks)
    assert dense.one.out_channels == 2


def test_tensors_that_a_forward_finds_in_a_list_are_those_of_now():
    model = Depending().eval()
    for value in (1.0, 3.0):
        model.factor[0].fill_(value)
        with left_alone(model):
            graph, args = Network.on(model, IMAGES).graph(model)
        torch.testing.assert_close(graph(*args), model(IMAGES))


def test_no_answer_is_given_for_shapes_that_changed():
    model = two_layers()
    network = Network.on(model, IMAGES)
    assert (len(network.flow.entering_group_ids("2")), network.sizes["2"][0][0]) == (4, (2, 4, 6, 6))
    for name, layer in two_layers(6).named_children():
        model.set_submodule(name, layer)
    assert (len(network.flow.entering_group_ids("2")), network.sizes["2"][0][0]) == (6, (2, 6, 6, 6))
    model[0].stride = (2, 2)
    assert network.sizes["2"][0] == ((2, 6, 3, 3), (2, 2, 1, 1))


def test_weights_may_change_and_the_graph_takes_the_new_ones(traces):
    model = two_layers()
    with left_alone():
        before = Network.on(model, IMAGES).flow
        with torch.no_grad():
            model[0].weight.mul_(3.0)
        network = Network.on(model, IMAGES)
        assert network.flow is before
        graph, args = network.graph(model)
    torch.testing.assert_close(graph(*args), model(IMAGES))
    assert traces == ["Sequential"]


def test_what_the_forward_makes_itself_is_in_the_graph():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1)
            self.shift = torch.ones(4, 1, 1)

        def forward(self, x):
            return self.layer(x) * torch.tensor([1.0, 2.0, 3.0, 4.0]).view(4, 1, 1) + self.shift

    model = Net().eval()
    network = Network.on(model, IMAGES)
    assert network.flow.layers
    model.shift = torch.full((4, 1, 1), 5.0)
    graph, args = network.graph(model)
    torch.testing.assert_close(graph(*args), model(IMAGES))
    assert "_tensor_constant0" not in vars(model)


def test_a_wrapped_model_is_the_same_network(traces):
    model, images = toy_model(), toy_images(2)
    with left_alone():
        before = Network.on(model, images).flow
        config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
        pruner = TopologicalPruner(model, config)
        pruner.compress()
        assert Network.on(pruner.bound_model, images).flow is before


def test_a_graph_found_by_running_is_found_again(monkeypatch):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return torch.relu(self.one(x) if self.one(x).sum() > 0 else self.other(self.one(x)[:, :3]))

    model = Chosen().eval()
    with torch.no_grad():
        model.one.bias.fill_(9.0)
    assert set(Network.on(model, IMAGES).flow.layers) == {"one"}
    with torch.no_grad():
        model.one.bias.fill_(-9.0)
    assert set(Network.on(model, IMAGES).flow.layers) == {"one", "other"}


def test_a_model_that_is_gone_leaves_nothing_behind():
    model = two_layers()
    network = Network.on(model, IMAGES)
    assert network.flow.layers
    assert network.sizes
    held = weakref.ref(model)
    del model, network
    gc.collect()
    assert held() is None


def test_a_copy_is_known_only_as_long_as_it_is_one(traces):
    model = two_layers()
    with left_alone():
        flow = Network.on(model, IMAGES).flow
        other = copy.deepcopy(model)
        module.share_answers(model, other)
        assert Network.on(other, IMAGES).flow is flow
        other.set_submodule("0", nn.Conv2d(3, 4, 1))
        assert Network.on(other, IMAGES).flow is not flow
        assert Network.on(model, IMAGES).flow is flow
    assert len(traces) == 2


def test_an_answer_is_found_once_for_all_networks_on_a_model_unless_it_is_this_ones_own():
    model, found = two_layers(), []

    def find():
        found.append(len(found))
        return found[-1]

    with left_alone():
        one, other = Network.on(model, IMAGES), Network.on(model, IMAGES)
        assert [network.remember("shared", find) for network in (one, other, one)] == [0, 0, 0]
        own = [network.remember("own", find, kept=lambda _: False) for network in (one, other, one, other)]
        assert own == [1, 2, 1, 2]
        assert [Network.on(model, each).remember("shared", find) for each in (IMAGES[:1], IMAGES)] == [3, 0]
        model[0].stride = (2, 2)
        assert [network.remember("shared", find) for network in (one, other)] == [4, 4]
        assert one.remember("own", find, kept=lambda _: False) == 5
    with left_alone():
        assert [network.remember("shared", find) for network in (one, other)] == [6, 6]
        assert one.remember("own", find, kept=lambda _: False) == 7
    assert [network.remember("shared", find) for network in (one, other, one)] == [8, 9, 8]  # each by itself


class Held:
    def __init__(self, value):
        self.value = value


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (1, 1, True),
        (1, 1.0, False),
        (None, 0, False),
        (torch.ones(2), torch.zeros(2), True),  # what has several entries is computed with, not looked at
        (torch.ones(2), torch.ones(3), False),
        (torch.ones(2), torch.ones(2, dtype=torch.int64), False),
        (torch.tensor([1.0]), torch.tensor([2.0]), False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": [1]}, {"a": [2]}, False),
        ({"a": 1}, {"b": 1}, False),
        ((1, torch.ones(2)), (1, torch.zeros(2)), True),
        (nn.Linear(2, 3), nn.Linear(4, 5), True),  # modules are listed by themselves
        (nn.Linear(2, 3), nn.ReLU(), False),
        (Held(1), Held(1), True),
        (Held(1), Held(2), False),
        (Held(Held(1)), Held(Held(2)), False),
        ([[torch.ones(2)]], [[torch.zeros(2)]], True),
        ([[[1]]], [[[2]]], False),
        (torch.add, torch.sub, False),
    ],
)
def test_what_a_trace_may_depend_on_is_told_from_what_it_may_not(one, other, same):
    """Objects that hold equal things are alike, wherever they lie."""
    assert (module._shown(one) == module._shown(other)) is same
    models = [two_layers(), two_layers()]
    for model, value in zip(models, (one, other), strict=True):
        vars(model[0])["held"] = value
    structures = [module._structure(model) for model in models]
    assert (structures[0] == structures[1]) is same


def test_modules_that_are_one_or_two_are_different_structures():
    layer = nn.Linear(4, 4)
    twice, once = nn.Sequential(layer, layer), nn.Sequential(layer, nn.Linear(4, 4))
    assert module._structure(twice) != module._structure(once)
    assert module._structure(copy.deepcopy(twice)) == module._structure(twice)
    one, two = nn.Threshold(0.1, 0.0), nn.Threshold(0.2, 0.0)
    assert module._structure(nn.Sequential(one, two, one)) != module._structure(nn.Sequential(one, two, two))


def test_planes_are_the_pixels_of_convolutions_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2), nn.ConvTranspose2d(4, 2, 2, stride=2), nn.Flatten(), nn.Linear(72, 5)
    )
    assert Network.on(model, IMAGES).planes == {"0": ((8, 8), (3, 3)), "1": ((3, 3), (6, 6))}


def test_what_holds_itself_is_written_down_too():
    held = Held({})
    held.value["again"] = [held]
    assert module._shown(held) == module._shown(held)


class Deciding(nn.Module):
    """Reads a value to decide in evaluation mode, in training mode, in both or in none."""

    def __init__(self, *, evaluating, training):
        super().__init__()
        self.first, self.last, self.beside = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 3)
        self.reads = {False: evaluating, True: training}

    def forward(self, x):
        x = self.first(x)
        if self.reads[self.training] and x.abs().sum() > -1:
            x = x.relu()
        return (self.last(x), self.beside(x)) if self.training else self.last(x)


@pytest.mark.parametrize("reads", [False, True])
def test_a_graph_reads_values_if_the_forward_does(reads):
    network = Network.on(Deciding(evaluating=reads, training=False).eval(), torch.randn(2, 4))
    assert network._recorded().reads_values is reads


def test_a_graph_runs_on_any_call():
    model, rows, others = Deciding(evaluating=False, training=False).eval(), torch.randn(2, 4), torch.randn(2, 4)
    network = Network.on(model, rows)
    graph_module, args = network.graph(model)
    assert [node.target for node in graph_module.graph.nodes if node.op == "call_module"] == ["first", "last"]
    assert torch.equal(args[0], rows)
    graph_module, args = network.graph(model, ((others,), {}))
    assert torch.equal(args[0], others)
    torch.testing.assert_close(graph_module(*args), model(others))


class Pyramid(nn.Module):
    """A convolution that is called on images of two sizes, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 3, 3, stride=2, padding=1)
        self.up, self.head = nn.ConvTranspose2d(3, 4, 2, stride=2), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.up(self.down(self.down(x))).mean((2, 3)))


def test_convolutions_have_the_planes_of_their_first_call():
    assert Network.on(Pyramid().eval(), torch.rand(2, 3, 12, 8)).planes == {
        "down": ((12, 8), (6, 4)), "up": ((3, 2), (6, 4)),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "is_same"),
    [
        (1, 1, True),
        (1, 2, False),
        (1, True, False),
        (1, 1.0, False),
        (None, 0, False),
        ("a", "a", True),
        (torch.ones(2, 3), torch.zeros(2, 3), True),  # what is computed with is not looked at
        (torch.ones(2, 3), torch.ones(3, 2), False),
        (torch.ones(2, 3), torch.ones(2, 3).double(), False),
        (torch.ones(2, 3), torch.ones(2, 3, device="meta"), False),
        (torch.tensor(True), torch.tensor(False), False),
        (torch.ones(1, 1), torch.zeros(1, 1), False),
        (torch.ones(1, device="meta"), torch.zeros(1, device="meta"), True),
        ({"a": 1}, {"a": 2}, False),
        ({"a": torch.ones(2)}, {"a": torch.zeros(2)}, True),
        ({"a": 1}, {"b": 1}, False),
        ([1, [2, (3,)]], [1, [2, (4,)]], False),
        ([1, torch.ones(2)], [1, torch.zeros(2)], True),
        ([[[torch.ones(2)]]], [[[torch.zeros(2)]]], True),
        ([[[[torch.ones(2)]]]], [[[[torch.zeros(2)]]]], False),  # from the third level on as it prints itself
        ({"a": {"b": {"c": torch.ones(2)}}}, {"a": {"b": {"c": torch.zeros(2)}}}, True),
        ({"a": {"b": {"c": {"d": torch.ones(2)}}}}, {"a": {"b": {"c": {"d": torch.zeros(2)}}}}, False),
        (nn.Linear(2, 2), nn.Linear(3, 3), True),  # modules are written down by themselves
        (nn.Linear(2, 2), nn.Identity(), False),
        (SimpleNamespace(a=1), SimpleNamespace(a=2), False),
        (SimpleNamespace(a=torch.ones(2)), SimpleNamespace(a=torch.zeros(2)), True),
        (torch.relu, torch.relu, True),
        (torch.relu, torch.sigmoid, False),
    ],
)
def test_values_are_written_down_as_far_as_a_trace_may_depend_on_them(one, other, is_same):
    assert (_shown(one) == _shown(other)) is is_same


def test_hooks_and_other_forwards_replace_what_a_class_computes():
    plain, hooked, replaced, given = (nn.Linear(2, 2) for _ in range(4))
    hooked.register_forward_hook(lambda *_: None)
    replaced.forward = torch.relu
    given.forward = given.forward  # the class's own
    before = nn.Linear(2, 2)
    before.register_forward_pre_hook(lambda *_: None)
    assert _replacements(plain) == _replacements(given) == "[]"
    assert all(_replacements(each) != "[]" for each in (hooked, replaced, before))


def test_attributes_are_looked_up_by_their_path():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)))
    assert _has(model, "0.0.weight")
    assert not _has(model, "0.1.weight")
    assert not _has(model, "0.0.scale")
