from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace

import pytest

from nni_topo.errors import ConfigError
from nni_topo.runs.choices import (
    Cell,
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    PruneConfig,
    PrunerChoice,
    Target,
    load_prune_config,
    with_recovery,
)
from nni_topo.zoo import Recipe

ALL = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneConfig("l1", ALL, calibration=-1), "calibration must be .*, got -1"),
        (lambda: PruneConfig("l1", ALL, round_to=0), "round_to must be .*, got 0"),
        (lambda: CompensationChoice(0), "images must be .*, got 0"),
        (lambda: CompensationChoice(refine=-1), "refine must be .*, got -1"),
        (lambda: DistillationChoice(1), "images must be .*, got 1"),
        (lambda: DistillationChoice(seconds=0), "seconds must be .*, got 0"),
        (lambda: DataChoice("digits", data_dir=1), "data_dir must be .*, got 1"),
        (lambda: Target("ratio", 1.0), r"in \[0, 1\), got 1.0"),
        (lambda: Target("flops", 0.0), r"in \(0, 1\], got 0.0"),
        (lambda: Target("size", 0.5), "got 'size'"),
    ],
)
def test_what_is_out_of_range_is_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


CELL = Cell(
    model=ModelChoice("small_cnn"),
    data=DataChoice("digits", limit=100),
    pruner=PrunerChoice("l1"),
    target=Target("ratio", 0.5),
    seed=0,
    train=Recipe(epochs=1),
    retrain=Recipe(epochs=2),
)


@pytest.mark.parametrize(
    "changes",
    [
        {"data": DataChoice("digits", data_dir="elsewhere", limit=100, download=True, workers=2)},
        {"pruner": PrunerChoice("l1", compensate=CompensationChoice(), distill=False)},
        {"distill": None},
        {"model": ModelChoice("small_cnn", checkpoint=None)},
    ],
)
def test_equal_settings_have_one_key_wherever_the_data_lie(changes):
    assert replace(CELL, **changes).key == CELL.key


@pytest.mark.parametrize(
    "changes",
    [
        {"model": ModelChoice("small_cnn", 0.5)},
        {"model": ModelChoice("small_cnn", checkpoint="net.pt")},
        {"data": DataChoice("digits", limit=100, test_limit=10)},
        {"data": DataChoice("digits", limit=100, image_size=16)},
        {"data": DataChoice("digits", limit=200)},
        {"compensate": CompensationChoice()},
        {"distill": DistillationChoice(32)},
        {"until": 0.5},
        {"seed": 1},
        {"device": "cuda"},
    ],
)
def test_other_settings_have_other_keys(changes):
    other = replace(CELL, **changes)
    assert other.key != CELL.key
    assert (other.training_key == CELL.training_key) == (not {"model", "data", "seed"} & changes.keys())


def digest(content):
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def test_keys_of_records_from_before_there_was_a_choice_are_found():
    # the digests of the settings without the fields that came later
    settings = {
        **{"model": {"name": "small_cnn", "width": 1.0}, "seed": 0, "device": "cpu"},
        "data": {"name": "digits", "data_dir": None, "limit": 100, "download": False},
        "pruner": {"name": "l1", "label": "", "knobs": {}, "calibration": 0},
        "target": {"kind": "ratio", "value": 0.5},
        **{"train": asdict(Recipe(epochs=1)), "retrain": asdict(Recipe(epochs=2))},
    }
    assert CELL.key == digest(settings)
    distill = {name: value for name, value in asdict(DistillationChoice(32)).items() if name != "precision"}
    assert replace(CELL, distill=DistillationChoice(32)).key == digest({**settings, "distill": distill})
    trained = digest([settings["model"], settings["data"], settings["train"]])
    assert CELL.training_key == f"small_cnn-digits-{trained}-seed0"


def test_a_file_says_how_a_network_is_pruned(tmp_path):
    path = tmp_path / "prune.yaml"
    path.write_text("pruner: l1\nconfig_list: [{op_types: [Conv2d], sparse_ratio: 0.5}]\ncompensate: {images: 8}\n")
    config = load_prune_config(path)
    assert config == PruneConfig("l1", ALL, compensate=CompensationChoice(8))
    plain = {"distill": {"images": 4}, "compensate": False, "seed": 3}
    wanted = {"distill": DistillationChoice(4), "compensate": False, "seed": 3}
    assert with_recovery(plain, (None, False)) == wanted
    for text, words in (
        ("seed: 3\nknobs: {}\n", r"must name pruner, got seed, knobs \(.*prune.yaml\)"),
        ("{}", "must name pruner, got nothing"),
        ("pruner: l1\n", "must name config_list, got pruner"),
        ("[1]", "a configuration must be a mapping, got list"),
        ("pruner: l11\nconfig_list: []\n", "got 'l11'; did you mean"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=words):
            load_prune_config(path)
