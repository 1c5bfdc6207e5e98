from __future__ import annotations

import torch

from nni_topo.network.labels import UNKNOWN, carry, carry_reduced


def channel_labels(*shape):
    """Labels 5, 6, ... of the channels, the same at every place."""
    labels = torch.arange(5, 5 + shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    return labels.expand(shape).contiguous()


def test_labels_go_through_what_leaves_channels_in_place():
    carried = carry(channel_labels(2, 3, 4, 4), (2, 3, 2, 2))
    assert torch.equal(carried, channel_labels(2, 3, 2, 2))
    assert carry(channel_labels(2, 3, 4, 4), (2, 4, 2, 2)) is None


def test_labels_that_differ_from_place_to_place_do_not():
    for dim in (2, 3):
        labels = channel_labels(1, 3, 2, 2)
        labels.select(dim, 1).add_(10)
        assert carry(labels, (1, 3, 4, 4)) is None


def test_reductions_over_places_keep_channels_and_others_mix_them():
    labels = channel_labels(2, 3, 4, 4)
    assert torch.equal(carry_reduced(labels, (2, 3)), channel_labels(2, 3))
    assert torch.equal(carry_reduced(labels, (2, 3, 1, 1)), channel_labels(2, 3, 1, 1))
    assert (carry_reduced(labels, (2, 3, 4)) == UNKNOWN).all()
    assert (carry_reduced(labels, (2,)) == UNKNOWN).all()
