"""Global thresholds without NNI's loop are NNI's, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nni.compression.pruning import L1NormPruner
from nni.compression.pruning.tools import sparse_gen
from torch import Tensor, nn

from nni_topo import compat
from nni_topo.compat import metrics as ranking


@pytest.fixture(autouse=True)
def _back_to_nni() -> Iterator[None]:
    yield
    compat.disable_fast_metrics()


def group_of(blocks: list[int], grains: list[int], seed: int, dtype: torch.dtype, distinct: int) -> tuple[Any, Any]:
    """Metrics of layers with so many blocks of so many elements, drawn from so many values."""
    generator = torch.Generator().manual_seed(seed)
    metrics: dict[str, dict[str, Tensor]] = {}
    group = []
    for index, (count, grain) in enumerate(zip(blocks, grains, strict=True)):
        scores = torch.randint(-distinct, distinct, (count, 1), generator=generator) / 7
        metrics[str(index)] = {"weight": scores.to(dtype)}
        group.append((str(index), "weight", SimpleNamespace(target=torch.empty(count, grain))))
    return metrics, group


@settings(max_examples=150, deadline=None)
@given(
    layers=st.lists(st.tuples(st.integers(1, 40), st.sampled_from([1, 2, 3, 9, 27])), min_size=1, max_size=5),
    same=st.booleans(),
    ratio=st.floats(0.0, 1.0),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    distinct=st.sampled_from([2, 1_000_000]),
)
def test_thresholds_are_nnis(
    layers: list[tuple[int, int]], same: bool, ratio: float, seed: int, dtype: torch.dtype, distinct: int
) -> None:
    blocks = [count for count, _ in layers]
    grains = [layers[0][1] if same else grain for _, grain in layers]
    metrics, group = group_of(blocks, grains, seed, dtype, distinct)
    number = int(ratio * sum(count * grain for count, grain in zip(blocks, grains, strict=True)))
    expected = ranking.NNI_THRESHOLD(metrics, group, number)
    assert ranking.global_threshold(metrics, group, number) == expected


@pytest.mark.parametrize("grains", [[4, 4], [4, 9]])
def test_thresholds_among_nans_are_nnis(grains: list[int]) -> None:
    metrics, group = group_of([12, 20], grains, 0, torch.float32, 1000)
    metrics["1"]["weight"][3::5] = torch.nan
    expected = ranking.NNI_THRESHOLD(metrics, group, 50)
    found = ranking.global_threshold(metrics, group, 50)
    assert found == expected or (found != found and expected != expected)


def test_a_pruner_makes_the_same_masks_on_request_only() -> None:
    def masks() -> dict[str, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.Conv2d(40, 30, 3), nn.Linear(30, 20))
        config = [{"op_names": ["0", "1", "2"], "sparse_ratio": 0.5, "global_group_id": 1}]
        return L1NormPruner(model, config).compress()[1]

    assert sparse_gen._global_threshold_generate.__module__.startswith("nni.")
    slow = masks()
    compat.enable_fast_metrics()
    assert sparse_gen._global_threshold_generate is ranking.global_threshold
    fast = masks()
    assert all(torch.equal(slow[name]["weight"], fast[name]["weight"]) for name in ("0", "1", "2"))
    compat.disable_fast_metrics()
    assert sparse_gen._global_threshold_generate.__module__.startswith("nni.")


# Layers with many blocks, which come in at a time where no larger ones are held.
MANY: list[list[tuple[int, int]]] = [
    [(100, 1), (150, 2), (200, 3)],
    [(200, 3), (150, 2), (100, 1)],
    [(90, 9), (300, 1), (90, 27), (70, 9)],
    [(3, 2), (200, 9), (150, 9), (64, 1), (65, 27)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layers", MANY)
def test_thresholds_of_many_blocks_are_nnis(layers: list[tuple[int, int]], dtype: torch.dtype) -> None:
    blocks, grains = zip(*layers, strict=True)
    total = sum(count * grain for count, grain in layers)
    for seed, distinct in enumerate((2, 40, 1_000_000)):
        metrics, group = group_of(list(blocks), list(grains), seed, torch.float64, distinct)
        if distinct > 40:  # values that only double precision tells apart
            for target in metrics.values():
                target["weight"] = 1 + target["weight"] * 1e-15
        metrics = {name: {"weight": target["weight"].to(dtype)} for name, target in metrics.items()}
        for ratio in (0.0, 0.03, 0.2, 0.5, 0.77, 0.99, 1.0):
            number = int(ratio * total)
            expected = ranking.NNI_THRESHOLD(metrics, group, number)
            assert ranking.global_threshold(metrics, group, number) == expected


# NNI's loop by hand: (negative) largest block out for each that comes in once more than `number` elements are held
CLOSE = [
    # two zeros are one value, of which the large block counts first
    ([[0.0], [-0.0], [1.0]], [1, 4, 1], 1),
    ([[-0.0], [0.0], [1.0]], [1, 4, 1], 1),
    # values of which one and another sum are equal
    ([[3e-9, 1e-9], [2e-9], [1.0]], [1, 2, 1], 1),
    ([[-1e-9, -3e-9], [-2e-9, 1e-9]], [1, 3], 2),
    ([[5.0, 4.0, 3.0], [2.0, 1.0, 6.0]], [2, 3], 0),
    ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [2, 2], 12),
    ([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]], [2, 2], 11),
]


@pytest.mark.parametrize(("scores", "grains", "number"), CLOSE)
def test_thresholds_of_close_values_are_nnis(scores: list[list[float]], grains: list[int], number: int) -> None:
    metrics = {str(place): {"weight": torch.tensor(values)} for place, values in enumerate(scores)}
    group: Any = [
        (str(place), "weight", SimpleNamespace(target=torch.empty(len(values), grain)))
        for place, (values, grain) in enumerate(zip(scores, grains, strict=True))
    ]
    for least in range(number, number + 3):
        expected = ranking.NNI_THRESHOLD(metrics, group, least)
        assert ranking.global_threshold(metrics, group, least) == expected
