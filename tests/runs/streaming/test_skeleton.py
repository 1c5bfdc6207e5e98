"""Which blocks a model has, and what enters and leaves them."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from nni_topo.errors import ConfigError
from nni_topo.runs.streaming.skeleton import Skeleton, _without_weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"architectures": ["NoSuchModel"]}, r"must name a class of Transformers \(architectures\), got \['NoSuch"),
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
