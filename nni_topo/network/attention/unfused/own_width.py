"""Attention that gives what its heads put out the width of its input, rewritten for heads of any width together.

Many classes, most of those of Transformers 4, take the width from what enters::

    batch, places, width = hidden_states.size()
    ...
    context.transpose(1, 2).reshape(batch, places, width)

With fewer heads, or a narrower input, that size is wrong. The size that a reshape is given for one dimension follows
from the others, so in the rewritten forward -1 stands in its place, and the same is computed.
"""

from __future__ import annotations

import ast

from torch import nn

from nni_topo.network.layers import look_up, rewritten

_CLASSES: dict[type[nn.Module], type[nn.Module] | None] = {}


def own_width_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a class derived from ``kind`` whose forward takes no width from its input; None if ``kind`` takes none."""
    if kind not in _CLASSES:
        _CLASSES[kind] = rewritten(kind, _take_no_width, f"Pruned{kind.__name__}", __name__)
    return _CLASSES[kind]


def __getattr__(name: str) -> type[nn.Module]:
    """Look up a rewritten class by its qualified name, as pickle does."""
    return look_up(name, __name__, own_width_class)


def _take_no_width(definition: ast.FunctionDef) -> bool:
    """Change a forward's definition in place; tell whether it took a width from its input."""
    rewriter = _Rewriter(_widths_in(definition))
    rewriter.visit(definition)
    return rewriter.found


def _widths_in(definition: ast.FunctionDef) -> set[str]:
    """Name the variables that hold nothing but the size of a tensor's last dimension, by the source of a forward."""
    widths, others = set[str](), set[str]()
    for node in ast.walk(definition):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                for at, each in enumerate(names):
                    if isinstance(each, ast.Name):
                        is_last = isinstance(target, ast.Tuple) and at == len(names) - 1 and _is_shape(node.value)
                        (widths if is_last or _is_last_size(node.value) else others).add(each.id)
        elif isinstance(node, (ast.AugAssign, ast.For)) and isinstance(node.target, ast.Name):
            others.add(node.target.id)
    return widths - others


def _is_shape(value: ast.expr) -> bool:
    """Tell whether an expression is ``x.shape`` or ``x.size()``."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Attribute) and value.func.attr == "size" and not value.args
    return isinstance(value, ast.Attribute) and value.attr == "shape"


def _is_last_size(value: ast.expr) -> bool:
    """Tell whether an expression is ``x.shape[-1]`` or ``x.size(-1)``."""
    if isinstance(value, ast.Subscript):
        return _is_shape(value.value) and ast.unparse(value.slice) == "-1"
    is_call = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "size"
    return is_call and [ast.unparse(each) for each in value.args] == ["-1"]  # type: ignore[attr-defined]


class _Rewriter(ast.NodeTransformer):
    """Put -1 in place of the one size of a reshape that is computed from a width."""

    def __init__(self, widths: set[str]) -> None:
        self.widths = widths
        self.found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Rewrite a call of ``reshape`` or ``view``."""
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("reshape", "view"):
            return node
        is_tuple = len(node.args) == 1 and isinstance(node.args[0], ast.Tuple)
        sizes: list[ast.expr] = node.args[0].elts if is_tuple else node.args  # type: ignore[attr-defined]
        of_width = []
        for at, each in enumerate(sizes):
            if ast.unparse(each) == "-1":
                return node
            if any(isinstance(part, ast.Name) and part.id in self.widths for part in ast.walk(each)):
                of_width.append(at)
        if len(of_width) == 1 and len(sizes) > 1:
            sizes[of_width[0]] = ast.UnaryOp(ast.USub(), ast.Constant(1))
            self.found = True
        return node
