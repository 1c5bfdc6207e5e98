"""Attention that gives what its heads put out the width of its input, rewritten for heads of any width together.

Many classes, most of those of Transformers 4, take the width from what enters::

    batch, places, width = hidden_states.size()
    ...
    context.transpose(1, 2).reshape(batch, places, width)

and attention over images does so with the channels first::

    batch, channels, height, width = images.shape
    ...
    (values @ shares).view(batch, channels, height, width)

With fewer heads, or a narrower input, that size is wrong. The size that a reshape is given for one dimension follows
from the others, so in the rewritten forward -1 stands in its place, and the same is computed.
"""

from __future__ import annotations

import ast
from functools import partial
from typing import Any

from torch import nn

from nni_topo.network.layers import look_up, rewritten

LAST, FIRST = -1, 1  # the dimension that holds the channels, in texts and in images
_ALONG = " along "  # between the name of a rewritten class and the dimension, if it isn't the last
_CLASSES: dict[tuple[type[nn.Module], int], type[nn.Module] | None] = {}


def own_width_class(kind: type[nn.Module], dim: int = LAST) -> type[nn.Module] | None:
    """Return a class derived from ``kind`` whose forward takes no width from its input; None if ``kind`` takes none.

    ``dim``: the dimension of the input that holds its channels.
    """
    key = kind, dim
    if key not in _CLASSES:
        change, variant = partial(_take_no_width, dim=dim), "" if dim == LAST else f"{_ALONG}{dim}"
        name = f"Pruned{kind.__name__}"
        found: Any = rewritten(kind, change, name, __name__, variant=variant)
        if found is not None:
            found.nni_topo_own_width = dim
        _CLASSES[key] = found
    return _CLASSES[key]


def take_own_width(module: nn.Module, dim: int = LAST) -> bool:
    """Switch a module to the class whose forward takes no width from its input; tell whether there is one."""
    found = own_width_class(type(module), dim)
    if found is None:
        return False
    module.__class__ = found
    vars(module).pop("forward", None)  # NNI stores the class's forward there when it removes a wrapper
    return True


def own_width_of(module: nn.Module) -> int | None:
    """Return the dimension whose size the forward of a rewritten module doesn't take; None for any other module."""
    dim: int | None = getattr(type(module), "nni_topo_own_width", None)
    return dim


def __getattr__(name: str) -> type[nn.Module]:
    """Look up a rewritten class by its qualified name, as pickle does."""
    plain, _, dim = name.partition(_ALONG)
    return look_up(plain, __name__, partial(own_width_class, dim=int(dim) if dim else LAST))


def _take_no_width(definition: ast.FunctionDef, dim: int) -> bool:
    """Change a forward's definition in place; tell whether it took a width from its input."""
    rewriter = _Rewriter(_widths_in(definition, dim), dim)
    rewriter.visit(definition)
    return rewriter.found


def _widths_in(definition: ast.FunctionDef, dim: int) -> set[str]:
    """Name the variables that hold nothing but the size of a tensor's dimension, by the source of a forward."""
    widths, others = set[str](), set[str]()
    for node in ast.walk(definition):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                names = target.elts if isinstance(target, ast.Tuple) else [target]
                place = dim % len(names) if -len(names) <= dim < len(names) else None
                for at, each in enumerate(names):
                    if isinstance(each, ast.Name):
                        is_width = isinstance(target, ast.Tuple) and at == place and _is_shape(node.value)
                        (widths if is_width or _is_size(node.value, dim) else others).add(each.id)
        elif isinstance(node, (ast.AugAssign, ast.For)) and isinstance(node.target, ast.Name):
            others.add(node.target.id)
    return widths - others


def _is_shape(value: ast.expr) -> bool:
    """Tell whether an expression is ``x.shape`` or ``x.size()``."""
    if isinstance(value, ast.Call):
        return isinstance(value.func, ast.Attribute) and value.func.attr == "size" and not value.args
    return isinstance(value, ast.Attribute) and value.attr == "shape"


def _is_size(value: ast.expr, dim: int) -> bool:
    """Tell whether an expression is ``x.shape[dim]`` or ``x.size(dim)``."""
    if isinstance(value, ast.Subscript):
        return _is_shape(value.value) and ast.unparse(value.slice) == str(dim)
    is_call = isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr == "size"
    return is_call and [ast.unparse(each) for each in value.args] == [str(dim)]  # type: ignore[attr-defined]


class _Rewriter(ast.NodeTransformer):
    """Put -1 in place of the one size of a reshape that is computed from a width."""

    def __init__(self, widths: set[str], dim: int) -> None:
        self.widths, self.dim = widths, dim
        self.found = False

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Rewrite a call of ``reshape`` or ``view``."""
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("reshape", "view"):
            return node
        before = node.args[:1] if ast.unparse(node.func.value) == "torch" else []
        given = node.args[len(before) :]
        if len(given) == 1 and isinstance(given[0], (ast.Tuple, ast.List)):
            given = given[0].elts
        sizes = self._opened(given)
        of_width = []
        for at, each in enumerate(sizes):
            if ast.unparse(each) == "-1" or isinstance(each, (ast.Tuple, ast.List)):
                return node
            if any(self._is_width(part) for part in ast.walk(each)):
                of_width.append(at)
        if len(of_width) == 1 and len(sizes) > 1:
            sizes[of_width[0]] = ast.UnaryOp(ast.USub(), ast.Constant(1))
            node.args = [*before, ast.Tuple(sizes, ast.Load())]
            self.found = True
        return node

    def _is_width(self, part: ast.AST) -> bool:
        is_named = isinstance(part, ast.Name) and part.id in self.widths
        return is_named or (isinstance(part, ast.expr) and _is_size(part, self.dim))

    def _opened(self, sizes: list[ast.expr]) -> list[ast.expr]:
        """Write the whole shape of a tensor, where that is all that a reshape is given, with the width apart."""
        only = sizes[0] if len(sizes) == 1 else None
        whole = only.value if isinstance(only, ast.Starred) else only
        if whole is None or not _is_shape(whole):
            return list(sizes)
        shape = ast.unparse(whole)
        parts = f"*{shape}[:-1], {shape}[-1]" if self.dim == LAST else f"{shape}[0], {shape}[1], *{shape}[2:]"
        return ast.parse(f"({parts})", mode="eval").body.elts  # type: ignore[attr-defined, no-any-return]
