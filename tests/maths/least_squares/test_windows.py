from __future__ import annotations

import itertools

import pytest
import torch

from nni_topo.maths.least_squares.windows import Windows


@pytest.mark.parametrize(("kernel", "dilation", "groups"), list(itertools.product([1, 3, 8], [1, 2], [1, 2])))
def test_sums_are_those_of_written_windows(kernel, dilation, groups):
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randn(groups, 5, 3, 30, generator=generator, dtype=torch.float64)
    windows = Windows(sequences, kernel, dilation)
    # (groups, entries, channels, positions, kernel)
    views = sequences.unfold(3, (kernel - 1) * dilation + 1, 1)[..., ::dilation]
    rows = views.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
    assert rows.shape[1:] == (5 * windows.positions, windows.columns)
    values = torch.randn(groups, rows.shape[1], 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(windows.total(), rows.sum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(windows.products(), rows.mT @ rows, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(windows.cross(values), rows.mT @ values, rtol=1e-12, atol=1e-12)
    weights = torch.randn(groups, windows.columns, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(windows.times(weights), rows @ weights, rtol=1e-12, atol=1e-12)
    some = torch.tensor([True, False, True, True, False]).repeat_interleave(windows.positions)
    torch.testing.assert_close(windows.of_rows(some).times(weights), rows[:, some] @ weights, rtol=1e-12, atol=1e-12)
