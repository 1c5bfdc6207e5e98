"""The tracer knows the tensor's methods, agrees with PyTorch on purity, and leaves annotations alone."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from nni.common.concrete_trace_utils import concrete_trace, concrete_tracer
from torch import Tensor, nn
from torch.fx.graph_module import GraphModule

TABLE = concrete_tracer.ConcreteTracer.default_autowrap_leaf_function


class Net(nn.Module):
    """Calls methods by way of the class, has dead code and an in-place method."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        unused = torch.Tensor.exp(x)  # noqa: F841
        y = torch.Tensor.add(self.linear(x), x)
        left, right = torch.Tensor.split(y, 2)
        return torch.cat([left, right.clone().mul_(2)])


def parts(x: Tensor, sizes: list[int], names: dict[str, int]) -> list[Tensor]:
    return list(torch.split(x, sizes)) if names else []


class Annotated(nn.Module):
    def forward(self, x: Tensor, names: dict[str, int] | None = None) -> list[Tensor]:
        return [part * 2 for part in parts(x, [1, 3], {"a": 1})]


class Base(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class Middle(Base):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class Overriding(Middle):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Typed(nn.Module):
    """Evaluates types of builtin classes where it runs."""

    def forward(self, x: Tensor, scale: float | None = 2.0) -> Tensor:
        sizes = torch.jit.annotate(list[int], [])
        kinds = dict[str, int](a=len(sizes)), tuple[int, ...]((1, 2))
        first = list.__getitem__([x, 2 * x], 1)
        return first + sum(kinds[1]) if isinstance(scale, int | tuple | None) else first * scale


class Checked(nn.Module):
    """Asks for exact types, of values that are traced and of others."""

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        pair = torch.split(x, 2)
        right = (
            type(pair) is tuple,
            type(scale) is not int,
            type([1]) is list,
            type(x) is not tuple,
        )
        wrong = type(pair) is list, type(pair) is not tuple, scale is None, x is pair
        return x * sum(right) + sum(wrong)


class Scripted(nn.Module):
    """Calls functions of PyTorch that call others of its Python side."""

    def forward(self, x: Tensor) -> Tensor:
        spread = nn.functional.mse_loss(x, x.flip(0)) + torch.norm(x, dim=1, keepdim=True)
        return nn.functional.normalize(x) * spread + torch.einsum("ij,kj->ik", x, x)


class FailingPool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.max_pool2d(x, 2, padding=7)


def targets(traced: GraphModule) -> list[Any]:
    return [node.target for node in traced.graph.nodes]


def test_trace_records_methods_called_on_the_class() -> None:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.rand(4, 3)
    traced = concrete_trace(net, (x,))
    torch.testing.assert_close(traced(2 * x), net(2 * x))
    assert "add" in targets(traced)


def test_annotations_of_builtin_generics_are_not_evaluated() -> None:
    traced = concrete_trace(Annotated(), (torch.rand(4, 2),))
    x = torch.rand(4, 2)
    for got, expected in zip(traced(x), Annotated()(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", [Middle, Overriding])
def test_super_is_the_base_of_the_defining_class(kind: type[nn.Module]) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(concrete_trace(kind(), (x,))(-x), kind()(-x))


@pytest.mark.parametrize("scale", [1.5, None, 3])
@pytest.mark.quick_every(2)
def test_types_of_builtin_classes_are_evaluated_as_types(scale: float | None) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(concrete_trace(Typed(), (x, scale))(-x, scale), Typed()(-x, scale))


def test_types_are_compared_as_types() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(concrete_trace(Checked(), (x, 1.5))(-x, 1.5), -4 * x)


def test_functions_call_those_of_python_and_stay_one_node() -> None:
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    traced = concrete_trace(Scripted(), (x,))
    torch.testing.assert_close(traced(-x), Scripted()(-x))
    names = {getattr(target, "__name__", target) for target in targets(traced)}
    assert {"mse_loss", "norm", "normalize", "einsum"} < names


class Doubled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, times: int = 2) -> Tensor:
        return times * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.times = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.times * gradient, None


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x, 2) + 1


@pytest.mark.parametrize(("model", "x"), [(Doubling(), torch.ones(4, 3)), (FailingPool(), torch.rand(1, 1, 4, 4))])
def test_functions_with_a_gradient_of_their_own_are_themselves_after_a_trace(model: nn.Module, x: Tensor) -> None:
    before = vars(torch.autograd.Function)["apply"]
    for _ in range(2):
        with nullcontext() if isinstance(model, Doubling) else pytest.raises(RuntimeError):
            concrete_trace(model, (x,))
    after = vars(torch.autograd.Function)["apply"]
    assert after is before
    assert torch.equal(torch.vmap(Doubled.apply)(torch.arange(3.0)), torch.tensor([0.0, 2.0, 4.0]))
    assert Doubled.apply(torch.ones(2)).tolist() == [2.0, 2.0]  # a default, which PyTorch's method in C doesn't know
