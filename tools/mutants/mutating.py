"""Every mutant of a source file, made by mutmut's operators, without those that tell nothing about the tests.

Messages, docstrings, annotations, decorators and imports stay as they are: no test has to see them. Mutants that
could hardly do anything but crash are left out as well (a positional argument or an assigned value that becomes None):
any test that runs the line kills them, and with two thirds of all mutants they would flatter the score.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.mutators import mutation_operators

WORDS = ("warn", "cast", "debug", "info", "warning", "error", "exception", "getLogger", "TypeVar")
"""Calls whose arguments are messages or types."""

# zip's `strict` only speaks in a program that is wrong already, `stacklevel` only moves a warning
SILENT_KEYWORDS = ("strict", "stacklevel")
NEVER_CALLED_WITH_NONE = ("len", "isinstance")

# a matcher takes longer to make than to match
_BARE_STRING = m.Expr(value=m.SimpleString() | m.ConcatenatedString())
_TYPE_CHECKING = m.Name("TYPE_CHECKING")


@dataclass(frozen=True)
class Mutant:
    """One change of one node; ``key`` stays the same when lines or folders move."""

    key: str
    path: str
    function: str
    line: int
    before: str
    after: str
    nth: int
    """Which of the file's changes it is, in their order."""

    def source(self, text: str) -> str:
        """Return the file's text with the change made."""
        code = _code(text)
        change = code.changes[self.nth]
        mutated = code.module.deep_replace(change.node, change.changed)
        assert isinstance(mutated, cst.Module)
        return mutated.code

    def diff(self, text: str) -> list[str]:
        """Return the lines that change, with - and + in front."""
        lines = difflib.unified_diff(text.splitlines(), self.source(text).splitlines(), n=0, lineterm="")
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def draw(root: Path, folders: Iterable[str], seed: int, count: int) -> list[Mutant]:
    """Return ``count`` random mutants of the files under the folders; more of them only adds to the end.

    A mutant's place in the draw hangs on its key and the seed alone: the draw stays when other code changes.
    """
    waiting = sorted(every_mutant(root, folders), key=lambda mutant: _digest(f"{seed} {mutant.key}"))
    drawn: list[Mutant] = []
    while waiting and len(drawn) < count:
        missing = count - len(drawn)
        some, waiting = waiting[:missing], waiting[missing:]
        differing = _differing(root, some)
        drawn += [mutant for mutant in some if mutant in differing]
    return drawn


def every_mutant(root: Path, folders: Iterable[str]) -> list[Mutant]:
    """Return all mutants of the files under the folders, given relative to the root."""
    seen: Counter[str] = Counter()
    paths = sorted({path for folder in folders for path in python_files(root / folder)})
    return [mutant for path in paths for mutant in _mutants(path, str(path.relative_to(root)), seen)]


def python_files(place: Path) -> list[Path]:
    """List the Python files of a folder, or the one file that a place is."""
    return [place] if place.is_file() else sorted(place.rglob("*.py"))


class Functions:
    """Which function or class a line of a file belongs to."""

    def __init__(self, text: str) -> None:
        self._names: dict[int, str] = {}
        self._name(ast.parse(text), ())

    def at(self, line: int) -> str:
        """Return the dotted name, "" at the module's level."""
        return self._names.get(line, "")

    def _name(self, node: ast.AST, outer: tuple[str, ...]) -> None:
        """Name the lines of the definitions under a node, the inner ones last."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = (*outer, child.name)
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                self._names.update(dict.fromkeys(range(first, (child.end_lineno or first) + 1), ".".join(name)))
                self._name(child, name)
            else:
                self._name(child, outer)


def _differing(root: Path, mutants: Iterable[Mutant]) -> set[Mutant]:
    """Return those of the mutants whose files compile, and to something else than before; each file is read once."""
    differing: set[Mutant] = set()
    for path, some in groupby(sorted(mutants, key=lambda mutant: mutant.path), key=lambda mutant: mutant.path):
        text = (root / path).read_text()
        differing.update(mutant for mutant in some if _differs(text, mutant.source(text)))
    return differing


def _mutants(path: Path, name: str, seen: Counter[str]) -> Iterator[Mutant]:
    """Yield a file's mutants; ``seen`` numbers those that read alike."""
    text = path.read_text()
    code, functions = _code(text), Functions(text)
    for nth, change in enumerate(code.changes):
        function = functions.at(change.line)
        before, after = (code.module.code_for_node(part) for part in (change.node, change.changed))
        alike = f"{path.name}:{function}:{before}->{after}"
        seen[alike] += 1
        yield Mutant(_digest(f"{alike}:{seen[alike]}")[:12], name, function, change.line, before, after, nth)


@dataclass(frozen=True)
class _Change:
    """A node that can change, the line where it begins, and what it becomes."""

    node: cst.CSTNode
    line: int
    changed: cst.CSTNode


@dataclass(frozen=True)
class _Code:
    """A parsed file and all its changes, in the file's order."""

    module: cst.Module
    changes: list[_Change]


@lru_cache(maxsize=1)
def _code(text: str) -> _Code:
    """Parse a file's text and list its changes; the last file's are kept."""
    # a parsed text has each node once, so that the wrapper needs no copy
    wrapper = MetadataWrapper(cst.parse_module(text), unsafe_skip_copy=True)
    places = wrapper.resolve(PositionProvider)
    parents: dict[cst.CSTNode, cst.CSTNode] = {}
    changes = []
    for node, changed in _changed_nodes(wrapper.module, parents):
        placed = node
        while placed not in places:
            placed = parents[placed]
        changes.append(_Change(node, places[placed].start.line, changed))
    return _Code(wrapper.module, changes)


def _changed_nodes(
    module: cst.Module, parents: dict[cst.CSTNode, cst.CSTNode]
) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    """Yield each node that can change together with what it becomes; ``parents`` is filled on the way."""
    stack: list[cst.CSTNode] = [module]
    while stack:
        node = stack.pop()
        if _is_words(node):
            continue
        children = node.children
        parents.update(dict.fromkeys(children, node))
        stack += reversed(children)
        if isinstance(node, cst.SimpleString) and not _is_looked_up(node, parents):
            continue
        for kind, operator in _operators(type(node)):
            changes = [changed for changed in operator(node) if _tells(node, changed)]
            # of a string's three changes one is enough
            yield from ((node, changed) for changed in changes[: 1 if kind is cst.BaseString else None])


@cache
def _operators(of: type[cst.CSTNode]) -> list[tuple[type[cst.CSTNode], Callable[..., Iterable[cst.CSTNode]]]]:
    """Return mutmut's operators for nodes of a class, each with the class that it is for."""
    return [(kind, operator) for kind, operator in mutation_operators if issubclass(of, kind)]


def _is_words(node: cst.CSTNode) -> bool:
    """Say whether a node and all in it is a message, a docstring, a type, or a definition's trimming."""
    if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom | cst.Raise):
        return True
    if isinstance(node, cst.FunctionDef):
        return node.name.value in ("__repr__", "__str__")
    if isinstance(node, cst.Call):
        return _called(node) in (*WORDS, *NEVER_CALLED_WITH_NONE)
    if isinstance(node, cst.Arg) and node.keyword:
        return node.keyword.value in SILENT_KEYWORDS
    if isinstance(node, cst.FormattedString):
        return any(isinstance(part, cst.FormattedStringText) and " " in part.value for part in node.parts)
    return _is_bare_string(node) or _is_trimming(node)


def _is_bare_string(node: cst.CSTNode) -> bool:
    """Say whether a node is a docstring: a statement that is nothing but a string."""
    return m.matches(node, _BARE_STRING)


def _is_trimming(node: cst.CSTNode) -> bool:
    """Say whether a node is ``__all__``, a type's alias (CapWords) or a block that only type checkers read."""
    if isinstance(node, cst.If):
        return m.matches(node.test, _TYPE_CHECKING)
    if isinstance(node, cst.Assign) and isinstance(target := node.targets[0].target, cst.Name):
        name = target.value.lstrip("_")
        return target.value == "__all__" or (name[:1].isupper() and not name.isupper())
    return False


def _is_looked_up(node: cst.CSTNode, parents: Mapping[cst.CSTNode, cst.CSTNode]) -> bool:
    """Say whether a string is compared or a key; other strings are mostly names in messages."""
    if not isinstance(node, cst.SimpleString) or " " in node.value:
        return False
    parent = parents[node]
    while isinstance(parent, cst.Element | cst.Tuple | cst.Set | cst.List):
        parent = parents[parent]
    is_key = isinstance(parent, cst.DictElement) and parent.key is node
    return is_key or isinstance(parent, cst.Comparison | cst.ComparisonTarget | cst.Index)


def _tells(node: cst.CSTNode, changed: cst.CSTNode) -> bool:
    """Say whether a change is more than a crash: of calls and assignments only a keyword that goes is."""
    if isinstance(node, cst.Assign | cst.AnnAssign):
        return False
    if not isinstance(node, cst.Call) or not isinstance(changed, cst.Call):
        return True
    lost = [arg for arg in node.args if all(arg is not kept for kept in changed.args)]
    return len(changed.args) < len(node.args) and all(_is_option(arg) for arg in lost)


def _is_option(arg: cst.Arg) -> bool:
    """Say whether an argument is given by name, and is no message and no silent keyword."""
    if arg.keyword is None or arg.keyword.value in SILENT_KEYWORDS:
        return False
    message = isinstance(arg.value, cst.SimpleString) and " " in arg.value.value
    return not message and not isinstance(arg.value, cst.ConcatenatedString | cst.FormattedString)


def _called(node: cst.Call) -> str:
    """Return the last part of a called function's name."""
    function = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    return function.value if isinstance(function, cst.Name) else ""


def _differs(text: str, mutated: str) -> bool:
    """Say whether a mutated text compiles, and to something else."""
    try:
        return ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(text))
    except SyntaxError:
        return False


def _digest(text: str) -> str:
    """Return a number for a text that is the same in every process."""
    return hashlib.sha256(text.encode()).hexdigest()
