from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.network.layers.kinds import by_output
from nni_topo.recovery.samples import (
    draw_positions,
    input_rows,
    output_rows,
    position_count,
)

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


def test_rows_of_a_transposed_convolution_called_for_a_size_are_those_of_this_size():
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    inputs = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    outputs = layer(inputs, output_size=(10, 11)).detach()
    positions = torch.arange(110).expand(2, 110)
    x = input_rows(layer, inputs, torch.arange(4)[None], positions, outputs.shape)
    weight = by_output(layer.weight.detach(), layer).flatten(1)
    y = output_rows(layer, outputs, torch.arange(6)[None], positions)
    torch.testing.assert_close(x @ weight.T + layer.bias.detach(), y)


@pytest.mark.parametrize(("count", "wanted"), [(9, 1), (9, 4), (9, 8), (1000, 7), (5, 5), (5, 50)])
def test_positions_are_distinct_inside_and_spread(count, wanted):
    positions = draw_positions(count, 40, wanted, torch.Generator().manual_seed(0))
    assert positions.shape == (40, min(count, wanted))
    assert int(positions.min()) >= 0
    assert int(positions.max()) < count
    if positions.shape[1] > 1:
        assert bool((positions.diff(dim=1) > 0).all())
    if count < 10:
        assert set(positions.flatten().tolist()) == set(range(count))
