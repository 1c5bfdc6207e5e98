"""The unpruned and the pruned network, run side by side over calibration batches up to any place of their graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.nn import functional

from nni_topo.network.graph.tracing import arguments, is_in_parts
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.network.runtime.inputs import Call, bind_arguments, calls, fitting, real_positions_of, tensors_of

Values = dict[Node, Any]


@dataclass
class _Reached:
    """A batch's values that are kept between passes: rank of the next node, values of both networks, their bytes."""

    rank: int
    unpruned: Values
    pruned: Values
    nbytes: int = 0


class Replay:
    """Runs two networks of one graph over the same batches; `pruned` may change between passes."""

    # Values that won't change any more are kept for the next pass, batch by batch, as far as they fit into
    # `cache_bytes`. A batch whose values don't fit starts at its last kept values, or at its inputs. So memory stays
    # bounded, whatever the number of images.

    def __init__(
        self,
        model: nn.Module,
        unpruned: GraphModule,
        pruned: GraphModule,
        calibration: Iterable[Any],
        cache_bytes: int,
    ) -> None:
        self.model = model
        self.nodes: list[Node] = list(unpruned.graph.nodes)
        self._placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.order = {node: rank for rank, node in enumerate(self.nodes)}
        self._runners = Interpreter(unpruned), Interpreter(pruned)
        self._twins = dict(zip(self.nodes, pruned.graph.nodes, strict=True))
        self._last_use = {node: max((self.order[user] for user in node.users), default=-1) for node in self.nodes}
        self._calibration = calibration
        # By argument, the name of the argument that the unpruned network gets instead.
        self._instead = calibration.instead if isinstance(calibration, Calibration) else {}
        # The placeholders at which the networks get different inputs.
        entering = [node for node in self._placeholders if str(node.target) in self._instead]
        if self._instead and is_in_parts(unpruned.graph):  # inputs of a part may depend on any input of the model
            entering = self._placeholders
        self.touched_nodes = touched_nodes(unpruned, pruned, entering)
        self.cache_bytes = cache_bytes
        # In-place methods such as `copy_`, which can't be replaced, would change kept values in every pass.
        self._keeps = not any(node.op == "call_method" and str(node.target).endswith("_") for node in self.nodes)
        self._reached: dict[int, _Reached] = {}  # by batch
        self._batches = math.inf  # unknown until one pass is complete
        self._real: dict[int, Tensor | None] = {}  # by batch, which positions aren't padding
        self._at = 0  # index of the batch that `run` yielded last

    def run(self, settled: int, watched: list[Node]) -> Iterator[tuple[Values, Values]]:
        """Yield the watched nodes' values in both networks, batch by batch; DataError if one doesn't fit the model.

        ``settled``: rank of the first node that may change before a later pass; it never falls between passes.
        """
        stop = max(self.order[node] for node in watched) + 1
        for index, at in enumerate(self._starts()):
            unpruned, pruned = at.unpruned, at.pruned
            self._advance(unpruned, pruned, range(at.rank, settled), watched, index)
            front = max(at.rank, settled)
            saved = dict(unpruned), dict(pruned)
            self._advance(unpruned, pruned, range(front, stop), watched, index)
            self._at = index
            yield {node: unpruned[node] for node in watched}, {node: pruned[node] for node in watched}
            # Keep the values of this batch instead of its earlier ones, if there is room.
            tensors = tensors_of([list(values.values()) for values in saved])
            nbytes = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
            other_bytes = sum(reached.nbytes for number, reached in self._reached.items() if number != index)
            if self._keeps and other_bytes + nbytes <= self.cache_bytes:
                self._reached[index] = _Reached(front, *saved, nbytes=nbytes)

    def unpadded(self) -> Tensor | None:
        """Return which positions of the current batch of `run` aren't padding, ``(entries, places)``; None: no mask."""
        return self._real[self._at]

    def _starts(self) -> Iterator[_Reached]:
        """Yield each batch's values at the place where its pass starts."""
        reached, batches = self._reached, 0
        is_known = len(reached) == self._batches
        batch_calls: Iterable[Any] = range(len(reached)) if is_known else calls(self.model, self._calibration)
        for index, call in enumerate(batch_calls):
            batches = index + 1
            if index in reached:
                # Copies of the dictionaries: a pass removes values that it no longer needs.
                yield replace(
                    reached[index], unpruned=dict(reached[index].unpruned), pruned=dict(reached[index].pruned)
                )
            else:
                self._real[index] = real_positions_of(self.model, call)
                values = self._graph_inputs(call)
                # The model's code may change its inputs in place, so it runs once if both networks get the same.
                unpruned = dict(values)
                if self._instead:  # the unpruned network gets other inputs
                    args, kwargs = call
                    replaced_inputs = {name: kwargs[source] for name, source in self._instead.items()}
                    unpruned = self._graph_inputs((args, kwargs | replaced_inputs))
                yield _Reached(0, unpruned, values)
        self._batches = batches

    def _graph_inputs(self, call: Call) -> Values:
        """Return the graphs' inputs; for a network in parts, the values that the model's code passes to the parts."""
        if is_in_parts(self._runners[0].graph):
            return dict(zip(self._placeholders, arguments(self._runners[0].graph, self.model, call), strict=True))
        named = bind_arguments(self.model, call)
        return {node: named[str(node.target)] for node in self._placeholders if str(node.target) in named}

    def _advance(self, unpruned: Values, pruned: Values, ranks: range, watched: Collection[Node], index: int) -> None:
        """Run the nodes of these ranks in both networks."""
        with fitting(index), torch.no_grad():
            for rank in ranks:
                node = self.nodes[rank]
                if node.op == "placeholder":
                    for values in (unpruned, pruned):
                        values.setdefault(node, node.args[0] if node.args else None)
                else:
                    unpruned[node] = _compute(self._runners[0], node, unpruned)
                    # A node that pruning doesn't affect has the same value in both networks, which share the tensor.
                    pruned[node] = unpruned[node]
                    if node in self.touched_nodes:
                        parent_values = {self._twins[parent]: pruned[parent] for parent in node.all_input_nodes}
                        pruned[node] = _compute(self._runners[1], self._twins[node], parent_values)
                # Free the values that no later node reads.
                for operand in [*node.all_input_nodes, node]:
                    if self._last_use[operand] <= rank and operand not in watched:
                        unpruned.pop(operand, None)
                        pruned.pop(operand, None)


def without_side_effects(graph_module: GraphModule, *, light: bool = False) -> GraphModule:
    """Return a copy of a graph module whose modules and operations work out of place where PyTorch can.

    A ``light`` copy shares the parameters.
    """
    copied: GraphModule = detached_copy(graph_module, light=True) if light else copy.deepcopy(graph_module)
    for module in copied.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False  # type: ignore[assignment]
    for node in copied.graph.nodes:
        if node.kwargs.get("inplace"):
            node.kwargs = {**node.kwargs, "inplace": False}
        # Methods are recorded out of place. PyTorch's functions have an out-of-place form: `relu` for `relu_`.
        name = getattr(node.target, "__name__", "")
        for home in (torch, functional):
            if node.op == "call_function" and name.endswith("_") and getattr(home, name, None) is node.target:
                node.target = getattr(home, name.rstrip("_"), node.target)
                break
    copied.recompile()
    return copied


def touched_nodes(unpruned: GraphModule, pruned: GraphModule, entering: Collection[Node] = ()) -> set[Node]:
    """Return the nodes of the unpruned graph whose values differ in the pruned one, because of parameters or inputs.

    ``entering``: the placeholders with different inputs.
    """
    # Tensors only, because a module's get_extra_state may return anything.
    unpruned_tensors, pruned_tensors = (
        {name: value for name, value in net.state_dict().items() if isinstance(value, Tensor)}
        for net in (unpruned, pruned)
    )
    # A narrowed norm has its tensors under other names and so counts as changed.
    changed = {
        name
        for name, value in unpruned_tensors.items()
        if name not in pruned_tensors or not torch.equal(value, pruned_tensors[name])
    }
    touched: set[Node] = set(entering)
    for node in unpruned.graph.nodes:
        target = str(node.target)
        is_changed = node.op in ("call_module", "get_attr") and any(
            name == target or name.startswith(f"{target}.") for name in changed
        )
        if is_changed or any(parent in touched for parent in node.all_input_nodes):
            touched.add(node)
    return touched


def _compute(runner: Interpreter, node: Node, values: Values) -> Any:
    if node.op == "call_method" and node.target == "requires_grad_":  # no gradients are taken here
        return values[node.all_input_nodes[0]]
    runner.env = values
    return runner.run_node(node)
