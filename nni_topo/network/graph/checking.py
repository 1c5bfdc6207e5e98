"""A graph run behind its model: a layer that gets in both what is the same isn't computed twice.

Then it gives what it gave in the model. All else of the graph is computed, so that what differs shows where it enters
the next layer, which is computed too, or in what the graph puts out.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.shape_prop import ShapeProp

from nni_topo.network.graph.nodes import RANDOM
from nni_topo.network.layers import CONVOLUTIONS
from nni_topo.network.runtime import Leaving, difference, drawn_since, random_states

_SAME = 1e-5  # of the largest value; sums in another order, as attention may compute them, are far below


class Calls:
    """What a model's layers got and gave when it ran, as far as that takes no more memory than its parameters."""

    def __init__(self, model: nn.Module) -> None:
        # What takes time, and depends on one tensor alone.
        self._layers = [module for module in model.modules() if type(module) in (nn.Linear, *CONVOLUTIONS)]
        self._left = sum(parameter.nbytes for parameter in model.parameters())
        self._seen: dict[nn.Module, list[tuple[tuple[Tensor, int], ...]]] = defaultdict(list)

    def leaving(self) -> list[tuple[nn.Module, Leaving]]:
        """List what has to watch the model while it runs."""
        return [(layer, partial(self._note, layer)) for layer in self._layers]

    def given(self, layer: nn.Module, entering: Any) -> Tensor | None:
        """Return what a layer gave at the first call not asked for yet, if it got the same as now."""
        seen = self._seen.get(layer)
        if not seen or not isinstance(entering, Tensor):
            return None
        (before, first), (given, second) = seen.pop(0)
        # Other operations may have written into either since.
        if (before._version, given._version) != (first, second) or before.shape != entering.shape:
            return None
        return given.clone() if difference(before, entering) <= _SAME else None

    def _note(self, layer: nn.Module, entering: Any, output: Any) -> None:
        tensors = [each for each in (entering, output) if isinstance(each, Tensor) and not each.is_inference()]
        self._left -= sum(each.nbytes for each in tensors)
        # A call that isn't noted would leave the next one in its place.
        if len(tensors) < 2 or self._left < 0:
            self._left = -1
        else:
            self._seen[layer].append(tuple((each, each._version) for each in tensors))


class Comparison(ShapeProp):
    """Note the shapes of what a graph's nodes give, and which draw random numbers, given the calls of its layers."""

    def __init__(self, graph_module: GraphModule, calls: Calls) -> None:
        super().__init__(graph_module)
        self._calls = calls

    def run_node(self, n: Node) -> Any:
        """Run a node, and note whether it draws random numbers."""
        states = random_states()
        found = super().run_node(n)
        if n.op in ("call_function", "call_method", "call_module") and drawn_since(states):
            n.meta[RANDOM] = True
        return found

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a module, or return what it gave before."""
        same = self._calls.given(self.fetch_attr(target), args[0]) if len(args) == 1 and not kwargs else None
        return super().call_module(target, args, kwargs) if same is None else same
