"""The rules of operators along dimensions against PyTorch: each result is computed with zeros, and without channels.

A dry run stands behind the rules, so a network comes out right even if one of them is wrong, and only keeps more than
it has to. Here the rules stand alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nni_topo.network.channels.ids import FIXED
from nni_topo.network.speedup.analysis import Analysis

CHANNELS, HEIGHT, WIDTH = 4, 6, 5
IMAGES = torch.randn(2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
Call = Callable[[Tensor], Any]


class Calls(nn.Module):
    """Calls, each on the output of a convolution of its own: one graph holds all of them."""

    def __init__(self, calls: list[Call]):
        super().__init__()
        self.calls = calls
        self.layers = nn.ModuleList([nn.Conv2d(3, CHANNELS, 1) for _ in calls])

    def forward(self, x):
        return tuple(call(layer(x)) for call, layer in zip(self.calls, self.layers, strict=True))


def drawn() -> Iterator[Tensor]:
    """Yield outputs of a layer: around zero, and of one sign at some pixels or at all."""
    generator = torch.Generator().manual_seed(1)
    for shift in (0.0, -1.0, 1.0, -9.0, 9.0):
        yield torch.randn(2, CHANNELS, HEIGHT, WIDTH, generator=generator, dtype=torch.float64) + shift


def without(images: Tensor, channel: int, dim: int) -> Tensor:
    rest = [each for each in range(CHANNELS) if each != channel]
    return images.index_select(dim, torch.tensor(rest))


def channels_of_result(call: Call) -> int | None:
    """Measure in which dimension of a result the channels are; -1 if in none, None if a zero isn't as good as nothing.

    A channel that is zero must change nothing but its own places of the result.
    """
    found = set[int]()
    for images in drawn():
        for channel in range(CHANNELS):
            zeroed = images.clone()
            zeroed[:, channel] = 0
            with_zeros, removed = call(zeroed), call(without(images, channel, 1))
            shrunk = [d for d in range(with_zeros.dim()) if with_zeros.shape[d] != removed.shape[d]]
            for dim in shrunk:
                if with_zeros.shape[dim] != CHANNELS:
                    return None
                with_zeros = without(with_zeros, channel, dim)
            if not torch.allclose(with_zeros.double(), removed.double(), rtol=1e-9, atol=1e-12):
                return None
            found.add(shrunk[0] if shrunk else -1)
    (place,) = found
    return place


def mixes(call: Call, place: int) -> bool:
    """Measure whether a channel changes the result at other places than its own, which are along a dimension."""
    for images in (*drawn(), torch.zeros(2, CHANNELS, HEIGHT, WIDTH, dtype=torch.float64)):
        for channel in range(CHANNELS):
            changed = images.clone()
            changed[:, channel] += torch.linspace(-3, 5, WIDTH, dtype=torch.float64)
            results = [call(images), call(changed)]
            if place >= 0:
                results = [without(each, channel, place) for each in results]
            if not torch.equal(*results):
                return True
    return False


def values(found: Any) -> Tensor:
    """Return the first tensor of several."""
    return found if isinstance(found, Tensor) else found[0]


def without_a_dimension(operator: Callable[..., Any], *given: Any, **options: Any) -> dict[str, Call]:
    """Call an operator that is given no dimension, with the channels in each of four."""
    calls: dict[str, Call] = {}
    for place in range(4):
        calls[f"channels in {place}"] = lambda z, place=place: values(operator(z.movedim(1, place), *given, **options))
    return calls


def with_dimensions(
    operator: Callable[..., Any], at: int | None, *given: Any, name: str = "dim", **options: Any
) -> dict[str, Call]:
    """Call an operator along each dimension, by name and by position (``given``: what stands before it)."""
    calls: dict[str, Call] = {}
    for dim in range(4):
        calls[f"{name}={dim}"] = lambda z, dim=dim: values(operator(z, *given, **{name: dim}, **options))
        if at is not None:
            padding = given + (None,) * (at - 1 - len(given))
            calls[f"{dim - 4} at {at}"] = lambda z, dim=dim, padding=padding: values(
                operator(z, *padding, dim - 4, **options)
            )
    return calls


def all_calls() -> dict[str, Call]:
    """List the calls by name."""
    tables: dict[str, dict[str, Call]] = {}
    for name in (
        "sum", "nansum", "any", "count_nonzero", "mean", "amin", "amax", "nanmean", "std", "var", "std_mean",
        "var_mean", "all", "median", "nanmedian", "argmax", "argmin", "sort", "argsort", "aminmax", "max", "min",
    ):  # fmt: skip
        operator = getattr(torch, name)
        tables[f"{name} of all"] = without_a_dimension(operator)
        if name not in ("std_mean", "var_mean", "aminmax"):
            tables[name] = with_dimensions(operator, 1)
        else:
            tables[name] = with_dimensions(operator, None)
    for name in ("prod", "cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "logsumexp"):
        tables[name] = with_dimensions(getattr(torch, name), 1)
    tables["prod of all"] = without_a_dimension(torch.prod)
    for name in ("softmax", "log_softmax", "softmin"):
        tables[name] = with_dimensions(getattr(functional, name), 1)
        tables[f"{name} of all"] = without_a_dimension(getattr(functional, name))
    for order in (1, 2, float("inf")):
        tables[f"norm of order {order}"] = with_dimensions(torch.norm, 2, order)
        tables[f"vector_norm of order {order}"] = with_dimensions(torch.linalg.vector_norm, 2, order)
    tables["norm of all"] = without_a_dimension(torch.norm)
    tables["vector_norm of all"] = without_a_dimension(torch.linalg.vector_norm)
    tables["linalg.norm of all"] = without_a_dimension(torch.linalg.norm)
    tables["linalg.norm"] = with_dimensions(torch.linalg.norm, 2, None)
    tables["matrix_norm of all"] = without_a_dimension(torch.linalg.matrix_norm)
    tables["normalize"] = with_dimensions(functional.normalize, 2, 2.0)
    tables["normalize of all"] = without_a_dimension(functional.normalize)
    tables["topk"] = with_dimensions(torch.topk, 2, 2)
    tables["topk of all"] = without_a_dimension(torch.topk, 2)
    tables["group_norm"] = {
        f"channels in {place}, {groups} groups": lambda z, place=place, groups=groups: functional.group_norm(
            z.movedim(1, place), groups
        )
        for place, groups in ((1, 1), (2, 2), (2, 6), (3, 6))
    }
    tables["layer_norm"] = {
        f"channels in {place}, last {len(shape)}": lambda z, place=place, shape=shape: functional.layer_norm(
            z.movedim(1, place), shape
        )
        for place, shape in (
            (1, (HEIGHT, WIDTH)), (1, (WIDTH,)), (2, (WIDTH,)), (0, (2, HEIGHT, WIDTH)), (0, (HEIGHT, WIDTH)),
        )
    }  # fmt: skip
    tables["local_response_norm"] = without_a_dimension(functional.local_response_norm, 3)
    for name in ("fft", "ifft"):
        tables[name] = with_dimensions(lambda *a, name=name, **k: getattr(torch.fft, name)(*a, **k).real, 2, None)
        tables[f"{name} of all"] = without_a_dimension(lambda z, name=name: getattr(torch.fft, name)(z).real)
    tables |= pools()
    return {f"{name}: {how}": call for name, calls in tables.items() for how, call in calls.items()}


def spread(z: Tensor, dims: int) -> Tensor:
    """Give images so many dimensions behind the channels."""
    if dims == 1:
        return z.flatten(2)
    return z if dims == 2 else z.unsqueeze(-1).expand(-1, -1, -1, -1, 3)


def pooled(operator: Callable[..., Any], given: tuple[Any, ...], dims: int, place: int, z: Tensor) -> Any:
    """Pool images with so many dimensions, and with the channels in one of them."""
    return operator(spread(z, dims).movedim(1, place), *given)


def pools() -> dict[str, dict[str, Call]]:
    """List functions that slide windows along the last one, two or three dimensions."""
    tables: dict[str, dict[str, Call]] = {}
    for dims in (1, 2, 3):
        for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "lp_pool"):
            name = f"{kind}{dims}d"
            operator, tables[name] = getattr(functional, name), {}
            for place in range(1, dims + 2):
                # All but `lp_pool` keep the size.
                given: tuple[Any, ...] = (2.0, 3, 1) if kind == "lp_pool" else (3, 1, 1)
                if kind.startswith("adaptive"):
                    given = (tuple(spread(next(drawn()), dims).movedim(1, place).shape[-dims:]),)
                tables[name][f"channels in {place}"] = partial(pooled, operator, given, dims, place)
    return tables


# What loses no channels though it could: its result has another size, in which no rule looks for the channels.
KEPT_ANYWAY = {"topk of all: channels in 2"}
RESIZED = ("topk", "topk of all", "lp_pool1d", "lp_pool2d", "lp_pool3d")
CALLS = all_calls()


@pytest.fixture(scope="module")
def flow():
    return Analysis.on(Calls(list(CALLS.values())).eval(), IMAGES).flow


def nodes_of(flow, at: int) -> set[str]:
    """Name the nodes of a call."""
    (outputs,) = (node for node in flow.graph.nodes if node.op == "output")
    found, waiting = set(), [outputs.args[0][at]]
    while waiting:
        node = waiting.pop()
        if node.target != f"layers.{at}":
            found.add(node.name)
            waiting += node.all_input_nodes
    return found


@pytest.mark.quick_every(3)
@pytest.mark.parametrize("name", dict.fromkeys(name.split(": ")[0] for name in CALLS))
def test_channels_stay_where_a_zero_is_not_as_good_as_nothing_and_are_found_in_the_result_elsewhere(flow, name):
    for at, (called, call) in enumerate(CALLS.items()):
        if called.split(": ")[0] != name:
            continue
        place, reasons = channels_of_result(call), flow.why_pinned(f"layers.{at}")
        if called in KEPT_ANYWAY:
            assert reasons, called
            continue
        if place is None:
            # Where channels of another number come out, that is the reason.
            kind = "call_not_covered" if called.split(":")[0] in RESIZED else "result_depends"
            assert {reason.kind for reason in reasons} <= {kind, "result_depends"}, called
            assert reasons, called
            continue
        assert not reasons, called
        ids = flow.group_ids(flow.ids["output"][at].numpy())
        assert [dim for dim in range(ids.ndim) if ids.shape[dim] > 1] == [place] * (place >= 0), called
        wanted = flow.group_ids_of(f"layers.{at}") if place >= 0 else [FIXED]
        assert np.array_equal(ids.ravel(), wanted), called
        # What sums channels up is noted: a removed channel has to arrive there as zeros.
        assert bool(nodes_of(flow, at) & flow.summed) == mixes(call, place), called
