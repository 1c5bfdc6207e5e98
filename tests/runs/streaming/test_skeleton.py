"""Which blocks a model has, and what enters and leaves them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.runs.streaming.skeleton import Skeleton, _blocks_of, _without_weights

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
    untold = with_lists(two=linears(2, 2))
    untold.config = SimpleNamespace()
    assert _blocks_of(untold, Path()) == "two"
    # one block is no list of blocks, however large
    assert _blocks_of(with_lists(small=linears(2, 2), one=linears(99)), Path()) == "small"


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
    skeleton = Skeleton(source, CPU)
    weights = load_file(source / "model.safetensors")
    assert (len(skeleton), skeleton.blocks_name, skeleton.name_of(1)) == (3, "model.layers", "model.layers.1")
    for name, value in skeleton.model.state_dict().items():
        assert value.is_meta == name.startswith("model.layers.")
        assert value.is_meta or torch.equal(value, weights[name])
    assert not skeleton.model.training
    assert not any(each.requires_grad for each in skeleton.model.model.embed_tokens.parameters())
    block = skeleton.block(1)
    assert not block.training
    assert all(each.requires_grad for each in block.parameters())
    assert all(torch.equal(value, weights[f"model.layers.1.{name}"]) for name, value in block.state_dict().items())
    # a block that is changed changes neither the file nor the next copy
    with torch.no_grad():
        block.mlp.up_proj.weight.zero_()
    again = skeleton.block(1)
    assert torch.equal(again.mlp.up_proj.weight, weights["model.layers.1.mlp.up_proj.weight"])
    assert all(each.is_meta for each in skeleton.blocks[1].parameters())
    filled = skeleton.filled(2, again.state_dict())
    assert not filled.training
    assert torch.equal(filled.mlp.up_proj.weight, again.mlp.up_proj.weight)
    assert all(each.is_meta for each in skeleton.blocks[2].parameters())


def test_blocks_pass_their_inputs_on_and_the_last_one_gives_what_it_is_told(source):
    skeleton = Skeleton(source, CPU)
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
    with pytest.raises(ConfigError, match=r"must call all its blocks, got none of this one \(model.layers.7\)"):
        skeleton.entering(call, 7)


def calling(source, forward):
    """A skeleton whose model calls its blocks otherwise; `forward` gets the skeleton and the tokens' states."""
    skeleton = Skeleton(source, CPU)
    skeleton.model.forward = lambda input_ids: forward(skeleton, skeleton.model.model.embed_tokens(input_ids))
    return skeleton, ((), {"input_ids": torch.arange(10).reshape(2, 5)})


@pytest.mark.parametrize("length", [0, 1, 3])
@pytest.mark.parametrize("by_name", [False, True])
def test_blocks_return_what_they_get_as_the_first_block_did(by_name, length, source):
    returned, cached = [], []

    def forward(skeleton, states):
        cached.append(skeleton.model.config.use_cache)
        for block in skeleton.blocks:
            output = block(hidden_states=states, flag=1) if by_name else block(states, 1, flag=2)
            returned.append(output)
            states = output[0] if length else output
        return states

    skeleton, call = calling(source, forward)
    skeleton.output_length = length
    states = skeleton.model.model.embed_tokens(call[1]["input_ids"])
    for index in range(3):
        returned.clear()
        args, kwargs = skeleton.entering(call, index)
        assert torch.equal(kwargs.pop("hidden_states") if by_name else args[0], states)
        assert (args[1:], kwargs) == (((), {"flag": 1}) if by_name else ((1,), {"flag": 2}))
        assert len(returned) == index  # no block is called in vain
    last = torch.zeros(2, 5, 8)
    returned.clear()
    assert torch.equal(skeleton.outputs(call, last), last)
    if length:
        assert [len(each) for each in returned] == [length] * 3
        assert all(other is None for each in returned for other in each[1:])
        returned = [each[0] for each in returned]
    assert all(torch.equal(each, states) for each in returned[:2])
    # nothing is kept for a next token, and the config that is written doesn't say so
    assert (set(cached), skeleton.config.use_cache) == ({False}, True)


@pytest.mark.parametrize(
    ("forward", "words"),
    [
        (
            lambda skeleton, states: skeleton.blocks[0]([states]),
            r"as their first argument, got list \(model.layers.0\)",
        ),
        (lambda skeleton, states: skeleton.blocks[1](x=states), r"first argument, got NoneType \(model.layers.1\)"),
        (
            lambda skeleton, states: skeleton.blocks[1](skeleton.blocks[0](states).clone()),
            r"each with what the one before returned, got something else \(model.layers.1\)",
        ),
    ],
)
def test_blocks_that_are_called_otherwise_are_told(forward, words, source):
    skeleton, call = calling(source, forward)
    with pytest.raises(ConfigError, match=words):
        skeleton.entering(call, 2)


def test_a_model_of_another_config_shares_what_lies_outside_of_the_blocks(source):
    skeleton = Skeleton(source, CPU)
    config = transformers.LlamaConfig.from_pretrained(source)
    config.num_hidden_layers, config.intermediate_size = 2, 6
    other = skeleton.described(config)
    assert (len(other), len(skeleton)) == (2, 3)
    assert other.blocks[1].mlp.up_proj.weight.shape == (6, 8)
    assert all(each.is_meta for block in other.blocks for each in block.parameters())
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        one, same = (each.model.get_submodule(name).weight for each in (skeleton, other))
        assert same is one
    assert not one.requires_grad
    assert not other.model.training
    args, _ = other.entering(((), {"input_ids": torch.arange(5)[None]}), 1)
    assert args[0].shape == (1, 5, 8)


def test_weights_that_were_loaded_stay_when_their_file_changes(source, tmp_path):
    folder = tmp_path / "source"
    shutil.copytree(source, folder)
    skeleton = Skeleton(folder, CPU)
    block, weights = skeleton.block(1), load_file(source / "model.safetensors")
    path = folder / "model.safetensors"
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert torch.equal(block.mlp.up_proj.weight, weights["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(skeleton.model.model.norm.weight, weights["model.norm.weight"])
