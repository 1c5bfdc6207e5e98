"""The ``nni-topo`` command: it prints its verbs, and finds wrong flags, before it loads PyTorch and NNI to run one."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

VERBS = {
    "list": "List pruners, recovery methods, models and data by name.",
    "demo": "Train a small network on digits, prune it by several pruners, and compare.",
    "compare": "Compare pruners at equal cost; a comparison resumes where it was stopped.",
    "report": "Write report.html in folders of finished or running runs, and print the tables of comparisons.",
    "analyze": "Study one model without changing it.",
    "experiment": "Run NNI's experiments and show their results.",
    "prune": "Prune one trained model by a YAML file.",
    "shrink": "Make one trained model smaller from unlabelled images: select channels, reconstruct weights, distil.",
    "profile": "Measure one model before and after pruning, in turns: time, throughput, memory, MACs, parameters.",
    "doctor": "Check versions, NNI, torch and torchvision, data, GPU, NNI's port and extras; say what to do.",
    "completion": 'Print a script that completes verbs and flags: eval "$(nni-topo completion bash)".',
}
HELP = ("-h", "--help")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line as :func:`nni_topo.cli.main` does; print help from the source, without loading it."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen("nni-topo", VERBS, words, f"nni_topo {version()}")
    explain(words)
    if wrong := first_mistake(words):
        print(wrong, file=sys.stderr)
        return 2
    if arguments is None and "" not in sys.path:
        sys.path.append("")  # a model that is named as module:function may lie in the working folder
    from nni_topo import cli

    return cli.main(words)


def chosen(name: str, choices: Mapping[str, str], words: Sequence[str], version: str = "") -> str:
    """Return the first word if it is one of the choices, each with a line of help; else print the choices and exit."""
    parser = argparse.ArgumentParser(prog=name, description="Topological pruning for NNI on current PyTorch.")
    parser.add_argument("--version", action="version", version=version)
    known = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, line in choices.items():
        known.add_parser(verb, help=line.replace("%", "%%"), add_help=False)
    if not words:
        parser.print_help()
        parser.exit(2)
    verb = parser.parse_args(words[:1]).verb
    return str(verb)


def version() -> str:
    """Return the package's version, as it is written in its source."""
    found = re.search(r'__version__ = "(.+)"', (_package() / "_version.py").read_text())
    return found[1] if found else "of an unknown version"


def explain(words: Sequence[str]) -> None:
    """If words ask what a verb is and takes, say it and leave.

    Verbs are dataclasses: their fields are the flags, and the comments after these say what they are for. All of it is
    read from the source, since importing a verb imports PyTorch.
    """
    if not set(HELP) & set(words):
        return
    has_parts = words[0] in ("analyze", "experiment")
    if has_parts and words[1] in HELP:
        parts = _studies() if words[0] == "analyze" else ["run", "status", "best", "export"]
        kinds = {part: _verb([words[0], part]) for part in parts}
        lines = {part: _docstring(kind).partition("\n")[0] for part, kind in kinds.items() if kind is not None}
        chosen(f"nni-topo {words[0]}", lines, HELP[1:], f"nni_topo {version()}")
    named = words[: 2 if has_parts else 1]
    source = _verb(named)
    if source is not None:
        _parser(f"nni-topo {' '.join(named)}", source).print_help()
        sys.exit(0)


def first_mistake(words: Sequence[str]) -> str:
    """Return what is wrong with the flags of a verb, as far as its source tells; empty if nothing is.

    Looked at are names of flags, numbers and their ranges, which the comments after the fields give, choices, names of
    models, data, pruners and recovery methods, and whether the output folder can be written to. Everything else is
    looked at when the verb is loaded.
    """
    named = words[: 2 if words[0] in ("analyze", "experiment") else 1]
    source = _verb(named)
    if source is None or len(named) > len(words):
        return ""
    fields = _fields(source)
    place = f"nni-topo {' '.join(named)}"
    given = _flags(words[len(named) :], source)
    # A word after a flag without a value may be one of these.
    has_positional = any("Positional" in field.kind for field in fields.values())
    reasons = []
    for name, values in given:
        flag = f"--{name.replace('_', '-')}"
        if name not in fields:
            known = [f"--{each.replace('_', '-')}" for each in fields]
            reasons.append(f"a flag must be a known one, got {flag}{_nearest(flag, known)}")
        elif fields[name].kind == "bool" and values and not has_positional:
            reasons.append(f"a flag without a value must stand alone, got {values[0]!r} after it ({flag})")
        elif wrong := _mistake(name, values, fields[name]):
            reasons.append(f"{wrong} ({flag})")
    for name, field in fields.items():
        if field.default is None and "Positional" not in field.kind and name not in dict(given):
            flag = f"--{name.replace('_', '-')}"
            reasons.append(f"{place} must get {flag} {name.upper()}, {field.comment}, got none")
    return f"{place}: {reasons[0]}; {place} --help lists all flags" if reasons else ""


def _flags(words: Sequence[str], source: _Class) -> list[tuple[str, list[str]]]:
    """Return the flags among words with their values; where --plan names a file of flags, those of the file first."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word.startswith("--") and len(word) > 2:
            flag, has_value, value = word[2:].partition("=")
            found.append((flag.replace("-", "_"), [value] if has_value else []))
        elif found:
            found[-1][1].append(word)
    plans = [values[0] for name, values in found if name == "plan" and values]
    is_of_flags = any("whose keys are these flags" in each.comment for each in _fields(source).values())
    return [*(_flags_of_file(Path(plans[-1])) if plans and is_of_flags else []), *found]


def _flags_of_file(path: Path) -> list[tuple[str, list[str]]]:
    """Return the flags that a YAML file gives; none of a file that can't be read, which is looked at later."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    found: list[tuple[str, list[str]]] = []
    for key, value in content.items() if isinstance(content, dict) else ():
        if value is None or isinstance(value, (bool, dict)):
            found.append((str(key).replace("-", "_"), []))
        else:
            values = value if isinstance(value, list) else [value]
            found.append((str(key).replace("-", "_"), [str(each) for each in values]))
    return found


def _mistake(name: str, values: Sequence[str], field: _Field) -> str:
    """Say what is wrong with the values of a flag; nothing if the source doesn't tell."""
    kind = re.sub(r"^tyro\.conf\.\w+\[(.*)\]$", r"\1", field.kind).removesuffix(" | None")
    is_number = re.fullmatch(r"(int|float)|tuple\[(int|float), \.\.\.\]", kind)
    for value in values:
        if is_number and value != "None":
            wanted = "a number" if "float" in kind else "an integer"
            try:
                number = float(value) if "float" in kind else int(value)
            except ValueError:
                return f"{name} must be {wanted}, got {value!r}"
            if rule := _broken_rule(number, field.comment):
                return f"{name} must be {rule}, got {value}"
        if name in _TABLES and kind == "str":
            known = _names(name)
            if value not in known and not re.search(r"[:/\\.]", value) and not Path(value).exists():
                return f"{name} must be a known name, got {value!r}{_nearest(value, known)}"
        if name == "out" and kind == "Path" and (where := _unwritable(Path(value))):
            return f"an output folder must be a folder that can be written to, got one that can't: {where}"
    return ""


def _broken_rule(value: float, comment: str) -> str:
    """Return the rule in a field's comment that a number breaks, such as "in (0, 1]" or "at least 1"; else nothing."""
    if re.search(rf"(^|; ){value:g}: ", comment):  # a number that means something else, such as -1
        return ""
    if found := re.search(r"in ([\[(])(-?[\d.]+), (-?[\d.]+)([\])])", comment):
        low, high = float(found[2]), float(found[3])
        is_above = value >= low if found[1] == "[" else value > low
        is_below = value <= high if found[4] == "]" else value < high
        return "" if is_above and is_below else found[0]
    if found := re.search(r"(at least|above) (-?\d+)", comment):
        is_kept = value >= float(found[2]) if found[1] == "at least" else value > float(found[2])
        return "" if is_kept else found[0]
    return ""


# By flag, the files with its table of names, the class of the records, and the entry points that add some.
_TABLES = {
    "model": (("zoo/models.py",), "ModelInfo", ""),
    "data": (("zoo/data.py",), "DataInfo", ""),
    "pruner": (("pruners/registry.py",), "PrunerInfo", "nni_topo.pruners"),
    "method": (("recovery/registry.py", "studies/recovery_rules.py"), "RecoveryInfo", "nni_topo.recoveries"),
}


def _names(flag: str) -> list[str]:
    """Return the names that a flag takes, from the records in the source and from installed packages."""
    files, record, group = _TABLES[flag]
    names = [point.name for point in entry_points(group=group)] if group else []
    for file in files:
        for node in ast.walk(_tree(_package() / file)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == record and node.args:
                first = node.args[0]
                names += [str(first.value)] if isinstance(first, ast.Constant) else []
    return names


def _nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint at the names that are nearest to an unknown one, as `nni_topo.errors.unknown_name` does."""
    names = sorted(set(known))
    folded = {each.casefold(): each for each in names}
    near = [folded[each] for each in difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)]
    return f"; did you mean {', '.join(near)}?" if near else f"; known: {', '.join(names)}"


def _unwritable(path: Path) -> str:
    """Return what keeps a folder from being made and written to; nothing if nothing does."""
    place = path.expanduser().absolute()
    while not os.path.lexists(place):
        place = place.parent
    return "" if place.is_dir() and os.access(place, os.W_OK) else str(place)


@dataclass(frozen=True)
class _Class:
    """A class in a file of the package, as the parser sees it."""

    node: ast.ClassDef
    file: Path


@dataclass(frozen=True)
class _Field:
    """A field of a dataclass: its type, its default and the comment after it."""

    kind: str
    default: ast.expr | None
    comment: str
    file: Path


def _package() -> Path:
    spec = importlib.util.find_spec("nni_topo")  # which doesn't import it
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def _tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def _studies() -> list[str]:
    """Name the files and folders of `nni_topo.studies.analysis` that hold a study."""
    folder = _package() / "studies" / "analysis"
    names = sorted(each.stem for each in folder.iterdir() if each.suffix == ".py" or (each / "__init__.py").exists())
    return [name for name in names if _verb(["analyze", name]) is not None]


def _verb(words: Sequence[str]) -> _Class | None:
    """Find the class of a verb by its name."""
    package = _package()
    if words[0] == "analyze":
        place = package / "studies" / "analysis" / words[-1]
        files, name = [place.with_suffix(".py"), *sorted(place.glob("*.py"))], f"Analyze{words[-1].capitalize()}"
    elif words[0] == "experiment":
        files, name = [package / "cli" / "experiment.py"], words[-1].capitalize()
    else:
        files, name = (
            sorted({*(package / "cli").glob("*.py")} - {package / "cli" / "experiment.py"}),
            words[0].capitalize(),
        )
    for file in files:
        for node in _tree(file).body if file.exists() else ():
            if isinstance(node, ast.ClassDef) and node.name == name:
                return _Class(node, file)
    return None


def _defined(name: str, file: Path) -> tuple[ast.stmt, Path] | None:
    """Find the class or the constant that a name stands for in a file, also where it is imported from another."""
    for node in _tree(file).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node, file
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return node, file
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "nni_topo":
            for each in node.names:
                if (each.asname or each.name) == name:
                    place = _package().parent.joinpath(*node.module.split("."))
                    return _defined(each.name, place / "__init__.py" if place.is_dir() else place.with_suffix(".py"))
    return None


def _bases(source: _Class) -> list[_Class]:
    """List a class and those that it inherits from, the most general one last."""
    found = [source]
    for base in source.node.bases:
        name = base.value if isinstance(base, ast.Subscript) else base
        place = _defined(name.id, source.file) if isinstance(name, ast.Name) else None
        if place is not None and isinstance(place[0], ast.ClassDef):
            found += _bases(_Class(place[0], place[1]))
    # One that is inherited from twice comes after both that inherit from it.
    return [each for index, each in enumerate(found) if each not in found[index + 1 :]]


def _docstring(source: _Class) -> str:
    return inspect.cleandoc(ast.get_docstring(source.node) or "")


def _fields(source: _Class) -> dict[str, _Field]:
    """Return the fields of a dataclass by their names, those of the classes it inherits from first."""
    found: dict[str, _Field] = {}
    for each in reversed(_bases(source)):
        lines = each.file.read_text(encoding="utf-8").splitlines()
        for node in each.node.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                kind = ast.unparse(node.annotation)
                comment = lines[(node.end_lineno or node.lineno) - 1].partition("  # ")[2]
                if not kind.startswith("ClassVar"):
                    found[node.target.id] = _Field(kind, node.value, comment, each.file)
    return found


def _parser(name: str, source: _Class) -> argparse.ArgumentParser:
    """Return what shows a verb's flags; it reads none."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=name, description=_docstring(source), formatter_class=formatter)
    for field, what in _fields(source).items():
        kind, positional = re.subn(r"^tyro\.conf\.Positional\[(.*)\]$", r"\1", what.kind)
        kind, repeated = re.subn(r"^tyro\.conf\.UseAppendAction\[(.*)\]$", r"\1", kind)
        knobs: dict[str, Any] = {"help": f"{what.comment} {_default(what)}".strip().replace("%", "%%")}
        if kind == "bool":
            knobs["action"] = "store_true"
        else:
            several = not repeated and (kind == "Names" or kind.startswith(("tuple", "dict")))
            knobs |= {"metavar": _metavar(kind), "nargs": "*" if several else None}
        if positional:
            knobs |= {"metavar": field.upper(), "nargs": knobs["nargs"] or ("?" if what.default else None)}
            parser.add_argument(field, **knobs)
        else:
            parser.add_argument(f"--{field.replace('_', '-')}", required=what.default is None, **knobs)
    return parser


def _metavar(kind: str) -> str:
    """Write down what a flag takes: ``float | None`` as FLOAT, ``Literal['a', 'b']`` as {a,b}, ``Names`` as NAME."""
    if kind == "Names":
        return "NAME"
    choices = re.findall(r"'([^']*)'", kind)
    names = [name for name in re.findall(r"\b[A-Za-z]+\b", re.sub(r"'[^']*'", "", kind)) if name not in _CONTAINERS]
    words = [*dict.fromkeys(name.upper() for name in names), *([f"{{{','.join(choices)}}}"] if choices else [])]
    return "|".join(words)


_CONTAINERS = {"None", "Literal", "tuple", "dict", "Any"}


def _default(what: _Field) -> str:
    """Write down the default of a field; nothing where it is empty, or where the comment says what None means."""
    if what.default is None:
        return "(required)"
    value = _value(what.default, what.file)
    if value is None or value is False or value in ((), ""):
        return ""
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else value
    return f"(default: {shown})"


def _value(node: ast.expr, file: Path) -> Any:
    """Return what an expression of a file stands for; None where only Python could say it."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_value(each, file) for each in node.elts)
    if isinstance(node, ast.Name):
        place = _defined(node.id, file)
        return _value(place[0].value, place[1]) if place is not None and isinstance(place[0], ast.Assign) else None
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        # the default of another dataclass's field, by the class or by an object made without arguments
        place = _defined(node.value.id, file)
        if place is not None and isinstance(place[0], ast.Assign) and isinstance(place[0].value, ast.Call):
            kind = place[0].value.func
            place = _defined(kind.id, place[1]) if isinstance(kind, ast.Name) else None
        if place is not None and isinstance(place[0], ast.ClassDef):
            field = _fields(_Class(place[0], place[1])).get(node.attr)
            return _value(field.default, field.file) if field is not None and field.default is not None else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Path":
        return _value(node.args[0], file)
    return None


if __name__ == "__main__":
    sys.exit(main())
