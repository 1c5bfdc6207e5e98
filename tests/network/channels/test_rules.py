from __future__ import annotations

import torch
from torch.fx.passes.shape_prop import ShapeProp

from nni_topo.network.channels.ids import FIXED, carry, carry_reduced, staying
from nni_topo.network.channels.rules import picked_along_others


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


def test_reductions_over_places_keep_channels_and_those_over_channels_make_numbers_anew():
    labels = channel_labels(2, 3, 4, 4)
    assert torch.equal(carry_reduced(labels, (2, 3), (2, 3)), channel_labels(2, 3))
    assert torch.equal(carry_reduced(labels, (2, 3, 1, 1), (3, 2)), channel_labels(2, 3, 1, 1))
    assert torch.equal(carry_reduced(labels, (2, 3, 4), (3,)), channel_labels(2, 3, 4))
    for shape, dims in {(2, 4, 4): (1,), (2,): (1, 2, 3), (): (0, 1, 2, 3)}.items():
        assert (carry_reduced(labels, shape, dims) == FIXED).all()


def test_reductions_over_some_of_the_places_of_channels_cannot_be_followed():
    heads = torch.arange(6).view(1, 2, 3, 1).expand(2, 2, 3, 5)
    assert carry_reduced(heads, (2, 2, 5), (2,)) is None


def test_channels_of_the_last_dimension_go_with_what_is_picked_along_others():
    picks = {
        "mask of rows": lambda x, at, mask: x[mask],
        "mask and all channels": lambda x, at, mask: x[mask, :],
        "rows": lambda x, at, mask: x[at],
        "places": lambda x, at, mask: x[:, at],
        "behind the others": lambda x, at, mask: x[..., at, :],
        "channels": lambda x, at, mask: x[..., at],
        "channels at places": lambda x, at, mask: x[:, 0, at],
        "both": lambda x, at, mask: x[:, at, at],
    }
    x, at = torch.zeros(5, 5, 5), torch.tensor([4, 0, 1, 2, 3])
    mask, labels = torch.eye(5, dtype=torch.bool), torch.arange(3, 8).expand(5, 5, 5)
    carried = {}
    for name, pick in picks.items():
        traced = torch.fx.symbolic_trace(pick)
        ShapeProp(traced).propagate(x, at, mask)
        node = next(node for node in traced.graph.nodes if node.op == "call_function")
        shape = tuple(node.meta["tensor_meta"].shape)
        found = picked_along_others(node, [labels, staying((5,))], shape)
        carried[name] = found is not None
        assert found is None or torch.equal(found, torch.arange(3, 8).expand(shape))
        assert picked_along_others(node, [labels.mT, staying((5,))], shape) is None
        assert picked_along_others(node, [labels, torch.arange(5)], shape) is None
    assert [name for name, is_carried in carried.items() if not is_carried] == [
        "channels",
        "channels at places",
        "both",
    ]
