"""What runs in training alone, as a second head of scores does, keeps working in dense networks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

import nni_topo

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def convolution(entering, leaving):
    return nn.Conv2d(entering, leaving, 3, padding=1)


class Exit(nn.Module):
    """Two convolutions with a head each, of which the first runs in training alone."""

    def __init__(self, between=torch.relu):
        super().__init__()
        self.a, self.b = convolution(3, 8), convolution(8, 6)
        self.exit, self.head = nn.Linear(8, 5), nn.Linear(6, 5)
        self.between = between

    def forward(self, x):
        x = self.between(self.a(x))
        scores = self.head(torch.relu(self.b(x)).mean((2, 3)))
        return (scores, self.exit(x.mean((2, 3)))) if self.training else scores


class Deep(Exit):
    """The head is a network of its own, with dropout, and a value decides on the way to it."""

    def __init__(self):
        super().__init__()
        self.exit = nn.Sequential(
            convolution(8, 8), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Flatten(), nn.Linear(512, 5)
        )

    def forward(self, x):
        x = self.a(x)
        if x.abs().sum() > 0:
            x = functional.dropout(torch.relu(x), 0.5, self.training)
        found = {"scores": self.head(self.b(x).mean((2, 3)))}
        if self.training:
            found["exit"] = self.exit(x)
        return tuple(found.values())


class Scaled(Exit):
    """A parameter of the network's own is used in training alone."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 2, 8).view(8, 1, 1))

    def forward(self, x):
        x = torch.relu(self.a(x))
        x = x * self.scale if self.training else x
        return (self.head(self.b(x).mean((2, 3))),)


class Attending(Exit):
    """Attention and a recurrent layer run in training alone."""

    def __init__(self):
        super().__init__()
        self.attention, self.recurrent = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 4, batch_first=True)

    def forward(self, x):
        x = torch.relu(self.a(x))
        scores = self.head(self.b(x).mean((2, 3)))
        if self.training:
            states = x.flatten(2).transpose(1, 2)
            return scores, self.attention(states, states, states)[0], self.recurrent(states)[0]
        return scores


def half(model, *names):
    """Masks that keep every second channel."""
    masks = {}
    for name in names:
        kept = torch.arange(len(model.get_submodule(name).weight)) % 2
        spread = kept.float().view(-1, 1, 1, 1)
        masks[name] = {"weight": spread.expand(model.get_submodule(name).weight.shape).clone(), "bias": kept.float()}
    return masks


def in_training(model):
    """Outputs in training mode, but for batch norms and dropout."""
    model.train()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    torch.manual_seed(0)
    return model(IMAGES)


@pytest.mark.parametrize(
    ("kind", "reader"), [(Exit, "exit"), (Deep, "exit.0"), (Scaled, "scale"), (Attending, "attention")]
)
def test_layers_that_training_alone_reads_stay_whole_and_the_dense_network_trains(kind, reader):
    torch.manual_seed(0)
    model = kind().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["b"]]
    assert groups.skipped["a"] == f"{reader} reads them in training mode only"
    masks = half(model, "a", "b")
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert [len(each.weight) for each in (dense.a, dense.b)] == [8, 3]
    assert dense.report.notes == ()
    masked = nni_topo.masked_model(model, IMAGES, {"b": masks["b"]})
    found, wanted = in_training(dense), in_training(masked)
    if kind is not Deep:  # of its dropout other numbers are drawn
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "pixels", "count"), [("googlenet", 64, 49), ("inception_v3", 299, 90)])
def test_second_heads_of_torchvision_go_on_training(name, pixels, count):
    torchvision = pytest.importorskip("torchvision")
    model = getattr(torchvision.models, name)(weights=None, init_weights=False, num_classes=10, aux_logits=True).eval()
    with torch.no_grad():  # PyTorch's own initial weights let values vanish on the way
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, (2 / parameter[0].numel()) ** 0.5, generator=torch.Generator().manual_seed(0))
    images = torch.rand(2, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
    groups = nni_topo.dependency_groups(model, images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert len(groups) == count
    masks = {}
    for entry in groups:
        (layer,) = entry["op_names"]
        weight = model.get_submodule(layer).weight
        kept = (torch.arange(len(weight)) % 2).float().view(-1, 1, 1, 1)
        masks[layer] = {"weight": kept.expand(weight.shape).clone()}
    dense = nni_topo.to_dense(model, images, masks, check=False)
    masked = nni_topo.masked_model(model, images, masks)
    for training in (False, True):
        for each in (dense, masked):
            each.train(training)
            for module in each.modules():
                if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
                    module.eval()
        with torch.no_grad():
            found, wanted = dense(images), masked(images)
        pairs = zip(found, wanted, strict=True) if training else [(found, wanted)]
        for one, other in pairs:
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Centred(nn.Module):
    """Keeps a running mean of its features, as teachers in self-supervised learning do, which training alone moves."""

    def __init__(self, move):
        super().__init__()
        self.a, self.b, self.head = convolution(3, 8), convolution(8, 6), nn.Linear(6, 4)
        self.register_buffer("centre", torch.zeros(6))
        self.move = move

    def forward(self, images):
        features = self.b(self.a(images).relu()).relu().mean((2, 3))
        if self.training:
            self.move(self, features.detach().mean(0))
        return self.head(features)


def written(net, new):
    net.centre.mul_(0.9).add_(new, alpha=0.1)


def replaced(net, new):
    net.centre = torch.lerp(net.centre, new, 0.1)


@pytest.mark.parametrize("move", [written, replaced])
def test_what_a_buffer_remembers_in_training_stays_whole(move):
    model = Centred(move).eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["a"]]
    assert groups.skipped["b"] == "centre reads them in training mode only"
