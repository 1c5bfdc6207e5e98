from __future__ import annotations

import torch
from speedup_nets import Concatenated, Residual, Shared, chain, filter_mask, lively
from torch import nn

from nni_topo.speedup import masked_model

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def changed(model, reference):
    """The rows of each parameter that differ from the model's; these have to be zero."""
    rows = {}
    for name, old in model.named_parameters():
        new = reference.get_parameter(name)
        different = (old != new).flatten(1).any(1) if old.dim() > 1 else old != new
        assert not new[different].any()
        if different.any():
            rows[name] = different.nonzero().flatten().tolist()
    return rows


def test_a_batch_norm_goes_with_its_convolution_and_nothing_else():
    model = chain()
    reference = masked_model(model, IMAGES, {"0": filter_mask(model[0], [1, 6])})
    assert changed(model, reference) == {name: [1, 6] for name in ("0.weight", "0.bias", "1.weight", "1.bias")}
    assert torch.equal(reference[1].running_mean, model[1].running_mean)


def test_a_norm_over_a_concatenation_loses_the_channels_of_both():
    model = Concatenated()
    masks = {"left": filter_mask(model.left, [3]), "right": filter_mask(model.right, [0, 5])}
    rows = changed(model, masked_model(model, IMAGES, masks))
    assert rows["norm.weight"] == rows["norm.bias"] == [3, 4, 9]
    assert rows["depthwise.bias"] == [3, 4, 9]
    assert "depthwise.weight" not in rows


def test_channels_that_come_alive_in_an_addition_stay():
    class Skip(Residual):
        def forward(self, x):
            x = self.stem(x)
            return self.tail(torch.relu(self.norm(x + self.point(x))))

    model = Skip()
    only_stem = masked_model(model, IMAGES, {"stem": filter_mask(model.stem, [0, 1])})
    assert not {"norm.weight", "norm.bias"} & set(changed(model, only_stem))
    both = {name: filter_mask(getattr(model, name), [1, 2]) for name in ("stem", "point")}
    assert changed(model, masked_model(model, IMAGES, both))["norm.bias"] == [1, 2]


def test_a_shared_norm_is_silenced_only_where_every_call_gets_zeros():
    model = Shared()
    one = masked_model(model, IMAGES, {"stem": filter_mask(model.stem, [0, 1])})
    assert set(changed(model, one)) == {"stem.weight", "stem.bias"}
    masks = {"stem": filter_mask(model.stem, [0, 1]), "twice": filter_mask(model.twice, [1, 2])}
    assert changed(model, masked_model(model, IMAGES, masks))["norm.bias"] == [1]


def test_what_a_half_dead_shared_norm_feeds_is_alive():
    class Chained(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 4, 1)
            self.norm, self.behind = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            lively(self)

        def forward(self, x):
            once = self.norm(self.first(x))
            return self.behind(once) + self.norm(x.mean(1, keepdim=True).expand(-1, 4, -1, -1))

    model = Chained()
    rows = changed(model, masked_model(model, IMAGES, {"first": filter_mask(model.first, [2])}))
    assert set(rows) == {"first.weight", "first.bias"}


def test_in_place_activations_and_modules_never_called_do_no_harm():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU6(inplace=True), nn.Conv2d(4, 2, 1))
    model.add_module("never", nn.BatchNorm2d(7))
    model.forward = lambda x: model[3](model[2](model[1](model[0](x))))
    lively(model)
    plain = nn.Sequential(*list(model)[:4])
    rows = changed(plain, masked_model(plain, IMAGES, {"0": filter_mask(plain[0], [1])}))
    assert rows["1.bias"] == [1]
    shared = Shared()
    masks = {"never": filter_mask(shared.never, [0])}
    assert set(changed(shared, masked_model(shared, IMAGES, masks))) == {"never.weight", "never.bias"}


def test_the_mode_of_each_module_stays():
    model = chain()
    model[1].eval()
    reference = masked_model(model, IMAGES, {"0": filter_mask(model[0], [1])})
    assert [module.training for module in reference.modules()] == [module.training for module in model.modules()]
