"""Nodes of a graph: their names, places, output shapes and marks in ``meta``; and graphs as modules."""

from __future__ import annotations

import operator
import sys
from types import FrameType
from typing import Any

import torch.fx
from torch import nn
from torch.fx import Graph, GraphModule, Interpreter
from torch.fx.node import map_aggregate
from torch.fx.passes.shape_prop import TensorMetadata

RECORDED = "_recorded"  # prefix of the names of constants in a recorded graph, before a number
RANDOM = "nni_topo_random"  # in a node's meta: whether it draws random numbers
UNUSED = "nni_topo_unused"  # in a node's meta: whether something is computed from its value and never used
UNSHOWN = "nni_topo_unshown"  # in a node's meta: whether a branch or a constant of the graph depends on its number
AS_NUMBERS = "nni_topo_as_numbers"  # in a node's meta: whether the forward reads its entries as a list or an array
LINE = "nni_topo_line"  # in a node's meta: file and line of the forward that calls it


def forward_line() -> str:
    """Return file and line of the model's own forward that is running: "models/resnet.py:102"; empty if none is."""
    frame: FrameType | None = sys._getframe(1)
    has_left = False  # whether the frames of this package's recorder, the innermost ones, are passed
    while frame is not None:
        package = str(frame.f_globals.get("__name__", ""))
        if package == "nni_topo.network.channels.rules":  # the wrapper of a registered function
            frame = frame.f_back
            continue
        is_own = package.startswith("nni_topo.network.")
        if is_own and has_left:
            return ""  # this frame runs the model, and no forward lies between, as in a Sequential
        has_left = has_left or not is_own
        if not is_own and package.partition(".")[0] != "torch":
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def line_of(node: torch.fx.Node) -> str:
    """Look up file and line of the forward that calls a node; empty if they aren't known."""
    return str(node.meta.get(LINE, ""))


def is_of_forward(node: torch.fx.Node) -> bool:
    """Tell whether a node is a constant that the forward creates at each call."""
    return node.op == "get_attr" and str(node.target).startswith(RECORDED)


def place(node: torch.fx.Node) -> str:
    """Return where a node stands: a module's name, or an operation and the module whose forward calls it."""
    if node.op == "call_module":
        return str(node.target)
    owner = owner_of(node)
    if owner:
        return f"{plain_name(node)} in {owner}"
    return plain_name(node)


def owner_of(node: torch.fx.Node) -> str:
    """Return the name of the module whose forward calls a node; empty for the model itself."""
    # NNI's tracer keeps the types of modules by name, PyTorch's names with types.
    stack = (node.meta.get("nn_module_stack") or {}).items()
    owners = []
    for key, value in stack:
        owner = value[0] if isinstance(value, tuple) else key
        if owner:
            owners.append(owner)
    if owners:
        return str(owners[-1])
    return ""


def described(node: torch.fx.Node) -> str:
    """Return where a node stands as `place` does, with the class of a module, as in "last.2: Fold"."""
    owner, text = node.graph.owning_module, place(node)
    if node.op == "call_module" and owner is not None:
        text += f": {type(owner.get_submodule(str(node.target))).__name__}"
    return text


def makes_mask(node: torch.fx.Node) -> bool:
    """Tell whether a node makes an attention mask, which depends only on the sizes and types of states."""
    return getattr(node.target, "makes_mask", False)


def tensor_shape(node: torch.fx.Node) -> tuple[int, ...] | None:
    """Look up the shape of a node's tensor in ``node.meta["tensor_meta"]``; None if its value isn't one tensor."""
    shape = getattr(node.meta.get("tensor_meta"), "shape", None)
    # A plain tuple: torch.Size compares equal to it, but pytrees would open it as a container.
    if shape is None:
        return None
    return tuple(shape)


def plain_name(node: torch.fx.Node) -> str:
    """Return one name for a function or method, however it is called: "add" for ``torch.add`` and ``add_``."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # Underscores before (``__add__``) and after (``add_``) a name say how it is called, not what it does to channels.
    if node.target is operator.getitem:
        return "getitem"
    return name.strip("_")


def leaves_of(tree: Any) -> list[Any]:
    """List the leaves of nested containers, including the ends and steps of slices."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    elif isinstance(tree, slice):
        tree = [tree.start, tree.stop, tree.step]
    if not isinstance(tree, (tuple, list)):
        return [tree]
    leaves = []
    for branch in tree:
        leaves += leaves_of(branch)
    return leaves


class ShapeNoting(Interpreter):
    """Run a graph, and note tensors' shapes and types in ``node.meta``, like ShapeProp but without loading SymPy."""

    def run_node(self, n: torch.fx.Node) -> Any:
        """Run a node, and note each tensor of its output, in the same containers."""
        has_tensors = False

        def note_shape(value: Any) -> Any:
            nonlocal has_tensors
            if not isinstance(value, torch.Tensor):
                return value
            has_tensors = True
            return TensorMetadata(value.shape, value.dtype, value.requires_grad, (), None, False, {})

        outputs = super().run_node(n)
        shapes = map_aggregate(outputs, note_shape)
        if has_tensors:
            n.meta["tensor_meta"] = shapes
        return outputs


class _Graphed(GraphModule):
    """A GraphModule whose forward is compiled at its first call, because most graphs are only interpreted.

    It may have a layer called ``code``, the name of a property of PyTorch's class.
    """

    def recompile(self) -> None:  # type: ignore[override]
        """Let the next call compile the graph."""
        type(self).forward = _compile_and_run  # each GraphModule has a class of its own

    @property
    def code(self) -> Any:
        """The layer of that name, else the source of the forward."""
        if "code" in self._modules:
            return self._modules["code"]
        super().recompile()
        return super().code

    def __str__(self) -> str:
        super().recompile()  # PyTorch's text ends with the source
        return super().__str__()

    def __reduce__(self) -> Any:
        return GraphModule(self, self.graph).__reduce__()


def _compile_and_run(self: GraphModule, *args: Any, **kwargs: Any) -> Any:
    GraphModule.recompile(self)
    return type(self).forward(self, *args, **kwargs)


def on_modules(root: nn.Module | dict[str, Any], graph: Graph, name: str) -> GraphModule:
    """Make a `torch.fx.GraphModule` of a graph and the modules that it calls."""
    graph_module = _Graphed(root, graph, name)
    if isinstance(root, nn.Module):
        # The root's non-persistent buffers stay non-persistent; before 2.14 PyTorch puts them into the state_dict.
        original_modules = dict(root.named_modules())
        for path, module in graph_module.named_modules():
            if path in original_modules and module is not original_modules[path]:
                module._non_persistent_buffers_set |= (
                    original_modules[path]._non_persistent_buffers_set & module._buffers.keys()
                )
    return graph_module
