"""What nodes are called, where they stand, and graph modules whose children have names of their own attributes."""

from __future__ import annotations

import operator
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.fx import Graph, Node

from nni_topo.network.graph.nodes import (
    PLAIN,
    described,
    is_held,
    is_of_forward,
    line_of,
    makes_mask,
    on_modules,
    owner_of,
    place,
    plain_name,
    tensor_shape,
)
from nni_topo.network.graph.recording import record


def node_of(kind: str, target: object, stack: dict[str, object] | None = None) -> Node:
    graph = Graph()
    node: Node = graph.create_node(kind, target, (graph.placeholder("x"),))
    if stack is not None:
        node.meta["nn_module_stack"] = stack
    return node


@pytest.mark.parametrize(
    ("kind", "target", "name"),
    [
        ("call_function", torch.add, "add"),
        ("call_function", operator.add, "add"),
        ("call_function", operator.and_, "and"),
        ("call_function", operator.getitem, "getitem"),
        ("call_function", torch.Tensor.__rsub__, "rsub"),
        ("call_method", "add_", "add"),
        ("call_method", "__add__", "add"),
        ("call_module", "layers.0", "layers.0"),
    ],
)
def test_functions_and_methods_are_named_alike(kind, target, name):
    assert plain_name(node_of(kind, target)) == name


@pytest.mark.parametrize(
    ("stack", "owner"),
    [
        (None, ""),
        ({}, ""),
        ({"": ("", nn.Module)}, ""),
        ({"": ("", nn.Module), "a": ("a", nn.Module), "b": ("a.b", nn.Module)}, "a.b"),
        ({"a": ("a", nn.Module), "": ("", nn.Module)}, "a"),
        ({"a": nn.Module, "a.c": nn.Module}, "a.c"),
    ],
)
def test_a_node_stands_in_the_innermost_module(stack, owner):
    node = node_of("call_method", "relu_", stack)
    assert owner_of(node) == owner
    assert place(node) == described(node) == (f"relu in {owner}" if owner else "relu")
    assert place(node_of("call_module", "a.0", stack)) == "a.0"


def test_a_module_is_described_with_its_class_where_the_graph_has_it():
    assert described(node_of("call_module", "0")) == "0"
    model = nn.Sequential(nn.Linear(2, 2))
    graph = record(model.eval(), {"input": torch.ones(1, 2)}).graph_module.graph
    (node,) = (each for each in graph.nodes if each.op == "call_module")
    assert described(node) == "0: Linear"
    assert line_of(node) == ""  # between the layers of a Sequential lies no forward of the model's own


def test_the_line_of_a_forward_is_that_of_the_models_own():
    class Own(nn.Linear):
        def forward(self, x):
            x = super().forward(x)
            return x.relu()

    graph = record(nn.Sequential(Own(2, 2)).eval(), {"input": torch.ones(1, 2)}).graph_module.graph
    first = Own.forward.__code__.co_firstlineno
    (node,) = (each for each in graph.nodes if plain_name(each) == "relu")
    assert line_of(node) == f"{Own.forward.__code__.co_filename}:{first + 2}"


@pytest.mark.parametrize(
    ("kind", "target", "marks", "of_forward", "held"),
    [
        ("get_attr", "weight", (), False, True),
        ("get_attr", "table", (PLAIN,), False, False),
        ("get_attr", "_tensor_constant0", (), True, False),
        ("get_attr", "_recorded_3", (), True, False),
        ("call_module", "_recorded_3", (), False, False),
        ("call_method", "weight", (), False, False),
    ],
)
def test_constants_of_a_forward_are_no_parameters(kind, target, marks, of_forward, held):
    node = node_of(kind, target) if kind != "get_attr" else Graph().get_attr(target)
    node.meta |= dict.fromkeys(marks, True)
    assert (is_of_forward(node), is_held(node)) == (of_forward, held)


def test_a_shape_is_a_plain_tuple_and_unknown_of_several_tensors():
    node = node_of("call_method", "relu")
    assert tensor_shape(node) is None
    node.meta["tensor_meta"] = (SimpleNamespace(shape=torch.Size([2])),) * 2
    assert tensor_shape(node) is None
    node.meta["tensor_meta"] = SimpleNamespace(shape=torch.Size([2, 3]))
    assert (tensor_shape(node), type(tensor_shape(node))) == ((2, 3), tuple)
    assert not makes_mask(node)


def test_a_function_that_makes_masks_says_so():
    def create_mask(states):
        return states

    assert not makes_mask(node_of("call_function", create_mask))
    create_mask.makes_mask = True
    assert makes_mask(node_of("call_function", create_mask))


@pytest.mark.parametrize("name", ["code", "layer", "print_readable"])
def test_a_child_with_the_name_of_an_attribute_is_the_child(name):
    model = nn.Module()
    model.add_module(name, nn.Linear(2, 3))
    graph = Graph()
    graph.output(graph.call_module(name, (graph.placeholder("x"),)))
    made = on_modules(model, graph, "Net")
    assert getattr(made, name) is getattr(model, name)
    assert made(torch.ones(1, 2)).shape == (1, 3)
    assert isinstance(made.graph, Graph)
    with pytest.raises(AttributeError):
        _ = made.missing
