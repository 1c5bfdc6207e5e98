"""Blocks of a network's graph: where they begin and end, what enters them, and what they compute."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from nni_topo.recovery.windows import Segment, Stretch, entering, segments


def test_blocks_begin_where_everything_flows_through_one_value(residual_net, images):
    graph = symbolic_trace(residual_net).graph
    nodes = list(graph.nodes)
    names = ("conv1", "conv2", "conv3", "conv4", "shortcut", "head")
    layers = [node for node in nodes if node.name in names]
    touched = set(nodes[nodes.index(layers[0]) :])

    cut = segments(nodes, touched, layers, 1)
    blocks = [([layer.name for layer in each.layers], each.place.name) for each in cut]
    assert blocks == [(["conv1", "conv2"], "relu_"), (["conv3", "conv4", "shortcut"], "mean"), (["head"], "output")]
    # conv3's output isn't all that is read: the shortcut reads what entered it.
    assert nodes[cut[1].first - 1].name == "relu_"


@pytest.mark.parametrize(
    ("together", "expected"),
    [
        (1, [(1, 2, "_1", "0 1"), (3, 4, "_3", "2 3"), (5, 7, "output", "4 5")]),
        (2, [(1, 4, "_3", "0 1 2 3"), (3, 7, "output", "2 3 4 5"), (5, 7, "output", "4 5")]),
        (9, [(1, 7, "output", "0 1 2 3 4 5"), (3, 7, "output", "2 3 4 5"), (5, 7, "output", "4 5")]),
    ],
)
def test_segments_of_a_chain(together, expected):
    nodes = list(symbolic_trace(nn.Sequential(*(nn.Linear(2, 2) for _ in range(6)))).graph.nodes)
    found = segments(nodes, set(nodes[1:]), nodes[6:0:-1], together)
    assert [
        (each.first, each.last, each.place.name, " ".join(str(layer.target) for layer in each.layers)) for each in found
    ] == expected


class Crossing(nn.Module):
    """A layer, a sum over a layer with a factor of the network's own, and a layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.factor = nn.Parameter(torch.full((3,), 2.0))

    def forward(self, values):
        first = self.first(values)
        return self.third(torch.tanh(first) + self.factor * self.second(first))


def test_a_stretch_is_what_the_network_computes_from_what_enters_it():
    torch.manual_seed(0)
    graph = symbolic_trace(Crossing())
    nodes = list(graph.graph.nodes)
    names = [node.name for node in nodes]
    assert names == ["values", "first", "tanh", "factor", "second", "mul", "add", "third", "output"]
    values = {"values": torch.randn(4, 3)}
    with torch.no_grad():
        values["first"] = graph.first(values["values"])
        values["tanh"] = torch.tanh(values["first"])
        values["add"] = values["tanh"] + 2.0 * graph.second(values["first"])
        values["output"] = values["third"] = graph.third(values["add"])
    for first, place, enter in (
        ("first", "add", ["values"]),
        ("tanh", "add", ["first"]),
        ("second", "add", ["first", "tanh"]),
        ("second", "output", ["first", "tanh"]),
        ("mul", "third", None),
        ("third", "third", ["add"]),
    ):
        at = names.index(first)
        segment = Segment(at, names.index(place), nodes[names.index(place)], ())
        found = entering(segment, nodes)
        if enter is None:
            assert [node.name for node in found] == ["tanh", "second"]
            continue
        assert [node.name for node in found] == enter
        inputs = [values[name] for name in enter]
        with torch.no_grad():
            torch.testing.assert_close(Stretch(graph, segment)(*inputs), values[place])
            half, double = copy.deepcopy(graph).bfloat16(), copy.deepcopy(graph).double()
            assert Stretch(half, segment)(*inputs).dtype == torch.float32
            assert Stretch(double, segment)(*(each.double() for each in inputs)).dtype == torch.float64
