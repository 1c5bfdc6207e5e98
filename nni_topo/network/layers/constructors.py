"""Which attributes of a model count channels of its layers, as far as its constructors show it.

``self.width = width`` beside ``self.conv = nn.Conv2d(3, width, 3)`` says that the attribute is the layer's number of
output channels, whatever the number is. Constructors are read, not run: their arguments are no longer known. Where the
same expression gives an attribute and a size of a layer, through constructors of the model's own modules and small
functions too, the two are the same number. Names that are assigned twice, or in a loop, say nothing.
"""

from __future__ import annotations

import ast
import builtins
import copy
import dis
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import nn

from nni_topo.network.runtime import put_attribute

Key = tuple[Any, ...]
"""An expression, in words that are the same wherever it is the same number."""
LayerAttribute = tuple[str, str]
"""A layer and the attribute of it that counts its channels."""

_COUNTS = frozenset({
    "in_channels", "out_channels", "in_features", "out_features", "num_features", "num_channels", "embedding_dim",
    "normalized_shape", "num_parameters", "input_size", "hidden_size", "embed_dim",
})  # fmt: skip
_DEEPEST = 20  # expressions within one another
_OTHER = frozenset({
    "kernel", "kernels", "stride", "strides", "pad", "padding", "dilation", "dilations", "group", "groups", "head",
    "heads", "depth", "depths", "patch", "patches", "window", "windows", "image", "images", "img", "class", "classes",
    "label", "labels", "layer", "layers", "block", "blocks", "stage", "stages", "token", "tokens", "vocab", "position",
    "positions", "length", "seed", "step", "steps", "epoch", "epochs", "version", "index", "idx", "scale", "factor",
    "ratio", "rate", "reduction", "reductions", "level", "levels",
})  # fmt: skip
"""Words in the names of numbers that count no channels."""
_PIXELS = frozenset({"resolution", "resolutions", "grid", "pixel", "pixels", "crop", "frame", "frames"})
"""Words in the names of numbers that count places of an image."""
_ABOUT_WEIGHTS = frozenset({"pretrained", "checkpoint"})
"""Words in the names of what describes downloaded weights, and nothing of the network that they were put into."""
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def sizes_shown(model: nn.Module, dense: nn.Module) -> dict[Place, int]:
    """Return the dense model's values of attributes that the constructors show to be widths of layers, if all agree.

    Attributes that the forward reads are left out: what it computes with them mustn't change.
    """
    found: dict[Place, int] = {}
    kinds: set[Any] = {type(module) for module in model.modules()}
    read = {name for kind in kinds for name in read_in_forward(kind)}
    for place, (number, sizes, is_all) in _held(model).items():
        olds, news = set[int | None](), set[int | None]()
        for layer, attribute in sizes:
            olds.add(_widths(model.get_submodule(layer)).get(attribute))
            news.add(_widths(dense.get_submodule(layer)).get(attribute))
        if not is_all:
            # Other layers may be made with it too, so all layers of this width within the module have to agree.
            news |= _dense_widths(model, dense, place[0], number)
        if place[1] not in read and olds == {number} and len(news) == 1 and (new := news.pop()) is not None:
            found[place] = new
    return found


def _dense_widths(model: nn.Module, dense: nn.Module, name: str, number: int) -> set[int | None]:
    """Return the dense widths of all layers within a module whose width was a number."""
    found: set[int | None] = set()
    for inner, module in model.get_submodule(name).named_modules(prefix=name):
        after = _widths(dense.get_submodule(inner))
        for attribute, width in _widths(module).items():
            if width == number:
                found.add(after.get(attribute))
    return found


def stale_numbers(model: nn.Module, dense: nn.Module, right: Collection[Place] = ()) -> dict[str, int]:
    """Return the attributes, by name, that in the dense model still hold the old width of a pruned layer within.

    Left out are those that are known to be ``right``, those that the forward of their own module reads, those whose
    name, or whose constructor, says that they count something else, and what describes downloaded weights.
    """
    cut: dict[str, set[str]] = {}
    lost: dict[str, set[int]] = defaultdict(set)  # by a module, the widths of layers within it that got narrower
    for name, module in model.named_modules():
        before, after = _widths(module), _widths(dense.get_submodule(name))
        cut[name] = {each for each, number in before.items() if after.get(each) != number}
        parts = name.split(".")
        for each in cut[name]:
            for length in range(len(parts) + 1):
                lost[".".join(parts[:length])].add(before[each])
    if not lost:
        return {}
    held_numbers = list(_described_too(model))
    # One dict may be held under several names, of which one says what it describes.
    of_weights = {id(value) for _, _, key, value in held_numbers if _words(key) & _ABOUT_WEIGHTS}
    kept: dict[Place, int] = {}
    for module, name, key, value in held_numbers:
        kind: Any = type(module)
        if not lost.get(name) or key in cut[name] or key in read_in_forward(kind):
            continue
        if type(value) is not int and id(value) in of_weights:
            continue
        for path, number in (numbers_in(value) or {}).items():
            names = [key, *(each for each in path if isinstance(each, str))]
            words = _words(names[-1])
            # A size in several numbers, as in ``input_size=(3, 288, 288)``, is that of an image.
            is_of_image = bool(words & _PIXELS) or ("size" in words and bool(path) and type(path[-1]) is int)
            is_other = bool(words & _OTHER) or is_of_image or any(_words(each) & _ABOUT_WEIGHTS for each in names)
            if (name, key, path) in right:
                continue
            if number > 1 and number in lost[name] and number_at(dense, (name, key, path)) == number and not is_other:
                kept[name, key, path] = number
    if not kept:
        return {}
    held, found = _held(model), dict[str, int]()
    for (name, key, path), number in kept.items():
        sizes = held[name, key, path][1] if (name, key, path) in held else set[LayerAttribute]()
        # Unless it is the width of layers that aren't pruned.
        if {_widths(dense.get_submodule(layer)).get(each) for layer, each in sizes} != {number}:
            found[f"{name}.{key}".lstrip(".") + "".join(f"[{each!r}]" for each in path)] = number
    return found


def _words(name: str) -> set[str]:
    """Return the words of a name, in small letters."""
    return {word.lower() for word in re.split(r"[_\W\d]+|(?<=[a-z])(?=[A-Z])", name)}


def _widths(module: nn.Module) -> dict[str, int]:
    """Return the attributes of a layer that count channels, with their values."""
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.nn.") and kind is not nn.Module]
    if not kinds or isinstance(module, _CONTAINERS):
        return {}
    found = {}
    for name in _COUNTS & vars(module).keys():
        value = vars(module)[name]
        if type(value) is tuple and len(value) == 1:  # as ``normalized_shape``
            value = value[0]
        if type(value) is int:
            found[name] = value
    return found


def _held(model: nn.Module) -> dict[Place, tuple[int, set[LayerAttribute], bool]]:
    """List the numbers that attributes hold, by place, the sizes of layers that are the same, and whether it is all."""
    reader = _Constructors(model)
    found = {}
    for place, (number, keys) in reader.held.items():
        sizes = set[LayerAttribute]()
        for key in keys:
            sizes |= reader.sizes.get(key, set())
        if sizes:
            found[place] = number, sizes, not any(_is_among(key, reader.unsure) for key in keys)
    return found


def _is_among(key: Key, keys: set[Key]) -> bool:
    """Tell whether a number, or the list that it is in, is among others."""
    return key in keys or (key[0] == "item" and _is_among(key[1], keys))


class _Constructors:
    """All constructors of a model, read from the outermost in."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.sizes: dict[Key, set[LayerAttribute]] = defaultdict(set)
        self.held: dict[Place, tuple[int, list[Key]]] = {}
        self.unsure: set[Key] = set()  # handed to calls that say nothing here, which may make layers of it
        self.named: dict[tuple[str, str], Key] = {}  # what attributes of modules that are read hold
        self._read: set[int] = set()
        for name, module in model.named_modules():
            self.read(name, module, {})

    def read(self, name: str, module: nn.Module, given: Mapping[str, Key]) -> None:
        """Read the constructor of a module of the model's own, once, given what is known of its arguments."""
        if id(module) in self._read:
            return
        self._read.add(id(module))
        self.read_from(type(module).__mro__, name, module, given)

    def read_from(
        self, kinds: tuple[type, ...], name: str, module: nn.Module, given: Mapping[str, Key], call: Any = None
    ) -> None:
        """Read the first constructor that these classes define; ``call`` is what calls it, if one of another does."""
        at = next((at for at, kind in enumerate(kinds) if "__init__" in vars(kind)), None)
        if at is None:
            return
        init = inspect.unwrap(vars(kinds[at])["__init__"])
        if kinds[at].__module__.startswith("torch.nn.") or (tree := _source(init)) is None:
            return
        _Body(self, tree, init, (name, kinds[at].__qualname__), given, name, module, kinds[at + 1 :]).read()


class _Body:
    """One function: what its names stand for, and what it makes."""

    def __init__(
        self,
        owner: _Constructors,
        tree: ast.FunctionDef,
        function: FunctionType,
        scope: tuple[str, str],
        given: Mapping[str, Key],
        name: str,
        module: nn.Module | None,
        above: tuple[type, ...] = (),
    ) -> None:
        self.owner, self.tree, self.function, self.scope = owner, tree, function, scope
        self.name, self.module, self.above = name, module, above
        every = [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]
        self.own = every[0].arg if module is not None and every else None
        names = [each.arg for each in every if each.arg != self.own]
        self.given = {each: given.get(each, ("given", *scope, each)) for each in names}
        self.understood: set[ast.Call] = set()
        self.stores: dict[str, list[ast.expr | None]] = defaultdict(list)
        self.attributes: dict[str, list[ast.expr | None]] = defaultdict(list)
        for statement in tree.body:
            self._note(statement, in_loop=False)

    def _note(self, node: ast.AST, *, in_loop: bool) -> None:
        """Note what is assigned, and what to: None where it may be assigned several values."""
        in_loop |= isinstance(node, (ast.For, ast.While, ast.ListComp, ast.GeneratorExp, ast.DictComp, ast.SetComp))
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                self._note_value(target, None if in_loop else node.value)
        elif isinstance(node, (ast.AugAssign, ast.For, ast.NamedExpr, ast.comprehension)):
            self._note_lost(node.target)
        elif isinstance(node, ast.withitem) and node.optional_vars is not None:
            self._note_lost(node.optional_vars)
        elif isinstance(node, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
            return
        for child in ast.iter_child_nodes(node):
            self._note(child, in_loop=in_loop)

    def _note_value(self, target: ast.expr, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self.stores[target.id].append(value)
        elif attribute := self._attribute(target):
            self.attributes[attribute].append(value)
        elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for one, given in zip(target.elts, value.elts, strict=True):
                self._note_value(one, None if isinstance(given, ast.Starred) else given)
        else:
            self._note_lost(target)

    def _note_lost(self, target: ast.AST) -> None:
        for each in ast.walk(target):
            if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
                self.stores[each.id].append(None)
            elif attribute := self._attribute(each):
                self.attributes[attribute].append(None)

    def _attribute(self, node: ast.AST) -> str | None:
        """Name the attribute of the module itself that an expression is."""
        is_own = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self.own
        return node.attr if is_own and isinstance(node, ast.Attribute) else None

    def read(self) -> None:
        """Note what the modules that a constructor makes, and its attributes, are given."""
        for node in self._calls_of_base():
            self._construct(node, self.name, base=True)
        kind: Any = type(self.module)
        for attribute, values in self.attributes.items():
            name = f"{self.name}.{attribute}".lstrip(".")
            if name in self.owner.modules:
                if len(values) == 1 and isinstance(values[0], ast.Call):
                    self._construct(values[0], name)
            elif attribute in _assigned_elsewhere(kind):
                values.append(None)
            elif len(values) == 1 and values[0] is not None:
                self.owner.named[self.name, attribute] = self._attribute_key(attribute)
        for attribute, values in self.attributes.items():
            value = vars(self.module).get(attribute)
            if len(values) == 1 and values[0] is not None:
                for path, number in (numbers_in(value) or {}).items():
                    written, own = self._at(values[0], path), _item(("self", *self.scope, attribute), path)
                    keys = [own] if written is None else [own, written]
                    self.owner.held[self.name, attribute, path] = number, keys
        for call in ast.walk(self.tree):
            if isinstance(call, ast.Call) and call not in self.understood:
                if self._resolved(call.func) is int or isinstance(self._resolved(call.func), BuiltinFunctionType):
                    continue  # it makes no layers
                given = [*call.args, *(each.value for each in call.keywords)]
                keys_given = [self._key(each.value if isinstance(each, ast.Starred) else each) for each in given]
                self.owner.unsure.update(key for key in keys_given if key is not None)

    def _calls_of_base(self) -> Iterator[ast.Call]:
        """Find the calls of a base class's constructor by `super`."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
                base = node.func.value
                if isinstance(base, ast.Call) and isinstance(base.func, ast.Name) and base.func.id == "super":
                    yield node

    def _attribute_key(self, attribute: str) -> Key:
        value = self.attributes[attribute][0]
        assert value is not None
        return self._key(value) or ("self", *self.scope, attribute)

    def _at(self, value: ast.expr, path: tuple[int | str, ...]) -> Key | None:
        """Write down a number within a list or dict that the constructor writes out, or that is handed to it."""
        if not path:
            return self._key(value)
        if isinstance(value, (ast.List, ast.Tuple)):
            is_whole = not any(isinstance(each, ast.Starred) for each in value.elts) and int(path[0]) < len(value.elts)
            return self._at(value.elts[int(path[0])], path[1:]) if is_whole else None
        if isinstance(value, ast.Dict):
            inside = {}
            for each, one in zip(value.keys, value.values, strict=True):
                if isinstance(each, ast.Constant):
                    inside[each.value] = one
            return self._at(inside[path[0]], path[1:]) if path[0] in inside else None
        key = self._key(value)
        return None if key is None else _item(key, path)

    def _key(self, node: ast.expr, depth: int = 0) -> Key | None:
        """Write an expression down; None where it isn't one number for good, or says nothing."""
        if depth > _DEEPEST:
            return None
        if isinstance(node, ast.Name):
            values = self.stores.get(node.id, [])
            if node.id in self.given:
                return None if values else self.given[node.id]
            if len(values) != 1 or values[0] is None:
                return None
            return self._key(values[0], depth + 1) or ("name", *self.scope, node.id)
        if isinstance(node, ast.Attribute):
            return self._key_of_attribute(node, depth)
        if isinstance(node, ast.Subscript):
            index = _constant(node.slice)
            base = None if index is None else self._key(node.value, depth + 1)
            if base is not None and base[0] == "module":
                return self._part(base[1], str(index))
            return None if base is None else ("item", base, index)
        if isinstance(node, ast.BinOp):
            sides = [self._operand(each, depth) for each in (node.left, node.right)]
            return None if None in sides else (type(node.op).__name__, *sides)
        if isinstance(node, ast.Call) and not node.keywords and node.args:
            called = self._resolved(node.func)
            given = [self._operand(each, depth) for each in node.args]
            is_function = called is int or isinstance(called, (FunctionType, BuiltinFunctionType))
            return ("call", id(called), *given) if is_function and called is not next and None not in given else None
        return None

    def _key_of_attribute(self, node: ast.Attribute, depth: int) -> Key | None:
        attribute = self._attribute(node)
        if attribute is not None:
            values = self.attributes.get(attribute)
            # A base class's constructor has set it, which may be that of a layer of PyTorch's.
            if not values or f"{self.name}.{attribute}".lstrip(".") in self.owner.modules:
                return self._part(self.name, attribute)
            if len(values) != 1 or values[0] is None:
                return None
            return self._key(values[0], depth + 1) or ("self", *self.scope, attribute)
        base = self._key(node.value, depth + 1)
        if base is not None and base[0] == "module":
            return self._part(base[1], node.attr)
        return None if base is None else ("attribute", base, node.attr)

    def _part(self, name: str, part: str) -> Key | None:
        """Write down a part of a module: another one, a size of it, or what its constructor makes of its own."""
        inner = f"{name}.{part}".lstrip(".")
        if inner in self.owner.modules:
            return ("module", inner)
        if (name, part) in self.owner.named:
            return self.owner.named[name, part]
        if part in _widths(self.owner.modules[name]):
            self.owner.sizes["size", name, part].add((name, part))
            return ("size", name, part)
        return None

    def _operand(self, node: ast.expr, depth: int) -> Key | None:
        value = _constant(node)
        return self._key(node, depth + 1) if value is None else ("constant", value)

    def _resolved(self, node: ast.expr) -> Any:
        """Return what a name stands for in the function's module."""
        if isinstance(node, ast.Attribute):
            return getattr(self._resolved(node.value), node.attr, None)
        if not isinstance(node, ast.Name) or node.id in self.given or node.id in self.stores:
            return None
        return self.function.__globals__.get(node.id, getattr(builtins, node.id, None))

    def _construct(self, call: ast.Call, name: str, *, base: bool = False) -> None:
        """Note what a module is made with; ``base``: the call is that of its base class's constructor."""
        module: Any = self.owner.modules[name]
        kinds = self.above if base else type(module).__mro__
        kind: Any = next((each for each in kinds if "__init__" in vars(each)), None)
        called = kind if base else self._resolved(call.func)
        if kind is None:
            return
        self.understood.add(call)
        if issubclass(kind, (nn.Sequential, nn.ModuleList)) and kind.__module__.startswith("torch.nn."):
            listed = call.args
            if issubclass(kind, nn.ModuleList):
                listed = [ast.Starred(call.args[0])] if call.args else []
            entries = [entry for each in listed for entry in self._entries(each)]
            for child, each in _aligned(list(module._modules), entries):
                if isinstance(each, ast.Call):
                    self._construct(each, f"{name}.{child}".lstrip("."))
        elif any(isinstance(each, ast.Starred) for each in call.args):
            self.understood.discard(call)
        elif isinstance(called, FunctionType):
            if not self._construct_by(called, call, name):
                self.understood.discard(call)
        elif kind.__module__.startswith("torch.nn.") and called in (None, kind):
            for argument, key in self._bound(kind.__init__, call).items():
                if argument in _widths(module):
                    self.owner.sizes[key].add((name, argument))
        elif base:
            self.owner.read_from(self.above, name, module, self._bound(kind.__init__, call))
        elif called is type(module):
            self.owner.read(name, module, self._bound(kind.__init__, call))
        else:
            self.understood.discard(call)

    def _entries(self, node: ast.expr) -> list[tuple[ast.expr, bool]]:
        """List what an argument hands over, a list with a star before it in parts: with whether each surely is there.

        What stands for several, or for none, is one that isn't surely there.
        """
        if not isinstance(node, ast.Starred):
            return [(node, True)]
        value = node.value
        if isinstance(value, (ast.List, ast.Tuple)):
            return [entry for each in value.elts for entry in self._entries(each)]
        made = self.stores.get(value.id, []) if isinstance(value, ast.Name) else []
        if not isinstance(value, ast.Name) or len(made) != 1 or not isinstance(made[0], ast.List):
            return [(node, False)]
        if _is_rearranged(self.tree, value.id):
            return [(node, False)]
        return self._entries(ast.Starred(made[0])) + self._added(self.tree.body, value.id, is_sure=True)

    def _added(self, statements: list[ast.stmt], name: str, *, is_sure: bool) -> list[tuple[ast.expr, bool]]:
        """List what statements add to a list of a name."""
        found: list[tuple[ast.expr, bool]] = []
        for statement in statements:
            call = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(call, ast.Call) and len(call.args) == 1 and (adds := _method_of(call, name)) is not None:
                given = ast.Starred(call.args[0]) if adds == "extend" else call.args[0]
                found += [(each, is_sure and sure) for each, sure in self._entries(given)]
            elif isinstance(statement, ast.If):
                for branch in (statement.body, statement.orelse):
                    found += self._added(branch, name, is_sure=False)
            elif not isinstance(statement, (ast.Assign, ast.AnnAssign)) and _mentions(statement, name):
                found.append((ast.Name(name), False))
        return found

    def _construct_by(self, function: FunctionType, call: ast.Call, name: str) -> bool:
        """Note what a module is made with by a function that does nothing else, and tell whether it is such a one."""
        tree = _source(inspect.unwrap(function))
        made = [each.value for each in ast.walk(tree) if isinstance(each, ast.Return)] if tree is not None else []
        is_deep = self.scope[1].count(">") >= _DEEPEST
        if tree is None or is_deep or len(made) != 1 or not isinstance(made[0], ast.Call):
            return False
        scope = (name, f"{self.scope[1]}>{function.__qualname__}")
        given = self._bound(function, call, skip=0)
        _Body(self.owner, tree, function, scope, given, name, None)._construct(made[0], name)
        return True

    def _bound(self, function: Callable[..., Any], call: ast.Call, skip: int = 1) -> dict[str, Key]:
        """Write down, by the names of a function's parameters, what a call gives it."""
        keywords = {each.arg: each.value for each in call.keywords if each.arg is not None}
        try:
            bound = inspect.signature(function).bind_partial(*[None] * skip, *call.args, **keywords).arguments
        except (TypeError, ValueError):
            return {}
        found = {}
        for name, each in bound.items():
            key = self._key(each) if isinstance(each, ast.expr) else None
            if key is not None:
                found[name] = key
        return found


def _aligned(children: list[str], entries: list[tuple[ast.expr, bool]]) -> list[tuple[str, ast.expr]]:
    """Pair the parts of a container with what made them: all, or from both ends as far as that is sure."""
    sure = [each for each, is_sure in entries if is_sure]
    if len(sure) in (len(entries), len(children)) and len(sure) == len(children):
        return list(zip(children, sure, strict=True))
    pairs: dict[str, ast.expr] = {}
    for order in (1, -1):
        for child, (each, is_sure) in zip(children[::order], entries[::order], strict=False):
            if not is_sure:
                break
            pairs[child] = each
    return list(pairs.items())


def _method_of(call: ast.Call, name: str) -> str | None:
    """Tell whether a call appends to a list of a name, or extends it."""
    of = call.func
    is_its = isinstance(of, ast.Attribute) and isinstance(of.value, ast.Name) and of.value.id == name
    return of.attr if is_its and isinstance(of, ast.Attribute) and of.attr in ("append", "extend") else None


def _is_rearranged(tree: ast.FunctionDef, name: str) -> bool:
    """Tell whether a list of a name is changed in another way than at its end."""
    for each in ast.walk(tree):
        if isinstance(each, (ast.Attribute, ast.Subscript)) and isinstance(each.value, ast.Name):
            is_entry = isinstance(each, ast.Subscript) and isinstance(each.ctx, ast.Load)
            only_grows = isinstance(each, ast.Attribute) and each.attr in ("append", "extend")
            if each.value.id == name and not is_entry and not only_grows:
                return True
    return False


def _mentions(statement: ast.stmt, name: str) -> bool:
    return any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(statement))


def _item(key: Key, path: tuple[int | str, ...]) -> Key:
    """Write down a part of a list or dict."""
    for step in path:
        key = ("item", key, step)
    return key


def _constant(node: ast.expr) -> int | str | float | None:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub) and isinstance(node.operand, ast.Constant):
        return -node.operand.value if isinstance(node.operand.value, (int, float)) else None
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, (int, str, float)) else None


@lru_cache(maxsize=1024)
def _source(function: Callable[..., Any]) -> ast.FunctionDef | None:
    """Parse a function; None where its source isn't there."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


@lru_cache(maxsize=1024)
def _assigned_elsewhere(kind: type) -> frozenset[str]:
    """Name the attributes that methods of a class, other than constructors, assign."""
    return frozenset[str]().union(*map(_assigned_by_methods, kind.__mro__))


@lru_cache(maxsize=1024)  # by each class of its own, for many share a base with hundreds of methods
def _assigned_by_methods(kind: type) -> frozenset[str]:
    found = set[str]()
    functions = vars(kind).values() if not kind.__module__.startswith(("torch.nn.", "builtins")) else ()
    for function in functions:
        if isinstance(function, FunctionType) and function.__name__ != "__init__":
            code = inspect.unwrap(function).__code__
            # To disassemble a function takes far longer than to look for the name of an instruction in its bytes.
            if dis.opmap["STORE_ATTR"] in code.co_code[::2]:
                found.update(str(one.argval) for one in dis.get_instructions(code) if one.opname == "STORE_ATTR")
    return frozenset(found)


@lru_cache(maxsize=1024)
def read_in_forward(kind: type) -> frozenset[str]:
    """Name the attributes that a class's forward reads, or methods and properties that it reads."""
    if kind.__module__.startswith("torch.nn."):
        return frozenset()
    names, left = set[str](), ["forward"]
    while left:
        found = inspect.getattr_static(kind, left.pop(), None)
        found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
        code = getattr(inspect.unwrap(found) if callable(found) else found, "__code__", None)
        codes = [code] if code is not None else []
        for each in codes:
            new = set(each.co_names) - names
            names |= new
            left += sorted(new)
            codes += [inner for inner in each.co_consts if inspect.iscode(inner)]
    return frozenset(names)


Place = tuple[str, str, tuple[int | str, ...]]
"""A module, its attribute, and the keys that lead to a number in it where that is a list or a dict."""


_MANY = 1000  # numbers that an attribute may hold
_DEEP = 4  # lists and dicts within one another
# PyTorch's own, and the line numbers of torch.fx's modules.
_TABLES = frozenset(vars(nn.Module())) | {"_lineno_map", "_prologue_start"}


def numbers_in(value: Any) -> dict[tuple[int | str, ...], int] | None:
    """List the integers in a value by the keys that lead to them: itself, or a list, tuple or dict of plain values.

    None where it holds anything else, as tensors, no integer, or very many.
    """
    found: dict[tuple[int | str, ...], int] = {}

    def is_plain(each: Any, path: tuple[int | str, ...]) -> bool:
        if type(each) is int:
            found[path] = each
        elif type(each) in (list, tuple, dict):
            inside = each.items() if type(each) is dict else enumerate(each)
            fits = len(path) < _DEEP and len(each) <= _MANY
            return fits and all(type(key) in (int, str) and is_plain(one, (*path, key)) for key, one in inside)
        return isinstance(each, (int, str, float, type(None)))

    return found if is_plain(value, ()) and 0 < len(found) <= _MANY else None


def with_numbers(value: Any, numbers: Mapping[tuple[int | str, ...], int], path: tuple[int | str, ...] = ()) -> Any:
    """Put integers in place of those in a value, by the keys that lead to them; lists and dicts are new ones."""
    if type(value) in (list, tuple):
        return type(value)(with_numbers(each, numbers, (*path, at)) for at, each in enumerate(value))
    if type(value) is dict:
        return {key: with_numbers(each, numbers, (*path, key)) for key, each in value.items()}
    return numbers.get(path, value)


def whole_numbers(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """List a model's own modules and attributes that hold integers, see `numbers_in`: with name and key."""
    for name, module in model.named_modules():
        for key, value in () if type(module).__module__.startswith("torch.nn.") else list(vars(module).items()):
            if key not in _TABLES and numbers_in(value) is not None:
                yield module, name, key, value


def numbers_read(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """List what `whole_numbers` does, and the lists in the ``config`` of modules, as models of Transformers have one.

    The key of such a list has a dot: ``config.hidden_sizes``. A config that several modules hold is listed with the one
    that contains the others. It is left out where none does, or where a further config holds it: there a forward may
    read numbers from it that `put_sizes` wouldn't reach.
    """
    yield from whole_numbers(model)
    holders: dict[int, list[str]] = defaultdict(list)
    configs = dict[int, Any]()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if callable(getattr(config, "to_dict", None)) and not isinstance(config, type):
            configs[id(config)] = config
            holders[id(config)].append(name)
    inner, waiting = set[int](), list(configs.values())
    while waiting:
        for each in vars(waiting.pop()).values():
            if callable(getattr(each, "to_dict", None)) and hasattr(each, "__dict__") and id(each) not in inner:
                inner.add(id(each))
                waiting.append(each)
    for key_of_config, config in configs.items():
        first, *others = holders[key_of_config]
        if key_of_config in inner or not all(not first or each.startswith(f"{first}.") for each in others):
            continue
        for key, value in list(vars(config).items()):
            if type(value) in (list, tuple) and numbers_in(value) is not None:
                yield model.get_submodule(first), first, f"config.{key}", value


def _described_too(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """List what `whole_numbers` does, and the list ``info`` of objects that describe features, as timm's have them.

    The key of such a list has a dot: ``feature_info.info``.
    """
    yield from whole_numbers(model)
    yield from _descriptions(model)


def _stored(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    """List what `numbers_read` does, and descriptions of features."""
    yield from numbers_read(model)
    yield from _descriptions(model)


def _descriptions(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, Any]]:
    for name, module in model.named_modules():
        for key, value in list(vars(module).items()):
            inside = getattr(value, "info", None) if hasattr(value, "out_indices") else None
            if isinstance(inside, list) and numbers_in(inside) is not None:
                yield module, name, f"{key}.info", inside


def sizes_of(model: nn.Module) -> dict[str, Any]:
    """List the numbers that attributes of a model's own modules hold, by full name: int or list of int.

    Of a dict, or of lists within lists, it is a dict of int by the keys that lead to each, joined by slashes.
    """
    sizes: dict[str, Any] = {}
    for _, name, key, value in _stored(model):
        full_name = f"{name}.{key}".lstrip(".")
        if type(value) is int:
            sizes[full_name] = value
        elif type(value) in (list, tuple) and all(type(each) is int for each in value):
            sizes[full_name] = list(value)
        else:
            sizes[full_name] = {"/".join(map(str, path)): each for path, each in (numbers_in(value) or {}).items()}
    return sizes


def places_of(model: nn.Module) -> dict[str, dict[str, Place]]:
    """List where the numbers of `sizes_of` are: by full name, by the keys that lead to each, joined by slashes."""
    places: dict[str, dict[str, Place]] = {}
    for _, name, key, value in _stored(model):
        inside = places[f"{name}.{key}".lstrip(".")] = {}
        for path in numbers_in(value) or {}:
            inside["/".join(map(str, path))] = name, key, path
    return places


def number_at(model: nn.Module, place: Place) -> int | None:
    """Return the number at a place of a model's attributes, None where there is none."""
    name, key, path = place
    value: Any = model.get_submodule(name)
    for part in key.split("."):
        value = getattr(value, part, None)
    return (numbers_in(value) or {}).get(path)


def put_sizes(model: nn.Module, sizes: dict[Place, int]) -> None:
    """Write sizes into a model's attributes."""
    for (name, key, path), size in sizes.items():
        module = model.get_submodule(name)
        owner, _, listed = key.partition(".")
        if listed:
            held = getattr(module, owner)
            described = copy.copy(held)  # other models may hold the same object
            setattr(described, listed, with_numbers(getattr(described, listed), {path: size}))
            for each in module.modules():  # those within may hold it too
                if vars(each).get(owner) is held:
                    put_attribute(each, owner, described)
        else:
            put_attribute(module, key, with_numbers(getattr(module, key), {path: size}))
