from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nni_topo.errors import ConfigError, DataError
from nni_topo.zoo import list_data, load_data
from nni_topo.zoo.sources import class_rank, stratified_fraction


def rows(dataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.tensors[0]}


def test_digits_are_complete_and_disjoint() -> None:
    data = load_data("digits")
    assert (data.in_channels, data.image_size, data.num_classes) == (1, 8, 10)
    assert data.class_names == tuple("0123456789")
    parts = (data.train, data.validation, data.test)
    # 20 % and then 10 % of every class, rounded down: digit 0 has 178 images, so 35 for the test, then 14.
    assert [len(part) for part in parts] == [1302, 140, 355]
    assert [int((part.tensors[1] == 0).sum()) for part in parts] == [129, 14, 35]
    assert not rows(data.train) & rows(data.test)
    assert not rows(data.train) & rows(data.validation)
    assert not rows(data.validation) & rows(data.test)
    for part in parts:
        images, labels = part.tensors
        assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert images.shape == (len(part), 1, 8, 8)


def test_text_is_followed_by_itself() -> None:
    data = load_data("python-stdlib", limit=50, validation=0.01)
    assert (len(data.train), data.image_size, data.num_classes) == (50, 128, 256)
    for part in (data.train, data.validation, data.test):
        rows, following = part.tensors
        assert torch.equal(rows[:, 1:], following[:, :-1])
        assert (rows.dtype, following.dtype) == (torch.int64, torch.int64)
    text = [bytes(row.tolist()) for row in data.test.tensors[0][:2000]]
    assert b"def " in b"".join(text)
    assert not set(text) & {bytes(row.tolist()) for row in data.train.tensors[0]}


def test_images_are_normalised_by_all_training_images() -> None:
    data = load_data("digits")
    training = torch.cat([data.train.tensors[0], data.validation.tensors[0]]).double()
    assert float(training.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(training.std(correction=0)) == pytest.approx(1.0, abs=1e-6)
    limited = load_data("digits", limit=20, validation=0.5, seed=3)
    assert (limited.mean, limited.std) == (data.mean, data.std)


def test_seed_moves_the_validation_split_but_not_the_test_set() -> None:
    first, again, other = (load_data("digits", limit=100, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.train.tensors[0], again.train.tensors[0])
    assert rows(first.validation) == rows(again.validation)
    assert rows(first.validation) != rows(other.validation)
    assert torch.equal(first.test.tensors[0], other.test.tensors[0])


@pytest.mark.parametrize(("limit", "counts"), [(100, {10}), (25, {2, 3}), (3, {0, 1})])
def test_limit_is_balanced_over_the_classes(limit: int, counts: set[int]) -> None:
    data = load_data("digits", limit=limit)
    assert len(data.train) == limit
    assert set(torch.bincount(data.train.tensors[1], minlength=10).tolist()) == counts
    assert len(data.validation) == 140


def test_a_scarce_class_leaves_its_share_to_the_others(npz_file) -> None:
    labels = np.array([0] * 2 + [1] * 19 + [2] * 19)
    data = load_data(str(npz_file(y_train=labels, y_test=np.arange(10) % 3)), limit=20, validation=0.0)
    assert torch.bincount(data.train.tensors[1]).tolist() == [2, 9, 9]


def test_padding_is_black_and_in_the_middle() -> None:
    plain, padded = load_data("digits"), load_data("digits", pad_to=11)
    assert padded.image_size == 11
    images = padded.train.tensors[0]
    assert torch.equal(images[:, :, 1:9, 1:9], plain.train.tensors[0])
    border = images.clone()
    border[:, :, 1:9, 1:9] = -padded.mean[0] / padded.std[0]
    torch.testing.assert_close(border, torch.full_like(border, -padded.mean[0] / padded.std[0]))


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.floats(0.0, 0.99),
    st.integers(0, 2**32 - 1),
)
def test_stratified_fraction_draws_the_floor_of_every_class(labels: list[int], fraction: float, seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    drawn = stratified_fraction(array, fraction, np.random.default_rng(seed))
    for label in set(labels):
        count = labels.count(label)
        assert drawn[array == label].sum() == int(np.floor(fraction * count + 1e-9))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 2**32 - 1))
def test_class_rank_numbers_every_class_from_zero(labels: list[int], seed: int) -> None:
    array = np.array(labels, dtype=np.int64)
    ranks = class_rank(array, np.random.default_rng(seed))
    for label in set(labels):
        assert sorted(ranks[array == label]) == list(range(labels.count(label)))


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"limit": 0}, "limit must be an integer of at least 1 or None, got 0"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\), got 1.0"),
        ({"pad_to": 0}, "pad_to must be an integer of at least 1 or None, got 0"),
    ],
)
def test_bad_numbers_are_named(knobs: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_data("digits", **knobs)


def test_unknown_name_comes_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"got 'fashion_mnist'; did you mean fashion-mnist"):
        load_data("fashion_mnist")
    assert list_data() == ["digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "image-folder", "python-stdlib"]


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_data_from_files_needs_a_folder_that_exists(name: str, tmp_path) -> None:
    with pytest.raises(ConfigError, match=rf"data_dir must be given .* got None \({name}\)"):
        load_data(name)
    with pytest.raises(DataError, match=r"data_dir must be a folder that exists, got none .*absent"):
        load_data(name, tmp_path / "absent")

    for path in ("nofile.pt", str(tmp_path / "absent")):
        with pytest.raises(DataError, match=r"an .npz file or a folder that exists, got none .*(absent|le.pt)"):
            load_data(path)
