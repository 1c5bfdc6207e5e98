"""Units of recurrent layers: all gates of one go together, and whatever reads it."""

from __future__ import annotations

import copy

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from speedup_nets import masks_of
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.cost.cost import NetworkCost

KINDS = [nn.LSTM, nn.GRU, nn.RNN]
ASKED = [{"op_types": ["Linear", "LSTM", "GRU", "RNN"], "sparse_ratio": 0.5}]


class Net(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self, kind, **knobs):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Linear(4, 6), kind(6, 10, **knobs)
        self.head = nn.Linear(20 if knobs.get("bidirectional") else 10, 3)

    def forward(self, rows):
        return self.head(self.body(torch.relu(self.embed(rows)))[0])


def without(module, units):
    """Return a recurrent layer whose rows of some units are zero, so that these are zero at each step."""
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.unflatten(0, (-1, module.hidden_size))[:, units] = 0
    return copied


SHAPES = [{}, {"num_layers": 2, "bidirectional": True}, {"num_layers": 2, "bias": False}]


@pytest.mark.parametrize(
    ("pruner", "knobs"),
    [
        (nni_topo.TopologicalPruner, {"batch_first": True}),
        *((L1NormPruner, shape) for shape in SHAPES),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick_every(4)
def test_units_go_with_all_of_their_gates(kind, pruner, knobs):
    model, rows = Net(kind, **knobs).eval(), torch.randn(5, 7, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    groups = nni_topo.dependency_groups(model, rows, ASKED)
    assert [entry["op_names"] for entry in groups] == [["embed"], ["body"]]
    found = pruner(model, groups)
    _, masks = found.compress()
    wrapped = model(rows)
    found.unwrap_model()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    gone = masks["body"]["weight_hh_l0"].amax(1).view(-1, 10)[0] == 0
    assert masks["body"].keys() == dict(model.body.named_parameters()).keys()
    assert int(gone.sum()) == 5
    for target, mask in masks["body"].items():
        gates = mask.expand_as(getattr(model.body, target)).unflatten(0, (-1, 10))
        assert bool((gates[:, gone] == 0).all())
        assert bool((gates[:, ~gone] == 1).all()), target
    dense = nni_topo.to_dense(model, rows, masks)
    assert [dense.body.input_size, dense.body.hidden_size] == [3, 5]
    assert dense.head.in_features == (10 if knobs.get("bidirectional") else 5)
    made = kind(3, 5, **knobs)
    shapes = [{name: each.shape for name, each in body.named_parameters()} for body in (dense.body, made)]
    assert shapes[0] == shapes[1]
    # The wrapped model has no norm whose shift would survive, so it computes the same.
    assert torch.allclose(dense(rows), wrapped, atol=1e-6)
    with torch.no_grad():
        model.embed.weight[masks["embed"]["bias"] == 0] = 0
        model.embed.bias[masks["embed"]["bias"] == 0] = 0
    model.body = without(model.body, gone)
    assert torch.allclose(dense(rows), model(rows), atol=1e-6)


def test_states_tie_the_units_of_two_layers():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.reads, self.writes, self.head = nn.LSTM(4, 8), nn.LSTM(4, 8), nn.Linear(8, 3)

        def forward(self, rows):
            _, state = self.reads(rows)
            return self.head(self.writes(rows, state)[0])

    model, rows = Pair().eval(), torch.randn(5, 2, 4)
    groups = nni_topo.dependency_groups(model, rows, ASKED)
    assert {entry["dependency_group_id"] for entry in groups} == {"group_0"}
    masks = masks_of(nni_topo.RandomPruner(model, groups))
    dense = nni_topo.to_dense(model, rows, masks)
    assert [dense.reads.hidden_size, dense.writes.hidden_size, dense.report.kept] == [4, 4, ()]


def test_cost_file_and_layers_behind_know_of_fewer_units(tmp_path):
    model, rows = Net(nn.LSTM, batch_first=True).eval(), torch.randn(64, 7, 4)
    groups = nni_topo.dependency_groups(model, rows[:2], ASKED)
    masks = masks_of(nni_topo.ReconstructionPruner(model, groups, calibration=[rows]))
    solved = nni_topo.compensate(model, masks, [rows])
    dense = nni_topo.to_dense(solved, rows[:2], masks)
    plain = nni_topo.to_dense(model, rows[:2], masks)
    expected = model(rows)
    assert (dense(rows) - expected).square().mean() < (plain(rows) - expected).square().mean()
    units = masks["body"]["bias_ih_l0"].view(4, 10)[0].bool().numpy()
    cost = NetworkCost.on(model, rows[:2])
    found = cost({"body": units})
    assert found.params == sum(parameter.numel() for parameter in dense.parameters())
    # Of each of 7 rows: 4 x 6, which no linear layer reads, four gates of 5 units that read 6 + 5, and 5 x 3.
    assert found.macs == 7 * (24 + 20 * 11 + 15)
    nni_topo.save(dense, tmp_path / "dense.pt")
    assert torch.equal(nni_topo.load(tmp_path / "dense.pt", model)(rows), dense(rows))


def test_a_masked_layer_trains_and_its_units_stay_silent():
    model, rows = Net(nn.LSTM, batch_first=True), torch.randn(5, 7, 4)
    pruner = L1NormPruner(model, nni_topo.dependency_groups(model, rows, ASKED))
    _, masks = pruner.compress()
    before, optimizer = model(rows).detach(), torch.optim.SGD(model.parameters(), lr=1.0)
    model(rows).square().mean().backward()
    optimizer.step()
    trained = model(rows).detach()
    pruner.unwrap_model()
    assert (trained - before).abs().max() > 1e-3
    assert torch.allclose(nni_topo.to_dense(model, rows, masks)(rows), trained, atol=1e-6)


def test_a_recurrent_layer_with_a_projection_cant_be_named():
    model = Net(nn.LSTM, proj_size=5)
    with pytest.raises(ConfigError, match=r"without a projection.*\(body\)"):
        nni_topo.RandomPruner(model, [{"op_names": ["body"], "sparse_ratio": 0.5}])


class Packed(nn.Module):
    """A recurrent layer that reads rows of several lengths, packed, between linear layers."""

    def __init__(self, kind, how, **shape):
        super().__init__()
        self.how = how
        self.embed, self.before = nn.Embedding(20, 6), nn.Linear(6, 8)
        self.body = kind(8, 10, batch_first=True, **shape)
        self.after, self.head = nn.Linear(10 * (1 + self.body.bidirectional), 12), nn.Linear(12, 3)

    def forward(self, words, lengths):
        rows = self.before(self.embed(words)).relu()
        packed = pack_padded_sequence(rows, lengths, batch_first=True, enforce_sorted=False)
        out, state = self.body(packed)
        if self.how == "state":
            state = state[0] if isinstance(state, tuple) else state
            read = torch.cat([*state[-1 - self.body.bidirectional :]], -1)
        else:
            read = pad_packed_sequence(out, batch_first=True)[0].sum(1) / lengths[:, None]
        return self.head(self.after(read).relu())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["state", "rows"])
@pytest.mark.quick_every(9)
def test_layers_around_packed_rows_lose_channels_and_the_recurrent_layer_keeps_its_units(kind, shape, how):
    torch.manual_seed(0)
    model = Packed(kind, how, **shape).eval()
    words, lengths = torch.randint(20, (8, 7)), torch.tensor([7, 3, 5, 1, 2, 7, 4, 6])
    asked = [*ASKED, {"op_types": ["Embedding"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, (words, lengths), asked)
    assert "packed" in groups.skipped["body"]
    assert NetworkCost.on(model, (words, lengths))({}).params == sum(each.numel() for each in model.parameters())
    masks = masks_of(L1NormPruner(model, groups))
    assert masks.keys() == {"embed", "before", "after"}
    masked = nni_topo.masked_model(model, (words, lengths), masks)
    dense = nni_topo.to_dense(model, (words, lengths), masks)
    assert (dense.embed.embedding_dim, dense.before.out_features, dense.after.out_features) == (3, 4, 6)
    assert (dense.body.input_size, dense.body.hidden_size) == (4, 10)
    for call in ((words, lengths), (words[:3, :5], lengths[:3].clamp(max=5)), (words.repeat(2, 1), lengths.repeat(2))):
        assert torch.allclose(dense(*call), masked(*call), atol=1e-6)
