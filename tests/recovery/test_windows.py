"""Blocks of a network's graph: where they begin and end, what enters them, and what they compute."""

from __future__ import annotations

import pytest
from torch import nn
from torch.fx import symbolic_trace

from nni_topo.recovery.windows import segments


def test_blocks_begin_where_everything_flows_through_one_value_and_places_lie_ahead(residual_net, images):
    graph = symbolic_trace(residual_net).graph
    nodes = list(graph.nodes)
    names = ("conv1", "conv2", "conv3", "conv4", "shortcut", "head")
    layers = [node for node in nodes if node.name in names]
    touched = set(nodes[nodes.index(layers[0]) :])

    cut = segments(nodes, touched, layers, 1, 2)
    blocks = [([layer.name for layer in each.layers], each.place.name) for each in cut]
    first, second = ["conv1", "conv2"], ["conv3", "conv4", "shortcut"]
    assert blocks == [([*first, *second], "output"), ([*second, "head"], "output"), (["head"], "output")]
    alone = [
        ([layer.name for layer in each.layers], each.place.name) for each in segments(nodes, touched, layers, 0, 1)
    ]
    assert alone == [(first, "relu_"), (second, "mean"), (["head"], "output")]
    # conv3's output isn't all that is read: the shortcut reads what entered it.
    assert nodes[cut[1].first - 1].name == "relu_"


@pytest.mark.parametrize(
    ("layers", "together", "expected"),
    [
        (0, 1, [(1, 2, "_1", "0 1"), (3, 4, "_3", "2 3"), (5, 7, "output", "4 5")]),
        (1, 1, [(1, 2, "_3", "0 1"), (3, 4, "output", "2 3"), (5, 7, "output", "4 5")]),
        (2, 1, [(1, 2, "_3", "0 1"), (3, 4, "output", "2 3"), (5, 7, "output", "4 5")]),
        (3, 1, [(1, 2, "output", "0 1"), (3, 4, "output", "2 3"), (5, 7, "output", "4 5")]),
        (0, 2, [(1, 4, "_3", "0 1 2 3"), (3, 7, "output", "2 3 4 5"), (5, 7, "output", "4 5")]),
        (0, 9, [(1, 7, "output", "0 1 2 3 4 5"), (3, 7, "output", "2 3 4 5"), (5, 7, "output", "4 5")]),
    ],
)
def test_segments_of_a_chain(layers, together, expected):
    nodes = list(symbolic_trace(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))).graph.nodes)
    found = segments(nodes, set(nodes[1:]), nodes[6:0:-1], layers, together)
    assert [
        (each.first, each.last, each.place.name, " ".join(str(layer.target) for layer in each.layers)) for each in found
    ] == expected
