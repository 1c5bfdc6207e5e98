"""Networks in the way that people write them: the channels that they lose, and the dense network beside the masked one.

Each network is pruned to half of its channels by their norms. A table says which layers lose channels, and how many
they keep. The dense network and the masked network are compared at a second size and another batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import nni_topo

PRUNED = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"]


class Net(nn.Module):
    """Layers and parameters by name, and a forward that uses them."""

    def __init__(self, forward: Callable[..., Any], parts: dict[str, Any]) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self, *inputs)


class Case(NamedTuple):
    parts: Callable[[], dict[str, Any]]
    forward: Callable[..., Any]
    inputs: Callable[[int, int], tuple[Tensor, ...]]  # of a batch and a size
    kept: dict[str, int]  # by layer that loses channels, how many stay
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((2, 8), (3, 11))  # batch and size: the example, the comparison


def images(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size),)


def rows(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 10),)


def tokens(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, size, 10),)


def of_kind(conv: type[nn.Module], *, width: int = 16, **parts: Callable[[], Any]) -> Callable[[], dict[str, Any]]:
    """Make ``a``, of as many channels as ``width``, and ``b``, which reads them, besides other parts."""
    if conv is nn.Linear:
        return lambda: {"a": nn.Linear(10, width), "b": nn.Linear(width, 4), **{k: f() for k, f in parts.items()}}
    return lambda: {
        "a": conv(3, width, 3, padding=1),
        "b": conv(width, 4, 1),
        **{k: f() for k, f in parts.items()},
    }


def in_order(*names: str) -> Callable[..., Any]:
    """Make a forward that calls parts one after the other."""

    def forward(self: Any, x: Tensor) -> Any:
        for name in names:
            x = getattr(self, name)(x)
        return x

    return forward


def check(case: Case) -> None:
    """Prune half of the channels; compare the dense network with the masked one, and count the channels that stay."""
    torch.manual_seed(0)
    model = Net(case.forward, case.parts())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    example, other = (case.inputs(*size) for size in case.sizes)
    model.eval()(*example)
    before = copy.deepcopy(model.state_dict())
    groups = nni_topo.dependency_groups(model, example, [{"op_types": PRUNED, "sparse_ratio": 0.5}])
    pruner = nni_topo.create_pruner("l1", model, groups)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, example, masks)
    kept = {}
    for name, module in dense.named_modules():
        whole = model.get_submodule(name)
        if isinstance(module, nn.Linear) and module.out_features < whole.out_features:
            kept[name] = module.out_features
        elif hasattr(module, "out_channels") and module.out_channels < whole.out_channels:
            kept[name] = module.out_channels
    assert kept == case.kept, dict(groups.skipped)
    with torch.no_grad():
        masked = nni_topo.masked_model(model, example, masks)
        torch.testing.assert_close(dense(*other), masked(*other), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def iresnet_block() -> dict[str, Any]:
    return {
        "stem": nn.Conv2d(3, 16, 3, padding=1, bias=False), "stem_norm": nn.BatchNorm2d(16), "stem_act": nn.PReLU(16),
        "norm1": nn.BatchNorm2d(16), "conv1": nn.Conv2d(16, 24, 3, padding=1, bias=False), "norm2": nn.BatchNorm2d(24),
        "act": nn.PReLU(24), "conv2": nn.Conv2d(24, 16, 3, stride=2, padding=1, bias=False),
        "norm3": nn.BatchNorm2d(16), "down": nn.Conv2d(16, 16, 1, stride=2, bias=False), "last": nn.Conv2d(16, 5, 1),
    }  # fmt: skip


def iresnet(self: Any, x: Tensor) -> Tensor:
    x = self.stem_act(self.stem_norm(self.stem(x)))
    inner = self.norm3(self.conv2(self.act(self.norm2(self.conv1(self.norm1(x))))))
    return self.last(inner + self.down(x)).mean((2, 3))


def fsrcnn() -> dict[str, Any]:
    return {
        "first": nn.Sequential(nn.Conv2d(3, 24, 5, padding=2), nn.PReLU(24)),
        "middle": nn.Sequential(
            nn.Conv2d(24, 12, 1), nn.PReLU(12), nn.Conv2d(12, 12, 3, padding=1), nn.PReLU(12), nn.Conv2d(12, 24, 1),
            nn.PReLU(24),
        ),
        "last": nn.ConvTranspose2d(24, 3, 9, stride=2, padding=4, output_padding=1),
    }  # fmt: skip


def enet_bottleneck() -> dict[str, Any]:
    return {
        "stem": nn.Conv2d(3, 16, 3, padding=1), "reduce": nn.Conv2d(16, 8, 1, bias=False), "norm1": nn.BatchNorm2d(8),
        "act1": nn.PReLU(8), "conv": nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False), "norm2": nn.BatchNorm2d(8),
        "act2": nn.PReLU(8), "expand": nn.Conv2d(8, 16, 1, bias=False), "norm3": nn.BatchNorm2d(16),
        "act3": nn.PReLU(16), "last": nn.Conv2d(16, 5, 1),
    }  # fmt: skip


def enet(self: Any, x: Tensor) -> Tensor:
    x = self.stem(x)
    inner = self.act2(self.norm2(self.conv(self.act1(self.norm1(self.reduce(x))))))
    return self.last(self.act3(x + self.norm3(self.expand(inner))))


def mtcnn() -> dict[str, Any]:
    return {
        "conv1": nn.Conv2d(3, 10, 3), "act1": nn.PReLU(10), "pool": nn.MaxPool2d(2, 2, ceil_mode=True),
        "conv2": nn.Conv2d(10, 16, 3), "act2": nn.PReLU(16), "conv3": nn.Conv2d(16, 32, 3), "act3": nn.PReLU(32),
        "dense": nn.Linear(32, 24), "act4": nn.PReLU(24), "scores": nn.Linear(24, 2), "boxes": nn.Linear(24, 4),
    }  # fmt: skip


def mtcnn_forward(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    x = self.act2(self.conv2(self.pool(self.act1(self.conv1(x)))))
    x = self.act3(self.conv3(x)).amax((2, 3))
    x = self.act4(self.dense(x))
    return self.scores(x).softmax(1), self.boxes(x)


class ClippedPReLU(nn.PReLU):
    """A PReLU with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.weight.clamp(0, 1))


def vectors(width: int = 16) -> dict[str, Callable[[], Any]]:
    return {
        "mean": lambda: torch.randn(width),
        "var": lambda: torch.rand(width) + 0.5,
        "slope": lambda: nn.Parameter(torch.rand(width)),
        "shift": lambda: nn.Parameter(torch.randn(width)),
    }


ONE_NUMBER_A_CHANNEL = {
    "iresnet's block": Case(
        iresnet_block, iresnet, images, {"stem": 8, "conv1": 12, "conv2": 8, "down": 8}
    ),
    "FSRCNN": Case(
        fsrcnn, in_order("first", "middle", "last"), images,
        {"first.0": 12, "middle.0": 6, "middle.2": 6, "middle.4": 12},
    ),
    "ENet's bottleneck": Case(enet_bottleneck, enet, images, {"stem": 8, "reduce": 4, "conv": 4, "expand": 8}),
    "MTCNN": Case(
        mtcnn, mtcnn_forward, images, {"conv1": 5, "conv2": 8, "conv3": 16, "dense": 12}, ((2, 12), (3, 17))
    ),
    "after conv1d": Case(
        of_kind(nn.Conv1d, act=lambda: nn.PReLU(16)), in_order("a", "act", "b"),
        lambda batch, size: (torch.randn(batch, 3, size),), {"a": 8},
    ),
    "after conv3d": Case(
        of_kind(nn.Conv3d, act=lambda: nn.PReLU(16)), in_order("a", "act", "b"),
        lambda batch, size: (torch.randn(batch, 3, size, 4, 4),), {"a": 8},
    ),
    "after linear": Case(of_kind(nn.Linear, act=lambda: nn.PReLU(16)), in_order("a", "act", "b"), rows, {"a": 8}),
    "one slope": Case(of_kind(nn.Conv2d, act=nn.PReLU), in_order("a", "act", "b"), images, {"a": 8}),
    "a slope for each token": Case(
        of_kind(nn.Linear, act=lambda: nn.PReLU(7)), in_order("a", "act", "b"), tokens, {"a": 8}, ((2, 7), (3, 7))
    ),
    "a derived class": Case(
        of_kind(nn.Conv2d, act=lambda: ClippedPReLU(16)), in_order("a", "act", "b"), images, {"a": 8}
    ),
    "F.prelu": Case(
        of_kind(nn.Conv2d, **vectors()), lambda self, x: self.b(functional.prelu(self.a(x), self.slope)), images,
        {"a": 8},
    ),
    "F.batch_norm with buffers": Case(
        of_kind(nn.Conv2d, **vectors()),
        lambda self, x: self.b(functional.batch_norm(self.a(x), self.mean, self.var, self.slope, self.shift)),
        images, {"a": 8},
    ),
    "F.batch_norm by name": Case(
        of_kind(nn.Linear, **vectors()),
        lambda self, x: self.b(functional.batch_norm(running_mean=self.mean, running_var=self.var, input=self.a(x))),
        rows, {"a": 8},
    ),
    "F.instance_norm": Case(
        of_kind(nn.Conv2d, **vectors()),
        lambda self, x: self.b(functional.instance_norm(self.a(x), weight=self.slope, bias=self.shift)),
        images, {"a": 8},
    ),
    "torch.prelu": Case(
        of_kind(nn.Conv2d, **vectors()), lambda self, x: self.b(self.a(x).prelu(self.slope)), images, {"a": 8}
    ),
}  # fmt: skip


def graph(batch: int, size: int) -> tuple[Tensor, ...]:
    """Return the features of some nodes, and edges between them."""
    return torch.randn(size, 10), torch.randint(0, size, (2, 3 * size))


def texts(batch: int, size: int) -> tuple[Tensor, ...]:
    """Return tokens, their mask, and the number of tokens of each text."""
    lengths = torch.randint(1, size + 1, (batch,))
    return torch.randn(batch, size, 10), (torch.arange(size) < lengths[:, None]).float(), lengths


def best(x: Tensor) -> Tensor:
    """Choose three tokens of each sample: (samples, 3)."""
    return x[..., 0].argsort(1)[:, :3]


def linear(work: Callable[..., Tensor], inputs: Any = tokens, **parts: Callable[[], Any]) -> Case:
    """Make a case of two linear layers with operations between them, of which the first loses half of its channels."""
    return Case(
        of_kind(nn.Linear, **parts), lambda self, *given: self.b(work(self, self.a(given[0]), *given).relu()), inputs,
        {"a": 8},
    )  # fmt: skip


def edges_summed(self: Any, y: Tensor, x: Tensor, edges: Tensor) -> Tensor:
    messages = y[edges[0]]
    return y.new_zeros(len(y), y.shape[1]).scatter_add_(0, edges[1].view(-1, 1).expand_as(messages), messages)


def edges_reduced(self: Any, y: Tensor, x: Tensor, edges: Tensor) -> Tensor:
    messages = y.index_select(0, edges[0])
    index = edges[1].view(-1, 1).expand(messages.size())
    return torch.zeros_like(y).scatter_reduce(0, index, messages, "amax", include_self=False)


def edges_mean(self: Any, y: Tensor, x: Tensor, edges: Tensor) -> Tensor:
    messages = y[edges[0]]
    sums = torch.zeros_like(y).index_add_(0, edges[1], messages)
    counts = torch.zeros(len(y)).index_add_(0, edges[1], torch.ones(edges.shape[1]))
    return sums / counts.clamp(min=1).unsqueeze(-1).broadcast_to(sums.shape)


def mean_pooled(self: Any, y: Tensor, x: Tensor, mask: Tensor, lengths: Tensor) -> Tensor:
    mask = mask.unsqueeze(-1).expand(y.size()).float()
    return (y * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def masked_as_mae(self: Any, y: Tensor, x: Tensor) -> Tensor:
    """Drop tokens, put a mask token in their place, and restore the order."""
    batch, length, width = y.shape
    order = x[..., 0].argsort(1)
    kept = torch.gather(y, dim=1, index=order[:, :3].unsqueeze(-1).repeat(1, 1, width))
    filled = torch.cat([kept, self.token.repeat(batch, length - 3, 1)], 1)
    return torch.gather(filled, 1, order.argsort(1).unsqueeze(-1).repeat(1, 1, width))


def blurred(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    kernel = self.kernel[None, None].expand(y.shape[1], 1, 3, 3)
    return self.b(functional.conv2d(y, kernel, padding=1, groups=y.shape[1]))


def written(y: Tensor, place: Any, value: float) -> Tensor:
    y[place] = value
    return y


def gated(self: Any, x: Tensor) -> Tensor:
    y = self.a(x)
    return self.b(y * self.gate(x).sigmoid().expand_as(y))


EXPANDED = {
    "scatter_add_": linear(edges_summed, graph),
    "scatter_reduce": linear(edges_reduced, graph),
    "scatter of a number": linear(
        lambda self, y, x: y.scatter(1, best(x).unsqueeze(-1).expand(-1, -1, y.shape[-1]), 0.5)
    ),
    "index_add_ and a mean": linear(edges_mean, graph),
    "index_copy": linear(lambda self, y, x: y.index_copy(1, x[0, :, 0].argsort(), y.flip(1))),
    "index_reduce": linear(lambda self, y, x: y.index_reduce(1, x[0, :, 0].argsort(), y.flip(1), "amax")),
    "index_fill": linear(lambda self, y, x: y.index_fill(1, best(x)[0], -0.5)),
    "gather": linear(lambda self, y, x: y.gather(1, best(x).unsqueeze(-1).expand(-1, -1, y.shape[-1]))),
    "gather, repeated": linear(
        lambda self, y, x: torch.gather(y, index=best(x)[..., None].repeat(1, 1, y.size(-1)), dim=1)
    ),
    "gather, repeated by an attribute": linear(
        lambda self, y, x: y.gather(1, best(x)[..., None].repeat(1, 1, self.columns)), columns=lambda: 16
    ),
    "gather, expanded by an attribute": linear(
        lambda self, y, x: y.gather(1, best(x)[..., None].expand(-1, -1, self.columns)), columns=lambda: 16
    ),
    "gather, repeat_interleave": linear(
        lambda self, y, x: y.gather(1, best(x)[..., None].repeat_interleave(y.shape[2], 2))
    ),
    "gather, tile": linear(lambda self, y, x: y.gather(1, best(x)[..., None].tile(y.shape[2]))),
    "take_along_dim": linear(lambda self, y, x: torch.take_along_dim(y, best(x)[..., None], 1)),
    "take_along_dim, expanded": linear(
        lambda self, y, x: y.take_along_dim(best(x)[..., None].expand(-1, -1, y.shape[-1]), dim=1)
    ),
    "last token": linear(
        lambda self, y, x, mask, n: y.gather(1, (n - 1).view(-1, 1, 1).expand(-1, 1, y.size(2))).squeeze(1), texts
    ),
    "mean pooling": linear(mean_pooled, texts),
    "masked maximum": linear(
        lambda self, y, x, mask, n: y.masked_fill(mask.unsqueeze(-1).expand(y.size()) == 0, -1e9).max(1).values, texts
    ),
    "masked by a buffer": linear(
        lambda self, y, x: y.masked_fill(self.mask, 0.0), mask=lambda: (torch.arange(8) < 3)[:, None],
    )._replace(sizes=((2, 8), (3, 8))),
    "padding set to zero": linear(lambda self, y, x, mask, n: written(y.clone(), mask == 0, 0.0), texts),
    "small values replaced": linear(lambda self, y, x: written(y.clone(), y < 0.1, 1e-6)),
    "where": linear(
        lambda self, y, x, mask, n: torch.where(mask[..., None].expand_as(y) > 0, y, torch.full_like(y, -2.0)), texts
    ),
    "broadcast_tensors": linear(
        lambda self, y, x, mask, n: torch.mul(*torch.broadcast_tensors(y, mask[..., None])), texts
    ),
    "a mask token": linear(masked_as_mae, token=lambda: nn.Parameter(torch.randn(1, 1, 16))),
    "a blur": Case(of_kind(nn.Conv2d, kernel=lambda: torch.rand(3, 3)), blurred, images, {"a": 8}),
    "a gate of one channel": Case(
        of_kind(nn.Conv2d, gate=lambda: nn.Conv2d(3, 1, 3, padding=1)), gated, images, {"a": 8}
    ),
}  # fmt: skip


def two(work: Callable[[Tensor, Tensor], Tensor], kept: dict[str, int], *, reads: int = 16) -> Case:
    """Make a case of two convolutions and a function of what they give, which another convolution reads."""
    return Case(
        lambda: {
            "a": nn.Conv2d(3, 16, 3, padding=1), "c": nn.Conv2d(3, 16, 3, padding=1), "b": nn.Conv2d(reads, 4, 1)
        },
        lambda self, x: self.b(work(self.a(x), self.c(x))), images, kept,
    )  # fmt: skip


BOTH = {"a": 8, "c": 8}
NAMED_ARGUMENTS = {
    "cat": two(lambda a, c: torch.cat([a, c], axis=1), BOTH, reads=32),
    "cat of named tensors": two(lambda a, c: torch.cat(axis=1, tensors=[a, c]), BOTH, reads=32),
    "stack": two(lambda a, c: torch.stack([a, c], axis=0).sum(axis=0), BOTH),
    "mean": two(lambda a, c: a.mean(axis=(2, 3), keepdims=True) * c, BOTH),
    "maximum": two(lambda a, c: a.amax(axis=-1, keepdims=True) + c, BOTH),
    "chunk": two(lambda a, c: torch.cat(torch.chunk(a + c, 2, axis=1)[::-1], axis=1), BOTH),
    "split": two(lambda a, c: torch.cat((a + c).split(4, dim=2), axis=2), BOTH),
    "narrow": two(lambda a, c: torch.narrow(input=a + c, dim=2, start=0, length=4), BOTH),
    "unbind": two(lambda a, c: torch.stack(torch.unbind(a + c, axis=2), axis=2), BOTH),
    "select": two(lambda a, c: (a + c).select(dim=2, index=1).unsqueeze(2), BOTH),
    "index_select": two(lambda a, c: torch.index_select(x=a + c, axis=2, index=torch.tensor([0, 2])), BOTH),
    "gather": two(lambda a, c: torch.gather(index=(a + c).argsort(axis=2), axis=2, input=a + c), BOTH),
    "flip": two(lambda a, c: a.flip(dims=(3,)) + c, BOTH),
    "softmax": two(lambda a, c: torch.softmax(x=a, axis=2) * c, BOTH),
    "cumsum": two(lambda a, c: a.cumsum(axis=3) * c, BOTH),
    "sums of two": two(lambda a, c: torch.add(x1=a, x2=c), BOTH),
}  # fmt: skip


def seeds(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 10),)


def decoder(middle: Callable[[Any, Tensor], Tensor], view: Callable[[Any, Tensor], Tensor], **parts: Any) -> Case:
    """Make a case of a linear layer whose outputs become images of sixteen channels, which a convolution reads."""
    return Case(
        lambda: {
            "a": nn.Linear(10, 16 * 4 * 4), "b": nn.Conv2d(16, 8, 3, padding=1), "last": nn.Conv2d(8, 3, 1),
            "norm": nn.BatchNorm2d(16), **{name: make() for name, make in parts.items()},
        },
        lambda self, z: self.last(self.b(middle(self, view(self, self.a(z)))).relu()),
        seeds, {"a": 8 * 4 * 4, "b": 4}, ((4, 1), (3, 1)),
    )  # fmt: skip


def by_samples(self: Any, x: Tensor) -> Tensor:
    return x.view(x.size(0), -1, 4, 4)


def after_view(middle: Callable[[Any, Tensor], Tensor]) -> Case:
    return decoder(middle, by_samples)


def after_module(make: Callable[[], nn.Module]) -> Case:
    return decoder(lambda self, x: self.work(x), by_samples, work=make)


def of_view(view: Callable[[Any, Tensor], Tensor], **parts: Any) -> Case:
    return decoder(lambda self, x: functional.interpolate(x, scale_factor=2).relu(), view, **parts)


def attended(self: Any, x: Tensor) -> Tensor:
    return x * x.flatten(2).softmax(-1).view_as(x)


IMAGES_OF_A_LINEAR_LAYER = {
    "batch norm": after_module(lambda: nn.BatchNorm2d(16)),
    "nearest": after_module(lambda: nn.Upsample(scale_factor=2)),
    "bilinear": after_module(lambda: nn.UpsamplingBilinear2d(scale_factor=2)),
    "bicubic": after_view(lambda self, x: functional.interpolate(x, (7, 7), mode="bicubic")),
    "max pool": after_module(lambda: nn.MaxPool2d(2)),
    "average pool": after_module(lambda: nn.AvgPool2d(2)),
    "adaptive pool": after_view(lambda self, x: functional.adaptive_max_pool2d(x, 3)),
    "zeros": after_module(lambda: nn.ZeroPad2d((1, 0, 2, 1))),
    "constants": after_module(lambda: nn.ConstantPad2d(1, 0.5)),
    "reflection": after_module(lambda: nn.ReflectionPad2d(1)),
    "replication": after_module(lambda: nn.ReplicationPad2d(1)),
    "circular": after_module(lambda: nn.CircularPad2d(1)),
    "pad": after_view(lambda self, x: functional.pad(x, (1, 1, 1, 1))),
    "pad by reflection": after_view(lambda self, x: functional.pad(x, (1, 1, 2, 0), mode="reflect")),
    "mean of the pixels": after_view(lambda self, x: self.norm(x) * x.mean((2, 3), keepdim=True)),
    "sum of the pixels": after_view(lambda self, x: self.norm(x) * x.sum((2, 3), keepdim=True).tanh()),
    "largest pixel": after_view(lambda self, x: x - x.amax((2, 3), keepdim=True)),
    "softmax of the pixels": after_view(attended),
    "a view by a convolution's width": of_view(lambda self, x: x.view(-1, self.b.in_channels, 4, 4)),
    "a view by a norm's width": of_view(lambda self, x: self.norm(x.reshape(-1, self.norm.num_features, 4, 4))),
    "a view by an attribute": of_view(lambda self, x: x.view(-1, self.channels, 4, 4), channels=lambda: 16),
    "unflatten": of_view(lambda self, x: x.unflatten(1, (-1, 4, 4))),
    "unflatten by a width": of_view(lambda self, x: x.unflatten(1, (self.b.in_channels, 4, 4))),
    "two steps": of_view(lambda self, x: x.view(len(x), -1, 16).view(len(x), -1, 4, 4)),
}  # fmt: skip

TABLES = {
    "images of a linear layer": IMAGES_OF_A_LINEAR_LAYER,
    "one number a channel": ONE_NUMBER_A_CHANNEL,
    "expanded over channels": EXPANDED,
    "named arguments": NAMED_ARGUMENTS,
}
ALL = {f"{title}: {name}": case for title, table in TABLES.items() for name, case in table.items()}


@pytest.mark.parametrize("name", ALL)
def test_networks_lose_the_channels_that_nothing_needs(name: str) -> None:
    check(ALL[name])
