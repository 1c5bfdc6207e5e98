"""Sentences without a download: those of the docstrings in installed packages.

A package belongs to one part only, so no sentence of the test part, nor one that quotes it, is learned from.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nni_topo.network.runtime.progress import bar

TOKENS = 32
Part = Literal["calibration", "validation", "test"]

PACKAGES: dict[Part, tuple[str, ...]] = {
    "calibration": ("torch", "transformers", "scipy", "numpy"),
    "validation": ("matplotlib",),
    "test": ("sklearn", "pandas"),
}
"""All of them are required by the package or its tests, so that they are installed where it is."""

_LEAST_WORDS, _MOST_WORDS = 5, 40
_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z`\"'])")
_PROSE = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()\-/`\".]*[.!?]$")


def missing() -> list[str]:
    """Return the packages whose docstrings are lacking."""
    return [name for names in PACKAGES.values() for name in names if importlib.util.find_spec(name) is None]


def versions() -> dict[str, str]:
    """Return the packages' versions: other versions have other sentences."""
    return {
        name: importlib.metadata.version("scikit-learn" if name == "sklearn" else name)
        for names in PACKAGES.values()
        for name in names
    }


def read(part: Part, count: int | None = None, seed: int = 0, cache: Path | None = None) -> list[str]:
    """Return sentences of a part, each once, in an order drawn from the seed; all, or so many.

    Reading takes a minute. ``cache`` is a folder that keeps what was read.
    """
    if cache is not None:
        _read_cache(cache / "sentences.json")
    earlier = {"calibration": (), "validation": ("calibration",), "test": ("calibration", "validation")}[part]
    seen = {sentence for other in earlier for sentence in _of_packages(PACKAGES[other])}  # type: ignore[index]
    found = [sentence for sentence in dict.fromkeys(_of_packages(PACKAGES[part])) if sentence not in seen]
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed)).tolist()
    if count is not None and count > len(found):
        raise ValueError(f"count must be at most {len(found)}, the sentences of {PACKAGES[part]}, got {count}")
    return [found[at] for at in order[:count]]


def tokens(tokenizer: Any, texts: list[str]) -> dict[str, Tensor]:
    """Return ids and the mask of the real tokens, both (sentences, TOKENS)."""
    found = tokenizer(texts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


def batches(inputs: dict[str, Tensor], size: int = 64) -> list[dict[str, Tensor]]:
    """Return inputs in batches."""
    count = len(inputs["input_ids"])
    return [{name: each[at : at + size] for name, each in inputs.items()} for at in range(0, count, size)]


def digest(texts: list[str]) -> str:
    """Return a short hash of sentences, for records."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:12]


_READ: dict[str, list[str]] = {}


def _read_cache(file: Path) -> None:
    """Fill what is read from a file, and write the file anew where a package's version has changed."""
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    for name, version in versions().items():
        if kept.get(name, {}).get("version") != version:
            kept[name] = {"version": version, "sentences": list(_of_package(name))}
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(kept), encoding="utf-8")
        _READ[name] = kept[name]["sentences"]


def _of_packages(names: tuple[str, ...]) -> Iterator[str]:
    for name in names:
        if name not in _READ:
            _READ[name] = list(_of_package(name))
        yield from _READ[name]


def _of_package(name: str) -> Iterator[str]:
    """Yield the sentences of a package's docstrings, file by file; the code isn't run."""
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"the package {name} must be installed, whose docstrings are read")
    for file in bar(f"docstrings of {name}", None, sorted(Path(found.origin).parent.rglob("*.py"))):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8", errors="replace"))
        except (SyntaxError, ValueError):  # templates, and files for other versions of Python
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _sentences(ast.get_docstring(node) or "")


def _sentences(docstring: str) -> Iterator[str]:
    """Yield what reads as sentences: no code, no lists of parameters."""
    for paragraph in docstring.split("\n\n"):
        text = " ".join(paragraph.split())
        if ">>>" in text or "::" in text or "---" in text:
            continue
        for sentence in _END.split(text):
            if _LEAST_WORDS <= len(sentence.split()) <= _MOST_WORDS and _PROSE.match(sentence):
                yield sentence
