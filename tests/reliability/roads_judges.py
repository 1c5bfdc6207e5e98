"""Weight reconstruction, then distillation on the same images: what judges is what no earlier step had.

The images on which a network is judged are told by its loss, computed by hand on the eighth that weight reconstruction
leaves out; other images in place of that eighth change no weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reliability.oracle import WrongError
from reliability.roads import Road
from torch import Tensor, nn

import nni_topo

SAMPLES, BATCH = 64, 16


class LeNet(nn.Module):
    """LeNet-5 on images [1, 16, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 48), nn.Linear(48, 32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.max_pool2d(torch.relu(self.conv1(x)), 2)
        x = torch.max_pool2d(torch.relu(self.conv2(x)), 2).flatten(1)
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))  # type: ignore[no-any-return]


class Bert(nn.Module):
    """BERT of Transformers, small, with a head that classifies; the logits alone."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        knobs: dict[str, Any] = {
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_labels": 4,
            "initializer_range": 0.2,
        }
        self.body = BertForSequenceClassification(
            BertConfig(vocab_size=60, hidden_size=24, intermediate_size=48, max_position_embeddings=16, **knobs)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.body(input_ids=tokens).logits  # type: ignore[no-any-return]


def loss_of(net: nn.Module, model: nn.Module, images: Tensor) -> float:
    """Return the divergence that distillation judges by, at its temperature of two."""
    with torch.no_grad():
        mine, theirs = ((each(images).double() / 2.0).log_softmax(1) for each in (net, model))
    return float((theirs.exp() * (theirs - mine)).sum(1).mean()) * 4.0


def check(network: Callable[[], nn.Module], layers: list[str], make: Callable[[], Tensor]) -> None:
    """Reconstruct weights, then distil, as the pages do; in the same order, and in another one."""
    torch.manual_seed(0)
    model, images = network().eval(), make()
    with torch.no_grad():  # scores as far apart as those of trained networks
        [each for each in model.modules() if isinstance(each, nn.Linear)][-1].weight *= 30.0
    held_out = torch.arange(SAMPLES) % 8 == 7
    asked = [{"op_names": layers, "sparse_ratio": 0.5}]
    pruner = nni_topo.create_pruner("l1", model, nni_topo.dependency_groups(model, images[:2], asked))
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    full = nni_topo.compensate(model, masks, images.split(BATCH), progress=False)
    # Other images in place of those that judge: not one weight is another one.
    other = images.clone()
    other[held_out] = make()[held_out]
    again = nni_topo.compensate(model, masks, other.split(BATCH), progress=False)
    for name, value in full.state_dict().items():
        if not torch.equal(value, again.state_dict()[name]):
            raise WrongError(f"{name} was solved on what judges")
    dense = nni_topo.to_dense(full, images[:2], masks)
    for order in (torch.arange(SAMPLES), torch.randperm(SAMPLES)):
        done = nni_topo.distillation(dense, model, images[order].split(BATCH), steps=3, lr=1e-3, progress=False)
        wanted = loss_of(dense, model, images[held_out])
        if done.held_out != SAMPLES // 8 or done.solved_on or abs(done.loss_before - wanted) > 1e-2 * wanted:
            raise WrongError(f"judged by a loss of {done.loss_before} on {done.held_out}, by hand it is {wanted}")
    everything = nni_topo.compensate(
        model, masks, nni_topo.Calibration(images.split(BATCH), hold_out=False), progress=False
    )
    dense = nni_topo.to_dense(everything, images[:2], masks)
    done = nni_topo.distillation(dense, model, images.split(BATCH), steps=1, lr=1e-4, progress=False)
    if done.solved_on != SAMPLES // 8 or "were solved on" not in str(done):
        raise WrongError("nothing says that the judges were solved on")


ROADS = [
    Road("judges", "LeNet", lambda: check(LeNet, ["conv1", "conv2", "fc1"], lambda: torch.randn(SAMPLES, 1, 16, 16))),
    Road(
        "judges",
        "BERT",
        lambda: check(
            Bert,
            [f"body.bert.encoder.layer.{index}.intermediate.dense" for index in range(2)],
            lambda: torch.randint(1, 60, (SAMPLES, 9)),
        ),
    ),
]
