"""Calls that are varied, and work that starts again with fewer samples where memory is short."""

from __future__ import annotations

import weakref
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError, SpeedupError
from nni_topo.network.cost.latency import measure_latency
from nni_topo.network.graph.traced_int import TracedInt
from nni_topo.network.runtime.fits import structure_of
from nni_topo.network.runtime.inputs import (
    VARIATIONS,
    arguments_of,
    at_once,
    batch_size,
    bind_arguments,
    call_by_name,
    calls,
    cast_floats,
    check_inputs,
    copied_for,
    cure_of_argument,
    cure_of_mapping,
    fitting,
    in_smaller_batches,
    inputs_of,
    is_argument,
    let_go,
    lists_of_samples,
    on_device,
    out_of_memory,
    parts,
    random_like,
    real_positions,
    returned_by_name,
    returned_tensors,
    run_few,
    shrunk,
    taken,
    tensors_of,
    together,
    variations_of,
    varied,
)


def test_numbers_are_shifted_and_scaled_and_tokens_and_masks_are_not():
    images, tokens, mask = torch.tensor([1.0, -2.0]), torch.tensor([3, 4]), torch.tensor([True, False])
    args, kwargs = varied(((images, tokens), {"mask": mask}), (10.0, 1.0))
    assert args[0].tolist() == [20.0, -10.0]
    assert args[1] is tokens
    assert kwargs["mask"] is mask


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out of memory"), MemoryError()])
@pytest.mark.parametrize(("fits", "tried"), [(2, [8, 4, 2]), (1, [8, 4, 2, 1]), (8, [8])])
def test_work_starts_again_with_half_as_many_samples_down_to_one(fits, tried, error):
    seen = []

    @in_smaller_batches
    def work():
        seen.append(at_once(8))
        if seen[-1] > fits:
            raise error
        return "done"

    assert work() == "done"
    assert seen == tried


def test_memory_for_less_than_one_sample_is_an_error():
    @in_smaller_batches
    def work():
        raise torch.OutOfMemoryError(f"{at_once(1)} is too many")

    with pytest.raises(DataError, match="must have memory for one sample at a time, got: 1 is too many"):
        work()


def test_only_what_runs_within_such_work_is_limited_and_inner_work_has_the_outers_limit():
    tried = []

    @in_smaller_batches
    def inner():
        return at_once(100)

    @in_smaller_batches
    def outer():
        tried.append((at_once(8), inner(), at_once(3)))
        if len(tried) < 3:
            raise torch.OutOfMemoryError("too many")
        return tried

    assert at_once(8) == 8
    assert outer() == [(8, 100, 3), (4, 4, 3), (2, 2, 2)]
    assert inner() == 100

    @in_smaller_batches
    def failing():
        raise RuntimeError("of another kind")

    with pytest.raises(RuntimeError, match="of another kind"):
        failing()


def test_a_call_is_cut_into_nearly_equal_parts():
    @in_smaller_batches
    def sizes(most, samples):
        images, whole = torch.arange(samples), torch.zeros(())
        if at_once(samples) > most:
            raise torch.OutOfMemoryError("too many")
        found = [(part[0].tolist(), part[1] is whole) for part in parts((images, whole))]
        assert [each for part, _ in found for each in part] == images.tolist()
        assert all(is_whole for _, is_whole in found)
        return [len(part) for part, _ in found]

    assert sizes(4, 7) == [3, 2, 2]
    assert sizes(3, 6) == [3, 3]
    assert sizes(9, 9) == [9]
    assert sizes(1, 3) == [1, 1, 1]
    call = (torch.arange(5),)
    assert next(parts(call)) is call


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


class Anything(nn.Module):
    def forward(self, images, **others):
        return images


class ByName(nn.Module):
    def forward(self, *, images):
        return images


class ByPlace(nn.Module):
    def forward(self, images, /):
        return images


class NoneRequired(nn.Module):
    def forward(self, images=None):
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
        with pytest.raises(ConfigError, match=rf"with a tensor in it, got {type(nothing).__name__}"):
            arguments_of(nothing)
    with pytest.raises(ConfigError, match=r"at least one sample, got a tensor of shape \(0, 3\) \(example_inputs\)"):
        arguments_of(torch.zeros(0, 3))
    with pytest.raises(ConfigError, match=r"at least one sample, got a tensor of shape \(0,\)"):
        arguments_of((torch.zeros(()), torch.zeros(0)))


def test_a_mapping_is_an_argument_where_it_can_be_nothing_else():
    assert is_argument({"a": X}, OneArgument())
    assert not is_argument({"batch": X}, OneArgument())
    assert not is_argument({"scale": X}, OneArgument())
    assert not is_argument({"a": X}, TwoArguments())
    assert not is_argument({"a": X}, AnyArguments())
    assert not is_argument({"a": X}, ByName())
    assert is_argument({"a": X}, ByPlace())
    assert is_argument({"images": X}, ByPlace())
    assert not is_argument({"a": X}, NoneRequired())
    assert is_argument({"a": X}, nn.DataParallel(OneArgument()))
    assert not is_argument({"batch": X}, nn.DataParallel(OneArgument()))
    assert is_argument({"a": X}, torch.compile(OneArgument(), backend="eager"))


def test_errors_say_how_a_mapping_is_meant():
    cure = "; a mapping holds arguments by name: if this one is itself the argument 'images', pass {'images': mapping}"
    assert cure_of_mapping(((), {"a": X}), TwoArguments()) == cure
    assert cure_of_mapping(((), {"images": X}), TwoArguments()) == ""
    assert cure_of_mapping(((), {}), TwoArguments()) == ""
    assert cure_of_mapping(((X,), {"a": X}), TwoArguments()) == ""
    assert cure_of_mapping(((), {"a": X}), ByName()) == ""
    assert cure_of_mapping(((), {"a": X}), ByPlace()) == ""
    assert "single argument" in cure_of_argument(TypeError("a dict was given"))
    assert "single argument" in cure_of_argument(AttributeError("'dict' object"))
    assert cure_of_argument(ValueError("a dict was given")) == ""
    assert cure_of_argument(TypeError("a list was given")) == ""


def test_arguments_are_bound_in_the_order_of_the_forward():
    assert list(bind_arguments(TwoArguments(), ((), {"vectors": X, "images": X}))) == ["images", "vectors"]
    assert list(bind_arguments(OneArgument(), ((X,), {}))) == ["batch"]
    assert bind_arguments(Anything(), ((), {"images": X, "mask": X})) == {"images": X, "mask": X}
    assert bind_arguments(Anything(), ((), {"images": X})) == {"images": X}
    with pytest.raises(ConfigError, match=r"must fit TwoArguments.forward: missing .*'vectors'$"):
        bind_arguments(TwoArguments(), ((X,), {}))
    with pytest.raises(ConfigError, match=r"pass \{'images': mapping\}$"):
        bind_arguments(TwoArguments(), ((), {"a": X}))


class Mixed(nn.Module):
    def forward(self, first, /, images, *further, scale=1.0, **others):
        return first


@pytest.mark.parametrize(
    ("model", "call", "expected"),
    [
        (TwoArguments(), ((X, X), {}), ((), {"images": X, "vectors": X})),
        (ByPlace(), ((X,), {}), ((X,), {})),
        (Mixed(), ((1, 2), {}), ((1,), {"images": 2})),
        (Mixed(), ((1,), {"images": 2, "scale": 3, "mask": 4}), ((1,), {"images": 2, "scale": 3, "mask": 4})),
        (Mixed(), ((1, 2, 5, 6), {"scale": 3, "mask": 4}), ((1, 2, 5, 6), {"scale": 3, "mask": 4})),
        (Anything(), ((), {"images": X, "mask": X}), ((), {"images": X, "mask": X})),
    ],
)
def test_what_a_forward_takes_by_place_alone_is_passed_so(model, call, expected):
    assert call_by_name(model, bind_arguments(model, call)) == expected


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


def test_random_inputs_are_drawn_for_floats_alone():
    call = ((torch.zeros(400, dtype=torch.float64), torch.arange(3)), {"mask": torch.tensor([True, False])})
    (normal, tokens), kwargs = random_like(call, torch.Generator().manual_seed(0))
    assert normal.dtype == torch.float64
    assert torch.equal(normal.float(), torch.randn(400, generator=torch.Generator().manual_seed(0)))
    assert tokens.tolist() == [0, 1, 2]
    assert tokens is not call[0][1]
    assert kwargs["mask"].tolist() == [True, False]
    (positive, _), _ = random_like(call, torch.Generator().manual_seed(0), positive=True)
    assert torch.equal(positive.float(), torch.rand(400, generator=torch.Generator().manual_seed(0)) + 0.5)


def test_images_are_cropped_and_features_are_not():
    images, features = torch.zeros(5, 3, 70, 80), torch.zeros(5, 64, 70, 80)
    (small, kept), _ = shrunk(((images, features), {}))
    assert small.shape == (2, 3, 64, 64)
    assert kept is features
    assert shrunk(((torch.zeros(5, 63, 70, 80),), {}), 33)[0][0].shape == (2, 63, 33, 33)
    assert shrunk(((torch.zeros(1, 3, 7, 80),), {}))[0][0].shape == (1, 3, 7, 64)
    call = ((images, torch.zeros(5, 3)), {})
    assert shrunk(call) is call


def test_variations_stand_behind_the_first_sample_in_one_batch():
    assert VARIATIONS == ((0.01, 0.0), (100.0, 0.0), (1.0, 3.0))
    assert variations_of(((X,), {})) == VARIATIONS
    assert variations_of(((torch.arange(3),), {})) == ()
    assert variations_of(((torch.arange(3), X), {})) == VARIATIONS
    images, tokens = torch.tensor([[1.0, 2.0], [5.0, 6.0]]), torch.tensor([[7], [8]])
    (batch, ids), kwargs = together(((images, tokens), {"flag": True}), ((10.0, 0.0), (1.0, 3.0)))
    assert batch.tolist() == [[1.0, 2.0], [10.0, 20.0], [4.0, 5.0]]
    assert ids.tolist() == [[7], [7], [7]]
    assert kwargs == {"flag": True}
    assert together(((images, torch.zeros(3)), {}), VARIATIONS) is None
    assert together(((images, torch.zeros(())), {}), VARIATIONS) is None
    table = torch.arange(3)
    assert together(((images, table), {}), VARIATIONS)[0][1] is table


def test_samples_are_taken_of_what_has_samples():
    images, table, number = torch.arange(4.0), torch.arange(3), torch.tensor(2.0)
    (some, whole, one), kwargs = taken(((images, table, number), {"a": images}), torch.tensor([2, 0]))
    assert some.tolist() == kwargs["a"].tolist() == [2.0, 0.0]
    assert whole is table
    assert one is number
    assert taken(images, torch.tensor([True, False, False, True])).tolist() == [0.0, 3.0]
    assert [batch_size(each) for each in (images, (number, table), number, 3)] == [4, 3, 1, 1]


def test_floats_are_cast_and_moved_and_others_only_moved():
    args, _ = cast_floats(((X, torch.arange(2)), {}), torch.float64)
    assert [each.dtype for each in args] == [torch.float64, torch.int64]
    given = torch.ones(2, requires_grad=True)
    assert not on_device([given], torch.device("cpu"))[0].requires_grad
    meta = torch.zeros(2, device="meta")
    assert on_device(meta, torch.device("meta")).is_meta
    with pytest.raises(DataError, match=r"got one on the meta device \(inputs\)"):
        on_device(meta, torch.device("cpu"))


class Picky(nn.Module):
    """It takes so many samples, or images of that size, alone."""

    def __init__(self, samples=None, side=None, error=RuntimeError("refused\nin two lines")):  # noqa: B008
        super().__init__()
        self.samples, self.side, self.error, self.shapes = samples, side, error, []

    def forward(self, images: Tensor) -> Tensor:
        self.shapes.append(tuple(images.shape))
        if self.samples not in (None, len(images)) or self.side not in (None, images.shape[-1]):
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
    with pytest.raises(ConfigError, match=r"tensor in it, got int \(data, batch 4\)"):
        inputs_of((3, X), 4, "data")
    for wrong, words in (
        (torch.zeros(2, 0), "a batch must hold inputs, got an empty one"),
        (X.to_sparse(), "got a sparse_coo tensor"),
        (X.to("meta"), "got a meta tensor"),
        (torch.tensor([1.0, float("nan")]), "must be finite"),
        (torch.tensor([1.0, float("-inf")]), "must be finite"),
    ):
        with pytest.raises(DataError, match=rf"{words}.*\(data, batch 4\)"):
            check_inputs(((X, wrong), 3), 4, "data")
    check_inputs(torch.arange(3), 0, "data")


def test_calls_have_the_arguments_that_a_model_takes():
    (call,) = calls(TwoArguments(), [{"images": X, "vectors": X, "labels": X}])
    assert list(call[1]) == ["images", "vectors"]
    assert call[1]["images"].data_ptr() != X.data_ptr()
    (call,) = calls(AnyArguments(), [{"images": X, "labels": X}])
    assert list(call[1]) == ["images", "labels"]
    with pytest.raises(DataError, match="must hold at least one batch, got none"):
        list(calls(TwoArguments(), []))
    with pytest.raises(DataError, match=r"missing .*'vectors'.*the first entry is the input.*\(batch 1\)$"):
        list(calls(TwoArguments(), [((X, X), 3), (X, 3)]))
    with pytest.raises(DataError, match=r"no argument called labels, names; a mapping holds.*\(batch 0\)$"):
        list(calls(TwoArguments(), [{"labels": X, "names": X}]))
    for alone in (X, (X,), [X]):  # with no targets
        with pytest.raises(DataError, match=r"'vectors' \(batch 0\)$"):
            list(calls(TwoArguments(), [alone]))
    with pytest.raises(DataError, match=r"no argument called a, vecs \(did you mean vectors\?\)"):
        list(calls(TwoArguments(), [{"images": X, "a": X, "vecs": X}]))


@pytest.mark.parametrize(
    ("inputs", "cure"),
    [
        ([1, 2.5], r"got list of numbers: torch.tensor makes a batch of them \("),
        ({"input_ids": [[1, 2]]}, r"got dict of numbers: tokenizers give tensors with return_tensors='pt'"),
        (3, r"got int \("),
        ("text", r"got str \("),
        ([], r"got list \("),
        (["text"], r"got list \("),
    ],
)
def test_numbers_say_how_they_become_tensors(inputs, cure):
    with pytest.raises(ConfigError, match=cure):
        inputs_of((inputs, 3))


class Typed(nn.Module):
    """Has parameters of some types."""

    def __init__(self, *dtypes):
        super().__init__()
        self.held = nn.ParameterList(nn.Parameter(torch.zeros(1).to(each), requires_grad=False) for each in dtypes)


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((), torch.float32),
        ((torch.float64, torch.int64), torch.float64),
        ((torch.float16, torch.float64), torch.float32),
        ((torch.float8_e4m3fn,), torch.float32),
    ],
    ids=["none", "one and integers", "two", "one for storage"],
)
def test_floats_get_the_one_type_that_a_models_parameters_have(dtypes, expected):
    (given, number), _ = copied_for(Typed(*dtypes), ((X, torch.tensor(3)), {}))
    assert (given.dtype, number.dtype) == (expected, torch.int64)
    assert given is not X


def test_errors_let_go_of_what_the_functions_held_that_raised_them():
    held = []

    def fail():
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        raise ValueError("first")

    def fail_again(is_cause):
        tensor = torch.zeros(3)
        held.append(weakref.ref(tensor))
        try:
            fail()
        except ValueError as error:
            if is_cause:
                raise KeyError("second") from error
            raise KeyError("second")  # noqa: B904 - it has a context alone

    for is_cause in (True, False):
        try:
            fail_again(is_cause)
        except KeyError as error:
            assert [each() is not None for each in held] == [True, True]
            let_go(error)
            assert [each() is None for each in held] == [True, True]
        held.clear()
    let_go(None)


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


def test_fields_of_data_classes_are_looked_into():
    one, two = torch.ones(2), torch.zeros(3)
    found = tensors_of({"a": (Answer(one, {"b": two}), 3)})
    assert [each is wanted for each, wanted in zip(found, (one, two), strict=True)] == [True, True]
    assert tensors_of(Answer) == []  # the class itself holds none


def test_a_network_that_returns_a_data_class_is_made_smaller():
    torch.manual_seed(0)
    model, images = Answering(), torch.randn(64, 1, 6, 6)
    small = nni_topo.shrink(model, [images], {"flops": 0.5}, distill=False)
    assert small.first.out_channels == 4
    (answer,) = small(images)
    torch.testing.assert_close(answer.others["double"], 2.0 * answer.scores)
    assert small.report.stages[-1].distance < small.report.stages[1].distance


class Flagged(nn.Module):
    """A network with an argument that is a single number, before its samples."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, return_loss=None, rows=None):
        return self.last(self.first(rows).relu())


def test_a_single_number_before_the_samples_is_no_number_of_samples(tmp_path):
    model = Flagged().eval()
    batches = [{"return_loss": torch.tensor(True), "rows": torch.randn(32, 6)} for _ in range(3)]
    assert batch_size(batches[0]) == 32
    assert zoo.count_macs(model, batches[0]) == 6 * 8 + 8 * 3
    small = nni_topo.shrink(model, batches, {"flops": 0.5}, distill={"steps": 3})
    assert small.first.out_features == 4
    assert (small.report.images, small.report.held_out) == (84, 12)
    groups = nni_topo.dependency_groups(model, batches[0], [{"op_names": ["first"], "sparse_ratio": 0.5}])
    for knobs in ({"pruner": "topological", "cloud": "activation"}, {"pruner": "reconstruction"}):
        pruner = nni_topo.create_pruner(knobs.pop("pruner"), Flagged(), groups, calibration=batches, **knobs)
        assert int(pruner.compress()[1]["first"]["weight"].amax(1).sum()) == 4
    masks = {"first": {"weight": torch.ones(8, 6).tril(4)}}
    assert nni_topo.compensation(model, masks, batches).report.images == 84
    table = measure_latency(model, batches[0], repeats=1, shares=(0.5, 1.0))
    assert table.batch_size == 32
    assert nni_topo.export(small, tmp_path / "small.pt2", batches[0]).error < 1e-5


@dataclass
class Pair:
    images: torch.Tensor
    labels: torch.Tensor


class TakesPair(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 3)

    def forward(self, pair):
        return self.head(torch.relu(self.second(torch.relu(self.first(pair.images)))).mean((2, 3)))


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


def test_a_cache_of_transformers_as_input_is_refused():
    transformers = pytest.importorskip("transformers")
    batch = {"x": torch.zeros(4, 2), "past_key_values": transformers.DynamicCache()}
    with pytest.raises(ConfigError, match=r"got a DynamicCache: pass its keys and values, .* \(calibration, batch 2\)"):
        inputs_of(batch, 2)


@pytest.mark.parametrize("place", ["alone", "in a tuple", "by name"])
def test_a_data_class_as_input_is_refused(place):
    pair = Pair(torch.randn(16, 1, 6, 6), torch.zeros(16))
    batch = {"alone": pair, "in a tuple": ((pair,),), "by name": {"pair": pair}}[place]
    with pytest.raises(ConfigError, match=r"got a data class, Pair: pass its tensors, .* \(images, batch 0\)"):
        nni_topo.shrink(TakesPair().eval(), [batch], {"flops": 0.5}, distill=False)


@pytest.mark.parametrize(
    ("batch", "words"),
    [([], "got an empty one"), (("a", X), "tensor in it, got str"), (TwoArguments(), "tensor in it, got TwoArguments")],
    ids=["nothing", "text", "a model"],
)
def test_a_batch_without_inputs_is_named_by_its_number(batch, words):
    for before in range(3):
        with pytest.raises((ConfigError, DataError), match=rf"{words}.*\(calibration, batch {before}\)$"):
            list(calls(TwoArguments(), [((X, X), 3)] * before + [batch]))


@pytest.mark.parametrize("most", [None, 8, 7, 6, 3, 1])
def test_calls_are_cut_into_parts_of_samples_that_may_run_together(most):
    tried = []

    @in_smaller_batches
    def work():
        tried.append([len(call[0][0]) for call in calls(TwoArguments(), [((torch.ones(7, 2), torch.ones(7)), 3)])])
        if most is not None and max(tried[-1]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tried[-1]

    found = work()
    assert max(found) <= (most or 7)
    assert sum(found) == 7
    assert max(found) - min(found) <= 1
    assert found == {None: [7], 8: [7], 7: [7], 6: [3, 2, 2], 3: [3, 2, 2], 1: [1] * 7}[most]


def test_mappings_of_any_class_become_dicts():
    found = inputs_of(UserDict(a=X))
    assert type(found) is dict
    assert found["a"] is X


class Result(dict):
    """As ``ModelOutput`` does, it holds its entries in attributes, too."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)


class Slots:
    __slots__ = ("deep", "lost", "scores")

    def __init__(self, scores, deep=None):
        self.scores, self.deep = scores, deep


class Plain:
    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.me, self.kind, self.layer = self, Plain, nn.Linear(1, 1)


class Text(str):
    def __init__(self, _):
        self.tensor = X


class KeyCache(Plain):
    pass


class StaticCache(Plain):
    __module__ = "transformers.cache_utils"


class Rows(tuple):
    pass


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
        (Pair, []),
        (5, []),
        (OrderedDict(a=X), ["a"]),
        (UserDict(a=X), ["a"]),
        (Rows((X, Rows((X,)))), ["output[0]", "output[1][0]"]),
        (deque([X, X]), ["output[0]", "output[1]"]),
        (frozenset([X]), ["output[0]"]),
        (Result(a=X, b=torch.ones(1)), ["a", "b"]),
        (Slots(X), ["scores"]),
        ([Slots(X, {"a": X})], ["output[0].deep.a", "output[0].scores"]),
        (Plain(a=X, b=X, c=Plain(d=X)), ["a", "b", "c.d"]),
        ((X, Plain(a=torch.ones(1))), ["output[0]", "output[1].a"]),
        ((X, KeyCache(a=torch.ones(1))), ["output[0]", "output[1].a"]),
        ((X, StaticCache(a=torch.ones(1))), ["output[0]"]),
        ({"a": X, "b": X}.values(), ["output[0]", "output[1]"]),
        ({"a": X}.items(), ["output[0][1]"]),
        ((X, range(3), b"text"), ["output[0]"]),
        ((X, X.numpy(), "text"), ["output[0]"]),
        ((X, TracedInt.of_tensor(3, X, 1), Text("text")), ["output[0]"]),
    ],
)
def test_outputs_are_named_by_what_leads_to_them(found, names):
    assert [name for name, _ in returned_by_name(found)] == names
    assert len(returned_tensors(found)) == len(names)


@pytest.mark.parametrize("found", [iter([X]), zip([X], strict=True), (each for each in [X])])
def test_an_iterator_is_no_output(found):
    with pytest.raises(SpeedupError, match=r"must be there when its forward ends, got (list_iterator|zip|generator)"):
        returned_by_name(found)
