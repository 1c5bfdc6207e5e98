"""`choose_images`: which images of a pool stand for the others."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nni_topo
from nni_topo import Calibration, choose_images
from nni_topo.errors import ConfigError, DataError


class Classifier(nn.Module):
    """A network whose features before the last layer are its inputs, doubled."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.last = nn.Linear(2, 3)
        with torch.no_grad():
            self.first.weight.copy_(2 * torch.eye(2))
            self.last.weight.zero_()  # outputs tell nothing

    def forward(self, x):
        return self.last(self.first(x))


# Two clusters of three, at (1.4 / 3, 0) and (10, 1.4 / 3): the fifth and the last are next to the means.
POINTS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [10.0, 0.0], [10.0, 1.0], [0.4, 0.0], [10.0, 0.4]])
NEAREST = [4, 5]


def chosen(found):
    """Return the chosen images as one tensor."""
    return torch.cat([batch[0] for batch in found])


def check(found, wanted=POINTS[NEAREST]):
    torch.testing.assert_close(chosen(found), wanted, rtol=0, atol=0)


def test_each_cluster_is_stood_for_by_the_image_nearest_to_its_mean():
    check(choose_images([POINTS[:4], POINTS[4:]], Classifier(), 2))
    # Around 0 the mean is 1 / 3, nearest to 0; around 10 it is 10.2, nearest to 10; 20 is alone.
    rows = torch.tensor([[10.0], [10.6], [0.0], [1.0], [0.0], [20.0], [10.0]])
    found = choose_images([rows[:4], rows[4:]], nn.Identity(), 3)
    assert chosen(found).flatten().tolist() == [10.0, 0.0, 20.0]
    assert found.sizes == (3,)


def test_batches_are_as_large_as_those_of_the_pool():
    found = choose_images(POINTS.split(2), Classifier(), 5)
    assert (found.sizes, found.samples) == ((2, 2, 1), 5)


def test_a_shuffling_loader_of_images_with_labels_is_read_once():
    loader = DataLoader(TensorDataset(POINTS, torch.arange(6)), batch_size=4, shuffle=True)
    found = chosen(choose_images(loader, Classifier(), 2))
    assert sorted(found.tolist()) == sorted(POINTS[NEAREST].tolist())


def test_without_a_last_linear_layer_the_outputs_count_and_positions_are_averaged():
    images = torch.zeros(6, 2, 2, 2)
    images[:, :, 0, 0] = 4 * POINTS  # of four positions: the mean is the point
    check(choose_images([images], nn.Identity(), 2), images[NEAREST])


def test_equal_images_are_filled_up_with_the_first_of_the_pool():
    rows = torch.tensor([[2.0], [2.0], [2.0], [5.0]])
    assert sorted(chosen(choose_images([rows], nn.Identity(), 3)).flatten().tolist()) == [2.0, 2.0, 5.0]


def test_the_seed_draws_the_first_centres_and_the_same_seed_gives_the_same_images():
    rows = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    found = [chosen(choose_images(rows.split(50), nn.Identity(), 20, seed=seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


class Embedder(nn.Module):
    """The hidden states of a sequence, as an encoder of Transformers gives them."""

    def forward(self, states, attention_mask=None):
        return {"last_hidden_state": states}


def test_padding_isnt_averaged_and_mappings_stay_mappings(device):
    states = torch.stack([POINTS, POINTS, torch.tensor([[50.0, -9.0]]) * torch.arange(6.0)[:, None]], 1)
    mask = torch.tensor([[1, 1, 0]]).expand(6, 3)
    ((batch,),) = list(choose_images([{"states": states, "attention_mask": mask}], Embedder().to(device), 2))
    torch.testing.assert_close(batch["states"].cpu(), states[NEAREST], rtol=0, atol=0)
    assert batch["attention_mask"].shape == (2, 3)


def test_features_can_be_told():
    # Of the second coordinates 1 is alone, and 0.08 is the mean of the others.
    found = choose_images([POINTS], Classifier(), 2, outputs=lambda _, images: images[:, 1:])
    assert chosen(found).tolist() == [[0.0, 0.0], [10.0, 1.0]]


def test_groups_go_along():
    pool = Calibration([POINTS[:4], POINTS[4:]], groups=["a", "b", "c", "c", "a", "b"])
    found = choose_images(pool, Classifier(), 6)
    order = [POINTS.tolist().index(each) for each in chosen(found).tolist()]
    kinds = ["abccab"[place] for place in order]
    assert found.groups.tolist() == [list(dict.fromkeys(kinds)).index(kind) for kind in kinds]


def test_batches_of_other_shapes_keep_their_order():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    images = [torch.rand(3, 2, 4, 4), torch.rand(3, 2, 5, 5)]
    found = choose_images(images, model, 6)
    assert [tuple(batch.shape) for batch in found] == [(3, 2, 4, 4), (3, 2, 5, 5)]


def test_the_model_stays_and_a_network_is_shrunk_with_the_images():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).train()
    before = copy.deepcopy(model.state_dict())
    pool = list(torch.randn(96, 1, 6, 6).split(32))
    few = choose_images(pool, model, 40)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    small = nni_topo.shrink(model, few, {"flops": 0.5}, distill=False)
    assert small.report.images + small.report.held_out == 40


def test_bad_arguments_are_refused():
    with pytest.raises(DataError, match="at least as many images as are to be chosen, 7, got 6"):
        choose_images([POINTS], Classifier(), 7)
    with pytest.raises(ConfigError, match="count must be an integer of at least 1, got 0"):
        choose_images([POINTS], Classifier(), 0)
    with pytest.raises(ConfigError, match=r"outputs must be a function of \(output, inputs\) or None, got 'pooled'"):
        choose_images([POINTS], Classifier(), 2, outputs="pooled")
    with pytest.raises(DataError, match="features must be as many for each image, got"):
        choose_images([torch.rand(3, 4), torch.rand(3, 5)], nn.Identity(), 2)
    with pytest.raises(DataError, match="features must be finite"):
        choose_images([POINTS], Classifier(), 2, outputs=lambda _, images: images / 0.0)


class Reading(nn.Module):
    """A linear layer whose outputs are read once more."""

    def __init__(self, read):
        super().__init__()
        self.layer, self.read = nn.Linear(2, 2, bias=False), read
        nn.init.eye_(self.layer.weight)

    def forward(self, points):
        return self.read(self.layer(points))


@pytest.mark.parametrize(
    ("read", "order"),
    [
        (lambda made: made[:, 1], [0, 3]),
        (lambda made: (made[:, 1:], made[:, :1]), NEAREST),
        (lambda made: {"logits": made, "other": made[:, :1]}, NEAREST),
    ],
)
def test_outputs_count_together_where_the_linear_layer_is_not_the_last(read, order):
    check(choose_images([POINTS], Reading(read), 2), POINTS[order])
