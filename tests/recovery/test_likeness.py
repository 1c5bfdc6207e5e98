from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import nn

from nni_topo.errors import DataError, SpeedupError
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.recovery.likeness import (
    Answers,
    Estimate,
    _mean,
    _share,
    have_answers,
)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def test_distance_and_agreement_are_those_of_each_part_with_their_intervals():
    one, other = net(0).double(), net(0).double()  # single precision differs by the size of a batch
    with torch.no_grad():
        other[2].weight += 0.2 * torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    images = torch.randn(60, 5, generator=torch.Generator().manual_seed(1)).double()
    parts = [Calibration([images[:17], images[17:40]]), Calibration([(images[40:], "labels")])]
    found = Answers(one, *parts).likenesses(other)
    with torch.no_grad():
        wanted, got = one(images), other(images)
    scale = float((wanted[40:] - wanted[40:].mean(0)).square().sum()) / 20
    errors = (wanted - got).square().sum(1) / scale
    same = wanted.argmax(1) == got.argmax(1)
    for likeness, rows in zip(found, (slice(0, 40), slice(40, 60)), strict=True):
        mine = errors[rows].numpy()
        assert likeness.distance.value == pytest.approx(mine.mean(), rel=1e-10)
        low, high = stats.t.interval(0.95, len(mine) - 1, loc=mine.mean(), scale=stats.sem(mine))
        assert (likeness.distance.low, likeness.distance.high) == (pytest.approx(low), pytest.approx(high))
        share = likeness.agreement
        assert share.value == pytest.approx(float(same[rows].double().mean()))
        wilson = stats.binomtest(int(same[rows].sum()), len(mine)).proportion_ci(method="wilson")
        assert (share.low, share.high) == (pytest.approx(wilson.low), pytest.approx(wilson.high))
    assert 0.0 < found[0].agreement.value < 1.0


def test_a_network_is_exactly_like_itself_and_a_constant_one_has_no_scale():
    model, batches = net(), Calibration([torch.randn(4, 5)])
    ((likeness),) = Answers(model, batches).likenesses(model)
    assert (likeness.distance.value, likeness.distance.high, likeness.agreement.low) == (0.0, 0.0, 1.0)
    constant, other = net(), net()
    with torch.no_grad():
        constant[2].weight.zero_()
        other[2].weight.zero_()
        other[2].bias += 1.0
    answers = Answers(constant, batches)
    assert answers.likenesses(net())[0].distance.value == math.inf
    assert answers.likenesses(nn.Sequential(*constant))[0].distance.value == 0.0


class Tokens(nn.Module):
    """What Transformers' models look like: lengths differ, a mask says what is padding."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.shift = nn.Embedding(11, 4), shift

    def forward(self, input_ids, attention_mask=None):
        return {"last_hidden_state": self.embed(input_ids) + self.shift * (input_ids == 3)[..., None]}


def test_padding_and_lengths_that_differ_do_not_count():
    generator = torch.Generator().manual_seed(0)
    batches, values, errors = [], [], []
    for length in (6, 9):
        ids = torch.randint(1, 11, (5, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[:, length - 2 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": ids})
        with torch.no_grad():
            hidden = Tokens().embed(ids)[:, : length - 2].double()
        values.append(hidden.flatten(0, 1))
        errors.append(((ids[:, : length - 2] == 3).double() * 4 * 0.5**2).sum(1))
    rows = torch.cat(values)
    scale = float((rows - rows.mean(0)).square().sum()) / 10
    (likeness,) = Answers(Tokens(), Calibration(batches)).likenesses(Tokens(0.5))
    assert likeness.distance.value == pytest.approx(float(torch.cat(errors).mean()) / scale, rel=1e-5)
    assert math.isnan(likeness.agreement.value)


class Logits(Tokens):
    """As many class scores at each position as there are positions, and the same mask."""

    def forward(self, input_ids, attention_mask=None):
        return {"logits": super().forward(input_ids)["last_hidden_state"].roll(1, 2)}


def test_agreement_of_positions_is_that_of_their_classes():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 11, (5, 4), generator=generator)
    mask = torch.tensor([[1, 1, 1, 0]] * 4 + [[1, 0, 0, 0]])
    (likeness,) = Answers(Logits(), Calibration([{"input_ids": ids, "attention_mask": mask}])).likenesses(Noisy())
    with torch.no_grad():
        same = (Logits()(ids)["logits"].argmax(2) == Noisy()(ids)["logits"].argmax(2)).double()
    assert 0.0 < float(same.mean()) < 1.0
    assert likeness.agreement.value == pytest.approx(float(((same * mask).sum(1) / mask.sum(1)).mean()))
    (without_mask,) = Answers(Logits(), Calibration([{"input_ids": ids}])).likenesses(Noisy())
    assert without_mask.agreement.value == pytest.approx(float(same.mean()))


class Noisy(Logits):
    def forward(self, input_ids, attention_mask=None):
        found = super().forward(input_ids)["logits"]
        return {"logits": found + torch.randn(found.shape, generator=torch.Generator().manual_seed(1))}


class Boxes(nn.Module):
    """A detector: as many boxes as it finds."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, images):
        return [{"boxes": self.scale * image.flatten()[image.flatten() > 0.5]} for image in images]


def test_outputs_without_an_entry_per_image_are_compared_where_they_have_one_shape():
    batches = Calibration([{"images": list(torch.rand(3, 3, 4, 4))} for _ in range(3)])
    assert batches.samples == 9
    answers = Answers(Boxes(1.0), batches)
    assert 0.0 < answers.likenesses(Boxes(1.1))[0].distance.value < 1.0

    class Fewer(Boxes):
        def forward(self, images):
            return super().forward([image[:2] for image in images])

    assert math.isnan(answers.likenesses(Fewer(1.0))[0].distance.value)


def test_batches_of_unequally_many_lists_of_boxes_are_compared():
    batches = [list(torch.rand(count, 3, 4, 4)) for count in (2, 3, 1)]
    (likeness,) = Answers(Boxes(1.0), Calibration([{"images": each} for each in batches])).likenesses(Boxes(1.5))
    # All lists are outputs of one kind: their variance is that of all boxes, for a list of mean length.
    boxes = [[image[image > 0.5].double() for image in batch] for batch in batches]
    every = torch.cat([each for batch in boxes for each in batch])
    variance = (every - every.mean()).square().sum() / 6
    by_batch = [sum(float((0.5 * each).square().sum() / variance) for each in batch) / len(batch) for batch in boxes]
    assert likeness.distance.value == pytest.approx(sum(by_batch) / 3, rel=1e-6)


class Masked(nn.Module):
    """Three scores, of which one is masked."""

    def __init__(self, net, by_sample=False):
        super().__init__()
        self.net, self.by_sample = net, by_sample

    def forward(self, images):
        scores = self.net(images)
        masked = torch.zeros_like(scores, dtype=torch.bool)
        masked[:, 0] = images[:, 0] > 0 if self.by_sample else True
        return scores.masked_fill(masked, -math.inf)


class Part(nn.Module):
    def forward(self, scores):
        return scores[:, 1:]


def test_scores_that_both_networks_mask_are_at_no_distance():
    nets, batches = (net(0), net(1)), Calibration([torch.randn(40, 5, generator=torch.Generator().manual_seed(1))])

    def distance(one, other):
        return Answers(one, batches).likenesses(other)[0].distance.value

    plain = distance(*(nn.Sequential(each, Part()) for each in nets))
    assert distance(*(Masked(each) for each in nets)) == pytest.approx(plain)
    assert 0.0 < distance(*(Masked(each, by_sample=True) for each in nets)) < math.inf
    assert distance(Masked(nets[0]), nets[0]) == math.inf


def test_outputs_that_are_no_numbers_are_not_near():
    constant, other = net(), net()
    with torch.no_grad():
        constant[2].weight.zero_()
        other[2].bias += math.nan
    batches = Calibration([torch.randn(4, 5)])
    assert Answers(constant, batches).likenesses(other)[0].distance.value == math.inf
    assert math.isnan(Answers(net(), batches).likenesses(other)[0].distance.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0], (2.0, 0.0, math.inf)),
        ([0.0, 1.0], (0.5, 0.0, 0.5 + 12.7062047 * 0.5)),  # Student's t of one degree of freedom
        ([1.0, 1.0, 1.0], (1.0, 1.0, 1.0)),
        ([1.0, math.inf], (math.inf, math.inf, math.inf)),
    ],
)
def test_a_mean_of_few_has_a_wide_interval_above_zero(values, expected):
    found = _mean(values)
    assert (found.value, found.low, found.high) == pytest.approx(expected)


@pytest.mark.parametrize(("hits", "count"), [(0, 1), (1, 1), (0, 9), (9, 9), (3, 7), (20, 20)])
def test_shares_have_wilsons_interval(hits, count):
    found = _share([1.0] * hits + [0.0] * (count - hits))
    wilson = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((hits / count, wilson.low, wilson.high), abs=1e-6)
    assert 0.0 <= found.low <= found.high <= 1.0
    assert (found.low == 0.0) is (hits == 0)
    assert (found.high == 1.0) is (hits == count)


class Several(nn.Module):
    """Two outputs of which the second varies a tenth as much."""

    def __init__(self, first=0.0, second=0.0):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, images):
        return images + self.first, 0.1 * images.flip(0)[:, :1] + self.second


def test_distances_of_several_outputs_are_means_of_shares_of_their_own_variances():
    images = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]).double()
    answers = Answers(Several(), Calibration([images]))
    scales = (2 * 8 / 3, 8 / 3 / 100)  # 0, 2 and 4 lie 8 / 3 from their mean, squared, on average
    for shifts, squares in (((0.5, 0.0), (2 * 0.25, 0.0)), ((0.5, 0.3), (2 * 0.25, 0.09)), ((0.0, 0.3), (0.0, 0.09))):
        expected = sum(square / scale for square, scale in zip(squares, scales, strict=True)) / 2
        found = answers.differences(Several(*shifts), 0)
        assert found.distances == pytest.approx([expected] * 3)
        assert all(math.isnan(each) for each in found.agreed)
    assert (answers.named.compared, answers.named.left_out) == (("output[0]", "output[1]"), ())
    exact = answers.likenesses(answers._model)
    assert exact[0].distance == Estimate(0.0, 0.0, 0.0)
    assert all(math.isnan(value) for value in vars(exact[0].agreement).values())


def test_batches_that_do_not_fit_are_named_from_zero():
    with pytest.raises(DataError, match=r"must fit the model, got .* \(batch 0\)$"):
        Answers(net(), Calibration([torch.randn(4, 6)]))
    with pytest.raises(DataError, match=r"must fit the model, got .* \(batch 1\)$"):
        Answers(net(), Calibration([torch.randn(4, 5), torch.randn(4, 6)]))


@pytest.mark.parametrize("size", [4, 16, 64])
@pytest.mark.parametrize(("gives", "agrees"), [(torch.sigmoid, True), (lambda x: x.softmax(1), True), (abs, False)])
def test_classes_and_decisions_have_answers_whatever_the_batches(gives, agrees, size):
    class Scores(nn.Module):
        def forward(self, x):
            return gives(x)

    images = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 3.0
    model, batches = Scores(), Calibration(list(images.split(size)))
    answers = Answers(model, batches)
    for found in (*answers.likenesses(nn.Identity()), *answers.likenesses(model)):
        assert math.isnan(found.agreement.value) is not agrees
    assert have_answers(model, batches) is agrees


def test_scores_that_lie_between_0_and_1_in_the_first_batch_alone_are_those_of_classes():
    generator = torch.Generator().manual_seed(0)
    scores = 4.0 * torch.eye(5)[torch.randint(5, (64,), generator=generator)] + torch.rand(64, 5, generator=generator)
    scores -= scores.mean(1, keepdim=True)
    scores[:16] = scores[:16] / 8.0 + 0.5
    answers = Answers(nn.Identity(), Calibration(list(scores.split(16))))
    assert [kind.holds for kind in answers.kinds] == ["classes"]
    assert all(found.agreement.value == 1.0 for found in answers.likenesses(nn.Identity()))


class Deciding(nn.Module):
    """Skips a layer where the numbers are small."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, width), nn.Linear(width, 8), nn.Linear(8, 3)

    def forward(self, inputs):
        hidden = self.first(inputs)
        return self.head(self.second(hidden) if inputs.abs().mean() > 1 else hidden)


def test_a_smaller_network_that_goes_another_way_is_told_of_and_not_the_images():
    images = Calibration([3 * torch.ones(4, 5), torch.zeros(4, 5)])
    answers = Answers(Deciding(8), images)
    with pytest.raises(SpeedupError, match="a smaller network must run on every batch on which the model runs"):
        answers.likenesses(Deciding(6))
