from __future__ import annotations

import copy

import pytest
import torch
from every_sample import compensate, compensation
from torch import nn

import nni_topo
from nni_topo import to_dense
from nni_topo.recovery import Reconstruct
from nni_topo.speedup import masked_model


def check_exact(model, masks, batches, **knobs):
    """The pruned net computes what the original does, masked and dense alike; the full-size one does so by itself."""
    repaired = compensate(model, masks, batches, **knobs)
    inputs = torch.cat(batches)
    expected = model(inputs).detach()
    shipped = masked_model(model, inputs[:2], masks)(inputs).detach()
    scale = float(expected.abs().max())
    assert float((shipped - expected).abs().max()) > 1e-2 * scale
    masked = masked_model(repaired, inputs[:2], masks)(inputs).detach()
    assert float((masked - expected).abs().max()) < 1e-6 * scale
    dense = to_dense(repaired, inputs[:2], masks)
    torch.testing.assert_close(dense(inputs), masked, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(repaired(inputs), masked, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in dense.parameters()) < sum(p.numel() for p in model.parameters())


def test_convolutions(twin, halves, images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2, padding=2, dilation=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(6, 4, 1), nn.Flatten(), nn.Linear(16, 3),
    ).double().eval()  # fmt: skip
    twin(net[0])
    twin(net[2])
    check_exact(net, halves(net, "0", "2"), images)


def test_a_constant_channel_goes_into_the_running_mean(halves, lively, images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1),
        nn.Flatten(), nn.Linear(32, 3),
    ).double().eval()  # fmt: skip
    lively(net)
    net[0].weight.data[2:] = 0
    check_exact(net, halves(net, "0"), images)
    repaired = compensate(net, halves(net, "0"), images)
    assert set(repaired.state_dict()) == set(net.state_dict())
    assert not torch.equal(repaired[2].running_mean, net[2].running_mean)
    assert torch.equal(repaired[2].running_var, net[2].running_var)


def test_residual_groups(residual_net, twin, halves, images):
    net = residual_net
    for layer, norm in (("stem", "norm"), ("conv1", "norm1"), ("conv2", "norm2"), ("conv3", None), ("conv4", "norm4")):
        twin(net.get_submodule(layer), norm and net.get_submodule(norm))
    twin(net.shortcut)
    check_exact(net, halves(net, "stem", "conv1", "conv2", "conv3", "conv4", "shortcut"), images)


class Mobile(nn.Module):
    """A depth-wise and a grouped convolution, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(16, 12, 3, groups=2)
        self.tail = nn.Conv2d(12, 5, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        x = nn.functional.relu6(self.norm(self.depthwise(x)))
        x = torch.cat([x, torch.relu(self.point(x))], dim=1)
        return self.tail(torch.relu(self.grouped(x))).flatten(2).mean(2)


def test_depthwise_grouped_and_concatenated(lively, images):
    torch.manual_seed(0)
    net = lively(Mobile()).double().eval()
    with torch.no_grad():
        for tensor in (net.stem.weight, net.stem.bias, net.depthwise.weight, *net.norm.state_dict().values()):
            if tensor.dim():
                tensor[4:] = tensor[:4]
        net.point.weight[4:] = 2 * net.point.weight[:4]
        net.point.bias[4:] = 2 * net.point.bias[:4]
    gone = {"stem": [4, 5, 6, 7], "point": [4, 5, 6, 7]}
    masks = {name: {"weight": torch.ones_like(net.get_submodule(name).weight)} for name in gone}
    for name, channels in gone.items():
        masks[name]["weight"][channels] = 0
    check_exact(net, masks, images)


class Mlp(nn.Module):
    """Token mixing of a transformer's kind: attention that isn't pruned, and an MLP that is."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.up = nn.Linear(6, 16)
        self.down = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x.mean(1))


def test_mlp_of_an_attention_block(halves):
    torch.manual_seed(0)
    net = Mlp().double().eval()
    net.up.weight.data[8:], net.up.bias.data[8:] = net.up.weight.data[:8], net.up.bias.data[:8]
    tokens = list(torch.randn(64, 5, 6, dtype=torch.float64).split(16))
    check_exact(net, halves(net, "up"), tokens)


def test_last_layer_before_a_sum_makes_up_for_the_shortcut(residual_net, images):
    net = residual_net
    masks = {name: {"weight": torch.ones_like(net.get_submodule(name).weight)} for name in ("conv1", "conv3")}
    masks["conv1"]["weight"][3:] = 0
    masks["conv3"]["weight"][4:] = 0
    frame = compensation(net, masks, images, method=Reconstruct(refine=0)).report.to_frame()
    assert frame["layer"].tolist() == ["conv2", "conv3", "shortcut", "conv4", "shortcut", "head"]
    assert frame["place"].tolist()[:5] == ["add", "conv3", "shortcut", "add_1", "add_1"]
    assert (frame["error_after"] < frame["error_before"]).all()


def test_each_refinement_lowers_the_error_behind_the_relu(images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    ).double().eval()  # fmt: skip
    masks = {"0": {"weight": (torch.arange(8) < 3).double()[:, None, None, None]}}
    whole = torch.cat(images)
    errors = []
    for refine in range(4):
        found = compensation(net, masks, images, method=Reconstruct(refine=refine), ridge=1e-9)
        reached = masked_model(found.model, images[0], masks)[:4](whole).detach()
        errors.append(float((reached - net[:4](whole).detach()).square().sum()))
        assert [layer.place for layer in found.report.layers] == ["_2", *["relu(_2)"] * refine, "_5"]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize(("kept", "steps"), [(1, 2), (2, 0)])
def test_layers_are_refined_twice_where_less_than_17_5_percent_of_their_products_are_left(images, kept, steps):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    ).double().eval()  # fmt: skip
    # The second convolution has 16 * 6 * 8 * 9 = 6,912 products, of which the kept eighths stay, the last layer 192:
    # 14.9 % with one channel of eight, 27 % with two.
    masks = {"0": {"weight": (torch.arange(8) < kept).double()[:, None, None, None]}}
    layers = compensation(net, masks, images).report.layers
    assert [layer.place for layer in layers] == ["_2", *["relu(_2)"] * steps, "_5"]


def test_at_a_sum_the_solution_is_numpys(images):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 1)
            self.branch = nn.Conv2d(6, 4, 1)
            self.shortcut = nn.Conv2d(6, 4, 1)
            self.lossy = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = torch.relu(self.stem(x))
            return self.lossy(torch.tanh(self.branch(y))) + y[:, :4] * 0.5

    torch.manual_seed(0)
    net = Sum().double().eval()
    masks = {"branch": {"weight": torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None, None, None]}}
    repaired = compensate(net, masks, images, ridge=0.0)
    whole = torch.cat(images)
    with torch.no_grad():
        inputs = torch.tanh(net.branch(torch.relu(net.stem(whole))))[:, :2].movedim(1, -1).flatten(0, 2)
        targets = net.lossy(torch.tanh(net.branch(torch.relu(net.stem(whole))))).movedim(1, -1).flatten(0, 2)
    augmented = torch.cat([inputs, torch.ones(len(inputs), 1, dtype=torch.float64)], dim=1)
    expected = torch.linalg.lstsq(augmented, targets).solution
    torch.testing.assert_close(repaired.lossy.weight[:, :2, 0, 0].T, expected[:2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(repaired.lossy.bias, expected[2], rtol=1e-6, atol=1e-6)


def test_dead_batch_norm_scale_leaves_finite_weights(residual_net, halves, images):
    residual_net.norm2.weight.data[:3] = 0
    residual_net.norm2.weight.data[3] = 1e-30
    repaired = compensate(residual_net, halves(residual_net, "conv1"), images)
    assert all(bool(torch.isfinite(p).all()) for p in repaired.parameters())
    torch.testing.assert_close(repaired.conv2.weight[:4, :4], residual_net.conv2.weight[:4, :4])
    assert float((repaired.conv2.weight - residual_net.conv2.weight)[4:, :4].abs().max().detach()) > 1e-3


def test_channel_that_is_not_zero_when_removed_is_not_read(halves, images):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Sigmoid(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 2)
    ).double().eval()  # fmt: skip
    masks = halves(net, "0")
    repaired = compensate(net, masks, images)
    dense = to_dense(repaired, images[0], masks)
    torch.testing.assert_close(dense(images[0]), masked_model(repaired, images[0], masks)(images[0]))
    error = (dense(images[0]) - net(images[0])).detach().abs().max()
    plain = (to_dense(net, images[0], masks, check=False)(images[0]) - net(images[0])).detach().abs().max()
    assert float(error) < 0.6 * float(plain)  # where what the removed channels hold, 0.5, is in the bias already


def test_nothing_given_is_changed(residual_net, halves, images):
    residual_net.train()
    residual_net.norm2.eval()
    masks = halves(residual_net, "conv1", "conv3")
    before = copy.deepcopy((residual_net.state_dict(), masks, images))
    random = torch.get_rng_state()
    repaired = compensate(residual_net, masks, images)
    assert torch.equal(torch.get_rng_state(), random)
    torch.testing.assert_close((residual_net.state_dict(), masks, images), before, rtol=0, atol=0)
    assert [m.training for m in repaired.modules()] == [m.training for m in residual_net.modules()]
    assert not repaired.norm2.training
    assert all(m._forward_hooks == {} for m in repaired.modules())
    assert [p.requires_grad for p in repaired.parameters()] == [p.requires_grad for p in residual_net.parameters()]
    assert not {p.data_ptr() for p in repaired.parameters()} & {p.data_ptr() for p in residual_net.parameters()}


@pytest.mark.parametrize("choose", [False, True])
def test_long_kernels_are_summed_over_all_positions_as_rows_are(choose, monkeypatch):
    """A ReLU (which is refined), groups, a dilation, reflected padding, and a stride, whose layer isn't summed so."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 8, 9, padding=4), nn.ReLU(), nn.Conv1d(8, 8, 9, dilation=2, padding=8, groups=2),
        nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 9, padding=4, padding_mode="reflect"), nn.ReLU(),
        nn.Conv1d(8, 8, 9, stride=2), nn.Flatten(), nn.Linear(8 * 12, 4),
    ).eval()  # fmt: skip
    batches = torch.randn(60, 3, 32).split(16)

    asked = []  # for each convolution with stride 1: whether its windows are summed

    def solved(pays):
        monkeypatch.setattr("nni_topo.recovery.samples.windows_pay", lambda *_: asked.append(pays) or pays)
        config = nni_topo.dependency_groups(model, batches[0], [{"op_types": ["Conv1d"], "sparse_ratio": 0.5}])
        kind = nni_topo.ReconstructionPruner if choose else nni_topo.MatrixPruner
        pruner = kind(copy.deepcopy(model), config, **({"calibration": batches} if choose else {}))
        _, masks = pruner.compress()
        return masks, nni_topo.compensate(model, masks, batches)

    masks, by_rows = solved(False)
    same_masks, by_windows = solved(True)
    assert set(asked) == {False, True}
    for layer, targets in masks.items():
        assert torch.equal(same_masks[layer]["weight"], targets["weight"])
    weights = dict(model.named_parameters())
    for (name, expected), weight in zip(by_rows.named_parameters(), by_windows.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)
        if name in {"2.weight", "5.weight", "7.weight", "9.weight"}:
            assert not torch.equal(weight, weights[name])
