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
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import libcst as cst
import libcst.matchers as m
from libcst.metadata import MetadataWrapper, ParentNodeProvider, PositionProvider
from mutmut.mutation.mutators import mutation_operators

WORDS = ("warn", "cast", "debug", "info", "warning", "error", "exception", "getLogger", "TypeVar")
"""Calls whose arguments are messages or types."""

# zip's `strict` only speaks in a program that is wrong already, `stacklevel` only moves a warning
SILENT_KEYWORDS = ("strict", "stacklevel")
NEVER_CALLED_WITH_NONE = ("len", "isinstance")


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
    """Which of the file's changes it is, in the order of `_changes`."""

    def source(self, text: str) -> str:
        """Return the file's text with the change made."""
        wrapper = MetadataWrapper(cst.parse_module(text))
        node, changed = next(c for i, c in enumerate(_changes(wrapper)) if i == self.nth)
        mutated = wrapper.module.deep_replace(node, changed)
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
    drawn: list[Mutant] = []
    for mutant in sorted(every_mutant(root, folders), key=lambda mutant: _digest(f"{seed} {mutant.key}")):
        text = (root / mutant.path).read_text()
        if len(drawn) < count and _differs(text, mutant.source(text)):
            drawn.append(mutant)
        if len(drawn) == count:
            break
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


def _mutants(path: Path, name: str, seen: Counter[str]) -> Iterator[Mutant]:
    """Yield a file's mutants; ``seen`` numbers those that read alike."""
    text = path.read_text()
    wrapper = MetadataWrapper(cst.parse_module(text))
    places, parents, functions = wrapper.resolve(PositionProvider), wrapper.resolve(ParentNodeProvider), Functions(text)
    for nth, (node, changed) in enumerate(_changes(wrapper)):
        placed = node
        while placed not in places:
            placed = parents[placed]
        line = places[placed].start.line
        function = functions.at(line)
        before, after = (wrapper.module.code_for_node(part) for part in (node, changed))
        alike = f"{path.name}:{function}:{before}->{after}"
        seen[alike] += 1
        yield Mutant(_digest(f"{alike}:{seen[alike]}")[:12], name, function, line, before, after, nth)


def _changes(wrapper: MetadataWrapper) -> Iterator[tuple[cst.CSTNode, cst.CSTNode]]:
    """Yield each node that can change together with what it becomes, in the file's order."""
    parents = wrapper.resolve(ParentNodeProvider)
    stack: list[cst.CSTNode] = [wrapper.module]
    while stack:
        node = stack.pop()
        if _is_words(node):
            continue
        stack += reversed(node.children)
        if isinstance(node, cst.SimpleString) and not _is_looked_up(node, parents):
            continue
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                changes = [changed for changed in operator(node) if _tells(node, changed)]
                # of a string's three changes one is enough
                yield from ((node, changed) for changed in changes[: 1 if kind is cst.BaseString else None])


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
    return m.matches(node, m.Expr(value=m.SimpleString() | m.ConcatenatedString()))


def _is_trimming(node: cst.CSTNode) -> bool:
    """Say whether a node is ``__all__``, a type's alias (CapWords) or a block that only type checkers read."""
    if isinstance(node, cst.If):
        return m.matches(node.test, m.Name("TYPE_CHECKING"))
    if isinstance(node, cst.Assign) and isinstance(target := node.targets[0].target, cst.Name):
        name = target.value.lstrip("_")
        return target.value == "__all__" or (name[:1].isupper() and not name.isupper())
    return False


def _is_looked_up(node: cst.CSTNode, parents: object) -> bool:
    """Say whether a string is compared or a key; other strings are mostly names in messages."""
    assert hasattr(parents, "__getitem__")
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
