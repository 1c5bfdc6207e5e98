from __future__ import annotations

import copy

import pytest
import torch
from speedup_nets import (
    Concatenated,
    Grouped,
    LeNet,
    Optional,
    Residual,
    Shared,
    chain,
    filter_mask,
    l1_masks,
    parameters,
    prune_half,
    same_output,
)  # fmt: skip
from tied_nets import LanguageModel
from torch import nn

from nni_topo import to_dense
from nni_topo.errors import ConfigError, SpeedupError
from nni_topo.speedup import masked_model


def images(channels=3, size=8, batch=2):
    return torch.rand(batch, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_a_chain_becomes_the_slices_that_a_hand_would_cut():
    model, kept, kept_next = chain(), [0, 2, 3, 6, 7], [1, 2, 3, 5]
    masks = {"0": filter_mask(model[0], [1, 4, 5]), "3": filter_mask(model[3], [0, 4])}

    dense = to_dense(model, images(), masks)

    assert torch.equal(dense[0].weight, model[0].weight[kept])
    assert torch.equal(dense[0].bias, model[0].bias[kept])
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(dense[1], name), getattr(model[1], name)[kept])
    assert torch.equal(dense[3].weight, model[3].weight[kept_next][:, kept])
    assert torch.equal(dense[8].weight, model[8].weight[:, kept_next])
    assert torch.equal(dense[8].bias, model[8].bias)
    sizes = dense[0].out_channels, dense[1].num_features, dense[3].in_channels, dense[8].in_features
    assert sizes == (5, 5, 5, 4)


def test_lenet_has_the_parameters_counted_by_hand():
    _, dense = prune_half(LeNet(), images(1, 28), ("Conv2d", "Linear"), exclude=["fc2"])
    assert parameters(dense) == (3 * 25 + 3) + (8 * 3 * 25 + 8) + (42 * 8 * 25 + 42) + (10 * 42 + 10)


@pytest.mark.parametrize("net", [LeNet, Residual, Concatenated, Grouped, Shared])
def test_dense_equals_masked(net):
    model = net()
    inputs = images(1, 28) if net is LeNet else images()
    exclude = ["fc2", "tail"]
    masks, dense = prune_half(model, inputs, exclude=exclude)
    same_output(dense, masked_model(model, inputs, masks), inputs)
    assert parameters(dense) < 0.7 * parameters(model)


# lenet5 keeps its linear layers, of which only the first reads fewer inputs: 36.0 k of 62.0 k parameters stay


def test_nnis_masked_model_differs_where_a_batch_norm_follows_and_masked_model_does_not():
    model, inputs = chain(), images()
    masks = {"0": filter_mask(model[0], [0, 2, 3])}
    dense = to_dense(model, inputs, masks).eval()
    plain = copy.deepcopy(model).eval()
    with torch.no_grad():
        plain[0].weight.mul_(masks["0"]["weight"])
        plain[0].bias[[0, 2, 3]] = 0
        expected = plain(inputs)
        assert (dense(inputs) - expected).abs().max() > 0.01 * expected.abs().max()
    same_output(dense, masked_model(model, inputs, masks), inputs)


def test_mode_precision_and_frozen_parameters_stay():
    model = chain().double()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    model[1].momentum, model[1].num_batches_tracked = None, torch.tensor(7)
    dense = to_dense(model, images().double(), {"0": filter_mask(model[0], [0, 1])})
    assert dense.training
    assert not dense[1].training
    assert {parameter.dtype for parameter in dense.parameters()} == {torch.float64}
    assert not dense[3].weight.requires_grad
    assert dense[0].weight.requires_grad
    assert dense[1].momentum is None
    assert dense[1].num_batches_tracked == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_stays_and_loses_nothing(dtype):
    model = chain().to(dtype)
    dense = to_dense(model, images().to(dtype), {"0": filter_mask(model[0], [0, 1])})
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    assert torch.equal(dense[0].weight, model[0].weight[2:])


def test_single_masked_weights_stay_zero():
    model = LeNet()
    mask = (torch.rand(model.conv1.weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    mask[2] = 0
    dense = to_dense(model, images(1, 28), {"conv1": {"weight": mask}})
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(dense.conv1.weight, (model.conv1.weight * mask)[kept])
    assert torch.equal(dense.conv2.weight, model.conv2.weight[:, kept])


def test_arguments_by_name_options_left_out_and_one_output_a_sample():
    model = Optional()
    inputs = torch.rand(3, 6, generator=torch.Generator().manual_seed(0))
    masks = {"first": filter_mask(model.first, [0, 3, 4])}
    dense = to_dense(model, {"x": inputs}, masks)
    assert (dense.first.out_features, dense.second.in_features) == (5, 5)
    shifted = to_dense(model, {"x": inputs, "shift": torch.ones(3, 1)}, masks)
    assert torch.allclose(shifted(inputs)["y"], dense(inputs)["y"])


def test_a_pruned_head_is_named():
    model = LeNet()
    masks = l1_masks(model, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    with pytest.raises(SpeedupError, match=r"output must not change: exclude .* \(fc2\)"):
        to_dense(model, images(1, 28), masks)


def test_a_fixed_size_in_the_forward_is_reported():
    class Fixed(LeNet):
        def forward(self, x):
            x = torch.max_pool2d(torch.relu(self.conv2(torch.max_pool2d(self.conv1(x), 2))), 2)
            return self.fc2(self.fc1(x.view(-1, 400)))

    model = Fixed()
    with pytest.raises(SpeedupError, match=r"ModelSpeedup|fixed size"):
        to_dense(model, images(1, 28), {"conv2": filter_mask(model.conv2, [0])})


@pytest.mark.parametrize(
    ("norm", "gone"),
    [
        (nn.LayerNorm(8), [2, 3, 6]),
        (nn.LayerNorm(8, bias=False), [2, 3, 6]),
        (nn.GroupNorm(1, 8), [2, 3, 6]),
        (nn.GroupNorm(2, 8), [0, 1, 6, 7]),
        (nn.GroupNorm(4, 8), [2, 3, 6, 7]),
    ],
)
def test_a_norm_over_channels_goes_over_those_that_are_left(norm, gone):
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(5, 8), norm, nn.Linear(8, 3)).double(), torch.rand(4, 5).double()
    nn.init.normal_(norm.weight)
    dense = to_dense(model, inputs, {"0": filter_mask(model[0], gone)})
    kept = [each for each in range(8) if each not in gone]
    # As many groups are left as hold a channel; each has channels next to one another.
    groups = 2 if isinstance(norm, nn.GroupNorm) and norm.num_groups > 1 else 1
    parts = model[0](inputs)[:, kept].unflatten(1, (groups, -1))
    distance = parts - parts.mean(2, keepdim=True)
    normed = (distance / (distance.square().mean(2, keepdim=True) + norm.eps).sqrt()).flatten(1) * norm.weight[kept]
    normed = normed if norm.bias is None else normed + norm.bias[kept]
    assert type(dense[1]) is type(norm)
    torch.testing.assert_close(dense(inputs), normed @ model[2].weight[:, kept].T + model[2].bias)


def test_inputs_must_fit_the_model():
    with pytest.raises(ConfigError, match=r"example_inputs must fit the model: LeNet .*'image'.*got TypeError"):
        to_dense(LeNet(), {"image": images(1, 28)}, {})
    with pytest.raises(ConfigError, match="example_inputs must be a tensor"):
        to_dense(LeNet(), "image", {})


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(mode):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    images = torch.randn(2, 3, 8, 8)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0]).reshape(4, 1, 1, 1)
    with mode():
        dense = to_dense(model, images, {"0": {"weight": mask}})
    assert dense[0].weight.shape[0] == 2


class Reading(nn.Module):
    """Computes with the weights of layers that it never calls."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(6, 2)
        self.table, self.narrow = nn.Embedding(5, 8), nn.Linear(8, 6, bias=False)
        self.scale = nn.Conv1d(1, 8, 1, bias=False)
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = self.first(x).relu() + self.table.weight[:1]
        x = x * self.scale.weight.flatten(1)[:, 0] * self.weight
        return self.last((x @ self.narrow.weight.T).relu())


def test_layers_whose_weights_the_forward_reads_are_as_wide_as_these():
    model, rows = Reading().eval(), torch.randn(3, 4)
    masks = {"first": filter_mask(model.first, [0, 3, 5])}
    dense = to_dense(model, rows, masks)
    widths = dense.table.embedding_dim, dense.narrow.in_features, dense.scale.out_channels, len(dense.weight)
    assert widths == (5, 5, 5, 5)
    kept = [1, 2, 4, 6, 7]
    assert torch.equal(dense.table.weight, model.table.weight[:, kept])
    assert torch.equal(dense.narrow.weight, model.narrow.weight[:, kept])
    assert torch.equal(dense.scale.weight, model.scale.weight[kept])
    x = (model.first(rows).relu() + model.table.weight[:1])[:, kept]
    x = x * (model.scale.weight.flatten() * model.weight)[kept]
    torch.testing.assert_close(dense(rows), model.last((x @ model.narrow.weight[:, kept].T).relu()))


class Labelled(nn.Module):
    """Reads some of its parameters only where it is given labels."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.never = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 8)
        self.table, self.other = nn.Parameter(torch.randn(5, 8)), nn.Parameter(torch.randn(5, 7))

    def forward(self, x, labels=None):
        x = self.first(x).relu()
        if labels is not None:
            x = x + self.table[labels] + self.other[labels].sum()
        return self.last(x)


def test_what_no_run_has_read_is_told_if_it_has_the_width_of_a_layer_that_lost_channels():
    model, rows, labels = Labelled().eval(), torch.randn(3, 4), torch.tensor([0, 2, 4])
    masks = {"first": filter_mask(model.first, [1, 6])}
    (note,) = to_dense(model, rows, masks).report.notes
    assert note.startswith("no run of the model has read these")
    assert "lost channels: table. If" in note
    assert to_dense(model, rows, {}).report.notes == ()
    dense = to_dense(model, (rows, labels), masks)
    assert dense.report.notes == ()
    assert (dense.table.shape, dense.other.shape) == ((5, 6), (5, 7))


def test_layers_that_are_not_cut_have_memory_of_their_own(monkeypatch):
    monkeypatch.setattr("nni_topo.network.runtime.copies._SHARE", 0.0)  # as for a model too large to be copied
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)
    ).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {"0": {"weight": (torch.arange(6) < 4).float()[:, None].expand(6, 4)}}
    dense = to_dense(model, torch.randn(3, 4), masks)
    assert dense[5].weight.shape == model[5].weight.shape
    with torch.no_grad():
        for value in dense.state_dict().values():
            value.zero_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_unused_modules_are_as_wide_as_the_used_ones_of_their_kind_whose_weight_they_share():
    model, tokens = LanguageModel().eval(), torch.randint(11, (2, 5))
    model.rotation = nn.Identity()
    model.unread, model.spare, model.free = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False), nn.Linear(8, 11)
    model.unread.weight = model.spare.weight = model.e.weight
    columns = torch.ones_like(model.e.weight)
    columns[:, [2, 6]] = 0
    dense = to_dense(model, tokens, {"e": {"weight": columns}, "down": filter_mask(model.down, [2, 6])})
    assert all(each.weight is dense.e.weight for each in (dense.o, dense.unread, dense.spare))
    assert (dense.unread.embedding_dim, dense.spare.in_features, dense.free.in_features) == (6, 6, 8)
    assert (dense.unread.num_embeddings, dense.spare.out_features) == (11, 11)
    assert torch.equal(dense.e.weight, model.e.weight[:, [0, 1, 3, 4, 5, 7]])
