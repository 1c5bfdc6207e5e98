"""Graphs on the modules of models whose children may have the names of what a graph module has itself."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn
from torch.fx import Graph, GraphModule

# What PyTorch and this package ask a graph module for while they use it.
_NEEDED = {"add_submodule", "delete_submodule", "delete_all_unused_submodules", "graph", "meta", "recompile"}
_OWN = {name for name in set(dir(GraphModule)) - set(dir(nn.Module)) - _NEEDED if not name.startswith("_")}
_OWN.add("shape_env")  # which instances have


class _Shadowed(GraphModule):
    """A graph module that gives its children where these have the names of what it has itself, ``code`` for one."""

    shadowed: ClassVar[frozenset[str]] = frozenset()

    def __getattribute__(self, name: str) -> Any:
        if name in type(self).shadowed:
            children = object.__getattribute__(self, "__dict__").get("_modules", {})
            if name not in children:
                raise AttributeError(name)  # it isn't there yet
            return children[name]
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The constructor's own, which would take the child's place.
        if name not in type(self).shadowed or isinstance(value, nn.Module):
            super().__setattr__(name, value)


def on_modules(root: nn.Module | dict[str, Any], graph: Graph, name: str) -> GraphModule:
    """Put a graph on modules, as `torch.fx.GraphModule` does."""
    firsts = {str(node.target).partition(".")[0] for node in graph.nodes if node.op in ("call_module", "get_attr")}
    shadowed = frozenset(firsts & _OWN)
    kind: Any = type("_Shadowed", (_Shadowed,), {"shadowed": shadowed}) if shadowed else GraphModule
    made: GraphModule = kind(root, graph, name)
    return made
