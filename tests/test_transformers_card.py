"""The card of a pruned model of Transformers: the report's figures in the README.md of its folder."""

from __future__ import annotations

import copy
import logging
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers_nets import SIZES, inputs_of, logits, transformers

import nni_topo
from nni_topo.network.speedup.dense_report import DenseReport, LayerChannels
from nni_topo.testing import require_unchanged, snapshot

# Neurons alone: how many heads may be left depends on the version of Transformers.
NEURONS = {
    "Bert": {"op_names_re": [r".*\.intermediate\.dense"]},
    "Llama": {"op_names_re": [r".*\.(gate_proj|up_proj)"]},
}


def made(name: str, **sizes: Any) -> Any:
    torch.manual_seed(0)
    kind = "SequenceClassification" if name == "Bert" else "CausalLM"
    config = getattr(transformers, f"{name}Config")(**{**SIZES, "num_hidden_layers": 3, **sizes})
    model = getattr(transformers, f"{name}For{kind}")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, 0.2)
    return model


@cache
def shrunk(name: str) -> Any:
    """A network that `shrink` made; nothing may change it."""
    drawing = torch.Generator().manual_seed(3)
    texts = [{"input_ids": torch.randint(5, 31, (16, 6), generator=drawing)} for _ in range(4)]
    budget = {"params": 0.9, "equal_blocks": True}
    return nni_topo.shrink(made(name), texts, budget, pruner="l1", layers=[NEURONS[name]], distill={"steps": 3})


def neurons_removed(**sizes: Any) -> Any:
    """A BERT that lost half of its neurons, by `to_dense` alone."""
    model = made("Bert", **sizes)
    inputs = inputs_of(model)
    asked = [{**NEURONS["Bert"], "sparse_ratio": 0.5}]
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), asked).compress()[1]
    return nni_topo.to_dense(model, inputs, masks)


def card_of(folder: Path) -> Any:
    hub = pytest.importorskip("huggingface_hub")
    return hub.ModelCard.load(folder / "README.md")


def table_rows(text: str) -> list[list[str]]:
    """The cells of all tables in a Markdown text, but for the rules under heads."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("|---")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_card_has_the_figures_of_the_report(tmp_path: Path) -> None:
    small = shrunk("Llama")
    before = snapshot(small)
    nni_topo.save_pretrained(small, tmp_path)
    require_unchanged(before, small)
    card, report = card_of(tmp_path), small.report
    assert card.data.to_dict() == {"library_name": "transformers", "tags": ["nni_topo", "pruned"]}
    text = card.content
    assert report.to_markdown() in text
    assert "image" not in text + repr(report)  # the calibration data are texts
    assert f"# {type(small).__name__}, pruned" in text
    for package in ("nni_topo", "torch", "transformers"):
        assert f"{package} {version(package)}" in text
    assert f"from transformers import {type(small).__name__}" in text


def test_the_report_as_markdown_says_what_was_done_and_what_it_cost() -> None:
    small = shrunk("Llama")
    report, text = small.report, small.report.to_markdown()
    first, last = report.stages[0], report.stages[-1]
    rows = table_rows(text)
    assert ["parameters", f"{first.params:,}", f"{last.params:,}", f"{100 * last.params / first.params:.1f} %"] in rows
    assert ["MACs of one sample", f"{first.macs:,}", f"{last.macs:,}", f"{100 * last.macs / first.macs:.1f} %"] in rows
    assert last.params == sum(each.numel() for each in small.parameters())
    # What changes, in the words of the printed report.
    printed = repr(report).splitlines()
    for stage in report.stages:
        (row,) = [row for row in rows if row[0].startswith(stage.network)]
        (line,) = [line for line in printed if line.split()[0] == stage.network]
        assert all(cell in line for cell in row), (row, line)
    assert [len(row) for row in rows if row[0] == "network"] == [3]  # network, distance, agreement
    assert str(report.budget)[1:] in text
    for word in ("`l1`", "`uniform`", "`reconstruct`", f"{report.images} samples"):
        assert word in text


def test_widths_are_told_by_kind_and_blocks() -> None:
    rows = {row.name: row for row in shrunk("Llama").report.layers.rows}
    up = rows["model.layers.1.mlp.up_proj"]
    assert up.after < up.before
    table = table_rows(shrunk("Llama").report.to_markdown())
    assert ["`model.layers.*.mlp.up_proj`", "0-2", str(up.before), str(up.after)] in table
    assert not [row for row in table if "down_proj" in row[0]]  # keeps all its channels
    kept = sum(row.after == row.before for row in rows.values())
    assert f"{kept} other layers keep all their channels" in shrunk("Llama").report.to_markdown()


def test_few_layers_of_different_widths_are_told_one_by_one_and_many_by_kind() -> None:
    first = LayerChannels("stem", 16, 8, 8)
    few = DenseReport((first, *(LayerChannels(f"blocks.{at}.fc", 64, 40 - at, 40 - at) for at in (0, 1, 2))))
    assert table_rows(few.to_markdown())[-4:] == [
        ["`stem`", "", "16", "8"],
        ["`blocks.0.fc`", "", "64", "40"],
        ["`blocks.1.fc`", "", "64", "39"],
        ["`blocks.2.fc`", "", "64", "38"],
    ]
    many = DenseReport(
        (first, *(LayerChannels(f"blocks.{at}.fc", 64, 60 - at, 60 - at) for at in range(40) if at != 5))
    )
    assert table_rows(many.to_markdown())[-2:] == [
        ["`stem`", "", "16", "8"],
        ["`blocks.*.fc`", "0-4, 6-39", "64", "21 to 60"],
    ]


def test_a_network_of_to_dense_alone_has_a_card_of_what_is_known(tmp_path: Path) -> None:
    dense = neurons_removed()
    nni_topo.save_pretrained(dense, tmp_path)
    text = card_of(tmp_path).content
    unpruned = sum(each.numel() for each in made("Bert").parameters())
    left = sum(each.numel() for each in dense.parameters())
    assert ["parameters", f"{unpruned:,}", f"{left:,}", f"{100 * left / unpruned:.1f} %"] in table_rows(text)
    assert ["`bert.encoder.layer.*.intermediate.dense`", "0-2", "24", "12"] in table_rows(text)
    assert dense.report.checked in text
    for unknown in ("MACs", "budget", "pruner:", "nan", "None"):
        assert unknown not in text
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path).eval()
    inputs = inputs_of(dense)
    assert torch.equal(logits(again, inputs), logits(dense, inputs))


def test_steps_that_were_not_run_are_not_told() -> None:
    model = made("Llama")
    texts = [{"input_ids": torch.randint(5, 31, (4, 6), generator=torch.Generator().manual_seed(3))}]
    knobs: dict[str, Any] = {"layers": [NEURONS["Llama"]], "compensate": None, "distill": False}

    small: Any = nni_topo.shrink(model, texts, {"params": 0.8, "equal_blocks": False}, pruner="subcluster", **knobs)
    text = small.report.to_markdown()
    assert "pruner: `subcluster`" in text
    assert "weight reconstruction: none" in text
    assert "distillation: none" in text
    assert "allocation" not in text
    assert (small.report.allocation, small.report.held_out) == ("", 0)
    assert "measured on the 4 calibration samples" in text
    assert "held-out" not in text


def test_a_base_model_is_named_if_the_config_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = neurons_removed()
    monkeypatch.chdir(tmp_path)
    # A folder in the form of the hub's cache: names of the hub are looked up there without a network.
    kept = tmp_path / "cache" / "models--some--tiny-bert"
    made("Bert").save_pretrained(kept / "snapshots" / ("0" * 40))
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0" * 40)
    load = transformers.BertForSequenceClassification.from_pretrained
    loaded = load("some/tiny-bert", cache_dir=tmp_path / "cache", local_files_only=True).config
    dense.config._name_or_path = loaded._name_or_path
    # Later versions don't note the commit; then the hub's cache tells, wherever it lies.
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        dense.config._commit_hash = None
        nni_topo.save_pretrained(dense, "cached")
        assert card_of(Path("cached")).data.base_model == "some/tiny-bert"
    nni_topo.save_pretrained(dense, "elsewhere")
    assert card_of(Path("elsewhere")).data.base_model is None
    dense.config._commit_hash = getattr(loaded, "_commit_hash", "0" * 40)
    nni_topo.save_pretrained(dense, "named")
    assert card_of(Path("named")).data.base_model == "some/tiny-bert"
    assert "https://huggingface.co/some/tiny-bert" in Path("named/README.md").read_text()
    # Places on this machine are no names of the hub, and nobody's business.
    made("Bert").save_pretrained("runs/bert")
    dense.config._commit_hash = getattr(load("runs/bert").config, "_commit_hash", None)
    # One of them is gone, or the program has another working folder now.
    for place in (str(tmp_path / "runs" / "bert"), "runs/bert", "runs/gone"):
        dense.config._name_or_path = place
        nni_topo.save_pretrained(dense, "local")
        assert card_of(Path("local")).data.base_model is None
        assert place not in Path("local/README.md").read_text()


def test_a_card_of_ours_is_replaced_and_a_users_text_never_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    card = tmp_path / "README.md"
    nni_topo.save_pretrained(shrunk("Llama"), tmp_path)
    first = card.read_bytes()
    nni_topo.save_pretrained(shrunk("Llama"), tmp_path)
    assert card.read_bytes() == first
    dense = neurons_removed()
    nni_topo.save_pretrained(dense, tmp_path)
    other = card.read_bytes()
    assert other != first
    # One changed word makes it the user's, line ends of Windows don't.
    ours = other.decode()
    for text in (ours.replace("pruned", "Pruned", 1).encode(), b"mine\n", b""):
        card.write_bytes(text)
        with caplog.at_level(logging.INFO, "nni_topo"):
            nni_topo.save_pretrained(shrunk("Llama"), tmp_path)
        assert card.read_bytes() == text
        assert str(card) in caplog.messages[-1]
        caplog.clear()
    card.write_bytes(ours.replace("\n", "\r\n").encode())
    nni_topo.save_pretrained(dense, tmp_path)
    assert card.read_text() == ours


def test_no_card_is_written_where_none_is_wanted_or_nothing_is_known(tmp_path: Path) -> None:
    dense = neurons_removed()
    nni_topo.save_pretrained(dense, tmp_path / "unwanted", card=False)
    assert sorted(path.name for path in (tmp_path / "unwanted").iterdir()) == ["config.json", "model.safetensors"]
    nni_topo.save_pretrained(made("Bert"), tmp_path / "unpruned")
    assert not (tmp_path / "unpruned" / "README.md").exists()
    with pytest.raises(nni_topo.errors.ConfigError, match=r"got 'no' \(save_pretrained\)"):
        nni_topo.save_pretrained(dense, tmp_path / "wrong", card="no")  # type: ignore[arg-type]
    assert not (tmp_path / "wrong").exists()


def test_heads_of_single_blocks_name_the_version_that_loads_them(tmp_path: Path) -> None:
    if int(transformers.__version__.split(".")[0]) > 4:
        pytest.skip("Transformers 5 prunes no heads")
    model = made("Bert")
    inputs = inputs_of(model)
    asked = [{"op_names_re": [r".*\.attention\.self"], "granularity": "head", "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, inputs, asked)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    nni_topo.save_pretrained(nni_topo.to_dense(model, inputs, masks), tmp_path)
    assert "Transformers 4" in card_of(tmp_path).content
    nni_topo.save_pretrained(neurons_removed(), tmp_path)
    assert "Transformers 4" not in card_of(tmp_path).content


def test_adapters_of_peft_keep_their_own_card_and_merged_ones_get_ours(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    dense = neurons_removed()
    adapted = peft.get_peft_model(dense, peft.LoraConfig(r=2, target_modules=["dense"]))
    with pytest.raises(nni_topo.errors.ConfigError, match=r"adapters merged, got PeftModel; nni_topo.save takes"):
        nni_topo.save_pretrained(adapted, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    adapted.save_pretrained(tmp_path / "adapter")
    assert "nni_topo" not in (tmp_path / "adapter" / "README.md").read_text()
    nni_topo.save_pretrained(adapted.merge_and_unload(), tmp_path / "merged")
    assert dense.report.to_markdown() in card_of(tmp_path / "merged").content


def test_a_model_that_was_changed_since_gets_no_card(tmp_path: Path) -> None:
    dense = neurons_removed()
    with torch.no_grad():
        dense.bert.encoder.layer[0].intermediate.dense.weight += 0.1  # its size is the report's
    nni_topo.save_pretrained(dense, tmp_path / "trained")
    assert (tmp_path / "trained" / "README.md").exists()
    shorter = nni_topo.remove_blocks(dense, ["bert.encoder.layer.0"], [inputs_of(dense)])
    nni_topo.save_pretrained(shorter, tmp_path / "shorter")
    assert (tmp_path / "shorter" / "config.json").exists()
    assert not (tmp_path / "shorter" / "README.md").exists()
