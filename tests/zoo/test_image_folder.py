"""Image folders are read where they are used: from files of ImageNet's layout, with a bounded resident set."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from image_files import write_imagenet
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.evaluators import recipe_evaluator
from nni_topo.runs.run import Start, load_model_data
from nni_topo.zoo import load_data
from nni_topo.zoo.external import pretrained_preprocessing
from nni_topo.zoo.labelled import Preprocessing


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_imagenet(tmp_path_factory.mktemp("imagenet"), classes=4, train=20, val=5)


def opened_files(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the name of every file that Pillow opens from now on, in this process."""
    opened: list[str] = []
    plain = Image.open

    def noted(path, *arguments, **knobs):
        opened.append(str(path))
        return plain(path, *arguments, **knobs)

    monkeypatch.setattr(Image, "open", noted)
    return opened


def test_loading_opens_one_header_a_class_and_the_limit_comes_before_any_other_file(folder, monkeypatch) -> None:
    opened = opened_files(monkeypatch)
    data = load_data(str(folder), image_size=16, limit=8, workers=0)
    assert len(opened) == 4
    assert (len(data.train), len(data.validation), len(data.test)) == (8, 8, 20)
    data.train[:]
    assert len(opened) == 4 + 8


@pytest.mark.parametrize("limit", [1, 6, None])
def test_every_round_of_a_limit_holds_each_class_once(folder: Path, limit: int | None) -> None:
    data = load_data(str(folder), image_size=16, limit=limit, validation=0.25)
    for part in (data.train, data.validation, data.test):
        for begin in range(0, len(part) - 3, 4):
            assert sorted(part.labels[begin : begin + 4].tolist()) == [0, 1, 2, 3]
        rest = part.labels[len(part) // 4 * 4 :].tolist()
        assert len(set(rest)) == len(rest)
    assert len(data.train) == min(limit or 60, 60)
    assert not set(data.train.files) & set(data.validation.files)


def test_images_are_those_of_torchvisions_own_reader_and_transforms(folder: Path) -> None:
    weights = models.ResNet18_Weights.DEFAULT.transforms()
    data = load_model_data(ModelChoice("torchvision/resnet18"), DataChoice(str(folder), image_size=16, workers=0))
    transforms = v2.Compose(
        [
            v2.Resize(round(16 * weights.resize_size[0] / weights.crop_size[0])),
            v2.CenterCrop(16),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(weights.mean, weights.std),
        ]
    )
    listed = ImageFolder(folder / "val", transforms)
    reference = {path: listed[row] for row, (path, _) in enumerate(listed.samples)}
    images, labels = data.test[:]
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        wanted, wanted_label = reference[data.test.path(row)]
        torch.testing.assert_close(image, wanted)
        assert wanted_label == label
    assert data.mean == tuple(weights.mean)


def test_other_processes_read_the_same_images(folder: Path) -> None:
    before = torch.get_rng_state()
    here, there = (load_data(str(folder), image_size=8, workers=number).train for number in (0, 2))
    assert torch.equal(here[:][0], there[:][0])
    assert torch.equal(here[3:70:7][0], there[3:70:7][0])
    assert here[5][1] == here.labels[5]
    assert torch.equal(here[-1][0], here[len(here) - 1 :][0][0])
    assert here[:0][0].shape == (0, 3, 8, 8)
    assert torch.equal(torch.get_rng_state(), before)


def test_errors_of_reading_processes_are_those_of_this_one(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "data", classes=1, train=6, val=1)
    path = root / "train" / "n01440764" / "n01440764_3.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    data = load_data(str(root), image_size=8, validation=0.0, workers=2)
    with pytest.raises(DataError, match=r"^an image file must be .*n01440764_3\.JPEG\)$"):
        data.train[:]
    Image.new("L", (40, 32)).save(root / "train" / "n01440764" / "n01440764_0.JPEG")
    data = load_data(str(root), image_size=8, validation=0.0, workers=0)
    assert data.mean == pytest.approx((0.449,), abs=1e-9)
    with pytest.raises(DataError, match=r"^images must all be grey if the first image of every class is, got .*RGB"):
        data.test[:]


def test_small_images_are_padded_with_black(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "data", classes=2, train=3, val=1, size=(28, 28))
    data = load_data(str(root), pad_to=32, validation=0.0)
    assert data.image_size == 32
    corner = data.train[:][0][:, :, :2, :2]
    torch.testing.assert_close(corner, data.black.view(1, 3, 1, 1).expand_as(corner))


def test_preprocessing_is_that_of_the_pretrained_weights_or_a_given_one(folder: Path) -> None:
    weights = models.ViT_B_16_Weights.DEFAULT.transforms()
    found = pretrained_preprocessing("torchvision/vit_b_16")
    assert found == Preprocessing(tuple(weights.mean), tuple(weights.std), 224 / 256, "bilinear")
    assert pretrained_preprocessing("resnet20") is None
    given = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), crop=0.5, interpolation="bicubic")
    data = load_data(str(folder), image_size=16, preprocessing=given)
    assert (data.mean, data.std) == (given.mean, given.std)
    assert -1.0 <= float(data.test[:4][0].min()) < float(data.test[:4][0].max()) <= 1.0
    with pytest.raises(ConfigError, match="workers must be an integer of at least 0 or None, got -1"):
        load_data(str(folder), workers=-1)


def test_training_evaluation_and_nnis_evaluators_give_what_they_do_on_the_same_images_in_memory(folder: Path) -> None:
    files = load_data(str(folder), image_size=8, validation=0.25)
    memory = zoo.DataBundle(
        **{
            **vars(files),
            **{name: torch.utils.data.TensorDataset(*vars(files)[name][:]) for name in ("train", "validation", "test")},
        }
    )
    recipe = zoo.Recipe(2, batch_size=7, lr=0.05, augmentation="crop-flip")
    found = []
    for data in (files, memory):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
        zoo.check_model(net, data)
        log = zoo.train(net, data, recipe, seed=3)
        evaluator = recipe_evaluator(net, data, recipe)
        evaluator._init_optimizer_helpers(net)
        evaluator.bind_model(net)
        evaluator.train(max_steps=11)
        start = Start(net, data, recipe)
        found.append(
            [
                *(epoch.loss for epoch in log.epochs),
                zoo.loss_and_accuracy(net, data.test)[0],
                start.accuracy,
                start.validation_accuracy,
                start.images(9, 4)[0].numpy(force=True).tobytes(),
                float(net[0].weight.detach().abs().sum()),
            ]
        )
    assert found[0] == found[1]


def flattened(root: Path, folder: Path, name: str) -> dict[str, str]:
    """Copy a data set, one of whose folders holds its images directly; return their classes by file."""
    shutil.copytree(folder, root)
    classes = {}
    for path in sorted((root / name).glob("*/*")):
        classes[path.stem] = path.parent.name
        path.rename(root / name / path.name)
    for place in (root / name).iterdir():
        if place.is_dir():
            place.rmdir()
    return classes


def test_the_command_of_the_documentation_sorts_the_validation_images_of_ilsvrc(folder, tmp_path) -> None:
    classes = flattened(tmp_path / "images", folder, "val")
    page = (Path(__file__).parents[2] / "docs" / "sources.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^awk .*LOC_val_solution.csv$", page, re.MULTILINE)
    rows = [f"{name},{label} 85 1 499 272 {label} 1 2 3 4" for name, label in classes.items()]
    (tmp_path / "images" / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows, ""]))
    subprocess.run(command, shell=True, cwd=tmp_path / "images", check=True)
    found, expected = (load_data(str(place), image_size=16) for place in (tmp_path / "images", folder))
    assert found.test.labels.tolist() == expected.test.labels.tolist()
    assert len(found.test) == 20
