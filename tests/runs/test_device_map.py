"""Models that accelerate has put on several devices, as ``from_pretrained(device_map=...)`` of Transformers does."""

from __future__ import annotations

import pytest
import torch

import nni_topo
from nni_topo.errors import DataError

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

OTHERS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.norm", "lm_head")
KNOBS = {"pruner": "l1", "compensate": None, "distill": False, "progress": False}


def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config).eval()


def batches():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(50, (8, 6), generator=generator)} for _ in range(2)]


def with_block_on_disk(model, folder):
    places = {**dict.fromkeys(OTHERS, "cpu"), "model.layers.1": "disk"}
    return accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


def all_on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=torch.device("cpu"))


def all_in_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


@pytest.mark.parametrize("place", [with_block_on_disk, all_on_disk, all_in_memory])
def test_a_model_whose_weights_are_offloaded_is_refused_and_stays_as_it_was(place, tmp_path):
    model = place(llama(), str(tmp_path))
    devices = [parameter.device for parameter in model.parameters()]
    named = r"meta device, .*; nni_topo.shrink_pretrained prunes a folder"
    with pytest.raises(DataError, match=rf"{named}.*\(model\..*weight, shrink\)"):
        nni_topo.shrink(model, batches(), {"params": 0.8}, **KNOBS)
    assert [parameter.device for parameter in model.parameters()] == devices
    assert torch.equal(model(**batches()[0]).logits, llama()(**batches()[0]).logits)
