"""Networks of diffusers: the pruned network computes what the masked one does, and samples (needs the package)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import nni_topo

diffusers = pytest.importorskip("diffusers")

ASKED = [{"op_types": ["Conv2d", "Linear", "Embedding"], "sparse_ratio": 0.5}]
STEPS = torch.tensor([3, 7])


def unet() -> tuple[nn.Module, dict[str, Any]]:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    widths = {"block_out_channels": (16, 32), "norm_num_groups": 4, "attention_head_dim": 8, "layers_per_block": 1}
    model = diffusers.UNet2DModel(sample_size=16, **blocks, **widths)
    return model, {"sample": torch.randn(2, 3, 16, 16), "timestep": STEPS}


def vae() -> tuple[nn.Module, dict[str, Any]]:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = diffusers.AutoencoderKL(block_out_channels=(16, 32), norm_num_groups=4, sample_size=16, **blocks)
    return model, {"sample": torch.randn(2, 3, 16, 16)}


def dit() -> tuple[nn.Module, dict[str, Any]]:
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    model = diffusers.DiTTransformer2DModel(in_channels=4, num_embeds_ada_norm=10, **sizes)
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": STEPS, "class_labels": torch.tensor([1, 2])}
    return model, inputs


@pytest.mark.slow
@pytest.mark.parametrize(("make", "share"), [(unet, 0.35), (vae, 0.35), (dit, 0.65)])
def test_the_dense_network_equals_the_masked_one_and_samples(make: Any, share: float) -> None:
    torch.manual_seed(0)
    model, inputs = make()
    model.eval()
    for parameter in model.parameters():
        if not bool(parameter.any()):
            nn.init.normal_(parameter, 0, 0.1)
    groups = nni_topo.dependency_groups(model, inputs, ASKED)
    masks = nni_topo.create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
    dense = nni_topo.to_dense(model, inputs, masks)
    masked = nni_topo.masked_model(model, inputs, masks, reconcile=True)
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (dense, model)]
    assert sizes[0] < share * sizes[1]
    with torch.no_grad():
        found, wanted = (each(**inputs).sample for each in (dense, masked))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        if make is not vae:
            key = "sample" if make is unet else "hidden_states"
            scheduler = diffusers.DDIMScheduler()
            scheduler.set_timesteps(2)
            step = scheduler.step(found[:, : inputs[key].shape[1]], scheduler.timesteps[0], inputs[key])
            assert bool(step.prev_sample.isfinite().all())


@pytest.mark.slow
def test_a_budget_is_met_although_group_norms_read_skip_connections() -> None:
    torch.manual_seed(0)
    model, inputs = unet()
    small = nni_topo.shrink(model.eval(), [inputs], {"flops": 0.5}, pruner="random", compensate=None, distill=False)
    share = nni_topo.zoo.count_macs(small, inputs) / nni_topo.zoo.count_macs(model, inputs)
    assert share == pytest.approx(0.5, abs=0.01)
    assert not small.report.layers.kept
