"""The defaults that docstrings name are those of the signatures."""

from __future__ import annotations

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

# In numpydoc: ``name : type, default=value``, or several names, with a value for each or one for all.
STATED = re.compile(r"^(\w+(?:, \w+)*) : .*default=(.+?)\.?$", re.M)
# Values that are no expressions; each stands for what code can't say as shortly.
WORDS = {
    "torch.nn.functional.cross_entropy", "METHODS", "(0.0, 0.1, ..., 0.9)", "(0.1, 0.2, ..., 0.9)", "NaN", "{}",
}  # fmt: skip


def documented() -> Iterator[tuple[str, Any, str]]:
    """Yield all functions and classes of the package: full name, object, docstring."""
    import nni_topo  # all of it is imported where this runs, and not where tests are collected

    for info in pkgutil.walk_packages(nni_topo.__path__, "nni_topo."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            is_one = inspect.isroutine(value) or inspect.isclass(value)
            if is_one and getattr(value, "__module__", "") == info.name:
                yield f"{info.name}.{name}", value, inspect.getdoc(value) or ""


def default_of(value: Any, name: str) -> Any:
    if is_dataclass(value):
        field = next(each for each in fields(value) if each.name == name)
        return field.default_factory() if field.default is MISSING else field.default  # type: ignore[misc]
    return inspect.signature(value).parameters[name].default


def stated_values(names: list[str], text: str) -> list[str]:
    """Split "50, 20" and "(1, 2) and (3, 4)" where there are as many values as names."""
    for between in (" and ", ", "):
        parts = text.split(between)
        if len(names) > 1 and len(parts) == len(names):
            return parts
    return [text] * len(names)


def test_docstrings_name_the_defaults_of_the_signatures() -> None:
    compared, wrong = 0, []
    for place, value, doc in documented():
        for listed, text in STATED.findall(doc):
            names = listed.split(", ")
            for name, stated in zip(names, stated_values(names, text), strict=True):
                default = default_of(value, name)
                if stated in WORDS:
                    continue
                compared += 1
                expected = eval(stated, {"math": math})
                if default != expected or isinstance(default, bool) != isinstance(expected, bool):
                    wrong.append(f"{place}: {name} is {default!r}, not {stated}")
    assert not wrong
    assert compared > 100
