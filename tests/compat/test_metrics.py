"""The fast metric has the values of NNI's loop and is used on request only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from nni.compression.pruning import FPGMPruner, LevelPruner, basic_pruner
from torch import Tensor, nn

from nni_topo import compat
from nni_topo.compat import metrics
from nni_topo.errors import ConfigError


@pytest.fixture(autouse=True)
def _back_to_nni() -> Iterator[None]:
    yield
    compat.disable_fast_metrics()


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 30, 3), nn.Flatten(), nn.Linear(480, 20))


def fpgm(**extra: object) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """Metrics and masks of NNI's pruner."""
    pruner = FPGMPruner(model(), [{"op_types": ["Conv2d", "Linear"], "sparse_ratio": 0.5, **extra}])
    return pruner._calculate_metrics(pruner._collect_data()), pruner.compress()[1]


@pytest.mark.parametrize("extra", [{}, {"granularity": "in_channel"}])
def test_pruner_computes_the_values_and_masks_of_the_loop(extra: dict[str, object]) -> None:
    slow_metrics, slow_masks = fpgm(**extra)
    compat.enable_fast_metrics()
    fast_metrics, fast_masks = fpgm(**extra)
    assert slow_metrics.keys() == fast_metrics.keys() == {"0", "2", "4"}
    for name in slow_metrics:
        torch.testing.assert_close(fast_metrics[name]["weight"], slow_metrics[name]["weight"], rtol=1e-5, atol=1e-5)
        assert torch.equal(fast_masks[name]["weight"], slow_masks[name]["weight"])


def test_metric_is_nnis_own_until_asked_for() -> None:
    assert basic_pruner.fpgm_metrics.__module__.startswith("nni.")
    compat.enable_fast_metrics()
    compat.enable_fast_metrics()
    assert basic_pruner.fpgm_metrics is metrics.fpgm_metrics
    compat.disable_fast_metrics()
    assert basic_pruner.fpgm_metrics.__module__.startswith("nni.")


@pytest.mark.parametrize(("p", "expected"), [(1, [10.0, 11.0, 7.0]), (2, [8.0, 9.0, 7.0])])
def test_sums_of_a_triangle(p: int, expected: list[float]) -> None:
    corners = torch.tensor([[0.0, 0.0], [3.0, 4.0], [3.0, 0.0]])
    torch.testing.assert_close(metrics.summed_distances(corners, p), torch.tensor(expected))


def test_sums_in_chunks_are_the_sums_at_once() -> None:
    blocks = torch.rand(5, 7, 4, generator=torch.Generator().manual_seed(0))
    at_once = metrics.summed_distances(blocks)
    assert at_once.shape == (5, 7)
    torch.testing.assert_close(metrics.summed_distances(blocks, most=70), at_once)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_sums_keep_the_type(dtype: torch.dtype) -> None:
    blocks = torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    sums = metrics.summed_distances(blocks.to(dtype))
    assert sums.dtype == dtype
    if dtype != torch.float64:  # added in single precision, and rounded once
        assert torch.equal(sums, metrics.summed_distances(blocks.to(dtype).float()).to(dtype))
    torch.testing.assert_close(sums.float(), metrics.summed_distances(blocks), rtol=2e-2, atol=0.0)


def test_sums_of_double_rows_far_from_zero_are_double() -> None:
    spread = torch.rand(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    blocks = 1e6 * torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64) + spread
    expected = (blocks[:, None] - blocks).square().sum(dim=2).sqrt().sum(dim=1)
    torch.testing.assert_close(metrics.summed_distances(blocks), expected, rtol=1e-9, atol=0.0)


def test_nearly_equal_filters_keep_their_distance() -> None:
    blocks = torch.full((40, 9), 100.0)
    blocks[0, 0] += 0.001
    gap = float(blocks[0, 0]) - 100.0
    sums = metrics.summed_distances(blocks)
    torch.testing.assert_close(sums, torch.tensor([39 * gap] + [gap] * 39), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("copies", [2, 40])
def test_near_copies_among_others_have_the_sums_of_the_loop(copies: int) -> None:
    generator = torch.Generator().manual_seed(3)
    blocks = torch.rand(60, 18, generator=generator)
    blocks[:copies] = blocks[0] + 1e-4 * torch.rand(copies, 18, generator=generator)
    expected = (blocks.double()[:, None] - blocks.double()).norm(dim=2).sum(dim=1)
    sums = metrics.summed_distances(blocks).double()
    assert float(((sums - expected) / expected).abs().max()) < 1e-6


def test_single_elements_are_refused() -> None:
    pruner = LevelPruner(model(), [{"op_names": ["0"], "sparse_ratio": 0.5}])
    with pytest.raises(ConfigError, match=r"structured granularity.*\(0\.weight\)"):
        metrics.fpgm_metrics(2, pruner._collect_data(), pruner._target_spaces)
