"""Registries of classes by name, for pruners and recovery methods; third-party packages can add entries."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import entry_points
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Generic, TypeVar

from nni_topo.errors import ConfigError, raised, shown, unknown_name
from nni_topo.rules import check_fields, is_class

Made = TypeVar("Made")  # type of the objects that a registered class makes
_logger = logging.getLogger(__name__)


def imported(path: str, what: str) -> Any:
    """Import what ``"package.module:Name"`` or ``"folder/file.py:Name"`` names; ConfigError if that fails.

    The error begins with ``what``.
    """
    module, _, name = path.rpartition(":")
    try:
        return attrgetter(name)(_of_file(module) if module.endswith(".py") else importlib.import_module(module))
    except Exception as error:  # code of a user's file runs, and may raise anything
        raise ConfigError(f"{what} that can be imported, got {path!r}: {raised(error)}") from error


def _of_file(path: str) -> ModuleType:
    """Return the module of a Python file, under the file's name; files in its folder can be imported, too."""
    file = Path(path).resolve()
    known = sys.modules.get(file.stem)
    if known is not None and getattr(known, "__file__", None) == str(file):
        return known
    if known is not None:
        raise ImportError(f"a module {file.stem} is there already ({known.__file__}): rename the file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError("it isn't a Python file")
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    made = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(made)
    except BaseException:
        del sys.modules[file.stem]
        raise
    return made


@dataclass(frozen=True)
class ClassInfo(Generic[Made]):
    """Record of a registered class, which is imported only when it is needed."""

    kind: ClassVar[str]  # word for such a class in messages, e.g. "pruner"
    base: ClassVar[type]  # base class that it must derive from
    name: str
    path: str
    summary: str

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def origin(self) -> str:
        """The package that holds the class: ``"nni_topo"``, ``"nni"`` or a third party's."""
        return self.path.partition(":")[0].partition(".")[0]

    def load(self) -> Callable[..., Made]:
        """Import and return the class, or its class method; ConfigError if it is missing or of another base class."""
        found: Callable[..., Made] = imported(self.path, f"a {self.kind} must be a class")
        owner = getattr(found, "__self__", found)  # the class of a class method
        if not (is_class(owner) and issubclass(owner, self.base)):
            base = f"{self.base.__module__}.{self.base.__qualname__}"
            raise ConfigError(f"a {self.kind} must be a class of {base}, got {found!r} ({self.path})")
        return found

    def knobs(self) -> tuple[str, ...]:
        """Return the argument names of the class or class method."""
        return tuple(inspect.signature(self.load()).parameters)


Info = TypeVar("Info", bound=ClassInfo[Any])


class Registry(Generic[Info]):
    """Records of one kind of class, by name; ``group``: entry points through which other packages add classes."""

    def __init__(self, record: type[Info], group: str) -> None:
        self.table: dict[str, Info] = {}
        self._record, self._group = record, group

    def register(self, *infos: Info) -> None:
        """Add records; ConfigError if another class already has the name."""
        for info in infos:
            known = self.table.get(info.name)
            if known is not None and known.path != info.path:
                taken = f"got {info.name!r}, taken by {known.path} ({type(info).__name__})"
                raise ConfigError(f"a {info.kind}'s name must be free, {taken}")
            self.table[info.name] = info

    def names(self, pattern: str) -> list[str]:
        """Return the names that match a shell pattern, sorted."""
        return sorted(name for name in self.table if fnmatchcase(name, pattern))

    def info(self, name: str, place: str, argument: str = "") -> Info:
        """Return the record of a name, or of ``package.module:Class``; ConfigError if the name is unknown.

        ``place`` and ``argument``, for the message: the function or file that got the name, and its argument.
        """
        kind = self._record.kind
        if not isinstance(name, str):
            raise ConfigError((argument or f"a {kind}'s name") + f" must be text, got {shown(name)} ({place})")
        if ":" in name:
            found = self._record(name, name, "a third party's")
            found.load()  # raises ConfigError if the class doesn't fit
            return found
        if name not in self.table:
            raise unknown_name(argument or kind, name, self.table, place)
        return self.table[name]

    def register_entry_points(self) -> None:
        """Register the classes that installed packages offer as entry points ``name = package.module:Class``."""
        for point in entry_points(group=self._group):
            package = point.dist.name if point.dist else "a third party"
            try:
                self.register(self._record(point.name, point.value, f"of {package}"))
            except ConfigError as error:  # another package's error mustn't break the import of this one
                _logger.warning("an entry point of %s is left out: %s", package, error)
