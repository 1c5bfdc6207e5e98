"""Sizes that a model's attributes hold: smaller in the dense model where they count channels, else untouched."""

from __future__ import annotations

import pytest
import torch
from speedup_nets import masks_of
from torch import nn

import nni_topo
from benchmarks.networks import zoo_nets

ASKED = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


class Split(nn.Module):
    """Splits channels by an attribute, and does something with the pieces and with the attribute."""

    def __init__(self, use):
        super().__init__()
        self.width, self.use = 4, use
        self.one, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.use(self, torch.cat(torch.split(self.one(x), self.width, 1)[::-1], 1))
        return self.head(x).mean((2, 3))


def in_tensor(self, x):
    return x * torch.full((1, 1, 1, 1), 1.0).expand(1, 1, 1, self.width)


def in_branch(self, x):
    return 2 * x if self.width == 4 else x


def not_at_all(_, x):
    return x


def dense_of(model):
    images = torch.randn(2, 3, 4, 4)
    groups = nni_topo.dependency_groups(model, images, ASKED)
    if not groups:
        return None, groups
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    return nni_topo.to_dense(model, images, masks), groups


def test_what_counts_channels_gets_smaller_and_the_model_stays_as_it_was():
    model, images = zoo_nets.make("written")
    groups = nni_topo.dependency_groups(model, images, ASKED)
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    dense = nni_topo.to_dense(model, images, masks)
    kept = (masks["two.0"]["weight"].flatten(1).sum(1) > 0).tolist(), masks["three.0"]["weight"].flatten(1).sum(1) > 0
    assert (dense.width, dense.sizes, dense.shape) == (2, (sum(kept[0][:8]), sum(kept[0][8:])), (6, 1, 1))
    assert dense.joined == 2 * int(kept[1][:10].sum())
    assert [model.width, model.sizes, model.shape, model.joined] == [4, (8, 4), (12, 1, 1), 20]
    found = [*map(type, (model.width, dense.width, dense.joined, *model.sizes, *dense.sizes, *dense.shape))]
    assert found == [int] * len(found)


@pytest.mark.parametrize("use", [in_tensor, in_branch])
def test_what_is_more_than_a_count_of_channels_stays_and_so_do_the_channels_that_it_counts(use):
    dense, groups = dense_of(Split(use))
    # The first piece keeps its 4 channels, and the second one doesn't vanish.
    why = "5 of 8 channels are kept: the forward picks or counts channels by fixed numbers (split)"
    assert groups.skipped["one"] == why
    assert dense.width == 4
    assert 5 <= dense.one.out_channels < 8


def test_each_piece_of_a_split_loses_as_many():
    dense, groups = dense_of(Split(not_at_all))
    assert groups[0]["internal_metric_block"] == 2
    assert (dense.width, dense.one.out_channels) == (2, 4)


class Config:
    """Numbers that modules share, as the configs of Transformers are."""

    def __init__(self):
        self.sizes, self.depths = [6, 8], [1, 1]

    def to_dict(self):
        return dict(vars(self))


class ReadsConfig(nn.Module):
    """Gives an operation a width from a list in its config, which a module within holds too."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.one, self.two = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1)
        self.head = nn.Linear(8, 2)
        self.pool = Pools(config)

    def forward(self, x):
        x = self.between(self.two(torch.relu(self.one(x))))
        return self.head(self.pool(x.permute(0, 2, 3, 1).reshape(len(x), -1, self.config.sizes[-1])))

    def between(self, x):
        return x


class Pools(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def forward(self, x):
        return x.mean(1).reshape(-1, self.config.sizes[-1])


def test_a_width_in_a_list_of_a_shared_config_gets_smaller_in_the_dense_models_own(tmp_path):
    torch.manual_seed(0)
    config = Config()
    model = ReadsConfig(config).eval()
    dense, groups = dense_of(model)
    assert set(groups.skipped) == set()
    assert dense.config.sizes == [6, 4]  # nothing reads the first one
    assert dense.pool.config is dense.config
    assert model.config is config
    assert model.pool.config is config
    assert vars(config) == {"sizes": [6, 8], "depths": [1, 1]}
    assert [*map(type, dense.config.sizes)] == [int, int]
    nni_topo.save(dense, tmp_path / "dense.pt")
    loaded = nni_topo.load(tmp_path / "dense.pt", ReadsConfig(config).eval())
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(loaded(images), dense(images))
    assert config.sizes == [6, 8]


class TextAndImage(nn.Module):
    """Words come first, up to the longest text, whose length an attribute holds; then the places of an image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.longest, self.words, self.places, self.head = 4, nn.Linear(3, 8), nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x):
        words, places = x[:, : self.longest], x[:, self.longest :]
        return self.head(torch.cat([self.words(words), self.places(places)], 1).relu())


@pytest.mark.slow
def test_a_length_along_which_no_channel_goes_is_no_number_of_channels():
    model, x, other = TextAndImage().eval(), torch.randn(2, 9, 3), torch.randn(3, 11, 3)
    groups = nni_topo.dependency_groups(model, x, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["words"], ["places"]]
    masks = masks_of(nni_topo.RandomPruner(model, groups, seed=0))
    dense, masked = nni_topo.to_dense(model, x, masks), nni_topo.masked_model(model, x, masks)
    assert (dense.longest, dense.words.out_features, dense.head.in_features) == (4, 4, 4)
    for inputs in (x, other):
        torch.testing.assert_close(dense(inputs), masked(inputs))
