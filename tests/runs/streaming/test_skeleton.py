"""Which blocks a model has, and what enters and leaves them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.runs.streaming.shards import Shards
from nni_topo.runs.streaming.skeleton import Skeleton, _blocks_of, _without_weights, output_length, states_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CPU = torch.device("cpu")


def with_lists(is_encoder_decoder=False, **lists):
    model = nn.Module()
    model.config = SimpleNamespace(is_encoder_decoder=is_encoder_decoder)
    for name, blocks in lists.items():
        setattr(model, name, nn.ModuleList(blocks))
    return model


def linears(*widths):
    return [nn.Linear(width, 2) for width in widths]


def test_the_blocks_are_the_list_with_most_parameters():
    assert _blocks_of(with_lists(small=linears(2, 2, 2), large=linears(9, 9)), Path()) == "large"
    # one block is no list of blocks, however large
    assert _blocks_of(with_lists(small=linears(2, 2), one=linears(99)), Path()) == "small"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (with_lists(one=linears(2)), r"a list of at least two blocks of one class \(nn.ModuleList\), got none"),
        (with_lists(is_encoder_decoder=True, two=linears(2, 2)), "got an encoder and a decoder"),
        (with_lists(two=[nn.Linear(2, 2), nn.Bilinear(2, 2, 2)]), "got Bilinear and Linear in two"),
        (with_lists(two=linears(2, 2, 3)), r"got \(2, 2\) and \(2, 3\) for weight; .*\(two.0 and two.2"),
        (
            with_lists(two=[nn.Linear(2, 2, bias=False), nn.Linear(2, 2)]),
            r"got none and \(2,\) for bias; .*\(two.0 and two.1",
        ),
    ],
)
def test_models_without_one_list_of_equal_blocks_are_told(model, words):
    with pytest.raises(ConfigError, match=words):
        _blocks_of(model, Path())


def test_a_block_returns_a_tensor_or_a_tuple_that_begins_with_one():
    states = torch.ones(1)
    assert [output_length(output) for output in (states, (states,), (states, None, None))] == [0, 1, 3]
    assert states_of(states) is states_of((states, torch.zeros(1))) is states
    with pytest.raises(ConfigError, match=r"or a tuple that begins with one, got dict"):
        output_length({"states": states})


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"architectures": ["NoSuchModel"]}, r"must name a class of Transformers \(architectures\), got \['NoSuch"),
        ({"architectures": []}, r"got \[\]; nni_topo.shrink"),
        ({}, "got None; nni_topo.shrink"),
        ({"architectures": ["LlamaConfig"]}, r"got \['LlamaConfig'\]"),
        ({"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}, "one that Transformers builds LlamaForCausal"),
        (
            {"architectures": ["LlamaForCausalLM"], "quantization_config": {"quant_method": "gptq", "bits": 4}},
            "weights must be floating-point, got a quantised model",
        ),
    ],
)
def test_configs_that_no_model_is_built_by_are_told(content, words, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **content}))
    with pytest.raises(ConfigError, match=words):
        _without_weights(tmp_path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    sizes = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}
    folder = tmp_path_factory.mktemp("skeleton")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, use_cache=True)).save_pretrained(folder)
    return folder


def test_only_what_lies_outside_of_the_blocks_is_loaded(source):
    skeleton = Skeleton(Shards(source), CPU)
    weights = load_file(source / "model.safetensors")
    assert (len(skeleton), skeleton.blocks_name, skeleton.name_of(1)) == (3, "model.layers", "model.layers.1")
    for name, value in skeleton.model.state_dict().items():
        assert value.is_meta == name.startswith("model.layers.")
        assert value.is_meta or torch.equal(value, weights[name])
    assert not skeleton.model.training
    assert not any(each.requires_grad for each in skeleton.model.model.embed_tokens.parameters())
    keys = skeleton.keys_of(1)
    assert keys["mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    block = skeleton.block(1)
    assert not block.training
    assert all(each.requires_grad for each in block.parameters())
    assert all(torch.equal(value, weights[keys[name]]) for name, value in block.state_dict().items())
    # a block that is changed changes neither the file nor the next copy
    with torch.no_grad():
        block.mlp.up_proj.weight.zero_()
    again = skeleton.block(1)
    assert torch.equal(again.mlp.up_proj.weight, weights["model.layers.1.mlp.up_proj.weight"])
    stored = skeleton.stored(again, 1)
    assert all(torch.equal(value, weights[keys[name]]) for name, value in stored.items())
    filled = skeleton.filled(2, stored)
    assert not filled.training
    assert torch.equal(filled.mlp.up_proj.weight, again.mlp.up_proj.weight)


def test_blocks_pass_their_inputs_on_and_the_last_one_gives_what_it_is_told(source):
    skeleton = Skeleton(Shards(source), CPU)
    whole = transformers.LlamaForCausalLM.from_pretrained(source).eval()
    ids = torch.arange(10).reshape(2, 5)
    call = ((), {"input_ids": ids})
    for index in range(3):
        args, kwargs = skeleton.entering(call, index)
        states = args[0] if args else kwargs["hidden_states"]
        assert torch.equal(states, whole.model.embed_tokens(ids))
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    found = skeleton.outputs(call, states).logits
    assert torch.allclose(found, whole.lm_head(whole.model.norm(states)), atol=1e-6)
    assert not found.requires_grad
    assert skeleton.config.use_cache is True
    with pytest.raises(ConfigError, match=r"must call all its blocks, got none of this one \(model.layers.7\)"):
        skeleton.entering(call, 7)


def test_a_missing_tensor_is_told_with_those_that_nothing_takes(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights["model.other"] = weights.pop("model.norm.weight")
    for path in source.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match=r"every tensor of LlamaForCausalLM, got none of model.norm.weight"):
        Skeleton(Shards(tmp_path), CPU)
