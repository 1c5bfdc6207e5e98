"""Tables with an entry for each head that a forward computes at each call, so that heads can be taken out of them.

ALiBi's slopes, as MPT, BLOOM and Falcon have them, follow from the number of heads::

    alibi = self.build_alibi_tensor(attention_mask, self.num_heads, dtype=hidden_states.dtype)

With fewer heads other slopes would be computed. So in the rewritten forward the table is that of all heads, of which a
buffer lists those to take. At first that is all of them; it is cut with the heads.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.network.layers.rewriting import look_up, rewritten
from nni_topo.network.runtime.modules import put_attribute

HEADS_TAKEN = "_nni_topo_heads_taken"
"""The name of the buffer: int64, (heads,)."""
_COUNTS = ("num_heads", "n_heads", "n_head", "num_attention_heads")
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_TAKE = "_nni_topo_take_heads"  # the method of rewritten classes that a table goes through

_CLASSES: dict[type[nn.Module], type[nn.Module] | None] = {}


def _take_heads(module: Any, table: Any, heads: int) -> Any:
    """Select heads of a table ``(heads, ...)`` or ``(samples * heads, ..., ...)``; anything else is returned unchanged.

    ``heads``: how many there are in the table.
    """
    if not isinstance(table, Tensor) or table.dim() < 1 or len(table) % heads:
        return table
    taken = getattr(module, HEADS_TAKEN)
    if len(table) == heads:
        return table.index_select(0, taken)
    if table.dim() < 2:
        return table
    return table.unflatten(0, (-1, heads)).index_select(1, taken).flatten(0, 1)


def take_heads_of_tables(module: nn.Module) -> bool:
    """Let a module that makes tables with an entry a head select entries by a buffer, in place; False for others.

    Only modules that call a list of blocks, and have no layers of their own that could make heads.
    """
    kind, children = type(module), list(module.children())
    is_stack = any(isinstance(each, nn.ModuleList) for each in children)
    if not is_stack or HEADS_TAKEN in module._buffers or any(isinstance(each, _WEIGHTED) for each in children):
        return False
    made, count = tables_by_head_class(kind), _heads_of(module)
    if made is None or count < 2:
        return False
    device = next((each.device for each in module.parameters()), None)
    put_attribute(module, "__class__", made)
    module.register_buffer(HEADS_TAKEN, torch.arange(count, device=device), persistent=False)
    return True


def takes_all_heads(module: nn.Module) -> bool:
    """Tell whether a module that selects heads of tables by a buffer selects all of them, in order."""
    taken = getattr(module, HEADS_TAKEN)
    return torch.equal(taken, torch.arange(_heads_of(module), device=taken.device))


def _heads_of(module: nn.Module) -> int:
    """Return how many heads a module's tables have; 0 if the module has no attribute that says so."""
    return next((value for key in _COUNTS if isinstance(value := vars(module).get(key), int)), 0)


def tables_by_head_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a class derived from ``kind`` that takes heads out of the tables it makes; None if it makes none."""
    if kind not in _CLASSES:
        _CLASSES[kind] = rewritten(kind, _take_in_calls, kind.__name__, __name__, members={_TAKE: _take_heads})
    return _CLASSES[kind]


def __getattr__(name: str) -> type[nn.Module]:
    """Look up a rewritten class by its qualified name, as pickle does."""
    return look_up(name, __name__, tables_by_head_class)


def _take_in_calls(definition: ast.FunctionDef) -> bool:
    """Change a forward's definition in place; tell whether it made tables of a number of heads."""
    own = definition.args.args[0].arg if definition.args.args else ""
    counts = {f"{own}.{key}" for key in _COUNTS}
    found = False
    for node in ast.walk(definition):
        value = node.value if isinstance(node, ast.Assign) else None
        if not isinstance(value, ast.Call) or not _is_own_function(value.func, own):
            continue
        given = [ast.unparse(each) for each in (*value.args, *(each.value for each in value.keywords))]
        count = next((each for each in given if each in counts), None)
        if count is not None:
            taken = ast.parse(f"{own}.{_TAKE}(None, {count})", mode="eval").body
            taken.args[0] = value  # type: ignore[attr-defined]
            node.value = taken  # type: ignore[attr-defined]
            found = True
    return found


def _is_own_function(function: ast.expr, own: str) -> bool:
    """Tell whether a function is a method of the module itself, or one of its file."""
    is_method = isinstance(function, ast.Attribute) and ast.unparse(function.value) == own
    return is_method or isinstance(function, ast.Name)
