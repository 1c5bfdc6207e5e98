"""Tiny models of Transformers without some of their blocks, or parts of these, found by images and texts."""

from __future__ import annotations

import pytest
import torch
from transformers_nets import generated, inputs_of, logits, make

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.io.checkpoint import take_out_part
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.runs.depth import removable_blocks


def found_in(name):
    model = make(name, layers=3)
    return model, removable_blocks(model, Calibration([inputs_of(model, samples=8)]))


@pytest.mark.parametrize(
    ("name", "blocks", "parts"),
    [
        ("GPT2LMHeadModel", "transformer.h", ("attn", "mlp")),
        ("BertForSequenceClassification", "bert.encoder.layer", ()),
        ("ViTForImageClassification", "vit.encoder.layer", ()),
    ],
)
@pytest.mark.quick_every(2)
def test_blocks_and_parts_of_them_are_found(name, blocks, parts):
    model, found = found_in(name)
    if name.startswith("ViT") and hasattr(model.vit, "layers"):  # since Transformers 5.17, with an MLP of its own
        blocks, parts = "vit.layers", ("attention", "mlp")
    wanted = []
    for number in range(3):
        wanted.append(f"{blocks}.{number}")
        # The keys of the first attention say how many tokens a decoder has seen.
        wanted += [f"{blocks}.{number}.{part}" for part in parts if number or part != "attn"]
    assert [each.name for each in found.candidates] == wanted
    assert not found.kept


def test_hidden_states_that_a_user_reads_keep_their_blocks():
    model = make("BertForSequenceClassification", layers=3)
    model.config.output_hidden_states = True
    found = removable_blocks(model, Calibration([inputs_of(model, samples=8)]))
    assert not found.candidates
    assert set(found.kept.values()) == {"its output is an output of the model"}


def test_a_decoder_without_an_attention_generates_and_is_read_again(tmp_path):
    model = make("GPT2LMHeadModel", layers=3)
    inputs = inputs_of(model)
    take_out_part(model, "transformer.h.1.attn", 2)
    generated(model, inputs)
    nni_topo.save(model, tmp_path / "small.pt")
    loaded = nni_topo.load(tmp_path / "small.pt", make("GPT2LMHeadModel", layers=3))
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    with pytest.raises(
        ConfigError, match=r"all parts in each block, got a model without some.*transformer\.h\.1\.attn"
    ):
        nni_topo.save_pretrained(model, tmp_path / "folder")
