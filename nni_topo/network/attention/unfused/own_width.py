"""Rewrite attention that reshapes its heads' output to its input's width, for heads of any width together.

Many classes, such as most of Transformers 4's, take the width from the input::

    batch, places, width = hidden_states.size()
    ...
    context.transpose(1, 2).reshape(batch, places, width)

and attention over images does so with the channels first::

    batch, channels, height, width = images.shape
    ...
    (values @ shares).view(batch, channels, height, width)

With fewer heads, or a narrower input, that size is wrong. A reshape can infer one size from the others, so the
rewritten forward passes -1 in its place, and computes the same.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import textwrap
from functools import cache
from typing import Any

from torch import nn

from nni_topo.network.runtime.modules import put_attribute

LAST, FIRST = -1, 1  # the dimension that holds the channels, in texts and in images
_OF, _ALONG = " of ", " along "  # before a class's module, and before the dimension, in a rewritten class's name


@cache
def own_width_class(kind: type[nn.Module], dim: int) -> type[nn.Module] | None:
    """Return a class derived from ``kind`` whose reshapes don't use its input's width; None if not needed or possible.

    ``dim``: the dimension of the input that holds its channels.
    """
    forward: Any = kind.__dict__.get("forward")
    function = inspect.unwrap(forward) if forward is not None else None
    # A function with free variables, such as one that calls ``super()``, can't be compiled again.
    if not inspect.isfunction(function) or function.__code__.co_freevars:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # code that isn't in a file
        return None
    definition, rewriter = tree.body[0], _Rewriter(dim)
    if not isinstance(definition, ast.FunctionDef) or not rewriter.rewrite(definition):
        return None
    if forward is function:
        definition.decorator_list = []  # these returned the function itself, and may need its class
    # In a class of that name, because decorators, such as Transformers', may read the function's qualified name.
    inside: Any = ast.parse(f"class {kind.__name__}: pass")
    inside.body[0].body = [definition]
    source = ast.unparse(ast.fix_missing_locations(inside))
    variant = "" if dim == LAST else f"{_ALONG}{dim}"
    file = f"<nni_topo: {kind.__module__}.{kind.__qualname__}.forward{variant}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    namespace: dict[str, Any] = {}
    exec(compile(source, file, "exec"), function.__globals__, namespace)
    members = {
        "__module__": __name__,
        "__qualname__": f"{kind.__qualname__}{_OF}{kind.__module__.replace('.', '/')}{variant}",
        "__doc__": kind.__doc__,
        "forward": namespace[kind.__name__].__dict__["forward"],
        "nni_topo_own_width": dim,
        "nni_topo_reads_width": rewriter.reads_width,
    }
    return type(f"Pruned{kind.__name__}", (kind,), members)


def __getattr__(name: str) -> type[nn.Module]:
    """Look up a rewritten class by its qualified name, as pickle does."""
    plain, _, dim = name.partition(_ALONG)
    qualified, _, module = plain.partition(_OF)
    if module:
        kind: Any = importlib.import_module(module.replace("/", "."))
        for part in qualified.split("."):
            kind = getattr(kind, part)
        variant = own_width_class(kind, int(dim) if dim else LAST)
        if variant is not None:
            return variant
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def take_own_width(module: nn.Module, dim: int = LAST, *, wholly: bool = False) -> bool:
    """Switch a module to the class whose reshapes don't use its input's width; return whether this class exists.

    ``wholly``: only if the forward uses the width for nothing else, such as dividing by its root.
    """
    kind: Any = type(module)
    variant: Any = own_width_class(kind, dim)
    if variant is None or (wholly and variant.nni_topo_reads_width):
        return False
    put_attribute(module, "__class__", variant)
    vars(module).pop("forward", None)  # NNI stores the class's forward there when it removes a wrapper
    return True


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a module's own attribute ``forward`` replaces its class's."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def own_width_of(module: nn.Module) -> int | None:
    """Return the dimension whose size a rewritten module's forward doesn't use; None for any other module."""
    dim: int | None = getattr(type(module), "nni_topo_own_width", None)
    return dim


def _assigned(target: ast.expr, value: ast.expr, dim: int) -> list[tuple[str, ast.expr | None]]:
    """Return the variables that are assigned, each with the expression of its value; None if unknown.

    If a shape is unpacked, the size of the dimension is written as ``x.shape[dim]``.
    """
    if not isinstance(target, ast.Tuple):
        if isinstance(target, ast.Name):
            return [(target.id, value)]
        return []
    assignments, count = list[tuple[str, ast.expr | None]](), len(target.elts)
    parts = value.elts if isinstance(value, ast.Tuple) and len(value.elts) == count else [None] * count
    for at, (variable, part) in enumerate(zip(target.elts, parts, strict=True)):
        if not isinstance(variable, ast.Name):
            continue
        if _is_shape(value) and at == (dim if dim >= 0 else count + dim):
            part = ast.parse(f"{ast.unparse(value)}[{dim}]", mode="eval").body
        assignments.append((variable.id, part))
    return assignments


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
    return is_call and [ast.unparse(argument) for argument in value.args] == [str(dim)]  # type: ignore[attr-defined]


class _Rewriter(ast.NodeTransformer):
    """Replace the size of a reshape that is computed from a width by -1, if it is the only one."""

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.widths = set[str]()  # variables that only hold a width, or a value computed from one
        self.found = False
        self.reads_width = False  # whether the rewritten forward still uses a width, except in ``_sizes``
        self._sizes = set[int]()  # ids of the widths in reshapes that infer another size

    def rewrite(self, definition: ast.FunctionDef) -> bool:
        """Change a forward's definition in place; return whether a reshape used its input's width."""
        assigned, ambiguous = list[tuple[str, ast.expr | None]](), set[str]()
        for node in ast.walk(definition):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    assigned += _assigned(target, node.value, self.dim)
            elif isinstance(node, (ast.AugAssign, ast.For)) and isinstance(node.target, ast.Name):
                ambiguous.add(node.target.id)
        # A value computed from a width counts as a width, and so on.
        count = -1
        while count < len(self.widths):
            count = len(self.widths)
            for name, value in assigned:
                if value is not None and self._is_of_width(value):
                    self.widths.add(name)
        names = [name for name, _ in assigned]
        for name, value in assigned:
            is_computed_again = isinstance(value, ast.BinOp) and names.count(name) > 1
            if value is None or is_computed_again or not self._is_of_width(value):
                ambiguous.add(name)
        self.widths -= ambiguous
        self.visit(definition)
        width_values = [value for name, value in assigned if name in self.widths]
        allowed = self._sizes | {id(part) for value in width_values if value is not None for part in ast.walk(value)}
        read = [part for part in ast.walk(definition) if self._is_width(part) and id(part) not in allowed]
        self.reads_width = any(not isinstance(getattr(part, "ctx", None), ast.Store) for part in read)
        return self.found

    def _is_of_width(self, value: ast.expr) -> bool:
        """Tell whether an expression is a width, or its product or integer quotient with another value."""
        if isinstance(value, ast.BinOp) and isinstance(value.op, (ast.Mult, ast.FloorDiv)):
            return self._is_of_width(value.left) or self._is_of_width(value.right)
        return self._is_width(value)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """Rewrite a call of ``reshape`` or ``view``."""
        self.generic_visit(node)
        if not isinstance(node.func, ast.Attribute) or node.func.attr not in ("reshape", "view"):
            return node
        before = node.args[:1] if ast.unparse(node.func.value) == "torch" else []
        arguments = node.args[len(before) :]
        if len(arguments) == 1 and isinstance(arguments[0], (ast.Tuple, ast.List)):
            arguments = arguments[0].elts
        sizes = self._opened(arguments)
        of_width = []
        for at, size in enumerate(sizes):
            if ast.unparse(size) == "-1":
                self._sizes.update(id(size) for size in sizes if self._is_width(size))
                return node
            if isinstance(size, (ast.Tuple, ast.List)):
                return node
            if any(self._is_width(part) for part in ast.walk(size)):
                of_width.append(at)
        if len(of_width) == 1 and len(sizes) > 1:
            sizes[of_width[0]] = ast.UnaryOp(ast.USub(), ast.Constant(1))
            node.args = [*before, ast.Tuple(sizes, ast.Load())]
            self.found = True
        return node

    def _is_width(self, part: ast.AST | None) -> bool:
        is_named = isinstance(part, ast.Name) and part.id in self.widths
        return is_named or (isinstance(part, ast.expr) and _is_size(part, self.dim))

    def _opened(self, sizes: list[ast.expr]) -> list[ast.expr]:
        """If a reshape's only argument is a tensor's whole shape, write the width as a separate size."""
        only = sizes[0] if len(sizes) == 1 else None
        expression = only.value if isinstance(only, ast.Starred) else only
        if expression is None or not _is_shape(expression):
            return list(sizes)
        shape = ast.unparse(expression)
        parts = f"*{shape}[:-1], {shape}[-1]" if self.dim == LAST else f"{shape}[0], {shape}[1], *{shape}[2:]"
        return ast.parse(f"({parts})", mode="eval").body.elts  # type: ignore[attr-defined, no-any-return]
