"""Inputs that become arguments of a model."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import ConfigError, DataError, SpeedupError, out_of_memory
from nni_topo.network.runtime.fits import structure_of
from nni_topo.network.runtime.inputs import (
    arguments_of,
    batch_size,
    calls,
    check_inputs,
    fitting,
    inputs_of,
    lists_of_samples,
    real_positions,
    returned_by_name,
    returned_tensors,
    run_few,
)


def test_an_error_says_that_memory_is_short_by_its_class_or_its_words():
    short = [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9")]
    assert [out_of_memory(each) for each in [*short, RuntimeError("memory"), ValueError()]] == [True] * 3 + [False] * 2


class OneArgument(nn.Module):
    def forward(self, batch, scale=1.0, *more):
        return batch


class TwoArguments(nn.Module):
    def forward(self, images, vectors):
        return images


class AnyArguments(nn.Module):
    def forward(self, images, **more):
        return images


X = torch.zeros(2, 3)


def test_inputs_become_arguments():
    assert arguments_of(X) == ((X,), {})
    assert arguments_of((X, 3)) == ((X, 3), {})
    assert arguments_of([X, None]) == ((X, None), {})
    assert arguments_of({"a": X}) == ((), {"a": X})
    assert arguments_of({"images": X}, TwoArguments()) == ((), {"images": X})
    assert arguments_of({"a": X}, OneArgument()) == (({"a": X},), {})
    assert arguments_of(torch.tensor(1.0)) == ((torch.tensor(1.0),), {})
    for nothing in (3, (), {}, {"a": 3}, None):
        with pytest.raises(ConfigError, match="with a tensor in it, got "):
            arguments_of(nothing)


def test_padding_is_where_masks_say_so():
    mask = torch.tensor([[1, 0, 2]])
    real, padded = [[True, False, True]], [[False, True, False]]
    assert real_positions({"attention_mask": mask}).tolist() == real
    assert real_positions({"key_padding_mask": mask}).tolist() == padded
    assert real_positions({"src_key_padding_mask": mask}).tolist() == padded
    assert real_positions({"x": X, "attention_mask": mask}).tolist() == real
    assert real_positions({"batch": {"x": X, "attention_mask": mask}}).tolist() == real
    assert real_positions({"batch": {"attention_mask": mask}, "x": X}) is None
    assert real_positions({"attention_mask": mask[0]}) is None
    assert real_positions({"attention_mask": None, "key_padding_mask": mask}).tolist() == padded
    assert real_positions({}) is None
    assert real_positions({"x": X}) is None


class Picky(nn.Module):
    """It takes so many samples alone."""

    def __init__(self, samples=None, error=RuntimeError("refused\nin two lines")):  # noqa: B008
        super().__init__()
        self.samples, self.error = samples, error

    def forward(self, images: Tensor) -> Tensor:
        if self.samples not in (None, len(images)):
            raise self.error
        return images


def test_models_run_on_two_samples_where_they_can():
    images = torch.zeros(5, 3, 70, 70)
    model = Picky()
    assert run_few(model, ((images,), {})).shape == (2, 3, 70, 70)
    assert run_few(Picky(samples=5), ((images,), {})).shape == (5, 3, 70, 70)
    with pytest.raises(MemoryError):
        run_few(Picky(samples=5, error=MemoryError()), ((images,), {}))
    call = ((images,), {})
    assert structure_of(Picky(), call)[0][0].shape == (2, 3, 70, 70)
    assert structure_of(Picky(samples=5), call) is call
    assert structure_of(Picky(), ((images[:1],), {}))[0][0].shape == (1, 3, 70, 70)
    with pytest.raises(
        DataError,
        match=r"^words must fit the model, got RuntimeError: refused, at `raise .* \(batch 0\)$",
    ):
        structure_of(Picky(samples=3), call, "words")


def test_errors_of_a_model_are_told_as_such():
    for error in (RuntimeError("a"), ValueError("a"), TypeError("a"), KeyError("a"), AttributeError("a")):
        words = rf"^data must fit .* got {type(error).__name__}: '?a'?, at `raise error` in .*:\d+ \(batch 7\)$"
        with pytest.raises(DataError, match=words), fitting(7, "data"):
            raise error
    for error in (ConfigError("a"), torch.OutOfMemoryError("a"), ZeroDivisionError("a")):
        with pytest.raises(type(error), match=r"^a$"), fitting(0):
            raise error


def test_a_batchs_inputs_are_its_first_entry():
    assert inputs_of((X, 3)) is X
    assert inputs_of([(X, X), 3]) == (X, X)
    assert inputs_of({"a": X}) == {"a": X}
    assert inputs_of(X) is X
    with pytest.raises(DataError, match=r"a batch must hold an input, got an empty one \(calibration, batch 0\)"):
        inputs_of([])
    with pytest.raises(ConfigError, match=r"tensor in it, got \d+ \(data, batch 4\)"):
        inputs_of((3, X), 4, "data")


def test_calls_have_the_arguments_that_a_model_takes():
    (call,) = calls(TwoArguments(), [{"images": X, "vectors": X, "labels": X}])
    assert list(call[1]) == ["images", "vectors"]
    assert call[1]["images"].data_ptr() != X.data_ptr()
    (call,) = calls(AnyArguments(), [{"images": X, "labels": X}])
    assert list(call[1]) == ["images", "labels"]
    with pytest.raises(DataError, match="must hold at least one batch, got none"):
        list(calls(TwoArguments(), []))
    with pytest.raises(DataError, match=r"missing .*'vectors' on float32 of shape \(2, 3\) \(batch 1\)$"):
        list(calls(TwoArguments(), [((X, X), 3), (X, 3)]))
    with pytest.raises(DataError, match=r"on \{'labels': .*, 'names': .*\} \(batch 0\)$"):
        list(calls(TwoArguments(), [{"labels": X, "names": X}]))


@dataclass
class Answer:
    """What a model returns: tensors in the fields of a data class."""

    scores: torch.Tensor
    others: dict[str, torch.Tensor]
    name: str = "answer"


class Answering(nn.Module):
    """A convolution that is read by a linear layer, and features beside the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 8, 3), nn.Linear(8, 3)

    def forward(self, images):
        features = self.first(images).relu().mean((2, 3))
        scores = self.last(features)
        return [Answer(scores, {"double": 2.0 * scores})]


def test_a_network_that_returns_a_data_class_is_made_smaller():
    torch.manual_seed(0)
    model, images = Answering(), torch.randn(64, 1, 6, 6)
    small = nni_topo.shrink(model, [images], {"flops": 0.5}, distill=False)
    assert small.first.out_channels == 4
    (answer,) = small(images)
    torch.testing.assert_close(answer.others["double"], 2.0 * answer.scores)
    assert small.report.stages[-1].distance < small.report.stages[1].distance


@dataclass
class Pair:
    images: torch.Tensor
    labels: torch.Tensor


def test_what_holds_a_tensor_for_each_sample_is_told_from_states():
    x, images = torch.zeros(4, 2), [torch.zeros(3, 8, 8)] * 4
    states = (torch.zeros(4, 5), torch.zeros(4, 6))
    assert lists_of_samples([images]) == [images]
    assert lists_of_samples([x, images]) == [images]
    assert lists_of_samples([tuple(images)]) == [tuple(images)]
    # Beside samples: states, levels of a pyramid, and states of levels first.
    assert lists_of_samples([x, states]) == []
    assert lists_of_samples([x, [*states]]) == []
    assert lists_of_samples([x, (torch.zeros(2, 4, 5), torch.zeros(2, 4, 5))]) == []
    assert lists_of_samples([x, (states, states)]) == []
    assert lists_of_samples([x, torch.zeros(4), None, (1, 2)]) == []


def test_a_single_number_before_the_samples_is_no_number_of_samples():
    assert batch_size({"return_loss": torch.tensor(True), "rows": torch.zeros(32, 6)}) == 32


def test_a_cache_of_transformers_as_input_is_refused():
    transformers = pytest.importorskip("transformers")
    batch = {"x": torch.zeros(4, 2), "past_key_values": transformers.DynamicCache()}
    with pytest.raises(ConfigError, match=r"got a DynamicCache \(calibration, batch 2\)"):
        inputs_of(batch, 2)


def test_a_data_class_as_input_is_refused():
    pair = Pair(torch.randn(16, 1, 6, 6), torch.zeros(16))
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 1))
    with pytest.raises(ConfigError, match=r"got a Pair \(images, batch 0\)"):
        nni_topo.shrink(model, [{"pair": pair}], {"flops": 0.5}, distill=False)


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.me, self.kind, self.layer = self, Plain, nn.Linear(1, 1)


class StaticCache(Plain):
    __module__ = "transformers.cache_utils"


Both = namedtuple("Both", ("first", "second"))


@pytest.mark.parametrize(
    ("found", "names"),
    [
        (X, ["output"]),
        ((X, [X]), ["output[0]", "output[1][0]"]),
        ({"a": X, "b": {"c": X, 2: X}}, ["a", "b.c", "b[2]"]),
        ({0: X, "text": "none", "empty": None}, ["output[0]"]),
        (Both(X, Both(X, 3)), ["first", "second.first"]),
        (Pair(X, {"deep": X}), ["images", "labels.deep"]),
        (Plain(a=X, b=X, c=Plain(d=X)), ["a", "b", "c.d"]),
        ((X, StaticCache(a=torch.ones(1))), ["output[0]"]),
        ((X, X.numpy(), range(3), b"text"), ["output[0]"]),
    ],
)
def test_outputs_are_named_by_what_leads_to_them(found, names):
    assert [name for name, _ in returned_by_name(found)] == names
    assert len(returned_tensors(found)) == len(names)


def test_an_iterator_is_no_output():
    with pytest.raises(SpeedupError, match=r"must be complete when its forward ends, got generator"):
        returned_by_name(each for each in [X])


@pytest.mark.parametrize(
    ("batch", "entry"),
    [
        ({"x": torch.ones(2), "edges": torch.zeros(0, 3)}, r"edges of shape \(0, 3\)"),
        (((torch.ones(2), torch.zeros(2, 0)), 1), r"inputs\[1\] of shape \(2, 0\)"),
    ],
)
def test_an_entry_without_elements_is_named(batch, entry):
    with pytest.raises(DataError, match=rf"must hold inputs, got an empty one: {entry} \(images, batch 3\)"):
        check_inputs(batch, 3, "images")
