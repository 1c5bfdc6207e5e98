"""A mask of a norm removes the channels of the layers before it: network slimming, from its training to the network."""

from __future__ import annotations

import copy

import nni
import pytest
import torch
from nni.compression import TorchEvaluator
from nni.compression.pruning import SlimPruner
from torch import nn
from torch.nn import functional

from nni_topo import compensate, create_pruner, dependency_groups, masked_model, to_dense
from nni_topo.errors import ConfigError, SpeedupError

DRAWN = torch.Generator().manual_seed(0)
IMAGES, OTHERS = torch.randn(4, 3, 8, 8, generator=DRAWN), torch.randn(3, 3, 12, 10, generator=DRAWN)
NORMS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm2d", "LayerNorm", "RMSNorm"]
HALF = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]


class Residual(nn.Module):
    """A norm after each convolution of a residual stream."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.first, self.norm1 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.norm2 = nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.norm(self.stem(x)).relu()
        x = (x + self.norm2(self.second(self.norm1(self.first(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


class BeforeConvolutions(Residual):
    """Norms that read a residual stream before each convolution, and at its end."""

    def forward(self, x):
        x = self.stem(x)
        x = x + self.second(self.norm1(self.first(self.norm(x).relu())).relu())
        return self.head(self.norm2(x).relu().mean((2, 3)))


class Joined(nn.Module):
    """One norm that reads two convolutions, concatenated or added."""

    def __init__(self, norm, join):
        super().__init__()
        self.one, self.two, self.join = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1), join
        width = join(torch.ones(1, 8), torch.ones(1, 8)).shape[1]
        self.norm, self.head = norm(width), nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.head(self.norm(self.join(self.one(x), self.two(x))).relu())


class DenselyConnected(nn.Module):
    """Each norm reads all features before it."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two, self.norm2 = nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(14)
        self.head = nn.Conv2d(14, 4, 1)

    def forward(self, x):
        x = self.one(x)
        x = torch.cat([x, self.two(self.norm1(x).relu())], 1)
        return self.head(self.norm2(x).relu())


class Split(nn.Module):
    """YOLO's block: a half of the channels goes through another convolution, and all parts are concatenated."""

    def __init__(self):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)
        self.two, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.head = nn.Conv2d(24, 4, 1)

    def forward(self, x):
        parts = list(functional.silu(self.norm1(self.one(x))).chunk(2, 1))
        parts.append(functional.silu(self.norm2(self.two(parts[-1]))))
        return self.head(torch.cat(parts, 1))


class Tokens(nn.Module):
    """A residual stream of tokens with positions, and norms over its channels."""

    def __init__(self, norm):
        super().__init__()
        self.enter, self.positions = nn.Linear(5, 8), nn.Parameter(torch.randn(1, 7, 8))
        self.norm1, self.up, self.down = norm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm2, self.head = norm(8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.enter(x) + self.positions
        x = x + self.down(self.up(self.norm1(x)).relu())
        return self.head(self.norm2(x).mean(1))


class Around(nn.Module):
    """A convolution that is read beside its norm, too."""

    def __init__(self):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.two, self.beside = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        x = self.one(x)
        return self.two(self.norm(x).relu()) + self.beside(x)


class Llama(nn.Module):
    """A norm of a class of its own; ``added`` as in Gemma's, which doesn't silence a channel of weight zero."""

    def __init__(self, width, added=0.0):
        super().__init__()
        self.weight, self.added = nn.Parameter(torch.ones(width) - added), added

    def forward(self, x):
        return (self.weight + self.added) * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def concatenated(one, two):
    return torch.cat([one, two], 1)


def chain(norm=nn.BatchNorm2d):
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), norm(16), nn.ReLU(), nn.Conv2d(16, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 4, 1),
    )  # fmt: skip


def depthwise():
    return nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU6(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 6, 1),
        nn.BatchNorm2d(6, affine=False), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4),
    )  # fmt: skip


def flattened():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.BatchNorm1d(32), nn.Linear(32, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 4),
    )  # fmt: skip


def others():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 48, 2, 2), nn.PixelShuffle(2),
        nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 4, 1),
    )  # fmt: skip


def volumes():
    return nn.Sequential(nn.Conv3d(3, 8, 3, padding=1), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 1))


# A network, the widths of its layers where each norm loses half of its channels, its two inputs if they aren't images.
CASES = {
    "chain": (chain, {"0": 8, "3": 4}),
    "residual": (Residual, {"stem": 4, "first": 6, "second": 4}),
    "before convolutions": (BeforeConvolutions, {"stem": 4, "first": 6, "second": 4}),
    "added": (lambda: Joined(nn.BatchNorm2d, torch.add), {"one": 4, "two": 4}),
    "concatenated": (lambda: Joined(nn.BatchNorm2d, concatenated), {"one": 3, "two": 5}),
    "groups, added": (lambda: Joined(lambda width: nn.GroupNorm(2, width), torch.add), {"one": 4, "two": 4}),
    "groups, concatenated": (
        lambda: Joined(lambda width: nn.GroupNorm(4, width), concatenated),
        {"one": 4, "two": 4},
    ),
    "instances": (lambda: chain(lambda width: nn.InstanceNorm2d(width, affine=True)), {"0": 8, "3": 4}),
    "densely connected": (DenselyConnected, {"one": 4, "two": 3}),
    "split": (Split, {"one": 8, "two": 4}),
    "depth-wise": (depthwise, {"1": 4, "4": 4, "7": 6}),
    "flattened": (flattened, {"0": 4, "6": 5}),
    "transposed and shuffled": (others, {"0": 4, "3": 24}),
    "volumes": (volumes, {"0": 4}, torch.randn(2, 3, 4, 4, 4), torch.randn(3, 3, 5, 6, 5)),
    "layer norms": (lambda: Tokens(nn.LayerNorm), {"enter": 4, "down": 4, "up": 16}, torch.randn(4, 7, 5)),
    "RMS norms": (lambda: Tokens(nn.RMSNorm), {"enter": 4, "down": 4, "up": 16}, torch.randn(4, 7, 5)),
}  # fmt: skip


def made(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
            if type(module).__name__ in NORMS and module.weight is not None:
                module.weight.uniform_(0.1, 1.6)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.3)
    return model


def masks_by(name, model, config_list, **knobs):
    pruner = create_pruner(name, model, config_list, **knobs)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return masks


def multiplied(model, masks):
    """Multiply each parameter by its mask: the masked network of NNI's wrappers."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, targets in masks.items():
            for target, mask in targets.items():
                if mask is not None:
                    model.get_submodule(name).get_parameter(target).mul_(mask)
    return model


def close(one, other, inputs):
    with torch.no_grad():
        return torch.allclose(one(inputs), other(inputs), rtol=0, atol=1e-5)


def widths(model):
    sizes = {}
    for name, module in model.named_modules():
        for size in ("out_channels", "out_features"):
            if hasattr(module, size):
                sizes[name] = getattr(module, size)
    return sizes


@pytest.mark.parametrize("pruner", ["l1", "random"])
@pytest.mark.parametrize("case", CASES)
def test_layers_before_masked_norms_lose_their_channels(case, pruner):
    make, expected, *inputs = CASES[case]
    model, (x, *rest) = made(make), inputs or (IMAGES, OTHERS)
    second = rest[0] if rest else x[:3] * 2
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = sorted({type(module).__name__ for module in model.modules()} & set(NORMS))
    masks = masks_by(pruner, model, dependency_groups(model, x, [{"op_types": types, "sparse_ratio": 0.5}]))
    dense = to_dense(model, x, masks)
    found = widths(dense)
    if case == "concatenated":  # a norm ranks the channels of both convolutions together
        assert found["one"] + found["two"] == 8
    else:
        assert {name: found[name] for name in expected} == expected
    masked = masked_model(model, x, masks, reconcile=True)
    is_by_channel = all(issubclass(getattr(nn, kind), nn.modules.batchnorm._NormBase) for kind in types)
    for images in (x, second):
        assert close(dense, masked, images)
        # Norms over channels run over the kept ones in the dense network.
        assert close(dense, multiplied(model, masks), images) is is_by_channel
    assert not dense.report.kept
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_smallest_scales_go_and_the_others_are_unchanged():
    model = made(chain)
    masks = masks_by("l1", model, dependency_groups(model, IMAGES, HALF))
    dense = to_dense(model, IMAGES, masks)
    largest = model[1].weight.argsort(descending=True)[:8].sort().values
    assert torch.equal(dense[1].weight, model[1].weight[largest])
    assert torch.equal(dense[0].weight, model[0].weight[largest])
    assert torch.equal(dense[1].running_var, model[1].running_var[largest])


def test_norms_share_a_global_ratio_and_a_budget():
    model = made(chain)
    with torch.no_grad():
        model[1].weight.mul_(0.01)
    entry = {"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5, "global_group_id": "all"}
    masks = masks_by("l1", model, dependency_groups(model, IMAGES, [entry]))
    dense = to_dense(model, IMAGES, masks)
    # 12 of 24 channels, all of them the first norm's, whose scales are smaller
    assert widths(dense) == {"0": 4, "3": 8, "6": 4}
    groups = dependency_groups(model, IMAGES, [{"op_types": ["BatchNorm2d"]}])
    masks = masks_by("random", model, groups, budget={"flops": 0.5}, example_inputs=IMAGES)
    products = lambda widths: 27 * widths["0"] + 9 * widths["0"] * widths["3"] + 4 * widths["3"]  # noqa: E731
    share = products(widths(to_dense(model, IMAGES, masks))) / products(widths(model))
    assert abs(share - 0.5) <= 0.02


def test_a_mask_of_the_weight_alone_takes_the_bias_along():
    model = made(chain)
    dense = to_dense(model, IMAGES, {"1": {"weight": torch.arange(16) % 3 == 0}})
    assert widths(dense) == {"0": 6, "3": 8, "6": 4}
    both = {target: (torch.arange(16) % 3 == 0).float() for target in ("weight", "bias")}
    assert close(dense, multiplied(model, {"1": both}), OTHERS)
    # A mask of the bias alone silences no channel.
    unscaled = {"1": {"bias": both["bias"]}}
    assert widths(to_dense(model, IMAGES, unscaled)) == widths(model)
    assert close(to_dense(model, IMAGES, unscaled), multiplied(model, unscaled), OTHERS)


def test_a_channel_goes_that_the_mask_of_the_layer_or_of_its_norm_removes():
    model = made(chain)
    masks = {
        "0": {"weight": (torch.arange(16) < 12).view(-1, 1, 1, 1)},
        "1": {"weight": torch.arange(16) >= 4},
    }
    assert widths(to_dense(model, IMAGES, masks))["0"] == 8
    # Of a residual stream one convolution is masked itself, the other by its norm.
    model = made(Residual)
    masks = {"stem": {"weight": (torch.arange(8) < 5).view(-1, 1, 1, 1)}, "norm2": {"weight": torch.arange(8) < 5}}
    dense = to_dense(model, IMAGES, masks)
    assert widths(dense) == {"stem": 5, "first": 12, "second": 5, "head": 4}
    assert close(dense, masked_model(model, IMAGES, masks), OTHERS)


def test_rounding_gives_a_channel_back_with_its_numbers():
    model = made(chain)
    masks = {"1": {"weight": torch.arange(16) < 6}}
    dense = to_dense(model, IMAGES, masks, round_to=8)
    assert dense[0].out_channels == 8
    assert not (dense[1].weight == 0).any()
    row = next(row for row in dense.report.rows if row.name == "1")
    assert (row.asked, row.after, row.reason) == (6, 8, "round_to=8")


def test_masked_norms_keep_their_zeros_in_channels_that_others_read():
    model, masks = made(DenselyConnected), {"norm1": {"weight": torch.arange(8) < 4}}
    masks["norm2"] = {"weight": torch.arange(14) >= 2}
    dense = to_dense(model, IMAGES, masks)
    # Channels 0 and 1 go only where both norms remove them; channels 4 to 7 stay for the second norm.
    assert widths(dense) == {"one": 8, "two": 6, "head": 4}
    full = {name: dict.fromkeys(("weight", "bias"), each["weight"].float()) for name, each in masks.items()}
    assert close(dense, multiplied(model, full), OTHERS)
    assert {row.name: row.reason for row in dense.report.kept} == {
        "norm1": "shared by norm2", "norm2": "shared by norm1",
    }  # fmt: skip


def test_weights_are_reconstructed_for_masks_of_norms():
    model, masks = made(chain), {"1": {"weight": torch.arange(16) % 3 == 0}}
    images = torch.randn(256, 3, 8, 8)
    solved, unsolved = to_dense(compensate(model, masks, [images]), IMAGES, masks), to_dense(model, IMAGES, masks)
    with torch.no_grad():
        errors = [float((net(OTHERS) - model(OTHERS)).square().mean()) for net in (solved, unsolved)]
    assert widths(solved)["0"] == 6
    assert errors[0] < 0.8 * errors[1]


def test_norms_that_remove_nothing_are_left_out_with_the_reason():
    groups = dependency_groups(made(depthwise), IMAGES, HALF)
    assert [entry["op_names"] for entry in groups] == [["2"], ["5"]]
    kinds = {name: [reason.kind for reason in why] for name, why in groups.reasons.items()}
    assert kinds == {"0": ["no_layer_before"], "8": ["no_scale"], "10": ["model_output"]}
    groups = dependency_groups(made(Around), IMAGES, HALF)
    assert not groups
    assert "beside" in groups.skipped["norm"]
    # A residual stream is read between two norms unless both are masked.
    groups = dependency_groups(made(Residual), IMAGES, [{**HALF[0], "exclude_op_names": ["norm2"]}])
    assert [entry["op_names"] for entry in groups] == [["norm1"]]
    assert "norm" in groups.skipped
    # Layers make the masks if they are selected with their norms.
    groups = dependency_groups(made(chain), IMAGES, [{"op_types": ["Conv2d", "BatchNorm2d"], "sparse_ratio": 0.5}])
    assert [entry["op_names"] for entry in groups] == [["0"], ["3"]]
    assert {groups.reasons[name][0].kind for name in ("1", "4")} == {"norm_follows"}


def test_norms_without_a_layer_before_them_are_refused_or_reported():
    model = made(depthwise)
    with pytest.raises(ConfigError, match=r"must follow a layer .*got 0:"):
        dependency_groups(model, IMAGES, [{"op_names": ["0"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match="must be able to lose channels, got 0"):
        dependency_groups(model, IMAGES, HALF, strict=True)
    masks = {"0": {"weight": torch.tensor([1.0, 0, 1])}, "2": {"weight": torch.arange(8) < 4}}
    dense = to_dense(model, IMAGES, masks)
    assert dense[1].in_channels == 3
    assert dense[1].out_channels == 4
    assert "no layer" in next(row.reason for row in dense.report.rows if row.name == "0")
    with pytest.raises(SpeedupError, match=r"output must not change.*\(10\)"):
        to_dense(model, IMAGES, {"10": {"weight": torch.tensor([1.0, 0, 1, 1])}})
    around = to_dense(made(Around), IMAGES, {"norm": {"weight": torch.arange(8) < 4}})
    assert around.one.out_channels == 8
    assert "beside" in around.report.kept[0].reason


@pytest.mark.parametrize(("added", "width"), [(0.0, 5), (1.0, 8)])
def test_norms_of_other_classes_are_run_to_see_what_their_weight_does(added, width):
    model, x = made(lambda: Tokens(lambda width: Llama(width, added))), torch.randn(4, 7, 5)
    masks = {name: {"weight": torch.arange(8) < 5} for name in ("norm1", "norm2")}
    dense = to_dense(model, x, masks)
    assert dense.enter.out_features == dense.down.out_features == width
    assert close(dense, masked_model(model, x, masks, reconcile=True), x[:2])


@pytest.mark.parametrize("is_grouped", [True, False])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "Conv2d"])
def test_network_slimming_ends_in_a_smaller_network_that_computes_what_the_trained_masked_one_does(kind, is_grouped):
    labels = torch.arange(256) % 4
    prototypes = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = prototypes[labels] + torch.randn(256, 3, 8, 8, generator=torch.Generator().manual_seed(1))

    def train(model, optimizer, step, scheduler, max_steps, max_epochs):
        model.train()
        for index in range(max_steps or 8 * (max_epochs or 1)):
            rows = slice(index % 8 * 32, index % 8 * 32 + 32)
            optimizer.zero_grad()
            step((images[rows], labels[rows]), model).backward()
            optimizer.step()

    def training_step(batch, model):
        return functional.cross_entropy(model(batch[0]), batch[1])

    model = made(Residual)
    config_list = [{"op_types": [kind], "sparse_ratio": 0.5, "max_sparse_ratio": 0.8}]
    if is_grouped:
        config_list = dependency_groups(model, IMAGES, config_list)
    optimizer = nni.trace(torch.optim.Adam)(model.parameters(), lr=0.01)
    evaluator = TorchEvaluator(train, optimizer, training_step)
    pruner = SlimPruner(model, config_list, evaluator, training_steps=60, regular_scale=0.001)
    _, masks = pruner.compress()
    model.eval()
    with torch.no_grad():
        trained = model(images)
    pruner.unwrap_model()
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).float().mean() > 0.9  # the unmasked network, as trained
        dense = to_dense(model, IMAGES, masks)
        if kind == "BatchNorm2d":
            assert torch.allclose(dense(images), trained, rtol=1e-4, atol=1e-4)
        assert widths(dense)["first"] == 6
        if is_grouped:
            assert widths(dense) == {"stem": 4, "first": 6, "second": 4, "head": 4}
