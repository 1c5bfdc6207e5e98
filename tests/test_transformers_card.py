"""The card of a pruned model of Transformers: the report's figures in the README.md of its folder."""

from __future__ import annotations

import copy
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_nets import SIZES, inputs_of, logits, transformers

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.speedup.dense_report import DenseReport, LayerChannels
from nni_topo.testing import require_unchanged, snapshot

# Neurons alone: how many heads may be left depends on the version of Transformers.
NEURONS = {
    "Bert": {"op_names_re": [r".*\.intermediate\.dense"]},
    "Llama": {"op_names_re": [r".*\.(gate_proj|up_proj)"]},
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    kind = "SequenceClassification" if name == "Bert" else "CausalLM"
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_hidden_layers": 3})
    model = getattr(transformers, f"{name}For{kind}")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


@cache
def shrunk() -> Any:
    """A LLaMA that `shrink` made; nothing may change it."""
    drawing = torch.Generator().manual_seed(3)
    texts = [{"input_ids": torch.randint(5, 31, (16, 6), generator=drawing)} for _ in range(4)]
    budget, knobs = {"params": 0.9, "equal_blocks": True}, {"layers": [NEURONS["Llama"]], "distill": {"steps": 3}}
    return nni_topo.shrink(made("Llama"), texts, budget, pruner="l1", **knobs)


def neurons_removed() -> Any:
    """A BERT that lost half of its neurons, by `to_dense` alone."""
    model = made("Bert")
    asked = [{**NEURONS["Bert"], "sparse_ratio": 0.5}]
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), asked).compress()[1]
    return nni_topo.to_dense(model, inputs_of(model), masks)


def card_of(folder: Path) -> Any:
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard.load(folder / "README.md")


def table_rows(text: str) -> list[list[str]]:
    """The cells of all tables in a Markdown text, but for the rules under heads."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_card_has_the_report_and_says_what_loads_the_model(tmp_path: Path) -> None:
    small = shrunk()
    before = snapshot(small)
    nni_topo.save_pretrained(small, tmp_path)
    require_unchanged(before, small)
    card = card_of(tmp_path)
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["nni_topo", "pruned"]}
    assert small.report.to_markdown() in card.content
    for package in ("nni_topo", "torch", "transformers"):
        assert f"{package} {version(package)}" in card.content
    assert f"from transformers import {type(small).__name__}" in card.content


def test_the_report_as_markdown_says_what_was_done_and_what_it_cost() -> None:
    small = shrunk()
    report, text = small.report, small.report.to_markdown()
    first, last = report.stages[0], report.stages[-1]
    rows = table_rows(text)
    assert ["parameters", f"{first.params:,}", f"{last.params:,}", f"{100 * last.params / first.params:.1f} %"] in rows
    assert ["MACs of one sample", f"{first.macs:,}", f"{last.macs:,}", f"{100 * last.macs / first.macs:.1f} %"] in rows
    assert last.params == sum(each.numel() for each in small.parameters())
    # What changes, in the words of the printed report.
    for stage in report.stages:
        (row,) = [row for row in rows if row[0].startswith(stage.network)]
        (line,) = [line for line in repr(report).splitlines() if line.split()[0] == stage.network]
        assert all(cell in line for cell in row), (row, line)
    for word in (str(report.budget)[1:], "`l1`", "`uniform`", "`reconstruct`", f"{report.images} samples"):
        assert word in text
    # Widths of layers of one kind, by blocks.
    up = next(row for row in report.layers.rows if row.name == "model.layers.1.mlp.up_proj")
    assert ["`model.layers.*.mlp.up_proj`", "0-2", str(up.before), str(up.after)] in rows
    kept = sum(row.after == row.before for row in report.layers.rows)
    assert f"{kept} other layers keep all their channels" in text


def test_few_layers_of_different_widths_are_told_one_by_one_and_many_by_kind() -> None:
    first = LayerChannels("stem", 16, 8, 8)
    few = DenseReport((first, *(LayerChannels(f"blocks.{at}.fc", 64, 40 - at, 40 - at) for at in (0, 1))))
    assert table_rows(few.to_markdown())[-3:] == [
        ["`stem`", "", "16", "8"],
        ["`blocks.0.fc`", "", "64", "40"],
        ["`blocks.1.fc`", "", "64", "39"],
    ]
    many = [LayerChannels(f"blocks.{at}.fc", 64, 60 - at, 60 - at) for at in range(40) if at != 5]
    assert table_rows(DenseReport((first, *many)).to_markdown())[-1] == ["`blocks.*.fc`", "0-4, 6-39", "64", "21 to 60"]


def test_a_network_of_to_dense_alone_has_a_card_of_what_is_known(tmp_path: Path) -> None:
    dense = neurons_removed()
    nni_topo.save_pretrained(dense, tmp_path)
    text = card_of(tmp_path).content
    unpruned = sum(each.numel() for each in made("Bert").parameters())
    left = sum(each.numel() for each in dense.parameters())
    assert ["parameters", f"{unpruned:,}", f"{left:,}", f"{100 * left / unpruned:.1f} %"] in table_rows(text)
    assert ["`bert.encoder.layer.*.intermediate.dense`", "0-2", "24", "12"] in table_rows(text)
    for unknown in ("MACs", "budget", "pruner:", "nan", "None"):
        assert unknown not in text
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs_of(dense)), logits(dense, inputs_of(dense)))


def test_steps_that_were_not_run_are_not_told() -> None:
    texts = [{"input_ids": torch.randint(5, 31, (4, 6), generator=torch.Generator().manual_seed(3))}]
    knobs: dict[str, Any] = {"layers": [NEURONS["Llama"]], "compensate": None, "distill": False}

    budget = {"params": 0.8, "equal_blocks": False}
    text = nni_topo.shrink(made("Llama"), texts, budget, pruner="subcluster", **knobs).report.to_markdown()
    said = ("pruner: `subcluster`", "weight reconstruction: none", "distillation: none", "the 4 calibration samples")
    assert all(each in text for each in said)
    assert not any(each in text for each in ("allocation", "held-out"))


def test_a_base_model_is_named_if_the_config_or_the_cache_of_the_hub_tells_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = neurons_removed()
    monkeypatch.chdir(tmp_path)
    # A folder in the form of the hub's cache: names of the hub are looked up there without a network.
    kept = tmp_path / "cache" / "models--some--tiny-bert"
    made("Bert").save_pretrained(kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    dense.config._name_or_path = "some/tiny-bert"

    def named(commit: str | None) -> str | None:
        dense.config._commit_hash = commit
        nni_topo.save_pretrained(dense, "runs/bert")
        return card_of(Path("runs/bert")).data.base_model

    assert named(None) is None
    assert named("0" * 40) == "some/tiny-bert"
    # Later versions don't note the commit; then the hub's cache tells, wherever it lies.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert named(None) == "some/tiny-bert"
    # Places on this machine are no names of the hub, and nobody's business, also if they are gone.
    for place in (str(tmp_path / "runs" / "bert"), "runs/bert", "runs/gone"):
        dense.config._name_or_path = place
        assert named(None) is None
        assert place not in Path("runs/bert/README.md").read_text()


def test_no_card_is_written_where_none_is_wanted_or_nothing_is_known(tmp_path: Path) -> None:
    dense = neurons_removed()
    nni_topo.save_pretrained(dense, tmp_path / "unwanted", card=False)
    assert sorted(path.name for path in (tmp_path / "unwanted").iterdir()) == ["config.json", "model.safetensors"]
    nni_topo.save_pretrained(made("Bert"), tmp_path / "unpruned")
    with pytest.raises(ConfigError, match=r"got 'no' \(save_pretrained\)"):
        nni_topo.save_pretrained(dense, tmp_path / "wrong", card="no")  # type: ignore[arg-type]
    assert not (tmp_path / "wrong").exists()
    # A model that was changed since the report.
    shorter = nni_topo.remove_blocks(dense, ["bert.encoder.layer.0"], [inputs_of(dense)])
    nni_topo.save_pretrained(shorter, tmp_path / "shorter")
    assert not [*tmp_path.rglob("README.md")]


def test_adapters_of_peft_keep_their_own_card_and_merged_ones_get_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    dense = neurons_removed()
    adapted = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=["dense"]))
    with pytest.raises(ConfigError, match=r"adapters merged, got PeftModel; nni_topo.save takes"):
        nni_topo.save_pretrained(adapted, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    nni_topo.save_pretrained(adapted.merge_and_unload(), tmp_path / "merged")
    assert dense.report.to_markdown() in card_of(tmp_path / "merged").content
