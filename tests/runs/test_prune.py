"""What a pruning file asks for, and the record that says what came of it."""

from __future__ import annotations

import pytest
import torch

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, DataError
from nni_topo.network import LatencyTable, LayerLatency
from nni_topo.runs import prune as module
from nni_topo.runs.choices import CompensationChoice, DataChoice, ModelChoice, PruneConfig
from nni_topo.runs.prune import prune_checkpoint

SMALL, DIGITS = ModelChoice("small_cnn"), DataChoice("digits", limit=64)
FULL = PruneConfig(
    "matrix",
    [{"op_types": ["Conv2d"]}],
    knobs={"budget": {"flops": 0.5}},
    compensate=CompensationChoice(32),
    retrain={"epochs": 1},
)
BARS = ("compensate:", "training:")


def small_cnn():
    return zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0).eval()


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "net.pt"
    torch.save(small_cnn().state_dict(), path)
    return path


@pytest.mark.parametrize("round_to", [None, 8])
def test_the_record_says_what_each_step_left(round_to, checkpoint, tmp_path, capsys, monkeypatch):
    # progress that nobody asked for appears at once
    monkeypatch.setattr("nni_topo.network.runtime.progress._DELAY", 0.0)
    out = tmp_path / "out"
    config = PruneConfig(**{**vars(FULL), "round_to": round_to})
    progress = None if round_to else False
    record = prune_checkpoint(SMALL, checkpoint, config, DIGITS, out, seed=3, progress=progress)
    assert {name: record[name] for name in ("model", "data", "pruner", "seed")} == {
        "model": "small_cnn",
        "data": "digits",
        "pruner": "matrix",
        "seed": 3,
    }
    data = zoo.load_data("digits", limit=64)
    dense = nni_topo.load(out / "dense.safetensors", small_cnn())
    assert record["accuracy_before"] == zoo.evaluate(small_cnn(), data.test)
    assert record["accuracy_retrained"] == zoo.evaluate(dense, data.test)
    assert {"accuracy_oneshot", "accuracy_compensated"} <= set(record)
    rows = record["compensation"]
    assert {"features.conv3"} <= {row["layer"] for row in rows}
    images = data.test[:2][0]
    left = zoo.count_macs(dense, images) / zoo.count_macs(small_cnn(), images)
    assert (record["flops"], record["flops_before"]) == (
        zoo.count_macs(dense, images),
        zoo.count_macs(small_cnn(), images),
    )
    assert record["budget"]["asked"] == 0.5
    assert record["budget"]["left"] == pytest.approx(left)
    if round_to is not None:
        assert {width % 8 for name, width in record["widths"].items() if name.startswith("features")} == {0}
    lines = capsys.readouterr().err.splitlines()
    assert {word for word in BARS if any(line.startswith(word) for line in lines)} == (set(BARS) if round_to else set())


def test_a_file_that_cant_be_used_is_refused_before_the_network_is_trained(tmp_path, monkeypatch):
    trainings = []
    monkeypatch.setattr(zoo, "train", lambda *arguments, **knobs: trainings.append(arguments))
    config = PruneConfig("l1", [{"op_names": ["nowhere"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match="nowhere"):
        prune_checkpoint(SMALL, None, config, DIGITS, tmp_path / "out")
    assert trainings == []
    assert not (tmp_path / "out").exists()


def test_coupled_layers_lose_the_same_channels(tmp_path):
    model, data = ModelChoice("resnet20"), DataChoice("digits", limit=32)
    torch.save(zoo.create_model("resnet20", num_classes=10, in_channels=1, image_size=8).state_dict(), tmp_path / "net")
    asked = [{"op_names": ["conv1", "stage1.0.conv2", "stage1.1.conv2", "stage1.2.conv2"], "sparse_ratio": 0.5}]
    record = prune_checkpoint(model, tmp_path / "net", PruneConfig("l1", asked), data, tmp_path / "out", progress=False)
    assert record["widths"]["conv1"] == 8
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"dense.safetensors", "masks.pt", "summary.json"}
    masks = torch.load(tmp_path / "out" / "masks.pt", weights_only=True)
    first, *others = (masks[name]["weight"].flatten(1).any(1) for name in asked[0]["op_names"])
    assert all(torch.equal(first, each) for each in others)


def test_the_seed_decides_what_a_random_pruner_removes(checkpoint, tmp_path):
    config = PruneConfig("random", [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    kept = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / str(number)
        prune_checkpoint(SMALL, checkpoint, config, DIGITS, out, seed=seed, progress=False)
        masks = torch.load(out / "masks.pt", weights_only=True)
        kept.append(torch.cat([each["weight"].flatten(1).any(1) for each in masks.values()]))
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


@pytest.mark.parametrize("round_to", [None, 8])
def test_a_budget_of_time_is_that_of_the_table_unless_widths_are_rounded(round_to, checkpoint, tmp_path):
    names = [name for name, layer in small_cnn().named_modules() if isinstance(layer, torch.nn.Conv2d)]
    # Each channel takes so much time that the rest counts nothing.
    each = LayerLatency((1, 64), (1, 64), ((1.0, 64.0), (1.0, 64.0)), activation=0.0)
    knobs = {"budget": {"latency": 0.5, "latency_table": LatencyTable(dict.fromkeys(names, each))}}
    config = PruneConfig("matrix", [{"op_types": ["Conv2d"]}], knobs=knobs, round_to=round_to)
    record = prune_checkpoint(SMALL, checkpoint, config, DIGITS, tmp_path / "out", progress=False)
    measured = record["latency_ms"] / record["latency_before_ms"]
    assert (record["budget"]["kind"], record["budget"]["asked"]) == ("latency", 0.5)
    if round_to is None:
        assert record["budget"]["left"] == pytest.approx(0.5, abs=0.05)
        assert record["budget"]["left"] != measured
    else:
        assert record["budget"]["left"] == measured


def test_an_output_folder_is_new_or_empty_and_takes_one_run_at_a_time(tmp_path):
    with module.empty_folder(tmp_path / "new"):
        with pytest.raises(DataError, match="one run at a time"), module.empty_folder(tmp_path / "new"):
            pass
        (tmp_path / "new" / "file").touch()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]
    with (
        pytest.raises(ConfigError, match=r"must be new or empty, got 1 entries"),
        module.empty_folder(tmp_path / "new"),
    ):
        pass
    with pytest.raises(KeyError), module.empty_folder(tmp_path / "failed"):
        raise KeyError
    assert not (tmp_path / "failed").exists()
    (tmp_path / "empty").mkdir()
    with module.empty_folder(tmp_path / "empty"):
        pass
    assert not list((tmp_path / "empty").iterdir())
