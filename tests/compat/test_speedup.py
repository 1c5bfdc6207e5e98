"""Speedup keeps sizes whole, frees what it should, and logs what NNI logs."""

from __future__ import annotations

import copy

import pytest
import torch
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from torch import Tensor, nn

from nni_topo import to_dense

INPUTS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Sized(nn.Module):
    """Uses a size as a value, and a length as the last user of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Linear(256, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu())
        flat = y.view(-1, y.size()[1:].numel())
        return self.head(flat) * len(x)


class Pooled(nn.Module):
    """The pooling of a first convolutional network: functional, and without a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x, _ = nn.functional.max_pool2d(x, 2, return_indices=True)
        return nn.functional.normalize(nn.functional.max_pool1d(self.conv2(x).relu().flatten(2), 2).flatten(1))


def masks_of(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    pruner = L1NormPruner(model, [{"op_names": ["conv1"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    assert isinstance(masks, dict)
    return masks


@pytest.mark.parametrize("kind", [Sized, Pooled], ids=["sizes and a dying length", "max pooling without a stride"])
def test_forwards_that_nnis_tracer_stumbles_over_are_sped_up(kind: type[Sized | Pooled]) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    masks = masks_of(model)
    with torch.no_grad():
        for name, mask in masks["conv1"].items():
            model.conv1.get_parameter(name).mul_(mask)
        expected = model(INPUTS)
    dense = ModelSpeedup(model, INPUTS, masks).speedup_model()
    assert dense.conv1.weight.shape == (4, 3, 3, 3)
    assert dense.conv2.weight.shape == (4, 4, 3, 3)
    torch.testing.assert_close(dense(INPUTS), expected)


class Added(nn.Module):
    """Two convolutions whose channels NNI makes agree, and one that it has no masks of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3((self.conv1(x) + self.conv2(x)).relu())


def test_given_masks_stay_as_they_are() -> None:
    torch.manual_seed(0)
    model = Added().eval()
    masks = masks_of(model)
    masks["conv2"] = {target: mask.flip(0) for target, mask in masks["conv1"].items()}
    before = copy.deepcopy(masks)
    first = ModelSpeedup(copy.deepcopy(model), INPUTS, masks).speedup_model()
    second = ModelSpeedup(copy.deepcopy(model), INPUTS, masks_or_file=masks).speedup_model()
    assert masks.keys() == before.keys()
    for name, targets in before.items():
        assert masks[name].keys() == targets.keys()
        assert all(torch.equal(masks[name][target], mask) for target, mask in targets.items())
    assert {name: p.shape for name, p in first.named_parameters()} == {
        name: p.shape for name, p in second.named_parameters()
    }
    to_dense(model, INPUTS, masks)


def test_each_of_several_outputs_is_gone_back_from() -> None:
    whole = object.__new__(ModelSpeedup)
    whole.batch_size = 2
    x = torch.zeros(2, 3, requires_grad=True)
    one = x.exp()
    outputs = one * one, one * one * one, one.detach(), x.sum(), 5
    masks = torch.tensor([1.0, 0.0, 1.0]), torch.tensor([[1.0, 1.0, 0.0]]), torch.ones(3), None, None
    for output, mask in zip(outputs, masks, strict=True):
        whole.indirect_backward(output, mask)
    assert x.grad is not None
    # the gradients are 2 and 3, where the masks keep them
    assert x.grad.tolist() == [[5.0, 3.0, 2.0]] * 2
    for output, mask in ((one, None), (5, torch.ones(1))):
        with pytest.raises(AssertionError):
            whole.indirect_backward(output, mask)


@pytest.mark.parametrize("training", [False, True])
def test_the_layers_of_a_model_keep_their_modes(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 4, 3)).train(training)
    model[1].eval()
    pruner = L1NormPruner(model, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(model, INPUTS, masks).speedup_model()
    assert model[0].out_channels == 4
    assert [module.training for module in model.modules()] == [training, training, False, training, training]
