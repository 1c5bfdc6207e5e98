"""The card of a pruned model of Transformers: ``README.md`` in its folder, as the Hugging Face hub shows it."""

from __future__ import annotations

import hashlib
import logging
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nni_topo._version import __version__
from nni_topo.network.runtime.reports import ModelReport

CARD = "README.md"
_TAGS = ["nni_topo", "pruned"]
_PACKAGES = ("torch", "transformers")
# The last line of a card holds a digest of the other lines, which shows whether someone has changed them.
_MARK = "<!-- written by nni_topo.save_pretrained, which replaces this file until someone changes it: {} -->\n"
_logger = logging.getLogger(__name__)


def model_card(model: Any, report: ModelReport) -> str:
    """Return the text of a card: metadata for the hub, the report, and how to load the model."""
    from huggingface_hub import ModelCardData

    base = _base_model(model.config)
    metadata = ModelCardData(base_model=base, library_name="transformers", tags=list(_TAGS))
    name = type(model).__name__
    origin = f" from [{base}](https://huggingface.co/{base})" if base is not None else ""
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {name}, pruned",
        "",
        f"This network was made{origin} by structured pruning with nni_topo. The figures are those of the network as "
        "it was pruned; what was changed or trained after that isn't in them.",
        "",
        report.to_markdown(),
        "",
        "## How to load it",
        "",
        "```python",
    ]
    import transformers

    if getattr(transformers, name, None) is type(model):
        lines += [f"from transformers import {name}", ""]
    lines += [f'model = {name}.from_pretrained("path of this folder")', "```", ""]
    if getattr(model.config, "pruned_heads", None):
        lines.append("It needs Transformers 4, which reads from its config how many heads each block has.")
    else:
        lines.append("It needs Transformers alone, not nni_topo.")
    # nni_topo itself may run from a checkout that isn't installed.
    known = {"nni_topo": __version__, **{package: version(package) for package in _PACKAGES}}
    versions = ", ".join(f"{package} {number}" for package, number in known.items())
    lines += ["", f"Saved with {versions}.", "", ""]
    text = "\n".join(lines)
    return text + _MARK.format(_digest(text))


def may_write_card(place: Path) -> bool:
    """Say whether a card may be written: nothing is there, or a card of this package that nobody has changed."""
    if not os.path.lexists(place):
        return True
    if place.is_file():
        lines = place.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
        text, _, mark = lines.rstrip("\n").rpartition("\n")
        if f"{mark}\n" == _MARK.format(_digest(f"{text}\n")):
            return True
    _logger.info("the model's card isn't written, because %s isn't a card of nni_topo's, or was changed", place)
    return False


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _base_model(config: Any) -> str | None:
    """Return the name on the hub that a model was loaded by; None if it wasn't loaded from there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    name = getattr(config, "_name_or_path", None)
    if not isinstance(name, str) or os.path.exists(name):
        return None
    try:
        is_cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return None
    # Up to 5.17 Transformers notes the commit of what it has loaded from the hub, and none for a folder of such a name.
    # Later versions don't, but what was loaded from the hub lies in its cache.
    return name if is_cached or getattr(config, "_commit_hash", None) is not None else None
