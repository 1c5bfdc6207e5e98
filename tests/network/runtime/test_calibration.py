from __future__ import annotations

import copy
import gc
import math
from collections import UserDict

import numpy as np
import pytest
import torch
from speedup_nets import masks_of
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import nni_topo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.runtime.calibration import Calibration

CONFIG = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
KNOBS = {
    "topological": {},
    "reconstruction": {},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 12)
        self.last = nn.Linear(12, 3)

    def forward(self, inputs, scale=1.0):
        return self.last(torch.relu(self.hidden(inputs)) * scale)


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    return list(torch.randn(3, 40, 6, generator=torch.Generator().manual_seed(1)))


def kept(row: str, model: nn.Module, calibration) -> list[int]:
    masks = masks_of(nni_topo.create_pruner(row, model, CONFIG, calibration=calibration, **KNOBS[row]))
    return masks["hidden"]["bias"].int().tolist()


@pytest.mark.parametrize("row", KNOBS)
def test_batches_may_come_in_any_container(row, model, batches):
    expected = kept(row, model, batches)
    assert 0 < sum(expected) < 12
    assert kept(row, model, [{"inputs": batch} for batch in batches]) == expected
    assert kept(row, model, [(batch, torch.zeros(40)) for batch in batches]) == expected
    assert kept(row, model, (batch for batch in batches)) == expected
    assert kept(row, model, DataLoader(TensorDataset(torch.cat(batches)), batch_size=40)) == expected


class Counting:
    """Counts how often it is iterated; every pass gives other batches."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter([batch + self.passes for batch in self.batches])


class Promising(Counting):
    """Says that it holds more than any disk does."""

    def __len__(self):
        return 10**15


def test_batches_are_read_once(batches):
    source = Counting(batches)
    calibration = Calibration(source)
    assert source.passes == 0
    for _ in range(3):
        assert all(map(torch.equal, calibration, [batch + 1 for batch in batches]))
    assert source.passes == 1
    assert len(calibration) == 3
    assert calibration.sizes == (40, 40, 40)
    assert calibration.samples == 120
    assert Calibration.of(calibration) is copy.deepcopy(calibration) is calibration


def test_the_batches_of_a_list_are_not_copied_and_others_are(batches):
    assert all(kept is given for kept, given in zip(Calibration(batches), batches, strict=True))
    same = torch.zeros(2, 6)

    def refilled():
        for value in (1.0, 2.0):
            yield same.fill_(value)

    assert [float(batch.mean()) for batch in Calibration(refilled())] == [1.0, 2.0]


def test_every_eighth_sample_is_held_out_with_its_labels():
    images, labels = torch.arange(26.0)[:, None], torch.arange(26)
    given = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    learned, held_out = Calibration(given).split()
    assert torch.cat([batch[1] for batch in held_out]).tolist() == [7, 15, 23]
    assert torch.cat([batch[1] for batch in learned]).tolist() == [n for n in range(26) if n % 8 != 7]
    assert all(torch.equal(batch[0][:, 0].long(), batch[1]) for part in (learned, held_out) for batch in part)
    assert (learned.sizes, held_out.sizes) == ((5, 18), (3,))
    assert Calibration([images[:7]]).split()[1] is None
    lists = Calibration([([[image, image]],) for image in torch.randn(9, 3, 4, 4)])
    assert list(map(len, lists.split())) == [8, 1]


def test_groups_are_held_out_as_a_whole(batches):
    """Sixteen photos, crops of each spread over all batches; the eighth and the sixteenth photo to appear are held."""
    photos = [(3 + at) % 16 for at in range(120)]
    data = Calibration(batches, groups=photos)
    learned, held_out = data.split()
    assert data.held_out(8).tolist() == [photo in (3 + 7, (3 + 15) % 16) for photo in photos]
    rows = torch.cat(list(batches))
    assert torch.equal(torch.cat(list(held_out)), rows[data.held_out(8)])
    assert torch.equal(torch.cat(list(learned)), rows[~data.held_out(8)])
    # What is split off keeps its groups, counted anew.
    assert len(learned.groups.unique()) == 14
    assert int(learned.groups.max()) == 13
    assert torch.equal(Calibration(batches, groups=[f"photo {photo}" for photo in photos]).groups, data.groups)


def test_samples_and_groups_are_split_into_parts_by_a_pattern(batches):
    rows = torch.cat(batches)
    parts = Calibration(batches).in_parts((0, 2, 0, 1))
    for part, chosen in zip(parts, ((0, 2), (3,), (1,)), strict=True):
        assert torch.equal(torch.cat(list(part)), rows[[at for at in range(120) if at % 4 in chosen]])
    photos = torch.arange(120) // 10
    first, second = Calibration(batches, groups=photos).in_parts((0, 0, 1))
    assert torch.equal(torch.cat(list(second)), rows[photos % 3 == 2])
    assert len(first.groups.unique()) == 8
    few = Calibration([rows[:1]]).in_parts((0, 1))
    assert (few[0].samples, few[1]) == (1, None)
    lists = Calibration([([[image, image]],) for image in torch.randn(9, 3, 4, 4)])
    assert list(map(len, lists.in_parts((0, 1, 1)))) == [3, 6]


def test_samples_are_chosen_in_their_order_with_what_all_batches_have():
    def batch(first):
        return {"rows": torch.arange(first, first + 4)[:, None], "scale": torch.tensor(2.0), "flag": True}

    data = Calibration([batch(0), batch(4), batch(8)], groups=[at // 2 for at in range(12)])
    chosen = data.chosen(torch.tensor([0, 2, 5, 9, 11]))
    assert [each["rows"].flatten().tolist() for (each,) in chosen] == [[0, 2, 5, 9], [11]]
    assert [(float(each["scale"]), each["flag"]) for (each,) in chosen] == [(2.0, True)] * 2
    assert (chosen.sizes, chosen.groups.tolist()) == ((4, 1), [0, 1, 2, 3, 4])
    one = data.chosen(torch.tensor([7]))
    assert [each["rows"].tolist() for (each,) in one] == [[[7]]]


def test_samples_that_fit_into_no_batch_together_stay_where_they_are():
    others = torch.arange(4.0, 7.0)[:, None].expand(3, 2)
    chosen = Calibration([torch.arange(4.0)[:, None], others]).chosen(torch.tensor([1, 3, 5, 6]))
    assert chosen.sizes == (2, 2)
    assert chosen[0].flatten().tolist() == [1.0, 3.0]
    assert chosen[1][:, 0].tolist() == [5.0, 6.0]


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=">f4").reshape(3, 2),
        np.arange(12, dtype=np.uint8).reshape(3, 4)[::-1, ::2],
        np.broadcast_to(np.int32(3), (2, 2)),
    ],
    ids=["of another byte order", "backwards", "read only"],
)
def test_arrays_are_tensors_of_the_same_values(array):
    for (read,) in (Calibration([array]), Calibration([(array, ["text"])])[0][:1], [Calibration([[array]])[0][0]]):
        found = read[0] if isinstance(read, tuple) else read
        assert isinstance(found, torch.Tensor)
        assert found.tolist() == array.tolist()


def test_batches_that_are_none_yet_may_say_so():
    data = Calibration(iter([torch.zeros(4, 6), torch.zeros(3, 6)]))
    assert repr(data) == "Calibration(not read yet)"
    assert data.samples == 7
    assert repr(data) == "Calibration(2 batches, 7 samples)"
    loader = DataLoader(TensorDataset(torch.zeros(3, 6)), batch_size=4, drop_last=True)
    for empty in (loader, []):
        with pytest.raises(DataError, match=r"must hold at least one batch, got none"):
            len(Calibration(empty))


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (torch.zeros(2, 3), r"one Tensor of shape \(2, 3\)"),
        (np.zeros((2, 3)), r"one ndarray of shape \(2, 3\)"),
        ({"a": torch.zeros(2)}, "dict"),
        ("text", "str"),
        (3, "int"),
    ],
)
def test_what_is_no_batches_is_refused(given, got):
    with pytest.raises(
        ConfigError, match=rf"calibration must be an iterable of batches, .*, got {got} \(calibration\)$"
    ):
        Calibration(given)


@pytest.mark.parametrize(("kinds", "held"), [(1, 0), (2, 60), (5, 24), (8, 15)])
def test_one_of_few_groups_is_held_out(batches, kinds, held):
    data = Calibration(batches, groups=torch.arange(120) % kinds)
    assert int(data.held_out(8).sum()) == held
    assert (0 if data.split()[1] is None else data.split()[1].samples) == held


def test_groups_that_are_none_are_refused(batches):
    for groups in ("abc", 3, [0.5] * 120, [None] * 120):
        with pytest.raises(ConfigError, match="groups must be a sequence of integers or strings"):
            Calibration(batches, groups=groups)
    with pytest.raises(DataError, match="groups must have one entry for each of 120 samples, got 119"):
        Calibration(batches, groups=[0] * 119).split()
    lists = [([[image, image]],) for image in torch.randn(9, 3, 4, 4)]
    with pytest.raises(ConfigError, match="whose samples have groups must be tensors of samples, got lists"):
        Calibration(lists, groups=[0] * 18).split()


def test_the_ridge_is_chosen_on_groups_that_were_not_seen(model):
    """Ten samples in twelve copies each: a copy says nothing of what the layer does elsewhere."""
    few = torch.randn(10, 6, generator=torch.Generator().manual_seed(1))
    rows = few.repeat_interleave(12, 0) + 1e-5 * torch.randn(120, 6, generator=torch.Generator().manual_seed(2))
    masks = {
        "hidden": {"weight": (torch.arange(12) % 2).float()[:, None].expand(12, 6), "bias": torch.arange(12) % 2.0}
    }
    apart, known = (
        nni_topo.compensation(model, masks, Calibration([rows], groups=groups)).report.layers[0]
        for groups in (None, torch.arange(120) // 12)
    )
    assert known.ridge > apart.ridge
    assert known.error_held_out > 3 * apart.error_held_out


def test_what_memory_has_no_room_for_lies_in_files_that_go(batches, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    given = [({"inputs": batch}, (None, "text", torch.tensor([index]))) for index, batch in enumerate(batches)]
    calibration = Calibration(iter(given), memory_bytes=1000)
    assert calibration.samples == 120
    assert len(list(tmp_path.rglob("*.pt"))) == 2  # the first batch has 968 bytes
    for kept_batch, batch in zip(calibration, given, strict=True):
        assert torch.equal(kept_batch[0]["inputs"], batch[0]["inputs"])
        assert kept_batch[1][:2] == (None, "text")
        assert torch.equal(kept_batch[1][2], batch[1][2])
    learned, held_out = calibration.split()
    assert (learned.samples, held_out.samples) == (105, 15)
    del calibration, learned, held_out, kept_batch
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def endless():
    while True:
        yield torch.zeros(4, 6)


class Stream(IterableDataset):
    """A data set that never ends."""

    def __iter__(self):
        return endless()


class TooShort(Stream):
    """The same with a length that isn't true, as that of a stream may be."""

    def __len__(self):
        return 5


STREAMS = {
    "loader": lambda: DataLoader(Stream(), batch_size=None),
    "wrong length": lambda: TooShort(),
}


@pytest.mark.parametrize("row", STREAMS)
def test_what_never_ends_is_an_error_that_names_the_knob(row, model):
    rule = "must have an end, a length or a limit"
    ended = rf"(calibration|images) {rule}, got 1000 batches so far .* and more: .*max_batches=16\) \(\w+\)$"
    with pytest.raises(DataError, match=ended):
        nni_topo.shrink(model, STREAMS[row](), {"flops": 0.5})
    with pytest.raises(DataError, match=ended):
        kept("reconstruction", model, STREAMS[row]())


def test_max_batches_takes_the_first_ones(batches):
    asked = []

    def counted():
        for index, batch in enumerate(batches):
            asked.append(index)
            yield batch

    for given in (batches, counted(), DataLoader(torch.stack(batches), batch_size=None)):
        calibration = Calibration(given, max_batches=2)
        assert calibration.sizes == (40, 40)
        for kept_batch, batch in zip(calibration, batches[:2], strict=True):
            assert torch.equal(kept_batch, batch)
    assert asked == [0, 1]
    assert Calibration(batches, max_batches=4).samples == 120
    for wrong in (0, 1.5, True):
        with pytest.raises(ConfigError, match=r"max_batches must be .*at least 1.* \(Calibration\)"):
            Calibration(batches, max_batches=wrong)


def test_what_does_not_fit_is_an_error(batches):
    with pytest.raises(DataError, match=r"must fit into .* GiB of memory and .* of disk, got 1 of 10{15} batches"):
        len(Calibration(Promising(batches)))
    assert len(Calibration(Promising(batches), max_batches=2)) == 2
    assert len(Calibration(iter(batches), max_batches=2**31 - 1)) == 3  # of which nobody knows that they come


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.full((4, 6), math.nan), r"inputs must be finite .*got NaN or inf \(\w+, batch 1\)"),
        (torch.zeros(0, 6), r"hold inputs, got an empty one: inputs of shape \(0, 6\) \(\w+, batch 1\)"),
        ((), r"batch must hold an input, got an empty one \(\w+, batch 1\)"),
        (torch.zeros(4, 7), r"must fit the model, got RuntimeError: .*mat1 .*\(batch 1\)|must have one shape"),
        (torch.zeros(4, 6, device="meta"), r"dense tensors with values, got a meta tensor \(\w+, batch 1\)"),
        (
            {"images": torch.zeros(4, 6)},
            r"got TypeError: .*dict.*\(batch 1\)|one shape",
        ),
    ],
    ids=["nan", "no samples", "nothing", "wrong width", "meta", "wrong name"],
)
def test_batches_that_can_not_be_used_are_named_by_every_function(batch, message):
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3)).eval()
    masks = {"0": {"weight": torch.ones(12, 6), "bias": torch.ones(12)}}
    masks["0"]["weight"][3:] = masks["0"]["bias"][3:] = 0.0
    given = [torch.randn(8, 6), batch]
    with pytest.raises((DataError, ConfigError), match=message):
        nni_topo.compensate(model, masks, given)
    with pytest.raises((DataError, ConfigError), match=message):
        nni_topo.shrink(model, given, {"flops": 0.5}, pruner="l1", compensate=None, distill=False)


class Two(nn.Module):
    """Takes two inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.last = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, images, vectors):
        return self.last(torch.relu(self.a(images)) + torch.relu(self.b(vectors)))


def test_two_inputs_are_taken_in_several_forms_and_one_of_them_is_refused():
    torch.manual_seed(0)
    model, images, vectors = Two().eval(), torch.randn(64, 6), torch.randn(64, 4)
    knobs = {"pruner": "reconstruction", "distill": {"steps": 2}}
    with pytest.raises(DataError, match=r"missing a required argument: 'vectors' on float32 of shape \(64, 6\) "):
        nni_topo.shrink(model, [(images, "labels")], {"params": 0.6}, **knobs)
    expected = nni_topo.shrink(model, [(images, vectors)], {"params": 0.6}, **knobs).state_dict()
    for batch in (
        ((images, vectors), "labels"),
        # what the model has no argument for, as the labels of a data set, is left out
        {"images": images, "vectors": vectors, "label": torch.zeros(64)},
    ):
        small = nni_topo.shrink(model, [batch], {"params": 0.6}, **knobs)
        torch.testing.assert_close(small.state_dict(), expected)


class Embedded(nn.Module):
    """A classifier of tokens that gives a loss where labels come along, as those of Transformers do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.hidden, self.last = nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, input_ids, labels=None):
        logits = self.last(torch.relu(self.hidden(self.embed(input_ids).mean(1))))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_what_tokenizers_give_is_split_copied_and_measured_as_dicts_are():
    ids, labels = torch.randint(20, (96, 5)), torch.randint(3, (96,))
    dicts = [{"input_ids": ids[at : at + 32], "labels": labels[at : at + 32]} for at in range(0, 96, 32)]
    learned, held_out = Calibration([UserDict(each) for each in dicts]).split()
    assert torch.equal(torch.cat([batch["input_ids"] for batch in held_out]), ids[7::8])
    assert learned.samples == 84
    one, other = (
        nni_topo.shrink(Embedded().eval(), batches, {"params": 0.7}, pruner="l1", distill={"steps": 2})
        for batches in (dicts, [UserDict(each) for each in dicts])
    )
    torch.testing.assert_close(one.state_dict(), other.state_dict())
    stage, same = one.report.stages[-1], other.report.stages[-1]
    assert stage.distance == pytest.approx(same.distance)
    assert stage.distance != stage.calibration_distance
    buffer = torch.zeros(4, 5, dtype=torch.long)

    def refilled():
        for value in (1, 2):
            yield UserDict(input_ids=buffer.fill_(value))

    assert [int(batch["input_ids"].max()) for batch in Calibration(refilled())] == [1, 2]


@pytest.mark.parametrize("groups", [None, [*range(40), *range(100, 115)]], ids=["no groups", "groups"])
def test_equal_inputs_are_on_one_side_of_each_split(groups):
    """Of 55 samples 40 differ, the others are copies of the first 15; -0.0 equals 0.0; batches don't matter."""
    rows = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).round()
    rows[:, 0] = torch.arange(40) - 3.0
    copies = torch.where(rows[:15] == 0, -rows[:15], rows[:15])
    data = Calibration(torch.cat([rows, copies]).split(20), groups=groups)
    learned, held_out = data.split()
    keys = [{int(row) for row in torch.cat(list(part))[:, 0]} for part in (learned, held_out)]
    assert keys[1] == {4, 12, 20, 28, 36}  # every eighth of the 40
    assert keys[0] == set(range(-3, 37)) - keys[1]
    assert (learned.samples, held_out.samples) == (49, 6)
    assert data.held_out(8).sum() == 6


def test_copies_join_the_groups_that_hold_them():
    rows = torch.arange(20.0)[:, None]
    rows[19] = rows[0]  # the last group holds a copy of the first one's first sample
    numbers = Calibration([rows], groups=torch.arange(20) // 2).groups
    assert numbers.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 0, 0]


def test_new_samples_leave_something_of_every_group():
    """Two groups of four, four groups of one, and one of two equal samples: every third of eight is split off."""
    rows = torch.arange(14.0)[:, None]
    rows[13] = rows[12]
    groups = [0, 1, 0, 1, 0, 1, 0, 1, 2, 3, 4, 5, 6, 6]
    rest, known = Calibration(rows.split(5), groups=groups).new_samples(3)
    assert torch.cat(list(known)).flatten().tolist() == [3.0, 4.0]  # of 0, 2, 4, 6, 1, 3, 5, 7
    assert rest.samples == 12
    assert Calibration([rows]).new_samples(1)[1] is None
    assert Calibration([rows], groups=groups).as_whole_batches("a reason").new_samples(3)[1] is None


def test_equal_inputs_alone_are_never_held_out():
    data = Calibration([torch.ones(16, 3)])
    assert data.split()[1] is None


class TakesOne(nn.Module):
    """A model of one argument, which holds two tensors."""

    def __init__(self):
        super().__init__()
        self.hidden, self.last = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, inputs):
        rows, lengths = inputs
        return self.last(self.hidden(rows).relu() / lengths[:, None])


@pytest.mark.parametrize(
    "form",
    [lambda x, n: ((x, n), n), lambda x, n: ([x, n], n), lambda x, n: (((x, n),),), lambda x, n: {"inputs": (x, n)}],
    ids=["and labels", "of a DataLoader", "alone", "by name"],
)
def test_tuples_of_tensors_are_samples(form):
    torch.manual_seed(0)
    batches = [form(torch.randn(40, 6), torch.full((40,), 3.0)) for _ in range(2)]
    small = nni_topo.shrink(TakesOne().eval(), batches, {"flops": 0.5}, distill={"steps": 3}, progress=False)
    assert small.hidden.out_features == 6
    assert Calibration(batches).split()[1].samples == 10
    assert small.report.held_out == 5  # the other five judge
