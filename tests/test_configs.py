"""Every file in configs/ loads, and does what its comment says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from nni_topo import zoo
from nni_topo.cli import main
from nni_topo.errors import ConfigError
from nni_topo.network.io import checkpoint as serialization
from nni_topo.network.layers.kinds import weights_left
from nni_topo.runs.choices import DataChoice, ModelChoice, load_prune_config
from nni_topo.runs.prune import prune_checkpoint
from nni_topo.studies.plan import load_plan
from nni_topo.studies.report import prune_costs

CONFIGS = Path(__file__).parent.parent / "configs"
SMALL, DIGITS = ModelChoice("small_cnn"), DataChoice("digits", limit=400)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    data = zoo.load_data("digits", limit=400)
    model = zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0)
    zoo.train(model, data, zoo.Recipe(epochs=5, batch_size=32), seed=0)
    path = tmp_path_factory.mktemp("trained") / "small_cnn.pt"
    zoo.save_checkpoint(path, model, {"accuracy": zoo.evaluate(model, data.test)})
    return path


COMPARISONS = sorted([*CONFIGS.glob("compare_*.yaml"), *CONFIGS.glob("recover_*.yaml")])


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_comparisons_load(path):
    networks = yaml.safe_load(path.read_text()).get("networks", [""])
    cells = [cell for network in networks for cell in load_plan(path, network).cells()]
    assert len(cells) == len({cell.key for cell in cells}) > 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("prune_*.yaml")), ids=lambda path: path.stem)
@pytest.mark.quick_every(6)
def test_pruning_files_prune(path, checkpoint, tmp_path):
    record = prune_checkpoint(SMALL, checkpoint, load_prune_config(path), DIGITS, tmp_path / "out")
    assert record["params"] < 0.7 * record["params_before"]
    assert record["accuracy_before"] > 0.8
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == record
    masks = torch.load(tmp_path / "out" / "masks.pt", weights_only=True)
    assert all(set(mask.unique().tolist()) <= {0.0, 1.0} for found in masks.values() for mask in found.values())


@pytest.mark.parametrize("config_list", ["[]", "[{op_types: [Conv2d]}]"])
def test_a_file_that_asks_for_nothing_is_refused_before_anything_is_trained(config_list, tmp_path, capsys):
    path, out = tmp_path / "prune.yaml", tmp_path / "out"
    path.write_text(f"pruner: l1\nconfig_list: {config_list}\n")
    words = ["prune", "--model", "small_cnn", "--config", str(path), "--data", "digits", "--limit", "100"]
    with mock.patch.object(zoo, "train") as training:
        assert main([*words, "--out", str(out)]) == 2
    assert not training.called
    assert "config_list" in capsys.readouterr().err
    assert not out.exists()


def test_a_pruning_file_may_compensate_and_round_for_any_pruner(checkpoint, tmp_path):
    path = tmp_path / "prune.yaml"
    path.write_text(
        "pruner: l1\nconfig_list: [{op_types: [Conv2d], sparse_ratio: 0.6}]\ncompensate: {images: 256}\nround_to: 8\n"
    )
    record = prune_checkpoint(SMALL, checkpoint, load_prune_config(path), DIGITS, tmp_path / "out")
    assert record["accuracy_compensated"] > record["accuracy_oneshot"]
    assert all(width % 8 == 0 for name, width in record["widths"].items() if "conv" in name)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert {"layer", "error_before", "error_after"} <= set(summary["compensation"][0])
    path.write_text(path.read_text().replace("te: {images", "te: {image"))
    with pytest.raises(ConfigError, match="did you mean images"):
        load_prune_config(path)


@pytest.mark.parametrize(
    ("share", "cap", "why"), [(0.5, 1.0, ""), (0.1, 0.5, "all layers to prune are at their max_sparse_ratio")]
)
def test_a_record_says_whether_the_dense_network_meets_the_budget(share, cap, why, checkpoint, tmp_path):
    path = tmp_path / "prune.yaml"
    path.write_text(
        f"pruner: matrix\nconfig_list: [{{op_types: [Conv2d], max_sparse_ratio: {cap}}}]\n"
        f"knobs: {{budget: {{flops: {share}}}}}\n"
    )
    record = prune_checkpoint(SMALL, checkpoint, load_prune_config(path), DIGITS, tmp_path / "out")
    found = record["budget"]
    assert (found["kind"], found["asked"], found["is_met"]) == ("flops", share, not why)
    assert found["left"] == pytest.approx(record["flops"] / record["flops_before"])
    assert why in found["why"]
    row = next(row for row in prune_costs(record) if row[0].startswith("flops kept"))
    assert row[0].endswith("asked, missed)" if why else "asked, met)")


def test_the_trees_file_leaves_zeros_that_retraining_keeps(checkpoint, tmp_path):
    config = replace(load_prune_config(CONFIGS / "timp.yaml"), retrain={"epochs": 1})
    record = prune_checkpoint(SMALL, checkpoint, config, DIGITS, tmp_path / "out")
    assert record["weights_left_before"] == record["params_before"] == record["params"]
    assert 0.29 * record["params"] < record["weights_left"] < 0.35 * record["params"]
    assert record["accuracy_retrained"] > record["accuracy_oneshot"]
    dense = serialization.load(
        tmp_path / "out" / "dense.safetensors",
        zoo.create_model("small_cnn", num_classes=10, in_channels=1, image_size=8, seed=0),
    )
    assert weights_left(dense) == record["weights_left"]
