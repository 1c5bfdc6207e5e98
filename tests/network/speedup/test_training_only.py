"""What runs in training alone, as a second head of scores does, keeps working in dense networks."""

from __future__ import annotations

from dataclasses import dataclass

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
        weight = model.get_submodule(name).weight
        spread = kept.float().view(-1, *[1] * (weight.dim() - 1))
        masks[name] = {"weight": spread.expand(weight.shape).clone(), "bias": kept.float()}
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


class Exits(nn.Module):
    """Three stages with a head each, of which only the last gives the output in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(convolution(*widths) for widths in ((3, 8), (8, 12), (12, 16)))
        self.norm, self.drop = nn.BatchNorm2d(16), nn.Dropout()
        self.heads = nn.ModuleList(nn.Linear(width, 4) for width in (8, 12, 16))

    def features(self, x):
        found = []
        for stage in self.stages:
            x = stage(x).relu()
            found.append(x)
        return [*found[:-1], self.norm(found[-1])]

    def scores(self, x):
        return [head(self.drop(each).mean((2, 3))) for head, each in zip(self.heads, self.features(x), strict=True)]


class Listed(Exits):
    def forward(self, x):
        scores = self.scores(x)
        return scores if self.training else scores[-1]


class InDict(Exits):
    def forward(self, x):
        first, second, last = self.scores(x)
        return {"out": last, "aux": {"first": first, "second": second}} if self.training else {"out": last}


@dataclass
class Found:
    scores: torch.Tensor
    others: list[torch.Tensor] | None = None


class InDataClass(Exits):
    def forward(self, x):
        *others, last = self.scores(x)
        return Found(last, others if self.training else None)


class WithMomentum(Exits):
    """What runs in training mode moves a buffer, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        scores = self.scores(x)
        if self.training:
            self.calls += 1
        return scores if self.training else scores[-1]


class Stored(Exits):
    """The heads' scores stay in attributes, also of a submodule, in both modes."""

    def forward(self, x):
        first, second, last = self.scores(x)
        self.aux_scores, self.stages[1].seen = first, {"scores": [second]}
        self.penalty, self.last_size, self.steps = last.square().mean(), x.shape, torch.arange(x.shape[-1])
        return last


class StoredInTraining(Exits):
    def forward(self, x):
        first, second, last = self.scores(x)
        if self.training:
            self.aux_scores, self.other = first, second
        return last


def last_or_all(net, scores):
    return scores if getattr(net, "training") else scores[-1]  # noqa: B009


class ReadElsewhere(Exits):
    """A function outside the class reads the mode."""

    def forward(self, x):
        return last_or_all(self, self.scores(x))


class OwnMode(Exits):
    """The class holds its mode itself."""

    training = property(lambda self: self.mode == "train", lambda self, on: setattr(self, "mode", "train" * on))

    def forward(self, x):
        return self.scores(x) if self.mode else self.scores(x)[-1]


def stored(net):
    found = []
    for module in net.modules():
        for name in ("aux_scores", "other", "seen"):
            value = vars(module).get(name)
            found += [value] if isinstance(value, torch.Tensor) else value["scores"] if value else []
    return found


def results(net, images):
    """What a network returns in training mode without noise, and what it leaves in attributes."""
    net.train()
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.Dropout)):
            module.eval()
    with torch.no_grad():
        found = net(images)
    if isinstance(found, dict):
        found = [found["out"], *found["aux"].values()]
    elif isinstance(found, Found):
        found = [found.scores, *found.others]
    return [*(found if isinstance(found, list) else [found]), *stored(net)]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        *((kind, "training_output") for kind in (Listed, InDict, InDataClass, WithMomentum, ReadElsewhere, OwnMode)),
        *((kind, "stored") for kind in (Stored, StoredInTraining)),
    ],
)
def test_results_that_the_output_lacks_in_evaluation_mode_keep_their_channels(kind, reason):
    torch.manual_seed(0)
    model, image = kind().eval(), IMAGES[:1]  # batch norms in training mode refuse one sample
    before = nni_topo.testing.snapshot(model)
    config = [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5}]
    groups = nni_topo.dependency_groups(model, image, config)
    assert [entry["op_names"] for entry in groups] == [["stages.0"], ["stages.1"], ["stages.2"]]
    assert {name: each.kind for name, (each,) in groups.reasons.items()} == {
        "heads.0": reason, "heads.1": reason, "heads.2": "model_output",
    }  # fmt: skip
    masks = half(model, *(f"stages.{at}" for at in range(3)))
    dense, masked = nni_topo.to_dense(model, image, masks), nni_topo.masked_model(model, image, masks)
    assert nni_topo.testing.snapshot(model) == before
    assert [len(each.weight) for each in (*dense.stages, *dense.heads)] == [4, 6, 8, 4, 4, 4]
    others = torch.rand(5, 3, 12, 16)
    one, other = (net(others) for net in (dense, masked))
    found, wanted = results(dense, others), results(masked, others)
    assert len(found) == 3
    pairs = zip(found, wanted, strict=True)
    for a, b in [*pairs, (one, other)] if isinstance(one, torch.Tensor) else pairs:
        assert a.shape == (5, 4)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reads_mode", [False, True])
def test_a_forward_that_reads_no_mode_is_run_in_evaluation_mode_alone(reads_mode):
    runs = []

    class Counted(Exits):
        def forward(self, x):
            runs.append(vars(self)["training"])
            return self.scores(x)[-1] * (2 if reads_mode and self.training else 1)

    model = Counted().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert any(runs) == reads_mode
    del runs[:]
    masks = half(model, *(f"stages.{at}" for at in range(3)))
    dense = nni_topo.to_dense(model, IMAGES, masks, groups=groups)
    assert [len(stage.weight) for stage in dense.stages] == [4, 6, 8]
    assert any(runs) == reads_mode
    assert "training" not in vars(nn.Module)


class Tabled(Exits):
    """What stays in an attribute is computed from a parameter, as biases of positions are."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 24).reshape(12, 2))

    def forward(self, x):
        first = self.stages[0](x).relu()
        self.table = self.scale[:, torch.ones(1, dtype=torch.int64)][..., None]
        return self.heads[2](self.stages[2](self.stages[1](first) + self.table).mean((2, 3)))


def test_a_table_that_is_computed_from_a_parameter_and_stays_in_an_attribute_keeps_no_channels():
    model = Tabled().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["stages.0"], ["stages.1"], ["stages.2"]]
    masks = half(model, "stages.0", "stages.1")
    dense, masked = nni_topo.to_dense(model, IMAGES, masks), nni_topo.masked_model(model, IMAGES, masks)
    assert [len(each.weight) for each in dense.stages] == [4, 6, 16]
    others = torch.rand(5, 3, 12, 16)
    torch.testing.assert_close(dense(others), masked(others), rtol=1e-4, atol=1e-5)


class Caching(Exits):
    """Keeps what a forward has computed, and reads it in the next ones."""

    def __init__(self, scaled):
        super().__init__()
        self.cache, self.by_size, self.listed = None, {}, []
        self.register_buffer("held", None, persistent=False)
        self.register_buffer("scale", torch.linspace(1, 2, 8)[:, None, None])
        self.scaled = scaled

    def forward(self, x):
        first = self.scaled(self, self.stages[0](x).relu())
        return self.heads[2](self.stages[2](self.stages[1](first).relu()).mean((2, 3)))


def with_attribute(net, x):
    if net.cache is None:
        net.cache = net.scale * 2
    return x * net.cache


def with_values_of_the_first_input(net, x):
    if net.cache is None:
        net.cache = x.mean((0, 2, 3), keepdim=True)
    return x - net.cache


def with_dict(net, x):
    if x.shape[-2:] not in net.by_size:
        net.by_size[x.shape[-2:]] = torch.zeros_like(x[0]) + 1.5
    return x * net.by_size[x.shape[-2:]]


def with_list(net, x):
    if not net.listed:
        net.listed.append(net.scale + 1)
    return x * net.listed[0]


def with_buffer(net, x):
    if net.held is None:
        net.held = torch.ones_like(x[:1, :, :1, :1]) * 2
    return x * net.held


def with_state(net, x):
    net.cache = x if net.cache is None else torch.cat([net.cache, x], 2)
    return net.cache


@pytest.mark.parametrize(
    "scaled", [with_attribute, with_values_of_the_first_input, with_dict, with_list, with_buffer, with_state]
)
@pytest.mark.slow
def test_caches_that_the_forward_itself_reads_again_keep_no_channels(scaled):
    torch.manual_seed(0)
    model = Caching(scaled).eval()
    before = nni_topo.testing.snapshot(model)
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["stages.0"], ["stages.1"], ["stages.2"]]
    masks = half(model, "stages.0", "stages.1")
    dense, masked = nni_topo.to_dense(model, IMAGES, masks), nni_topo.masked_model(model, IMAGES, masks)
    assert nni_topo.testing.snapshot(model) == before
    assert [len(each.weight) for each in dense.stages] == [4, 6, 16]
    assert (dense.cache, dense.by_size, dense.listed, dense.held) == (None, {}, [], None)
    others = torch.rand(5, 3, 12, 16)
    for _ in range(2):  # the second forward reads what the first has kept
        torch.testing.assert_close(dense(others), masked(others), rtol=1e-4, atol=1e-5)


class Features(Exits):
    """The features themselves are returned in training mode."""

    def forward(self, x):
        features = self.features(x)
        scores = self.heads[2](features[-1].mean((2, 3)))
        return (scores, features[1]) if self.training else scores


def test_features_that_training_returns_stay_whole_and_others_can_be_cut():
    groups = nni_topo.dependency_groups(Features().eval(), IMAGES, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["stages.0"], ["stages.2"]]
    assert [each.kind for each in groups.reasons["stages.1"]] == ["training_output"]


class Unread(Exits):
    """Heads whose scores nothing reads, in neither mode, and a training mode that needs targets."""

    def forward(self, x, targets=None):
        scores = self.scores(x)[-1]
        return functional.cross_entropy(scores, targets) if self.training else scores


def test_layers_that_nothing_reads_can_be_cut_and_a_training_mode_with_targets_is_no_error():
    model = Unread().eval()
    groups = nni_topo.dependency_groups(model, IMAGES, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["heads.0"], ["heads.1"]]
    masks = half(model, "heads.0", "heads.1")
    dense = nni_topo.to_dense(model, IMAGES, masks)
    assert [len(head.weight) for head in dense.heads] == [2, 2, 4]
    torch.testing.assert_close(dense(torch.rand(3, 3, 9, 9)).shape, (3, 4))


class Fused(nn.Module):
    """Attention that keeps its weights in an attribute, for whoever wants to look at them."""

    def __init__(self, keep):
        super().__init__()
        self.num_heads, self.keep = 4, keep
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        samples, places, _ = x.shape
        q, k, v = self.qkv(x).reshape(samples, places, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) / 2).softmax(-1)
        self.weights = self.keep(weights)
        return self.proj((weights @ v).transpose(1, 2).reshape(samples, places, -1))


class Maps(nn.Module):
    """A network with attention."""

    def __init__(self, keep):
        super().__init__()
        self.enter, self.attention, self.head = nn.Linear(5, 16), Fused(keep), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.attention(self.enter(x)))


@pytest.mark.parametrize(
    ("keep", "removed"), [(lambda x: x.detach(), 0), (lambda x: x.mean(1), 2), (lambda _: None, 2)]
)
def test_attention_whose_weights_stay_in_an_attribute_keeps_its_heads(keep, removed):
    states = torch.randn(2, 6, 5)
    model = Maps(keep).eval()
    groups = nni_topo.dependency_groups(model, states, [{"op_types": ["Linear"], "sparse_ratio": 0.5}])
    if not removed:
        assert [each.kind for each in groups.reasons["attention.qkv"]] == ["stored"]
    pruner = nni_topo.create_pruner("l1", model, groups)
    masks = pruner.compress()[1]
    pruner.unwrap_model()
    assert len(nni_topo.to_dense(model, states, masks).attention.qkv.weight) == 48 - removed * 12
