"""A graph run behind its model: what it puts out is its own, whatever isn't computed twice."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, symbolic_trace

from nni_topo.network.graph.checking import Calls, Comparison
from nni_topo.network.runtime.hooks import watched

IMAGES = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Shifted(nn.Module):
    """Layers with an operation of its own between them."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)
        self.act, self.head = nn.ReLU(inplace), nn.Linear(64, 32)

    def forward(self, x):
        return self.head(self.two(self.act(self.one(x)) + 1.0).flatten(1))


def compared(model: nn.Module, graph: GraphModule) -> tuple[torch.Tensor, list[str]]:
    """Return what a graph puts out behind its model, and the layers that were computed for it."""
    calls, computed = Calls(model), []
    with torch.no_grad():
        with watched(leaving=calls.leaving()):
            model(IMAGES)
        names = {module: name for name, module in graph.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
        with watched(leaving=[(each, lambda _, __, name=names[each]: computed.append(name)) for each in names]):
            output = Comparison(graph, calls).propagate(IMAGES)
    return output, computed


@pytest.mark.parametrize("inplace", [False, True])
def test_no_layer_is_computed_twice_but_for_what_was_written_into(inplace):
    model = Shifted(inplace).eval()
    output, computed = compared(model, graph := symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == (["one"] if inplace else [])
    assert all("tensor_meta" in node.meta for node in graph.graph.nodes)


def test_what_differs_is_computed():
    model = Shifted().eval()
    graph = symbolic_trace(model)
    (added,) = (node for node in graph.graph.nodes if node.op == "call_function" and 1.0 in node.args)
    added.args = (added.args[0], 1.001)
    graph.recompile()
    output, computed = compared(model, graph)
    assert computed == ["two", "head"]
    torch.testing.assert_close(output, Interpreter(graph).run(IMAGES), rtol=0, atol=0)
    assert not torch.allclose(output, model(IMAGES), rtol=1e-4, atol=1e-5)


def test_calls_of_one_layer_are_told_apart():
    class Twice(nn.Sequential):
        def forward(self, x):
            return self[0](x) + self[0](2.0 * x)

    model = Twice(nn.Conv2d(3, 32, 6)).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == []


def test_calls_take_no_more_memory_than_the_model():
    # 8 weights and biases, and 72 pixels in and out of each layer
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == ["0", "1"]
