"""What is done to a model isn't done to copies of all its weights, nor to the weights themselves."""

import copy
import functools
import multiprocessing
import threading
import warnings
import weakref
from collections import OrderedDict, UserDict, UserList, defaultdict, deque, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import nni_topo
from nni_topo import RandomPruner, dependency_groups, to_dense
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.copying import RandomWeights, detached_copy, in_double, put_parameters

CONFIG = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]


class Seen(nn.Conv2d):
    """A convolution that notes the sizes of the images that enter."""

    sides: ClassVar[list[int]] = []

    def forward(self, x):
        self.sides.append(x.shape[-1])
        return super().forward(x)


class Model(nn.Module):
    """A gate, whose removed channels are constants, and a norm; ``side``: takes images of so many pixels alone."""

    def __init__(self, side=None):
        super().__init__()
        self.side = side
        self.first, self.norm, self.second = Seen(3, 8, 3), nn.BatchNorm2d(8), Seen(8, 8, 1)
        self.third, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 2)

    def forward(self, x):
        if self.side is not None:
            x = x.view(-1, 3, self.side, self.side)
        x = torch.sigmoid(self.second(self.norm(self.first(x)).relu()))
        return self.head(self.third(x).relu().mean((2, 3)))


@pytest.mark.parametrize("side", [None, 100])
def test_a_rehearsal_runs_on_a_corner_of_large_images_where_the_graph_lets_it(side):
    Seen.sides.clear()
    groups = dependency_groups(Model(side), torch.randn(1, 3, 100, 100), CONFIG)
    assert [entry["op_names"][0] for entry in groups] == ["first", "second", "third"]
    assert {100, 98} <= set(Seen.sides)
    assert (33 in Seen.sides) == (side is None)


def test_the_model_keeps_its_weights_and_shares_none_with_the_dense_one():
    model = Model().train()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    groups = dependency_groups(model, torch.randn(1, 3, 20, 20), CONFIG)
    pruner = RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    before |= {name: (tensor, before[name][1]) for name, tensor in model.state_dict(keep_vars=True).items()}
    dense = to_dense(model, torch.randn(1, 3, 20, 20), masks)
    after = model.state_dict(keep_vars=True)
    assert all(after[name] is tensor and torch.equal(tensor, value) for name, (tensor, value) in before.items())
    places = {tensor.untyped_storage().data_ptr() for tensor in after.values()}
    assert not places & {tensor.untyped_storage().data_ptr() for tensor in dense.state_dict().values()}
    assert all(parameter.requires_grad for parameter in dense.parameters())


def test_a_light_copy_holds_the_weights_until_others_are_put_in_their_places():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    copied = detached_copy(model, light=True)
    assert copied[0].weight is model[0].weight
    assert copied[1].running_mean is not model[1].running_mean
    given = []
    put_parameters(copied, lambda name, old: given.append(name) or torch.zeros_like(old))
    assert given == ["0.weight", "0.bias", "1.weight", "1.bias", "2.bias"]
    assert copied[2].weight is copied[0].weight is not model[0].weight
    assert not bool(copied[0].weight.any())
    assert bool(model[0].weight.all())


class Tied(nn.Module):
    """An embedding whose weights are the head's too, a recurrent layer and a norm, in half precision."""

    def __init__(self):
        super().__init__()
        self.table, self.units, self.norm = nn.Embedding(7, 4), nn.LSTM(4, 4, batch_first=True), nn.LayerNorm(4)
        self.conv, self.head = nn.Conv1d(4, 4, 1), nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("shift", torch.ones(4))
        self.bfloat16()

    def forward(self, numbers):
        values = self.norm(self.units(self.table(numbers))[0] + self.shift)
        return self.head(self.conv(values.mT).mT) @ self.table.weight


def test_a_copy_in_double_precision_computes_as_one_and_holds_the_large_weights_as_they_are():
    torch.manual_seed(0)
    model, numbers = Tied().eval(), torch.randint(7, (3, 5))
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    full = detached_copy(model).double()
    copied = in_double(model)
    with torch.no_grad():
        found, expected = copied(numbers), full(numbers)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(copied.get_submodule(n)._parameters["weight"] is model.get_submodule(n).weight for n in ("conv", "head"))
    now = model.state_dict(keep_vars=True)
    for name, (tensor, values) in before.items():
        assert now[name] is tensor
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, values)
    assert type(model.head) is nn.Linear
    for name in ("conv", "head", "table"):  # a norm's, say, is asked for
        one, other = (type(each.get_submodule(name)) for each in (copied, model))
        assert (one.__name__, one.__module__) == (other.__name__, other.__module__)
        assert issubclass(one, other)


def test_random_weights_differ_from_row_to_row_and_from_layer_to_layer():
    numbers = RandomWeights(torch.randn, torch.Generator().manual_seed(0))
    one, other = (numbers.like(torch.empty(700, 512, 1, 1), 0.1) for _ in range(2))
    rows = torch.cat([one, other]).flatten(1)
    assert len(rows.unique(dim=0)) == 1400
    assert not bool((one == other).any())
    assert float(one.std()) == pytest.approx(0.1, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_random_weights_are_those_that_a_generator_draws_and_it_goes_on_behind_them(draw, dtype):
    own, expected = torch.Generator(), torch.Generator()
    torch.set_default_dtype(dtype)
    try:
        with torch.random.fork_rng([]):
            for seed in (7, 8, 7):
                for generator in (own, expected, torch.default_generator):
                    generator.manual_seed(seed)
                drawn = draw(RandomWeights._DRAWN, generator=expected)
                for given in (own, None):
                    numbers = RandomWeights(draw, given)
                    assert torch.equal(numbers.like(torch.empty(1000), 1.0), drawn[102:1102])
                after = draw(5, generator=expected)
                assert torch.equal(draw(5, generator=own), after)
                assert torch.equal(draw(5), after)
    finally:
        torch.set_default_dtype(torch.float32)


class Unlike(nn.Module):
    """Attributes that are more than what they hold: shared, looking at one another, or copied in a way of their own."""

    class Counted(nn.Linear):
        """A layer that says how it is copied."""

        copies = 0

        def __deepcopy__(self, memo):
            type(self).copies += 1
            return type(self)(self.in_features, self.out_features)

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(2, 2), self.Counted(2, 2), nn.LSTM(2, 3)])
        self.same = self.inner[0]
        self.settings = {"widths": [2, 2], "layer": self.inner[0]}
        self.inner[0].settings = self.settings
        self.register_buffer("table", torch.arange(6.0).view(2, 3))
        self.register_buffer("row", self.table[1])
        self.register_buffer("flat", self.table.view(-1))
        self.register_buffer("number", torch.tensor(3.0))
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.computed = self.inner[0].weight * 2
        self.empty, self.nothing = {}, None
        self.inner[0].register_forward_hook(lambda module, args, output: output + 1)

    def forward(self, x):
        return self.inner[2](self.inner[0](x))[0] + self.number


@pytest.mark.parametrize("light", [True, False])
def test_a_copy_shares_within_itself_what_the_model_does_and_nothing_with_the_model(light):
    model = Unlike()
    copied = detached_copy(model, light=light)
    assert copied.same is copied.inner[0] is copied.settings["layer"] is not model.same
    assert copied.settings is copied.inner[0].settings is not model.settings
    copied.settings["widths"].append(3)
    assert model.settings["widths"] == [2, 2]
    assert copied.inner[1].copies == 1
    Unlike.Counted.copies = 0
    assert (copied.inner[0].weight is model.inner[0].weight) == light
    assert torch.equal(copied.computed, model.computed)
    assert copied.computed.is_leaf
    copied.table.zero_()
    assert not bool(copied.row.any())
    assert not bool(copied.flat.any())
    assert bool(model.row.any())
    copied.number.fill_(7.0)
    copied.empty["new"] = 1
    assert float(model.number) == 3.0
    assert model.empty == {}
    assert copied.wide.stride() == (0,)
    x = torch.randn(3, 2)
    assert torch.allclose(copied(x) - 7.0, model(x) - 3.0, atol=1e-6)
    assert list(map(type, copied.modules())) == list(map(type, model.modules()))


def test_public_functions_copy_models_whose_weights_are_computed_with_gradients(tmp_path):
    # After a forward in training the weight of PyTorch's old weight norm is no leaf, which deepcopy refuses.
    torch.manual_seed(0)
    inner = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU()]
    model = nn.Sequential(*inner, nn.Flatten(), nn.Linear(8 * 16, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.nn.utils.weight_norm(model[0])
    images = torch.randn(16, 3, 8, 8)
    model(images).sum().backward()
    nni_topo.recalibrate_batch_norm(model, [images])
    nni_topo.analysis.sensitivity(model, images[:2], lambda net: 0.0, [0.5], pruner="l1")
    nni_topo.speedup.profile({"net": model}, images[:2], runs=1)
    dense = nni_topo.shrink(model, [images], {"params": 0.7}, distill={"steps": 2})
    assert dense(images).shape == (16, 4)


class Block(nn.Module):
    """A residual block that computes with functions: ``how`` says who holds them."""

    def __init__(self, how):
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.steps = []
        if how == "attribute":
            self.act = lambda x: torch.relu(x) * self.scale
        elif how == "list":
            self.steps = [lambda x: torch.relu(x) * self.scale]
        else:
            self.act = functools.partial(_scaled, self)
        if how in FORWARDS:
            self.forward = FORWARDS[how](self, self.forward)
        elif how == "hook":
            self.second.register_forward_hook(lambda module, args, output: output * self.scale)

    def forward(self, x):
        act = self.steps[0] if self.steps else self.act
        return x + self.second(act(self.first(x)))


def _scaled(block, x):
    return torch.relu(x) * block.scale


def _closure(block, forward):
    return lambda x: checkpoint(forward, x, use_reentrant=False)


def _wrapper(block, forward):
    @functools.wraps(forward)
    def run(x):
        return forward(x)

    return run


def _recursive(block, forward):
    def run(x, depth=0):
        return forward(x) if depth else run(x, depth + 1)

    return run


FORWARDS = {
    "closure": _closure,
    "wrapper": _wrapper,
    "recursive": _recursive,
    "decorator": lambda block, forward: torch.autocast("cpu", enabled=False)(forward),
    "default": lambda block, forward: lambda x, own=block: type(own).forward(own, x),
    "compiled": lambda block, forward: torch.compile(forward, backend="eager"),
    "disabled": lambda block, forward: torch.compiler.disable(forward),
}


def _network(how):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), Block(how), nn.ReLU(), nn.Conv2d(4, 6, 1)).eval()


@pytest.mark.parametrize("how", [*FORWARDS, "attribute", "list", "hook", "partial"])
def test_functions_that_a_model_holds_belong_to_the_copy(how):
    images = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = _network(how)
    held = {name: vars(model[1]).get(name) for name in ("forward", "act")}
    cells = [cell.cell_contents for each in held.values() for cell in getattr(each, "__closure__", None) or ()]
    with torch.no_grad():
        expected = model(images)
        copied = detached_copy(model)
        torch.testing.assert_close(copied(images), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied(images).abs().max() == 0.0
        torch.testing.assert_close(model(images), expected)  # the original computes with its own weights
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        assert copied(images).abs().max() == 0.0
    assert all(vars(model[1]).get(name) is each for name, each in held.items())
    after = [cell.cell_contents for each in held.values() for cell in getattr(each, "__closure__", None) or ()]
    assert all(one is other for one, other in zip(cells, after, strict=True))


@pytest.mark.parametrize("how", ["closure", "compiled", "attribute", "hook"])
@pytest.mark.quick_every(2)
def test_a_smaller_network_computes_without_the_one_it_was_made_of(how):
    images = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = _network(how)
    small = nni_topo.shrink(model, images.split(16), {"flops": 0.6}, distill=False)
    assert "1.first" in small.report.pruned_layers
    with torch.no_grad():
        before = small(images)
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        torch.testing.assert_close(small(images), before)


def test_a_forward_that_reads_a_global_model_is_refused():
    model = _network("partial")
    names = {"block": model[1], "Block": Block}
    exec("forward = block.forward\nblock.forward = lambda x: forward(x)", names)
    with pytest.raises(ConfigError, match=r"got the global name 'forward' \(forward of a Block\)"):
        nni_topo.shrink(model, [torch.randn(16, 3, 6, 6)], {"flops": 0.6}, distill=False)


class Holds(nn.Module):
    """Has something beside its layers."""

    def __init__(self, held):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 12, 3), nn.Linear(12, 4)
        self.held = held

    def forward(self, images):
        return self.head(self.first(images).relu().mean((2, 3)))


class Writer:
    """Writes from another thread, as writers of logs do."""

    def __init__(self):
        self.lock, self.lines = threading.Lock(), ["one"]


@pytest.mark.parametrize("make", [threading.Lock, Writer, multiprocessing.Queue, lambda: [threading.Lock(), 3]])
@pytest.mark.quick_every(2)
def test_what_cannot_be_copied_is_one_for_the_model_and_its_copies(make):
    torch.manual_seed(0)
    model, images = Holds(make()).eval(), list(torch.randn(64, 3, 8, 8).split(16))
    before = copy.deepcopy(model.state_dict())
    small = nni_topo.shrink(model, images, {"flops": 0.5}, distill={"steps": 5})
    assert small.held is model.held
    assert small.first.out_channels < 12
    assert torch.equal(model.first.weight, before["first.weight"])
    assert model.first.weight.data_ptr() != detached_copy(model).first.weight.data_ptr()


def test_an_open_file_is_one_for_the_model_and_its_copies(tmp_path):
    with (tmp_path / "log.txt").open("w") as log:
        assert detached_copy(Holds(log)).held is log


def test_a_copy_has_a_generator_of_its_own_in_the_same_state():
    model = Holds(torch.Generator().manual_seed(5))
    torch.rand(3, generator=model.held)
    copied = detached_copy(model)
    drawn = torch.rand(4, generator=copied.held)
    assert torch.equal(torch.rand(4, generator=model.held), drawn)


@pytest.mark.parametrize("part", ["layer", "tensor"])
def test_an_attribute_that_cannot_be_copied_and_holds_layers_is_refused(part):
    model = Holds({"lock": threading.Lock()})
    model.held["deep"] = [(model.first,) if part == "layer" else torch.ones(2)]
    with pytest.raises(ConfigError, match=r"got dict: cannot pickle '_thread.lock' object \(Holds.held\)"):
        nni_topo.shrink(model, [torch.randn(16, 3, 8, 8)], {"flops": 0.5}, distill=False)


class LooksUp(nn.Module):
    """A block reaches the network around it by a weak reference, which is no cycle for the garbage collector."""

    def __init__(self):
        super().__init__()
        self.first, self.block, self.head = nn.Conv2d(3, 12, 3), nn.Sequential(nn.ReLU()), nn.Linear(12, 4)
        self.block.around = weakref.ref(self)

    def forward(self, images):
        return self.block.around().head(self.block(self.first(images)).mean((2, 3)))


@pytest.mark.parametrize("light", [False, True])
def test_a_weak_reference_to_a_module_refers_to_its_copy(light):
    model = LooksUp().eval()
    copied = detached_copy(model, light=light)
    assert copied.block.around() is copied
    assert model.block.around() is model


def test_a_smaller_network_with_weak_references_stands_alone():
    torch.manual_seed(0)
    model, images = LooksUp().eval(), list(torch.randn(64, 3, 8, 8).split(16))
    small = nni_topo.shrink(model, images, {"flops": 0.5}, distill=False)
    with torch.no_grad():
        before = small(images[0])
    assert small.block.around() is small
    del model
    with torch.no_grad():
        assert torch.equal(small(images[0]), before)


Pair = namedtuple("Pair", "value other")


@dataclass
class Record:
    value: Any


@dataclass(frozen=True)
class Frozen:
    value: Any


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    value: Any


class Slots:
    __slots__ = ("__weakref__", "value")

    def __init__(self, value):
        self.value = value


class Plain:
    def __init__(self, value):
        self.value = value


def _value(held):
    return held.value


def _first(held):
    return next(iter(held))


def _by_name(held):
    return held["one"]


# How a value is put into what a model holds, and found there.
PLACES = {
    "attribute": (lambda value: value, lambda held: held),
    "list": (lambda value: [value], _first),
    "tuple": (lambda value: (3, (value,)), lambda held: held[1][0]),
    "dict": (lambda value: {"one": value}, _by_name),
    "OrderedDict": (lambda value: OrderedDict(one=value), _by_name),
    "defaultdict": (lambda value: defaultdict(list, one=value), _by_name),
    "UserDict": (lambda value: UserDict(one=value), _by_name),
    "UserList": (lambda value: UserList([value]), _first),
    "deque": (lambda value: deque([value], maxlen=2), _first),
    "set": (lambda value: {value}, _first),
    "frozenset": (lambda value: frozenset([value]), _first),
    "key": (lambda value: {value: 1}, _first),
    "namedtuple": (lambda value: Pair(value, 3), _value),
    "dataclass": (Record, _value),
    "frozen": (Frozen, _value),
    "frozen slots": (FrozenSlots, _value),
    "slots": (Slots, _value),
    "object": (Plain, _value),
    "namespace": (lambda value: SimpleNamespace(value=value), _value),
    "nested": (lambda value: deque([Frozen({"a": Pair([value], 3)})]), lambda held: held[0].value["a"].value[0]),
}


class Keeps(nn.Module):
    """Holds something made of itself in a place of its own, and computes with it."""

    def __init__(self, place, make):
        super().__init__()
        self.inner, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(0.5))
        put, self.get = PLACES[place]
        self.__dict__["held"] = put(make(self))

    def times(self, x):
        return x * self.scale

    def forward(self, x):
        return self.get(self.held)(x)


def _in_a_closure(place):
    put, get = PLACES[place]

    def make(model):
        held = put(model.inner)
        return lambda x: get(held)(x)

    return make


def _with_default(model):
    def run(x, layers=[model.inner], *, scales={"one": model.scale}):  # noqa: B006
        return layers[0](x) * scales["one"]

    return run


def _with_attribute(model):
    def run(x):
        return run.layers[0](x)

    run.layers = [model.inner]
    return run


def _over_parameter(model):
    scales = [model.scale]
    return lambda x: x * scales[0]


def _over_methods(model):
    steps = {"times": [model.times]}
    return lambda x: steps["times"][0](x)


def _over_weak(model):
    own = weakref.ref(model)
    return lambda x: own().times(x)


def _over_another(model):
    def first(x):
        return Plain(model).value.times(x)

    held = Slots(first)
    return lambda x: held.value(x)


FUNCTIONS = {
    "lambda": lambda model: lambda x: x * model.scale,
    "method": lambda model: model.times,
    "partial": lambda model: functools.partial(_scaled, model),
    "cached": lambda model: functools.lru_cache(maxsize=2)(lambda x: x * model.scale),
    "default": _with_default,
    "attribute": _with_attribute,
    "parameter": _over_parameter,
    "methods": _over_methods,
    "weak": _over_weak,
    "another": _over_another,
    "of an object": lambda model: Called(model).run,
    "of a table": lambda model: Called({"one": model}).named,
    "weak method": lambda model: Called(weakref.WeakMethod(model.times)).found,
}


class Called:
    def __init__(self, held):
        self.held = held
        self.get = getattr(held, "get", None)

    def run(self, x):
        return self.held.times(x)

    def named(self, x):
        return self.get("one").times(x)

    def found(self, x):
        return self.held()(x)


def _assert_the_copy_is_alone(model):
    """A copy computes with its own parameters alone, and goes on without the model, which stays as it is."""
    x = torch.ones(2, 3)  # of which each call gets a copy, for a cache knows what it has seen
    with torch.no_grad():
        before = {name: value.clone() for name, value in model.state_dict().items()}
        expected, copied = model(x), detached_copy(model)
        assert torch.equal(copied(x.clone()), expected)
        for parameter in copied.parameters():
            parameter.zero_()
        assert copied(x.clone()).abs().max() == 0.0
        assert torch.equal(model(x.clone()), expected)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
        del model
        assert copied(x.clone()).abs().max() == 0.0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_function_belongs_to_the_copy_wherever_a_model_holds_it(place, what):
    _assert_the_copy_is_alone(Keeps(place, FUNCTIONS[what]))


@pytest.mark.parametrize("place", PLACES)
def test_what_a_function_holds_of_the_model_is_the_copys_in_whatever_it_lies(place):
    _assert_the_copy_is_alone(Keeps("attribute", _in_a_closure(place)))


class LooksFor(nn.Module):
    """Finds its layer by a weak reference somewhere."""

    def __init__(self, make, get):
        super().__init__()
        self.inner, self.get = nn.Linear(3, 3), get
        self.__dict__["held"] = make(self.inner)

    def forward(self, x):
        return self.get(self.held)(x)


def _key_table(layer):
    table = weakref.WeakKeyDictionary()
    table[layer] = [2.0]
    return table


WEAK = {
    "proxy": (weakref.proxy, lambda held: held),
    "method": (lambda layer: weakref.WeakMethod(layer.forward), lambda held: held()),
    "values": (lambda layer: weakref.WeakValueDictionary(one=layer), _by_name),
    "keys": (_key_table, _first),
    "set": (lambda layer: weakref.WeakSet([layer]), _first),
    "callback": (lambda layer: weakref.ref(layer, lambda _: None), lambda held: held()),
    "parameter": (lambda layer: [weakref.ref(layer.weight)], lambda held: lambda x: x @ held[0]()),
    "proxies": (lambda layer: [weakref.proxy(layer)], _first),
    **{
        f"in {place}": (
            lambda layer, put=put: put(weakref.ref(layer)),
            lambda held, get=get: get(held)(),
        )
        for place, (put, get) in PLACES.items()
    },
}


@pytest.mark.parametrize("how", WEAK)
def test_weak_references_refer_to_the_copy_wherever_a_model_holds_them(how):
    _assert_the_copy_is_alone(LooksFor(*WEAK[how]))


def test_a_weak_reference_to_an_object_refers_to_the_copy_that_the_model_holds_of_it():
    model, outside = Holds(None), Plain(3)
    model.seen = [weakref.ref(outside), weakref.WeakSet([outside])]
    model.early = [weakref.ref(model.head.weight)]
    model.late = Plain(model.first)
    model.late.own = weakref.ref(model.late)
    model.refs = Pair(weakref.ref(model.late), {weakref.ref(model.late.value)})
    copied = detached_copy(model)
    assert copied.refs.value() is copied.late is copied.late.own()
    assert next(iter(copied.refs.other))() is copied.first
    assert copied.early[0]() is copied.head.weight
    assert copied.seen[0]() is outside  # of which nobody would hold a copy
    assert list(copied.seen[1]) == [outside]
    assert model.refs.value() is model.late is model.late.own()


def test_a_dead_weak_reference_stays_dead():
    gone = nn.Linear(2, 2)
    model = Holds([weakref.ref(gone), weakref.proxy(gone), weakref.WeakMethod(gone.forward)])
    del gone
    copied = detached_copy(model)
    assert copied.held[0]() is copied.held[2]() is None
    with pytest.raises(ReferenceError):
        copied.held[1].weight  # noqa: B018


def test_functions_keep_what_they_share_and_what_is_not_of_the_model():
    model = Holds({})
    lines, count = [], 0

    def write(x):
        nonlocal count
        count += 1
        lines.append(x)
        return model.head(x)

    model.held |= {"write": write, "read": lambda: (count, lines), "relu": torch.relu, "pool": nn.functional.max_pool2d}
    model.held["self"] = model.held
    model.held["again"] = Frozen(write)
    both = {"layer": model.first}
    model.one, model.other = (lambda: both), (lambda: both)
    copied = detached_copy(model)
    assert copied.held is not model.held
    assert copied.held["self"] is copied.held
    assert copied.held["again"].value is copied.held["write"] is not write
    assert copied.held["read"] is model.held["read"]
    copied.held["write"](torch.ones(12))
    assert copied.held["read"]()[0] == 1
    assert copied.held["read"]()[1] is lines
    assert len(lines) == 1
    assert copied.held["relu"] is torch.relu
    assert copied.held["pool"] is nn.functional.max_pool2d
    assert copied.one() is copied.other() is not both
    assert copied.one()["layer"] is copied.first
    assert both["layer"] is model.first


def test_a_function_and_the_model_share_settings_in_the_copy_too():
    model = Holds({"rate": [1]})
    settings = model.held
    model.rate = Slots(lambda: settings["rate"])
    copied = detached_copy(model)
    copied.held["rate"].append(2)
    assert copied.rate.value() == [1, 2]
    assert model.rate.value() == [1]


def test_functions_hold_the_tables_of_the_copy_itself():
    model = Holds(None)
    layers, own = model._modules, vars(model)
    model.held = [lambda: layers, lambda: own, model._modules.get]
    copied = detached_copy(model)
    assert copied.held[0]() is copied._modules
    assert copied.held[1]() is vars(copied)
    copied.head = nn.Identity()
    assert copied.held[2]("head") is copied.head
    assert model.held[2]("head") is model.head is not copied.head


def test_the_dictionary_of_an_object_in_a_closure_is_copied_with_its_layers():
    class Part:
        def __init__(self):
            self.layer = nn.Linear(12, 4)

    part = Part()
    attributes = vars(part)
    model = Holds(lambda features: attributes["layer"](features))
    copied = detached_copy(model)
    features = torch.randn(2, 12)
    before = model.held(features)
    with torch.no_grad():
        attributes["layer"].weight.zero_()
    assert torch.equal(copied.held(features), before)
    assert not torch.equal(model.held(features), before)


def test_functions_that_hold_one_another_are_copied_as_they_are():
    model = Holds(None)

    def even(n):
        return model.head.bias if n == 0 else odd(n - 1)

    def odd(n):
        return even(n - 1)

    steps = []
    steps += [even, odd, lambda: steps]
    model.held = deque(steps)
    copied = detached_copy(model)
    assert copied.held[1](3) is copied.head.bias
    assert copied.held[2]()[0] is copied.held[0] is not even
    assert model.held[1](3) is model.head.bias


def test_an_unregistered_layer_in_a_closure_is_copied():
    layer = nn.BatchNorm1d(3)
    model = Holds(lambda x: layer(x))
    detached_copy(model).train().held(torch.randn(4, 3))
    assert int(layer.num_batches_tracked) == 0


class Own:
    """Says how it is copied."""

    def __init__(self, held):
        self.held = held

    def __deepcopy__(self, memo):
        made = memo[id(self)] = type(self)(None)
        made.held = copy.deepcopy(self.held, memo)
        return made


@pytest.mark.parametrize("make", [lambda model: [lambda: model], lambda model: [weakref.ref(model)]])
def test_an_object_that_says_how_it_is_copied_holds_functions_and_references_of_the_copy(make):
    model = Holds(None)
    model.held = Own(make(model))
    copied = detached_copy(model)
    assert copied.held.held[0]() is copied
    assert model.held.held[0]() is model


def test_a_lock_in_a_closure_is_one_for_the_model_and_its_copies():
    model, lock = Holds(None), threading.Lock()
    model.held = Plain(lambda: (model, lock))
    copied = detached_copy(model)
    assert copied.held.value() == (copied, lock)


def _uncopied(model, held):
    held |= {"lock": threading.Lock(), "layer": model.first}
    return lambda: held


def test_what_cannot_be_copied_in_a_closure_and_holds_layers_is_refused_by_its_name():
    model = Holds(None)
    model.held = (Plain(_uncopied(model, {})),)
    with pytest.raises(ConfigError, match=r"a variable of a function .* got dict: .*lock.* \(held in Holds.held\)"):
        detached_copy(model)


def test_a_generator_that_computes_with_layers_is_refused():
    model = Holds(None)
    model.held = [model.first.weight * factor for factor in (1, 2)], (model.first.weight * n for n in range(3))
    with pytest.raises(ConfigError, match=r"cannot pickle 'generator' object \(Holds.held\)"):
        detached_copy(model)
    model.held = (n for n in range(3))
    assert detached_copy(model).held is model.held


class KeptByItsClass(Holds):
    last: Any = None

    def forward(self, images):
        return super().forward(images) * self.factor()

    def factor(self):
        return KeptByItsClass.last.head.bias


def test_a_class_attribute_that_holds_the_model_is_refused_where_it_is_read():
    model = KeptByItsClass(None)
    detached_copy(model)
    try:
        KeptByItsClass.last = model
        with pytest.raises(ConfigError, match=r"attribute 'last' \(read by KeptByItsClass.factor\)"):
            detached_copy(model)
        detached_copy(KeptByItsClass(None))  # another one's layers are constants
    finally:
        KeptByItsClass.last = None


def _dense_and_masked(model):
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < 6).float()
    masks = {"first": {"weight": mask.view(-1, 1, 1, 1).expand(12, 3, 3, 3).clone(), "bias": mask}}
    dense, masked = to_dense(model, images, masks), nni_topo.masked_model(model, images, masks)
    with torch.no_grad():
        model.first.weight.mul_(masks["first"]["weight"])
        model.first.bias.mul_(mask)
        return dense, dense(images), masked(images), model(images)


class Runs(Holds):
    """Calls its layers by a function."""

    def __init__(self):
        super().__init__(None)
        layers = {"first": self.first, "head": weakref.proxy(self.head)}
        self.held = Frozen(lambda name, x: layers[name](x))

    def forward(self, images):
        return self.held.value("head", self.held.value("first", images).relu().mean((2, 3)))


def test_a_dense_and_a_masked_network_compute_with_masks_by_functions_over_layers():
    torch.manual_seed(0)
    dense, small, masked, expected = _dense_and_masked(Runs().eval())
    assert dense.first.out_channels == 6
    assert torch.equal(masked, expected)
    torch.testing.assert_close(small, expected, rtol=1e-5, atol=1e-6)


def test_a_tensor_with_attributes_holds_functions_of_the_copy_and_one_without_none():
    model = Holds(None)
    model.register_buffer("scale", torch.ones(3))
    model.scale.of, model.scale.reference = lambda: model, weakref.ref(model)
    model.register_buffer("plain", torch.ones(3))
    copied = detached_copy(model)
    assert copied.scale.of() is copied
    assert copied.scale.reference() is copied
    assert model.scale.of() is model
    assert torch.equal(copied.plain, model.plain)
    assert copied.plain.data_ptr() != model.plain.data_ptr()
    assert not vars(copied.plain)


@pytest.mark.parametrize("table", ["_parameters", "_buffers", "_modules"])
def test_a_function_may_hold_a_table_of_the_module(table):
    model = Holds(None)
    model.register_buffer("scale", torch.ones(3))
    model.layer = nn.Linear(2, 2)
    model.weight = nn.Parameter(torch.ones(1))
    held = vars(model)[table]
    model.held = lambda: held
    copied = detached_copy(model)
    assert copied.held() is vars(copied)[table]
    assert list(copied.held()) == list(held)
    assert all(one is not other for one, other in zip(copied.held().values(), held.values(), strict=True))


LAYER = nn.Linear(2, 2)


class Tools:
    """Holds a function that pickle finds by its qualified name."""

    @staticmethod
    def apply(x, layer=LAYER):
        """Map rows."""
        return layer(x)


def _made():
    def renamed(x, layer=LAYER):
        return layer(x)

    return renamed


renamed = _made()


def test_layers_of_a_function_that_has_a_name_of_its_module_are_nobodys():
    for function in (Tools.apply, renamed):
        assert detached_copy(Holds(function)).held is function
    nameless = _made()
    copied = detached_copy(Holds(nameless))
    assert copied.held is not nameless
    assert copied.held.__defaults__[0] is not LAYER
    assert nameless.__defaults__[0] is LAYER
