"""Hooks around calls: what they see, what they put in its place, and that nothing of them is left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.layers.kinds import by_channel
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import call_arguments, run
from nni_topo.network.runtime.hooks import (
    batches_of,
    called,
    inputs_seen,
    padding_known,
    watched,
)
from nni_topo.network.runtime.inputs import calls


class Twice(nn.Module):
    """Calls one layer twice, by position and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        self.layer.weight.data.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layer(input=self.layer(inputs) + 1.0)


def hooks_of(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_every_call_is_seen_however_its_input_is_given():
    model, entered, left = Twice(), [], []
    looks = [(model.layer, lambda values: entered.append(values.tolist()))]
    with watched(looks, [(model.layer, lambda _, output: left.append(output.tolist()))]), torch.no_grad():
        model(torch.tensor([[1.0, 5.0]]))
    assert entered == [[[1.0, 5.0]], [[6.0, 2.0]]]
    assert left == [[[5.0, 1.0]], [[2.0, 6.0]]]
    assert hooks_of(model) == 0


def test_what_looks_return_takes_the_place_of_what_they_saw():
    model, inputs = Twice(), torch.tensor([[1.0, 5.0]])
    with torch.no_grad():
        with watched([(model.layer, lambda values: values * 2.0)]):
            assert model(inputs).tolist() == [[6.0, 22.0]]
        with watched(leaving=[(model.layer, lambda entered, output: output - entered)]):
            # (5, 1) - (1, 5) + 1 = (5, -3) enters the second call, which gives (-3, 5) - (5, -3)
            assert model(inputs).tolist() == [[-8.0, 8.0]]
    assert hooks_of(model) == 0


def test_an_error_leaves_no_hook_and_no_other_mode():
    model, seen = Twice(), []

    def fail(_: Tensor) -> None:
        raise ValueError("no")

    with (
        pytest.raises(ValueError, match="no"),
        called(model, lambda args, kwargs: seen.append((len(args), list(kwargs)))),
        watched([(model.layer, fail)]),
    ):
        run(model, [torch.ones(1, 2)])
    assert seen[0] == (1, [])
    assert hooks_of(model) == 0
    assert model.training
    assert model.layer.training


def test_inputs_of_calls_are_batches_of_their_own():
    class Two(nn.Module):
        def forward(self, one: Tensor, other: Tensor | None = None) -> Tensor:
            return one

    model, given = Two(), torch.ones(2)
    seen = inputs_seen(model, lambda: (model(given, given + 1), model(other=given, one=given + 2), model(given)))
    given.zero_()
    assert [each.tolist() for each in seen[0]] == [[1.0, 1.0], [2.0, 2.0]]
    assert {name: each.tolist() for name, each in seen[1].items()} == {"one": [3.0, 3.0], "other": [1.0, 1.0]}
    assert len(seen[2]) == 1
    with pytest.raises(ConfigError, match=r"images must be an iterable of batches, .*, got NoneType \(images\)$"):
        batches_of(None, model, "images")


class Two(nn.Module):
    def forward(self, images, vectors, scale=1.0):
        return images.flatten(1).sum(1) + scale * vectors.sum(1)


def test_both_ways_to_pass_two_inputs_are_taken_everywhere():
    images, vectors, labels = torch.randn(6, 2, 2), torch.randn(6, 5), torch.arange(6)
    entries = list(zip(images.split(2), vectors.split(2), labels.split(2), strict=True))
    ways = [
        [((one, other), label) for one, other, label in entries],
        [((one, other),) for one, other, _ in entries],
        [[one, other, label] for one, other, label in entries],
        [(one, other) for one, other, _ in entries],
    ]
    for way in ways:
        found = batches_of(Calibration(way, groups=[0, 0, 1, 1, 2, 2]), Two(), "images")
        for at, (arguments, named) in enumerate(calls(Two(), found)):
            assert torch.equal(arguments[0], entries[at][0])
            assert torch.equal(arguments[1], entries[at][1])
            assert len(arguments) == 2
            assert not named
        ((held_out, also), _) = next(calls(Two(), found.split()[1]))  # the last group
        assert torch.equal(held_out, images[4:])
        assert torch.equal(also, vectors[4:])
    for example in (ways[0][0], ways[1][0], ways[3][0]):
        (given, also), named = call_arguments(example, Two())
        assert torch.equal(given, images[:2])
        assert torch.equal(also, vectors[:2])
        assert not named
    with pytest.raises(DataError, match="must be finite"):
        batches_of([(images, vectors.log())], Two(), "images")


def test_what_one_argument_takes_is_no_list_of_arguments():
    class One(nn.Module):
        def forward(self, images, mask=None):
            return images[0] + images[1] if isinstance(images, (tuple, list)) else images

    image, label = torch.randn(2, 3), torch.zeros(2, 3)
    (call,) = calls(One(), batches_of([(image, label)], One()))
    assert len(call[0]) == 1
    ((pair,), _) = call_arguments(((image, label),), One())  # it runs on a list of images
    assert isinstance(pair, tuple)


class Masked(nn.Module):
    """Takes a mask beside its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        found: Tensor = self.layer(x)
        return found


def test_padding_of_the_latest_call_is_skipped() -> None:
    model, x, seen = Masked(), torch.arange(12.0).view(2, 3, 2), []
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    look = [(model.layer, lambda values: seen.append(by_channel(model.layer, values)))]
    with torch.no_grad(), padding_known(model), watched(look):
        model(x, mask)
        model(x)
        model(attention_mask=mask == 0, x=x)
        model(x, mask.float()[:, :, None])  # no mask of positions
    with torch.no_grad(), watched(look):
        model(x, mask)
    whole = [[0.0, 2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 3.0, 5.0, 7.0, 9.0, 11.0]]
    assert [each.tolist() for each in seen] == [
        [[0.0, 2.0, 6.0], [1.0, 3.0, 7.0]], whole, [[4.0, 8.0, 10.0], [5.0, 9.0, 11.0]], whole, whole,
    ]  # fmt: skip
