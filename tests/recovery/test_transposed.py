"""Transposed convolutions solved anew, and read by reconstruction's choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from every_sample import compensate, compensation
from torch import Tensor, nn

import nni_topo
from nni_topo import masked_model, to_dense

UPS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "stride": {"kernel_size": 2, "stride": 2},
    "overlap": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "groups": {"kernel_size": 3, "stride": 2, "groups": 2},
    "no bias": {"kernel_size": 2, "stride": 2, "bias": False},
}


def doubled(**up: Any) -> tuple[nn.Sequential, dict[str, dict[str, Tensor]]]:
    """A network whose first layer makes each channel twice, and the masks that remove the doubles."""
    torch.manual_seed(0)
    first = nn.Conv2d(3, 8, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), nn.ConvTranspose2d(8, 6, **up), nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        for kept, gone in ((0, 1), (2, 3), (4, 5), (6, 7)):  # a pair lies in one group
            first.weight[gone], first.bias[gone] = 2.0 * first.weight[kept], 2.0 * first.bias[kept]
    mask = torch.ones_like(first.weight)
    mask[1::2] = 0
    return model, {"0": {"weight": mask}}


@pytest.mark.parametrize(
    ("up", "method"),
    [(up, method) for up in UPS for method in ("reconstruct", "pair")],
)
@pytest.mark.quick_every(3)
def test_what_the_kept_channels_know_is_made_up_for(up: str, method: Any) -> None:
    model, masks = doubled(**UPS[up])
    images = torch.randn(48, 3, 6, 6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = compensation(model, masks, images.split(16), method=method, ridge=0.0 if method != "pair" else "auto")
    assert not found.report.left_alone
    wanted = model(images).detach()
    lost = (masked_model(model, images, masks)(images).detach() - wanted).square().mean()
    left = (to_dense(found.model, images, masks)(images).detach() - wanted).square().mean()
    assert left < 1e-6 * lost
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_mean_of_a_constant_goes_into_the_bias() -> None:
    """A removed channel that is constant is predicted by a constant, which each output position sees in part."""
    torch.manual_seed(0)
    first, up = nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 5, 3, stride=2)
    with torch.no_grad():
        first.weight[3], first.bias[3] = 0.0, 2.0
    model, images = nn.Sequential(first, up).eval(), torch.randn(32, 3, 12, 12)
    mask = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(4, 1, 1, 1)
    repaired = compensate(model, {"0": {"weight": mask}}, [images], method="pair")
    with torch.no_grad():
        alone = torch.zeros(1, 4, 12, 12)
        alone[:, 3] = 2.0
        inside = (up(alone) - up(torch.zeros_like(alone)))[:, :, 4:-5, 4:-5]  # periods of two pixels
    torch.testing.assert_close(
        repaired[1].bias.detach() - up.bias.detach(), inside.mean((0, 2, 3)), rtol=1e-4, atol=1e-5
    )


def test_channels_of_grouped_transposed_convolutions_stay_gone_in_distillation() -> None:
    model, images = (
        nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.Conv2d(4, 2, 1)).eval(),
        torch.randn(16, 4, 5, 5),
    )
    config = [{"op_names": ["0"], "sparse_ratio": 0.5}]
    pruner = nni_topo.create_pruner("l1", model, nni_topo.dependency_groups(model, images, config))
    _, masks = pruner.compress()
    pruner.unwrap_model()
    masked = masked_model(model, images, masks)
    taught = nni_topo.distill(masked, model, [images], steps=4, lr=0.1)
    assert torch.equal(taught[0].bias.detach()[masks["0"]["bias"] == 0], torch.zeros(2))
