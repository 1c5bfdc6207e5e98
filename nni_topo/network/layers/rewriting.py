"""Classes of modules with a rewritten forward: derived from a model's own, compiled of its changed source.

Pickle looks such a class up by its module and qualified name, which say what it was made of. So a module that makes
some has a ``__getattr__`` that calls `look_up`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import linecache
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

_OF = " of "  # between a class and its module, in the qualified name of the rewritten class


def rewritten(
    kind: type[nn.Module],
    change: Callable[[ast.FunctionDef], bool],
    name: str,
    place: str,
    *,
    variant: str = "",
    members: Mapping[str, Any] | None = None,
) -> type[nn.Module] | None:
    """Return a class derived from ``kind`` with a changed forward; None if nothing changes, or if that can't be done.

    ``change``: changes the forward's definition in place, and tells whether it did. ``name``: the name of the class.
    ``place``: the module that looks the class up for pickle. ``variant``: the end of its qualified name, where a place
    rewrites in several ways. ``members``: further methods, which the forward calls.
    """
    forward: Any = kind.__dict__.get("forward")
    function = inspect.unwrap(forward) if forward is not None else None
    # A function with free variables, as one that calls ``super()``, can't be compiled anew.
    if not inspect.isfunction(function) or function.__code__.co_freevars:
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):  # code that isn't in a file
        return None
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or not change(definition):
        return None
    if forward is function:
        definition.decorator_list = []  # they returned the function itself, and may need to know its class
    # In a class of that name, for decorators may look at the function's qualified name, as those of Transformers do.
    inside: Any = ast.parse(f"class {kind.__name__}: pass")
    inside.body[0].body = [definition]
    source = ast.unparse(ast.fix_missing_locations(inside))
    file = f"<nni_topo: {kind.__module__}.{kind.__qualname__}.forward{variant}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)  # for tracebacks
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec"), function.__globals__, made)
    own: dict[str, Any] = {
        "__module__": place,
        "__qualname__": f"{kind.__qualname__}{_OF}{kind.__module__.replace('.', '/')}{variant}",
    }
    own |= {"__doc__": kind.__doc__, "forward": made[kind.__name__].__dict__[definition.name], **(members or {})}
    return type(name, (kind,), own)


def look_up(name: str, place: str, make: Callable[[type[nn.Module]], type[nn.Module] | None]) -> type[nn.Module]:
    """Look up a rewritten class by its qualified name; AttributeError if ``make`` rewrites none of that name."""
    qualified, _, module = name.partition(_OF)
    if module:
        kind: Any = importlib.import_module(module.replace("/", "."))
        for part in qualified.split("."):
            kind = getattr(kind, part)
        found = make(kind)
        if found is not None:
            return found
    raise AttributeError(f"module {place!r} has no attribute {name!r}")
