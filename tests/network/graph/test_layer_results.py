"""A graph run after its model: its outputs are its own, whatever isn't computed twice."""

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, Interpreter, symbolic_trace
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nni_topo.network.graph.layer_results import LayerResults

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


class Computed(TorchFunctionMode):
    """Notes the layers whose functions are computed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names: list[str] = []
        self._layers = {id(layer.weight): name for name, layer in model.named_modules() if hasattr(layer, "weight")}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (functional.conv2d, functional.linear):
            self.names.append(self._layers[id(args[1])])
        return func(*args, **(kwargs or {}))


def compared(
    model: nn.Module, graph: GraphModule, inputs: torch.Tensor = IMAGES, **knobs: int
) -> tuple[torch.Tensor, list[str]]:
    """Return what a graph puts out behind its model, and the layers that were computed for it."""
    results, computed = LayerResults(model, **knobs), Computed(model)
    with torch.no_grad():
        with results.taken():
            model(IMAGES)
        with computed, results.given():
            output = Interpreter(graph).run(inputs)
    return output, computed.names


@pytest.mark.parametrize("inplace", [False, True])
def test_no_layer_is_computed_twice(inplace):
    model = Shifted(inplace).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == []


def test_a_run_on_twice_the_samples_gets_the_results_twice():
    model = Shifted().eval()
    doubled = torch.cat([IMAGES, IMAGES])
    output, computed = compared(model, symbolic_trace(model), doubled)
    torch.testing.assert_close(output, model(doubled))
    assert computed == []
    others = torch.cat([IMAGES, IMAGES + 0.01])
    output, computed = compared(model, symbolic_trace(model), others)
    torch.testing.assert_close(output, model(others))
    assert computed == ["one", "two", "head"]


def test_a_layer_whose_input_was_written_into_is_computed():
    class Writing(nn.Sequential):
        def forward(self, x):
            x = x * 1.0
            return self[0](x) + x.mul_(2.0).sum()

    model = Writing(nn.Conv2d(3, 4, 3)).eval()
    output, computed = compared(model, symbolic_trace(model))
    torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
    assert computed == ["0"]


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


def test_results_take_no_more_memory_than_the_model_and_what_may_be_spared():
    # 12 weights and 3 biases, and 144 + 72 pixels in and out of the first layer, 72 + 144 of the second, of 4 bytes
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 1)).eval()
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    first, both = 4 * (216 + 72), 4 * (216 + 72 + 72 + 144)
    for memory, expected in ((both, []), (both - 1, ["1"]), (first - 1, ["0", "1"])):
        output, computed = compared(model, symbolic_trace(model), spare_bytes=memory - weights)
        torch.testing.assert_close(output, model(IMAGES), rtol=0, atol=0)
        assert computed == expected
