"""Where nodes stand: the module and its class, and the line of the model's own forward."""

from __future__ import annotations

import torch
from torch import nn

from nni_topo.network.graph.nodes import described, line_of, plain_name
from nni_topo.network.graph.recording import record


def test_a_module_is_described_with_its_class_and_has_no_line_where_no_forward_of_the_models_own_calls_it():
    model = nn.Sequential(nn.Linear(2, 2))
    graph = record(model.eval(), {"input": torch.ones(1, 2)}).graph_module.graph
    (node,) = (each for each in graph.nodes if each.op == "call_module")
    assert described(node) == "0: Linear"
    assert line_of(node) == ""


def test_the_line_of_a_forward_is_that_of_the_models_own():
    class Own(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return x.relu()

    graph = record(nn.Sequential(Own(2, 2)).eval(), {"input": torch.ones(1, 2)}).graph_module.graph
    first = Own.forward.__code__.co_firstlineno
    (node,) = (each for each in graph.nodes if plain_name(each) == "relu")
    assert described(node) == "relu in 0"
    assert line_of(node) == f"{Own.forward.__code__.co_filename}:{first + 2}"
