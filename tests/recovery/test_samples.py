from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from nni_topo import Calibration
from nni_topo.network.layers.kinds import by_output
from nni_topo.recovery import compensation, samples
from nni_topo.recovery.samples import (
    draw_positions,
    draw_unpadded,
    input_rows,
    output_rows,
    position_count,
)


class Series(nn.Sequential):
    """Two convolutions along time, beside a mask of padding."""

    def forward(self, states, attention_mask):
        return super().forward(states)


@pytest.mark.parametrize("places", [64, 60])
def test_convolutions_are_sampled_where_there_is_no_padding(monkeypatch, places):
    """160 rows are 17 of each of ten entries; so many real ones, of half of all, take 34. Another shape is no mask."""
    monkeypatch.setattr(samples, "_LEAST_SAMPLES", 160)
    monkeypatch.setattr(samples, "_SAMPLES_PER_UNKNOWN", 1)
    torch.manual_seed(0)
    model = Series(nn.Conv1d(2, 8, 3, padding=1), nn.Conv1d(8, 8, 15, padding=7)).eval()
    mask = (torch.arange(places) < 32).long().expand(5, places)
    batches = Calibration([{"states": torch.randn(5, 2, 64), "attention_mask": mask}] * 2, hold_out=False)
    masks = {"0": {"weight": (torch.arange(8) < 7).float()[:, None, None]}}
    (layer,) = compensation(model, masks, batches).report.layers
    assert abs(layer.samples - 170) <= 10


def test_of_layers_with_many_positions_some_are_drawn():
    """Of 12 positions of two entries the real ones are 3 and 6: a share of 3 / 8."""
    real = torch.zeros(2, 12, dtype=torch.bool)
    real[0, :3] = real[1, :6] = True
    for mask, wanted, count in (
        (None, 4, 4),
        (None, 12, 12),
        (None, 13, 12),
        (real, 3, 8),
        (real, 4, 11),
        (real, 5, 12),
        (real[:, :6], 4, 4),  # not of these positions
        (torch.zeros(2, 12, dtype=torch.bool), 1, 12),
    ):
        positions, stay = draw_unpadded(12, 2, wanted, torch.Generator().manual_seed(3), mask)
        assert positions.shape == (2, count)
        if mask is None or mask.shape != (2, 12):
            assert stay is None
        else:
            assert stay.tolist() == [
                [bool(row[at]) for at in places] for row, places in zip(mask, positions, strict=True)
            ]


@pytest.mark.parametrize(
    ("count", "wanted", "lows"),
    [(10, 3, [0, 4, 7, 10]), (2**26 + 1, 3, [0, 22369622, 44739244, 67108865]), (5, 2, [0, 3, 5]), (4, 1, [0, 4])],
)
def test_a_position_is_drawn_from_each_of_equal_ranges(count, wanted, lows):
    found = draw_positions(count, 50, wanted, torch.Generator().manual_seed(0))
    jitter = torch.rand(50, wanted, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for index, (low, high) in enumerate(itertools.pairwise(lows)):
        assert torch.equal(found[:, index], (low + jitter[:, index] * (high - low)).floor().long())


LAYERS = {
    "plain": (nn.Conv2d(4, 6, 3), (2, 4, 7, 9)),
    "stride, padding": (nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 4, 7, 9)),
    "dilation": (nn.Conv2d(4, 6, 3, dilation=2, padding=2), (2, 4, 7, 9)),
    "same": (nn.Conv2d(4, 6, (2, 3), padding="same"), (2, 4, 7, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 9)),
    "circular": (nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 7, 9)),
    "1d": (nn.Conv1d(4, 6, 4, stride=3, padding=1), (2, 4, 11)),
    "3d": (nn.Conv3d(4, 6, (1, 2, 3), padding=(0, 1, 1)), (2, 4, 3, 4, 5)),
    "groups": (nn.Conv2d(4, 6, 3, groups=2, padding=1), (2, 4, 7, 9)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (2, 4, 7, 9)),
    "transposed": (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 5, 6)),
    "transposed, overlapping": (nn.ConvTranspose2d(4, 6, (3, 4), stride=(2, 1), padding=(1, 0)), (2, 4, 5, 6)),
    "transposed, gaps": (nn.ConvTranspose2d(4, 6, 1, stride=3), (2, 4, 4, 3)),
    "transposed, dilation": (nn.ConvTranspose2d(4, 6, 3, dilation=2, padding=5, stride=3), (2, 4, 5, 6)),
    "transposed, output padding": (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 5, 6)),
    "transposed, groups": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 6)),
    "transposed, depthwise": (nn.ConvTranspose2d(4, 8, 2, groups=4), (2, 4, 5, 6)),
    "transposed, 1d": (nn.ConvTranspose1d(4, 6, 4, stride=3, padding=1), (2, 4, 7)),
    "transposed, 3d": (nn.ConvTranspose3d(4, 6, (1, 2, 3), stride=(1, 2, 1)), (2, 4, 2, 3, 4)),
    "linear": (nn.Linear(5, 6), (3, 5)),
    "tokens": (nn.Linear(5, 6), (3, 4, 2, 5)),
}


@pytest.mark.parametrize("case", LAYERS)
def test_rows_times_weights_are_the_layer(case):
    layer, shape = LAYERS[case]
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = layer(inputs)
    groups = getattr(layer, "groups", 1)
    weight = by_output(layer.weight.detach(), layer)
    columns = torch.arange(weight.shape[1] * groups).reshape(groups, -1)
    rows = torch.arange(len(weight)).reshape(groups, -1)
    count = position_count(layer, outputs.shape)
    positions = draw_positions(count, len(inputs), max(1, count // 2), torch.Generator().manual_seed(0))
    x = input_rows(layer, inputs, columns, positions, outputs.shape)
    y = output_rows(layer, outputs, rows, positions)
    weight = weight.reshape(groups, rows.shape[1], -1).transpose(1, 2)
    torch.testing.assert_close(x @ weight + layer.bias.detach()[rows][:, None], y)


class OfSixteen(nn.Linear):
    """Runs on sixteen samples only."""

    def forward(self, rows):
        return super().forward(rows.reshape(16, -1))


@pytest.mark.parametrize(
    ("kind", "knobs", "count"),
    [(nn.Linear, {}, 14), (nn.Linear, {"hold_out": False}, 16), (OfSixteen, {}, 16)],
)
def test_every_eighth_sample_is_not_solved_on_unless_the_model_needs_them_all(kind, knobs, count):
    data = Calibration([torch.randn(16, 3)], **knobs)
    assert samples.samples_to_solve_on(kind(3, 2), data).samples == count
