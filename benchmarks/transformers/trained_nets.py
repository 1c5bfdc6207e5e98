"""Small networks that several benchmarks train: a ViT, a BERT and a ResNet-20 on images of 14 pixels, a GPT on texts.

Rows of the training data after those that calibrate judge what is learned.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace
from typing import Any

from torch import nn
from torch.nn.functional import avg_pool2d
from torch.utils.data import TensorDataset

from nni_topo import create_pruner, dependency_groups, zoo
from nni_topo.recovery.lesson import judged
from nni_topo.zoo.evaluation import bits

LEFT = {"half": (1 / 2, 1 / 2), "third": (1 / 3, 1 / 4), "sixth": (1 / 6, 1 / 8)}
"""Shares of the heads, and of the neurons; of a ResNet's channels the first."""
ROWS, JUDGING, BATCH = 512, 256, 64
EPOCHS = {"gpt_small": 2}  # of training; four of the others


class TrainedNet:
    """A trained network and its rows."""

    def __init__(self, name: str, seed: int, options: argparse.Namespace) -> None:
        is_text = name == "gpt_small"
        source = "python-stdlib" if is_text else "fashion-mnist"
        data = zoo.load_data(source, None if is_text else options.data_dir, limit=options.limit, validation=0.0)
        self.data = replace(data, train=_smaller(data.train, is_text), test=_smaller(data.test, is_text))
        self.name, self.seed, self.is_text = name, seed, is_text
        size = self.data.train.tensors[0].shape[-1]
        sizes = {"num_classes": data.num_classes, "in_channels": data.in_channels, "image_size": size}
        self.net = zoo.create_model(name, **sizes, seed=seed)
        path = options.out / f"{name}-{seed}.pt"
        if path.exists():
            zoo.load_checkpoint(path, self.net)
        else:
            zoo.train(self.net, self.data, self.recipe(), seed=seed)
            zoo.save_checkpoint(path, self.net, {"seconds": 0.0})
        self.net.eval()
        images = self.data.train.tensors[0]
        self.batches = list(images[:ROWS].split(BATCH))
        self.judging = list(images[ROWS : ROWS + JUDGING].split(BATCH))
        self.unpruned = self.worth(self.net)

    def recipe(self) -> zoo.Recipe:
        """Return how the network is trained."""
        return replace(zoo.default_recipe(self.name, self.data.name), epochs=EPOCHS.get(self.name, 4))

    def worth(self, net: nn.Module) -> float:
        """Return the accuracy on test images, or bits per byte."""
        tested = TensorDataset(*(part[: 512 if self.is_text else 2000] for part in self.data.test.tensors))
        loss, accuracy = zoo.loss_and_accuracy(net, tested)
        return bits(loss) if self.is_text else accuracy

    def agreement(self, net: nn.Module) -> float:
        """Return the share of test rows' answers that are the unpruned network's."""
        rows = self.data.test.tensors[0][: 512 if self.is_text else 2000]
        return judged(self.net, [net], list(rows.split(256)))[0].agreement

    def masks(self, left: str, choice: str) -> Any:
        """Prune by a criterion."""
        heads, neurons = LEFT[left]
        config: list[dict[str, Any]] = [
            {"op_names_re": [r".*\.attention"], "granularity": "head", "sparse_ratio": 1.0 - heads},
            {"op_names_re": [r".*\.mlp\.(fc1|gate_proj|up_proj)"], "sparse_ratio": 1.0 - neurons},
        ]
        if self.name == "resnet20":
            config = [{"op_names_re": [r".*\.conv1"], "sparse_ratio": 1.0 - heads}]
        net = copy.deepcopy(self.net)
        knobs: dict[str, Any] = {}
        if choice == "reconstruction":
            knobs = {"calibration": self.batches, "example_inputs": self.batches[0][:2]}
        groups = list(dependency_groups(net, self.batches[0][:2], config))
        return create_pruner(choice, net, groups, **knobs).compress()[1]


def _smaller(rows: TensorDataset, is_text: bool) -> TensorDataset:
    """Return texts of 32 bytes, or images at half of their resolution."""
    inputs, targets = rows.tensors
    if is_text:
        return TensorDataset(inputs[:, :32], targets[:, :32])
    return TensorDataset(avg_pool2d(inputs, 2), targets)
