"""The dry run's two networks: layers that are alike run once for both, and no check goes with that."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from speedup_nets import Grouped, chain
from torch import nn
from torch.overrides import TorchFunctionMode

import nni_topo
from nni_topo.errors import SpeedupError
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.layers.kinds import register_module
from nni_topo.network.speedup import dry_run as dry_runs
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import unprunable_layers
from nni_topo.network.speedup.dry_run import _DryRun

ROWS = torch.randn(80, 6, generator=torch.Generator().manual_seed(0))


def dry_run(model: nn.Module, rows: torch.Tensor = ROWS) -> _DryRun:
    """Make one of a model of which the odd channels of the first layer go."""
    trace = Analysis.on(model, rows).trace
    assembled, flow = trace.assembled, trace.flow
    left = np.ones(flow.size, dtype=bool)
    left[flow.group_ids_of("0")[1::2]] = False
    return _DryRun(flow, left, assembled(copy.deepcopy(model)))


def run(dry_run: _DryRun, rows: torch.Tensor = ROWS) -> tuple[dict[int, str], list[str]]:
    """Return the channels that can't go, and the linear layers of the whole network that were computed."""
    layers = [(name, each) for name, each in dry_run.full.named_modules() if isinstance(each, nn.Linear)]
    computed: list[str] = []
    with torch.no_grad():
        before = {name: each.forward for name, each in layers}
        for name, each in layers:
            each.forward = lambda x, name=name: (computed.append(name), before[name](x))[1]
        found = dry_run.run((rows,))
    return found, computed


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def test_a_linear_layer_of_many_rows_runs_once_for_both(model):
    assert run(dry_run(model)) == ({}, [])
    assert run(dry_run(model, ROWS[:4]), ROWS[:4]) == ({}, ["0", "2"])


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_a_layer_that_was_cut_wrongly_shows(model, layer, name):
    wrong = dry_run(model)
    values = getattr(wrong.small.get_submodule(layer), name)
    values.data = values.data.flip(0)
    found, computed = run(wrong)
    assert set(wrong.flow.group_ids_of("0")[1::2].tolist()) <= found.keys()
    assert layer in computed


def test_a_layer_that_channels_enter_as_values_is_computed(model):
    model[1] = nn.Sigmoid()  # of a removed channel it makes one half, which the bias of the next can add
    found, computed = run(dry_run(model))
    assert not found
    assert "2" in computed


def values_of_nodes(both):
    """Return a dictionary that a dry run fills with what each node gives in both networks."""
    found, step = {}, both._step

    def looked(node):
        step(node)
        found[node.name] = both._values[node]

    both._step = looked
    return found


def test_what_is_masked_is_what_the_whole_layer_gives():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)).eval()
    both = dry_run(model)
    kept = values_of_nodes(both)
    assert run(both) == ({}, [])
    with torch.no_grad():
        first = model[0](ROWS) * torch.from_numpy(both.is_kept[both.flow.group_ids_of("0")])
        second = model[2](model[1](first))
    torch.testing.assert_close(kept["_0"][0], first)
    torch.testing.assert_close(kept["_2"][0], second)
    torch.testing.assert_close(kept["_2"][1], second)


def test_a_network_that_fails_on_random_numbers_stays_whole_with_the_reason():
    class Whitening(nn.Module):
        """Multiplies with a root of a matrix, which must be positive."""

        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(3, 2)
            self.squares = nn.Parameter(torch.eye(6, 3))

        def forward(self, x):
            group_id = torch.linalg.cholesky(self.squares[:3])
            return self.last(self.first(x) @ self.squares @ group_id)

    groups = nni_topo.dependency_groups(
        Whitening().eval(), torch.randn(5, 4), [{"op_types": ["Linear"], "sparse_ratio": 0.5}]
    )
    assert not groups
    assert "the dry run fails on random numbers: _LinAlgError" in groups.skipped["first"]


class Routed(nn.Module):
    """Calls those experts that a router gives a row, in a loop over them, as mixtures of Transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(6, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)) for _ in range(4))

    def forward(self, x):
        chosen = nn.functional.one_hot(self.router(x).topk(1, 1).indices, 4).permute(2, 1, 0)
        found = torch.zeros_like(x)
        for expert in torch.greater(chosen.sum((1, 2)), 0).nonzero():
            _, rows = torch.where(chosen[expert].squeeze(0))
            found = found.index_add(0, rows, self.experts[expert](x[rows]))
        return found


def test_other_random_numbers_are_drawn_where_a_router_leaves_an_expert_out(monkeypatch):
    model, reasons = Routed().eval(), []
    for seed in range(40):
        rows = torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        if len(model.router(rows).argmax(1).unique()) < 4:  # an expert that isn't called is no part of the graph
            continue
        with monkeypatch.context() as patched:
            patched.setattr(dry_runs, "_DRAWS", 1)
            alone = str(nni_topo.explain(copy.deepcopy(model), rows, "experts.0.0"))
        if "the dry run fails on random numbers" in alone:
            reasons.append(alone)
            found = str(nni_topo.explain(copy.deepcopy(model), rows, "experts.0.0"))
            assert "all but one of 8 channels can be pruned" in found
            break
    assert "IndexError: tuple index out of range" in reasons[0]


class Positions(nn.Module):
    """Adds positions that the forward computes in the precision of its input, as RT-DETR does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(6, 8), nn.Linear(8, 12), nn.Linear(12, 4)

    def forward(self, states):
        places = torch.arange(states.shape[1], dtype=states.dtype).sin()[:, None]
        return self.last(torch.relu(self.inner(self.first(states) + places)))


def test_a_model_in_double_precision_that_makes_constants_is_pruned_as_in_single():
    asked, states = [{"op_types": ["Linear"], "sparse_ratio": 0.5}], torch.randn(2, 5, 6)
    single = nni_topo.dependency_groups(Positions().eval(), states, asked)
    double = nni_topo.dependency_groups(Positions().eval().double(), states.double(), asked)
    assert [entry["op_names"] for entry in single] == [entry["op_names"] for entry in double]
    assert single.skipped == double.skipped
    assert "inner" in {name for entry in double for name in entry["op_names"]}


class Picking(nn.Module):
    """Reads rows that a mask picks, and adds positions, for which it only asks the length of one of the channels."""

    def __init__(self, *, reads_values: bool):
        super().__init__()
        self.words, self.inner, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.places, self.reads_values = nn.Embedding(12, 8), reads_values

    def forward(self, ids):
        x = self.words(ids)
        one = x[:, :, -1]
        positions = self.places(torch.arange(one.shape[1], device=ids.device))
        x = x * one.mean(1)[:, None, None] if self.reads_values else x
        x = self.inner(x + positions).relu()
        ends = ids.eq(2)
        return self.head(x[ends, :].view(len(ids), -1, x.shape[-1])[:, -1])


@pytest.mark.parametrize("reads_values", [False, True])
@torch.no_grad()
def test_a_channel_that_is_picked_counts_where_its_values_do_and_rows_that_a_mask_picks_have_all(reads_values):
    torch.manual_seed(0)
    model, ids = Picking(reads_values=reads_values).eval(), torch.randint(3, 9, (4, 7))
    ids[:, -1] = 2
    asked = [{"op_types": ["Linear", "Embedding"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, ids, asked)
    told = "1 of 8 channels are kept: the forward picks or counts channels by fixed numbers (getitem)"
    assert groups.skipped.get("words") == (told if reads_values else None)
    assert "inner" not in groups.skipped
    masks = nni_topo.create_pruner("random", copy.deepcopy(model), list(groups), seed=0).compress()[1]
    if reads_values:  # the one that is read may be masked
        for name in ("words", "places"):
            masks[name]["weight"][:, -1] = 1
    dense, reference = nni_topo.to_dense(model, ids, masks), nni_topo.masked_model(model, ids, masks)
    assert dense.words.embedding_dim in ((4, 5) if reads_values else (4,))
    assert dense.inner.out_features == 4
    torch.testing.assert_close(dense(ids), reference(ids))


class Attending(nn.Module):
    """Attention of states to themselves, which a gate may make of removed channels."""

    def __init__(self, gated=False, mask=None) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(6, 3, batch_first=True), nn.Linear(6, 2)
        self.gate, self.mask = nn.Linear(6, 6) if gated else None, mask

    def forward(self, x):
        x = x if self.gate is None else self.gate(x).sigmoid()
        return self.head(self.attention(x, x, x, attn_mask=self.mask, need_weights=False)[0])


class Products(TorchFunctionMode):
    """Lists how many heads products of attention have."""

    def __init__(self) -> None:
        super().__init__()
        self.heads: list[int] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            self.heads.append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


def without_a_head(model: nn.Module, states: torch.Tensor) -> _DryRun:
    trace = Analysis.on(model.eval(), states).trace
    assembled, flow = trace.assembled, trace.flow
    left = np.ones(flow.size, dtype=bool)
    left[flow.group_ids_of("attention")[flow.heads["attention"].channels["attention"][1]]] = False
    if "gate" in flow.layers:
        left[flow.group_ids_of("gate")[:2]] = False
    return _DryRun(flow, left, assembled(copy.deepcopy(model)))


def heads_of(dry_run: _DryRun, states: torch.Tensor) -> tuple[dict[int, str], list[int]]:
    with torch.no_grad(), Products() as seen:
        found = dry_run.run((states,))
    return found, seen.heads


@pytest.mark.parametrize(
    ("model", "states", "heads"),
    [
        (Attending(), ROWS[None], [2]),
        (Attending(gated=True), ROWS[None], [3, 2]),  # removed channels enter as halves
        (Attending(), ROWS[None, :4], [3, 2]),
        (Attending(mask=torch.zeros(80, 80)), ROWS[None], [3, 2]),  # one may be of all heads
    ],
)
def test_attention_of_many_rows_runs_once_for_both(model, states, heads):
    assert heads_of(without_a_head(model, states), states)[1] == heads


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_attention_that_was_cut_wrongly_shows(name):
    torch.manual_seed(0)
    model = Attending()
    nn.init.normal_(model.attention.in_proj_bias)
    wrong = without_a_head(model, ROWS[None])
    values = getattr(wrong.small.attention, name)
    values.data = values.data.flip(0)
    found, heads = heads_of(wrong, ROWS[None])
    assert found
    assert heads == [3, 2]


class Squares(nn.Module):
    """Squares its values in each block and holds no norm, so that they are infinite after some blocks."""

    def __init__(self, operator):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3 if at == 0 else 8, 8, 1) for at in range(12)])
        self.last, self.operator = nn.Conv2d(8, 2, 1), operator

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
            x = x * x
        return self.last(self.operator(x))


def test_channels_of_numbers_beyond_measure_are_compared_too():
    def centred(images):
        return images - images.amax(1, keepdim=True)

    asked = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    images = torch.rand(2, 3, 6, 6)
    centred = nni_topo.register_operator(centred, "follow")
    groups = nni_topo.dependency_groups(Squares(centred).eval(), images, asked)
    assert "depends on removed channels" in groups.skipped["layers.11"]
    assert "layers.11" not in nni_topo.dependency_groups(Squares(torch.relu).eval(), images, asked).skipped


class Scale(nn.Module):
    """Factors of channels, which refuse to be cut."""

    def __init__(self, width: int):
        super().__init__()
        self.factors = nn.Parameter(torch.ones(width))

    def forward(self, images):
        return images * self.factors.view(-1, 1, 1)


def refuse(module, kept):
    raise SpeedupError("its factors can't be cut")


def test_a_module_that_refuses_to_be_cut_keeps_the_channels_that_enter_it():
    register_module(Scale, refuse)
    scaled = nn.Sequential(nn.Conv2d(3, 8, 1), Scale(8), nn.Conv2d(8, 6, 1))
    model = nn.Sequential(scaled, nn.ReLU(), nn.Conv2d(6, 4, 1)).eval()
    images = torch.randn(2, 3, 5, 5)
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert groups.skipped["0.0"] == "its factors can't be cut"
    assert [entry["op_names"] for entry in groups] == [["0.2"]]
    (reason,) = nni_topo.explain(model, images, "0.0").reasons
    assert (reason.kind, reason.layer) == ("uncut_module", "0.1")


class LowRank(nn.Linear):
    """A linear layer that adds a product of two parameters of its own widths, as LoRA by inheritance does."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return super().forward(rows) + rows @ self.down.T @ self.up.T


def test_a_layer_with_parameters_that_are_not_cut_keeps_its_own_channels_alone():
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 10), nn.ReLU(), LowRank(10, 12), nn.ReLU(), nn.Linear(12, 4)]
    layers += [nn.ReLU(), nn.Linear(4, 2)]
    model = nn.Sequential(*layers).eval()
    small = nni_topo.shrink(model, [ROWS], {"params": 0.8}, distill=False)
    widths = [len(each.weight) for each in small if isinstance(each, nn.Linear)]
    assert widths[1:3] == [10, 12]  # what enters it and what it makes
    assert widths[0] < 8
    assert widths[3] < 4
    kept = unprunable_layers(Analysis.on(model, ROWS), ["0", "2", "4", "6"])
    assert kept.keys() == {"2", "4"}


class Thirds(nn.Module):
    """A layer whose channels are three alike parts, of which the first is used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x).reshape(len(x), 3, -1).permute(1, 0, 2)
        return x[0] * 0.5


def test_channels_before_a_wrong_size_are_to_blame_and_not_those_of_the_whole_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), Thirds(), nn.Linear(4, 4)).eval()
    trace = Analysis.on(model, ROWS).trace
    assembled, flow = trace.assembled, trace.flow
    left = np.ones(flow.size, dtype=bool)
    gone = flow.group_ids_of("2.layer")[9:]  # three of the last part, so that each part gets a channel less
    left[flow.group_ids_of("0")[1::2]] = left[gone] = False
    with torch.no_grad():
        found = _DryRun(flow, left, assembled(copy.deepcopy(model))).run((ROWS,))
    assert found.keys() == set(gone.tolist())


class Counting(nn.Module):
    """Views what it reads by a number that it computes of how many channels another layer has."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.last, self.also = nn.Linear(6, 2), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = self.other(x)
        y = self.second(self.first(x)).view(len(x), other.shape[1] // 4 * 3, -1)
        return self.last(y.flatten(1)) + self.also(other)


def test_layers_whose_channels_a_size_is_computed_of_are_to_blame_for_it_and_none_before_what_is_viewed():
    groups = nni_topo.dependency_groups(Counting().eval(), ROWS, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["first"]]
    assert groups.skipped.keys() == {"second", "other", "last", "also"}


class Placed(nn.Module):
    """A table of positions is for one size of images; what removed channels become isn't zero."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.table = nn.Parameter(torch.rand(1, 3, 96, 96))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x + self.table).sigmoid())


def test_nothing_is_printed_where_smaller_images_do_not_fit(capfd):
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(Placed().eval(), torch.rand(2, 3, 96, 96), config)
    assert [entry["op_names"] for entry in groups] == [["first"]]
    assert capfd.readouterr().err == ""


class Found:
    """Stands for a dry run: notes the inputs that it gets, and finds what is said of such inputs."""

    def __init__(self, answers):
        self.answers, self.seen = answers, []

    def run(self, args, *, blocks=1, is_varied=False):
        (x,) = args
        kind = "batch" if blocks > 1 else "varied" if is_varied else "plain"
        name = f"{kind} {x.shape[-1]}{' double' if x.dtype == torch.float64 else ''}"
        assert len(x) == blocks == 4 if kind == "batch" else len(x) == 2
        self.seen.append(name)
        found = self.answers.get(name, self.answers.get(kind, {}))
        if isinstance(found, Exception):
            raise found
        return found

    def doubled(self):
        return self


FOUND, OTHER, FAILS = {1: "a"}, {2: "b"}, ValueError("another size")
THRICE = ["varied 64"] * 3
INPUTS = {
    "nothing": ({}, {}, ["batch 33"]),
    "all": ({"batch": FOUND, "plain": FOUND}, FOUND, ["batch 33", "plain 64", "plain 80"]),
    "a size that the network takes": ({"batch 33": FAILS}, {}, ["batch 33", "batch 64"]),
    "no size but its own": (
        {"batch 33": FAILS, "batch 64": FAILS, "plain 64": FAILS},
        {}, ["batch 33", "batch 64", "batch 80"],
    ),
    "no batch": ({"batch": FAILS}, {}, ["batch 33", "batch 64", "batch 80", "plain 64", *THRICE]),
    "no batch of its own size": (
        {"batch": FAILS, "plain 64": FAILS}, {},
        ["batch 33", "batch 64", "batch 80", "plain 64", "plain 80", *["varied 80"] * 3],
    ),
    "in batches alone": ({"batch": FOUND}, {}, ["batch 33", "plain 64", "batch 33", *THRICE]),
    "in batches and small ones": ({"batch": FOUND, "plain 64": FOUND}, {}, [
        "batch 33", "plain 64", "plain 80", "batch 33", *["varied 80"] * 3,
    ]),
    "of other scales": ({"batch": FOUND, "varied": OTHER}, OTHER, [
        "batch 33", "plain 64", "batch 33", *["varied 64", "varied 64 double"] * 3,
    ]),
    "by rounding": ({"batch": FOUND, "varied 64": OTHER, "varied 64 double": {}}, {}, [
        "batch 33", "plain 64", "batch 33", *["varied 64", "varied 64 double"] * 3,
    ]),
    "without double precision": ({"batch": FOUND, "varied 64": OTHER, "varied 64 double": FAILS}, OTHER, [
        "batch 33", "plain 64", "batch 33", *["varied 64", "varied 64 double"] * 3,
    ]),
    "without other scales": ({"batch": FOUND, "varied": FAILS}, {}, ["batch 33", "plain 64", "batch 33", *THRICE]),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_as_small_and_few_as_will_do(name):
    answers, found, seen = INPUTS[name]
    run = Found(answers)
    assert dry_runs._Inputs((torch.rand(2, 3, 80, 80),)).find(run) == found
    assert run.seen == seen


def test_once_something_was_found_inputs_come_by_themselves_first():
    inputs = dry_runs._Inputs((torch.rand(2, 3, 80, 80),))
    inputs.find(Found({"batch": FOUND, "plain": FOUND}))
    after = Found({})
    assert inputs.find(after) == {}
    assert after.seen == ["plain 80", "batch 33"]


def test_whole_numbers_have_no_scales():
    run = Found({"plain": FOUND})
    assert dry_runs._Inputs((torch.zeros(2, 80, dtype=torch.int64),)).find(run) == FOUND
    assert run.seen == ["plain 80"]
    assert dry_runs._Inputs((torch.zeros(2, 80, dtype=torch.int64),)).find(Found({})) == {}


@pytest.mark.parametrize("kind", ["plain 64", "plain 80", "varied", "varied 64 double"])
def test_where_memory_is_short_nothing_is_found(kind):
    """Of several inputs in one batch there may be too many."""
    answers = {"batch": FOUND, "plain 64": {} if "varied" in kind else FOUND, "varied 64": FOUND, kind: MemoryError()}
    with pytest.raises(MemoryError):
        dry_runs._Inputs((torch.rand(2, 3, 80, 80),)).find(Found(answers))
    assert dry_runs._Inputs((torch.rand(2, 3, 80, 80),)).find(Found({"batch": MemoryError(), "plain": FOUND})) == FOUND


PRUNED = torch.tensor([False, True, True]).view(1, 3, 1)


def zeros_but(*place: int, value: float = 1.0) -> torch.Tensor:
    values = torch.zeros(2, 3, 4)
    values[place] = value
    return values


@pytest.mark.parametrize(
    ("value", "pruned", "told"),
    [
        (zeros_but(0, 0, 0), PRUNED, True),
        (zeros_but(1, 2, 3), PRUNED, False),
        (zeros_but(1, 2, 3, value=-1.0), PRUNED, False),
        (zeros_but(1, 2, 3, value=torch.nan), PRUNED, False),
        (zeros_but(0, 0, 0).double(), PRUNED, True),
        (zeros_but(0, 0, 0).half(), PRUNED, False),  # the entries are read one by one
        (zeros_but(0, 0, 0), PRUNED.expand(2, 3, 1), False),
        (zeros_but(0, 0, 0), PRUNED[:, 1:2], False),
        (zeros_but(0, 0, 0), PRUNED[:, :2], False),
    ],
)
def test_zeros_of_one_dimension_are_told_quickly(value, pruned, told):
    assert dry_runs._is_zero(value, pruned) is told


@pytest.mark.parametrize("shape", [(3,), (3, 4), (2, 3, 4), (2, 3, 4, 5)])
def test_places_are_taken_of_any_dimension(shape):
    value, places = torch.randn(shape), torch.tensor([2, 0])
    for d in range(len(shape)):
        if shape[d] > 2:
            assert torch.equal(dry_runs._taken(value, d, places), value.index_select(d, places))


def test_calls_of_other_shapes_are_different():
    calls = [((torch.zeros(shape),), {}) for shape in ((2, 3), (2, 4), (2, 3))]
    assert dry_runs._different(calls) == calls[:2]


@pytest.mark.parametrize(
    "values", [[0.0, 0.0, 0.5], [0.0, -0.5, 0.0], [0.0, 0.5j, 0.0], [False, True, False], [0, 2, 0]]
)
def test_channels_with_values_are_listed_whatever_their_type(values):
    """Of the three first channels one is removed that has a value, or none has."""
    model = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 2))
    both = dry_run(model, ROWS)
    (node,) = (node for node in both.full.graph.nodes if node.target == "0")
    ids = both.flow.group_ids_of("0")
    for left in ([0, 1], [0, 2], [0]):
        both.is_kept[ids] = [at in left for at in range(3)]
        both._values = {node: (torch.tensor([values, [0] * 3]), None)}
        listed = both.flow.group_ids(both._nonzero(node)).tolist()
        assert listed == [int(ids[at]) for at in range(3) if values[at] and at not in left]


def test_channels_with_values_are_listed_whatever_dimension_holds_them():
    images, maps = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, 4)
    maps[1, 2, 3, 0] = -1.0
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)).eval()
    trace = Analysis.on(model, images).trace
    assembled, flow = trace.assembled, trace.flow
    ids = flow.group_ids_of("0")
    for gone, listed in ([1, 2], [2]), ([0, 3], []):
        is_kept = np.ones(flow.size, dtype=bool)
        is_kept[ids[gone]] = False
        both = _DryRun(flow, is_kept, assembled(copy.deepcopy(model)))
        (node,) = (node for node in both.full.graph.nodes if node.target == "0")
        both._values = {node: (maps, None)}
        assert flow.group_ids(both._nonzero(node)).tolist() == ids[listed].tolist()


@pytest.mark.parametrize("in_parts", [False, True])
def test_about_half_of_the_channels_are_drawn_and_none_that_must_stay(in_parts):
    images = torch.randn(2, 3, 8, 8)
    for model in (Grouped().eval(), chain().eval(), nn.Sequential(nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)).eval()):
        flow = Analysis.on(model, images).flow
        drawing, first = np.random.default_rng(0), next(iter(flow.layers))
        held = {} if flow.blocks else {int(flow.group_ids_of(first)[0]): None}
        drawn = [dry_runs._draw(flow, held, drawing, {}, in_parts=in_parts) for _ in range(20)]
        for is_kept in drawn:
            assert is_kept[[FIXED, *flow.at_output, *held]].all()
            for name in flow.layers:
                group_ids = flow.group_ids_of(name)
                assert is_kept[group_ids].any()
                is_free = not set(group_ids.tolist()) & {FIXED, *flow.at_output}
                if not in_parts and not flow.blocks and is_free and len(group_ids) > 2:
                    assert not is_kept[group_ids].all()
            for blocks in flow.blocks:
                for block in (each for side in blocks.sides for each in side):
                    group_ids = flow.group_ids(block)
                    if in_parts and not set(group_ids.tolist()) & {FIXED, *flow.at_output}:
                        assert is_kept[group_ids].sum() == (len(group_ids) + 1) // 2
        prunable = [group_id for group_id in flow.group_ids_of(first).tolist() if group_id not in held]
        assert not np.all([is_kept[prunable] for is_kept in drawn])


class Divided(nn.Module):
    """Divides by the root, say, of a size of what it computes."""

    def __init__(self, dim: int, root: Callable[[int], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.dim, self.root = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), dim, root

    def forward(self, x):
        x = self.first(x)
        return self.last(x / self.root(x.shape[self.dim]))


ROOTS = {
    "power": lambda size: size**0.5,
    "math.sqrt": math.sqrt,
    "float": float,
    "math.exp": math.exp,
    "a tensor": lambda size: torch.tensor(float(size)),
    "np.sqrt": np.sqrt,
    "of the double": lambda size: math.sqrt(2 * size),
    "of a half": lambda size: (size // 2) ** 0.5,
}


@pytest.mark.parametrize("root", ROOTS.values(), ids=ROOTS)
@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.quick_every(3)
def test_a_number_that_is_made_of_how_many_channels_there_are_holds_them(dim, root):
    images, asked = torch.randn(2, 3, 5, 5), [{"op_names": ["first"], "sparse_ratio": 0.5}]
    skipped = unprunable_layers(Analysis.on(Divided(dim, root).eval(), images), ["first"])
    assert [each.kind for each in skipped.get("first", ())] == (["number_made"] if dim == 1 else [])
    assert len(nni_topo.dependency_groups(Divided(dim, root).eval(), images, asked)) == 1


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.InstanceNorm2d(8, affine=True), nn.GroupNorm(8, 8)])
def test_a_norm_makes_zeros_of_removed_channels_whatever_its_shift(norm):
    """What reads them could supply no constant: it has several groups and pads with zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), norm, nn.Conv2d(8, 4, 3, padding=1, groups=2)).eval()
    assert unprunable_layers(Analysis.on(model, torch.randn(2, 3, 5, 5)), ["0"]) == {}


def test_a_norm_without_parameters_is_not_masked():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=False), nn.ReLU(), nn.Linear(8, 4)).eval()
    both = dry_run(model)
    kept = values_of_nodes(both)
    with torch.no_grad():
        both.run((ROWS,))
    full, _ = kept["_1"]
    is_kept = torch.from_numpy(both.is_kept[both.flow.group_ids_of("0")])
    first = model[0](ROWS) * is_kept
    expected = nn.functional.layer_norm(first, (8,))
    torch.testing.assert_close(full[:, is_kept], expected[:, is_kept])
    # A removed channel is minus the mean, of which half change their sign.
    torch.testing.assert_close(full[:, ~is_kept].abs(), expected[:, ~is_kept].abs())
    changed = (full[:, ~is_kept] * expected[:, ~is_kept] < 0).float().mean()
    assert 0.3 < changed < 0.7


@pytest.fixture(scope="module")
def chained():
    """A dry run of three layers, of which the first loses its odd channels."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)]
    return dry_run(nn.Sequential(*layers).eval())


def node_of(both: _DryRun, target: str):
    (node,) = (node for node in both.full.graph.nodes if node.target == target)
    return node


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize(
    ("wanted", "given", "blocks", "is_varied", "kind"),
    [
        ([[1.0, 2.0]], [[1.0, 2.0]], 1, False, None),
        ([[1.0, 2.0]], [[1.0, 2.1]], 1, False, "result_depends"),
        ([[1.0, 2.0]], [[1.0]], 1, False, "fixed_sizes"),
        ([[1.0], [2.0]], [[1.0]], 1, False, "fixed_sizes"),
        ([[1e8], [1.0]], [[1e8], [2.0]], 1, False, None),  # to the largest value, ...
        ([[1e8], [1.0]], [[1e8], [2.0]], 2, False, "result_depends"),  # ... of each input
        ([[1e8], [1.0]], [[1e8], [1.0]], 2, False, None),
        ([1e8, 1.0], [1e8, 2.0], 2, False, None),  # no dimension beside that of samples
        ([[1e8], [1.0], [1.0]], [[1e8], [2.0], [1.0]], 2, False, None),  # three rows of two inputs
        ([[NAN], [1.0]], [[1.0], [1.0]], 1, False, "result_depends"),
        ([[NAN], [1.0]], [[1.0], [1.0]], 1, True, None),
        ([[NAN], [1.0]], [[1.0], [1.0]], 2, False, None),
        ([[NAN], [1.0]], [[1.0], [2.0]], 2, False, "result_depends"),
        ([[INF, 1.0]], [[INF, 1.0]], 1, False, None),
    ],
)
def test_outputs_are_compared_input_by_input(chained, wanted, given, blocks, is_varied, kind):
    chained._blocks, chained._is_varied = blocks, is_varied
    node = node_of(chained, "2")
    pair = torch.tensor(wanted), torch.tensor(given)
    for before in ([], [pair[0]], [3]):  # whichever output it is
        found = chained._compare(node, [*before, pair[0]], [*before, pair[1]])
        assert (found and found.kind) == kind


@pytest.mark.parametrize(
    ("values", "factor"),
    [
        ([2.0**21, 1.0], 2.0**-21),
        ([2.0**21 + 1, -3.0], 2.0**-22),
        ([1.0, -(2.0**30)], 2.0**-30),
        ([2.0**20, -(2.0**20)], 1.0),
        ([0.5, -0.5], 1.0),
        ([INF, 2.0**30], 1.0),
        ([NAN, 2.0**30], 1.0),
        ([], 1.0),
    ],
)
def test_large_outputs_of_layers_are_scaled_in_both_networks_alike(chained, values, factor):
    full, small = torch.tensor(values), torch.tensor([3.0])
    one, other = chained._in_range(node_of(chained, "2"), full, small)
    torch.testing.assert_close(one, full * factor, rtol=0, atol=0, equal_nan=True)
    assert float(other) == 3.0 * factor
    for target, pair in (("1", (full, small)), ("2", ((full, 2), (small, 2)))):
        assert chained._in_range(node_of(chained, target), *pair) == pair


def test_removed_channels_are_those_at_a_layer_or_of_the_nearest_before_it(chained):
    gone = chained.flow.group_ids_of("0")[1::2].tolist()
    assert chained._removed() == chained._removed_at("0") == chained._removed_at("2") == gone
    # None enters or leaves the last layer, so all of the network may be to blame.
    assert chained._removed_at("4") == gone
    for target in ("1", "2", "3", "4"):
        assert chained._removed_before(node_of(chained, target)) == gone
    two = dry_run(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3)).eval())
    further = two.flow.group_ids_of("2")[:2].tolist()
    two.is_kept[further] = False
    assert two._removed_at("4") == two._removed_before(node_of(two, "3")) == further
    assert sorted(two._removed_at("2")) == sorted(gone + further) == sorted(two._removed())
    assert two._removed_before(node_of(two, "1")) == gone


def test_removed_channels_are_cut_out_or_poisoned_in_the_dimension_that_holds_them(chained):
    node, values = node_of(chained, "0"), torch.arange(16.0).reshape(2, 8)
    assert chained._cut(node, values).tolist() == values[:, ::2].tolist()
    assert chained._cut(node, (values, values))[0] is values  # of which nothing is known
    assert chained._cut(node_of(chained, "2"), values[:, :5]).shape == (2, 5)
    ids = chained.flow.ids[node.name]
    poisoned = chained._poisoned(values, ids)
    assert poisoned.isnan().tolist() == [[False, True] * 4] * 2
    assert torch.equal(poisoned[:, ::2], values[:, ::2])
    assert not values.isnan().any()
    for other in (values.long(), values[0], values):
        found = chained._poisoned(other, ids if other is not values else None)
        assert torch.equal(found, other)
        assert found is not other
    assert chained._poisoned(5, ids) == 5


def test_weights_are_drawn_by_how_many_values_enter():
    model = nn.Sequential(nn.Conv2d(4, 64, 3), nn.BatchNorm2d(64), nn.Flatten(), nn.Linear(64, 100)).double()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(0)
    drawn = dry_runs._with_random_weights(model.train())
    assert not drawn.training
    assert {each.dtype for each in drawn.parameters()} == {torch.float32}
    for layer, entering in ((drawn[0], 36), (drawn[3], 64)):
        assert float(layer.weight.std()) == pytest.approx(entering**-0.5, rel=0.05)
        assert abs(float(layer.weight.mean())) < 0.1 * entering**-0.5
    for values in (drawn[0].bias, drawn[1].weight, drawn[1].bias, drawn[3].bias):
        assert 0.5 <= float(values.min()) < 0.7
        assert 1.3 < float(values.max()) < 1.5
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_only_floats_are_changed_and_nothing_is_written_to():
    for values in (torch.tensor([1.0, -2.0]), torch.tensor([1, -2])):
        found = dry_runs._changed(torch.abs, values)
        assert found.tolist() == ([1.0, 2.0] if values.is_floating_point() else [1, -2])
        assert found.data_ptr() != values.data_ptr()


class Reading(nn.Module):
    """A recurrent layer and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.units, self.last = nn.GRU(6, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, rows):
        return self.last(self.units(rows)[0])


@torch.no_grad()
def test_the_removed_units_of_a_recurrent_layer_are_zero_for_its_others():
    torch.manual_seed(0)
    model, rows = Reading().eval(), ROWS.reshape(4, 20, 6)
    trace = Analysis.on(model, rows).trace
    assembled, flow = trace.assembled, trace.flow
    is_kept = np.ones(flow.size, dtype=bool)
    is_kept[flow.group_ids(flow.unit_channel_ids("units"))[[1, 3]]] = False
    both = _DryRun(flow, is_kept, assembled(copy.deepcopy(model)))
    silenced = both._silenced("units", model.units)
    assert silenced is not model.units
    assert both._silenced("last", model.last) is model.last
    states, expected = silenced(rows)[0], both.small.units(rows)[0]
    assert not states[..., [1, 3]].any()
    torch.testing.assert_close(states[..., [0, 2]], expected)
    assert model.units.weight_hh_l0.all()
    assert both.run((rows,)) == {}
