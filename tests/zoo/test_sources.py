from __future__ import annotations

import gzip
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nni_topo.errors import DataError
from nni_topo.zoo import load_data

IMAGES = "train-images-idx3-ubyte"
LABELS = "train-labels-idx1-ubyte"


@pytest.mark.parametrize(("place", "packed"), [("data", True), ("data/raw", False), ("data/FashionMNIST/raw", False)])
def test_idx_files_are_found_and_read(idx_folder, tmp_path: Path, place: str, packed: bool) -> None:
    folder = idx_folder(place, packed=packed)
    data = load_data("fashion-mnist", tmp_path / "data", validation=0.0)
    content = (folder / (IMAGES + (".gz" if packed else ""))).read_bytes()
    pixels = np.frombuffer(gzip.decompress(content) if packed else content, dtype=np.uint8)[16:] / 255
    assert (len(data.train), len(data.test), data.image_size, data.num_classes) == (60, 20, 28, 10)
    assert data.class_names[9] == "ankle boot"
    assert data.mean[0] == pytest.approx(pixels.mean(), abs=1e-12)
    assert data.std[0] == pytest.approx(pixels.std(), abs=1e-9)
    stored = data.train.tensors[0].double().reshape(-1).numpy() * data.std[0] + data.mean[0]
    np.testing.assert_allclose(stored, pixels, atol=1e-6)
    assert data.train.tensors[1].tolist() == [index % 10 for index in range(60)]


def test_bad_idx_files_are_named(idx_folder) -> None:
    folder = idx_folder()
    content = (folder / IMAGES).read_bytes()
    (folder / IMAGES).write_bytes(content[:-100])
    # whole it has 16 bytes of header and 60 images of 784 bytes
    with pytest.raises(DataError, match=rf"an idx file must be a whole file .* got 46956 bytes .*{IMAGES}"):
        load_data("mnist", folder)
    (folder / IMAGES).write_bytes((folder / LABELS).read_bytes())
    with pytest.raises(DataError, match=r"with 3 axes, .* magic number 00000801"):
        load_data("mnist", folder)
    (folder / LABELS).unlink()
    (folder / IMAGES).write_bytes(content)
    with pytest.raises(DataError, match=f"must hold {LABELS} or {LABELS}\\.gz, got none .*data"):
        load_data("mnist", folder)


@pytest.mark.parametrize("layout", ["last", "first", "grey"])
def test_npz_layouts(npz_file, layout: str) -> None:
    plain = np.load(npz_file())
    turned = {
        "last": lambda images: images,
        "first": lambda images: images.transpose(0, 3, 1, 2),
        "grey": lambda images: images[..., 0],
    }[layout]
    data = load_data(str(npz_file(x_train=turned(plain["x_train"]), x_test=turned(plain["x_test"]))), validation=0.0)
    channels = 1 if layout == "grey" else 3
    assert (data.in_channels, data.image_size, data.num_classes) == (channels, 6, 4)
    assert data.class_names == ("0", "1", "2", "3")
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    stored = data.test.tensors[0] * std + mean
    expected = torch.from_numpy(plain["x_test"].transpose(0, 3, 1, 2)[:, :channels] / 255.0).float()
    torch.testing.assert_close(stored, expected, atol=1e-6, rtol=1e-5)


def test_npz_floats_names_and_column_labels(npz_file) -> None:
    pixels = np.random.default_rng(1).normal(7.0, 2.0, (40, 1, 5, 5))
    before = pixels.copy()
    path = npz_file(
        x_train=pixels,
        x_test=pixels[:10].astype(np.float32),
        y_train=(np.arange(40) % 4)[:, None].astype(np.uint8),
        class_names=np.array(["a", "b", "c", "d", "e"]),
    )
    data = load_data(str(path), validation=0.0)
    assert (data.num_classes, data.class_names[4]) == (5, "e")
    assert data.mean[0] == pytest.approx(before.mean())
    assert float(data.train.tensors[0].mean()) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize(
    ("replaced", "message"),
    [
        ({"y_test": None}, "must hold x_train, y_train, x_test, y_test, got x_test, x_train, y_train"),
        ({"y_test": np.arange(10)}, r"labels must be in \[0, 4\), got 0 to 9 \(test"),
        ({"y_train": np.arange(40) % 4 - 1}, r"labels must be in \[0, 3\), got -1 to 2 \(training"),
        ({"y_train": np.arange(39) % 4}, "one label per image, got 40 and 39"),
        ({"y_train": np.linspace(0, 3, 40)}, r"labels must be integers of shape \(n,\), got float64"),
        ({"x_test": np.zeros((10, 5, 5, 3), np.uint8)}, r"share a shape, got \(3, 6, 6\) and \(3, 5, 5\)"),
        ({"x_train": np.zeros((40, 6, 6, 2), np.uint8)}, r"images must be .* got \(40, 6, 6, 2\) \(x_train"),
        ({"x_train": np.zeros((40, 6, 6), np.int32)}, r"images must be uint8 or floats, got int32"),
        ({"x_test": np.full((10, 6, 6, 3), np.nan)}, r"images must be finite, got NaN or infinity \(test"),
        (
            {"x_train": np.zeros((40, 6, 7), np.uint8), "x_test": np.zeros((10, 6, 7), np.uint8)},
            "images must be squares, got 6x7",
        ),
        ({"x_train": np.array([None] * 40)}, "must be a whole file of plain arrays, got .* bytes"),
    ],
)
def test_bad_npz_files_are_named(npz_file, replaced, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_data(str(npz_file(**replaced)))


def test_truncated_npz_files_are_named(npz_file) -> None:
    path = npz_file()
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=r"must be a whole file of plain arrays, got 700 bytes"):
        load_data(str(path))


def write_images(folder: Path, count: int, *, mode: str = "RGB", size: tuple[int, int] = (6, 6)) -> None:
    folder.mkdir(parents=True)
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")


def test_image_folder_of_classes_alone_splits_a_test_off(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 10, mode="L")
    (tmp_path / ".hidden").mkdir()
    data, other = (load_data(str(tmp_path), seed=seed) for seed in (0, 1))
    assert (data.in_channels, data.class_names) == (1, ("a", "b"))
    assert torch.bincount(data.test[:][1]).tolist() == [2, 2]
    assert torch.equal(data.test[:][0], other.test[:][0])


def test_image_folder_can_be_scaled(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 5, size=(9, 6))
    write_images(tmp_path / "b", 5, size=(6, 12))
    with pytest.raises(DataError, match=r"squares of one size unless image_size .* is given, got 6x9 beside 9x9"):
        load_data(str(tmp_path))
    data = load_data(str(tmp_path), image_size=6, validation=0.0)
    assert data.train[:][0].shape == (8, 3, 6, 6)
    # A 9x6 image needs no scaling: as torchvision crops it, its middle 6 columns begin at 1.5, rounded to 2.
    wanted = {np.asarray(Image.open(tmp_path / "a" / f"{i}.png"))[:, 2:8].tobytes() for i in range(5)}
    images, labels = data.train[:]
    stored = images.permute(0, 2, 3, 1).numpy() * np.array(data.std) + np.array(data.mean)
    found = {each.tobytes() for each in np.rint(255 * stored[labels == 0]).astype(np.uint8)}
    assert len(found) == 4
    assert found < wanted


def test_bad_image_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one folder per class .*got: Couldn't find any class folder"):
        load_data(str(tmp_path))
    write_images(tmp_path / "train" / "a", 2)
    with pytest.raises(DataError, match="a folder test or val, got neither"):
        load_data(str(tmp_path))
    write_images(tmp_path / "val" / "b", 2)
    with pytest.raises(DataError, match=r"test classes must be training classes, got b \(.*val\)"):
        load_data(str(tmp_path))
    (tmp_path / "train" / "b").mkdir()
    with pytest.raises(DataError, match=r"at least one image, .*classes b\..*\(.*train\)"):
        load_data(str(tmp_path))
    with pytest.raises(DataError, match=r"an .npz file or a folder that exists, got none \(.*absent\)"):
        load_data(str(tmp_path / "absent"))


def write_classes(root: Path, *names: str) -> Path:
    for name in names:
        write_images(root / name, 10)
    return root


def sizes_of(folder: Path) -> list[int]:
    data = load_data(str(folder))
    return [len(part) for part in (data.train, data.validation, data.test)]


def test_links_in_image_folders_add_no_image_twice(tmp_path: Path) -> None:
    plain, linked = (write_classes(tmp_path / name, "a", "b") for name in ("plain", "linked"))
    (linked / "a" / "itself").symlink_to(".")
    (linked / "a" / "0_again.png").symlink_to("3.png")
    (linked / "b" / "deep").mkdir()
    for name in ("above", "beside"):
        (linked / "b" / "deep" / name).symlink_to(linked / "b")
    (linked / "b" / "lost").symlink_to("nowhere")
    (linked / "b" / "notes.txt").symlink_to("nowhere")
    assert sizes_of(linked) == sizes_of(plain) == [16, 0, 4]
    assert torch.equal(load_data(str(linked)).test[:][0], load_data(str(plain)).test[:][0])


def test_an_image_folder_may_consist_of_links_to_images_elsewhere(tmp_path: Path) -> None:
    store = write_classes(tmp_path / "store", "a", "b")
    folder = tmp_path / "links"
    (folder / "a").mkdir(parents=True)
    for index in range(10):
        (folder / "a" / f"{index}.png").symlink_to(store / "a" / f"{index}.png")
    (folder / "b").symlink_to(store / "b")
    assert sizes_of(folder) == sizes_of(store)
    assert torch.equal(load_data(str(folder)).test[:][0], load_data(str(store)).test[:][0])


def test_an_image_in_two_classes_or_parts_is_named(tmp_path: Path) -> None:
    classes = write_classes(tmp_path / "classes", "a", "b")
    (classes / "b" / "other.png").symlink_to(classes / "a" / "7.png")
    with pytest.raises(DataError, match=r"of one class alone, got .*a/7\.png and .*b/other\.png"):
        load_data(str(classes))
    around = write_classes(tmp_path / "around", "a", "b")
    (around / "b" / "up").symlink_to("..")
    with pytest.raises(DataError, match=r"of one class alone, got .*a/0\.png and .*b/up/a/0\.png"):
        load_data(str(around))
    parts = write_classes(tmp_path / "parts" / "train", "a", "b").parent
    write_images(parts / "test" / "a", 2)
    (parts / "test" / "b").symlink_to(parts / "train" / "b")
    with pytest.raises(DataError, match=r"for the test alone, got .*train/b/0\.png and .*test/b/0\.png"):
        load_data(str(parts))


def test_what_is_no_file_is_named_and_nothing_waits_for_it(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, "a", "b")
    os.mkfifo(folder / "a" / "pipe.png")
    with pytest.raises(DataError, match=r"a file or a link to a file, got a pipe.*pipe\.png"):
        load_data(str(folder))
    (folder / "a" / "pipe.png").unlink()
    (folder / "b" / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"a file or a link to a file, got a link that leads to no file .*gone\.png"):
        load_data(str(folder))


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every folder")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = write_classes(tmp_path, "a", "b")
    (folder / "a" / "closed").mkdir(mode=0)
    with pytest.raises(DataError, match=r"a folder of images must be readable, .*closed"):
        load_data(str(folder))


def test_truncated_images_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "test" / "a", 3)
    path = tmp_path / "train" / "a" / "1.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match=r"an image file must be undamaged .* in 60 bytes .*1\.png"):
        load_data(str(tmp_path), validation=0.0).train[:]


def test_cifar_is_read_through_torchvision(cifar10) -> None:
    folder = cifar10(8)
    data = load_data("cifar10", folder, validation=0.0)
    assert (len(data.train), len(data.test)) == (16, 8)
    assert (data.in_channels, data.image_size, data.num_classes) == (3, 32, 10)
    content = pickle.loads((folder / "cifar-10-batches-py" / "test_batch").read_bytes())
    mean, std = (np.array(values).reshape(3, 1, 1) for values in (data.mean, data.std))
    stored = data.test.tensors[0].numpy() * std + mean
    np.testing.assert_allclose(stored, content["data"].reshape(8, 3, 32, 32) / 255, atol=1e-5)
    path = folder / "cifar-10-batches-py" / "data_batch_2"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"cifar10 must be in the folder, got: .*corrupted.* download=True fetches it"):
        load_data("cifar10", folder)
