"""Keys that NNI 2 had in a config_list, rewritten as NNI 3 spells them.

NNI rewrites them too, but only if one stands in the first entry, turns ``total_sparsity`` into a key that its
own schema refuses, and lets an entry with ``exclude`` take out every module that has one of its types *or* names.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from nni.compression.base.config import select_modules_by_config
from torch import nn

from nni_topo.errors import ConfigError

LEGACY_KEYS = {
    "sparsity": "sparse_ratio",
    "sparsity_per_layer": "sparse_ratio",
    "total_sparsity": "sparse_ratio with global_group_id",
    "max_sparsity_per_layer": "max_sparse_ratio",
    "op_partial_names": "op_names_re",
    "exclude": "exclude_op_names",
}
"""Each key of NNI 2 and what NNI 3 calls it."""

_RATIOS = ("sparsity", "sparsity_per_layer", "total_sparsity")


def modern_config(model: nn.Module, config_list: Sequence[Any]) -> list[Any]:
    """Rewrite the keys of NNI 2 in a config_list, wherever they stand.

    Parameters
    ----------
    model : torch.nn.Module
        The model; an entry with ``exclude`` is applied to its modules.
    config_list : sequence of dict
        Entries in the words of NNI 2, NNI 3 or both. It isn't changed. Anything that isn't a dict is passed on.

    Returns
    -------
    list of dict
        Entries in the words of NNI 3. An entry with ``exclude`` is gone: the modules that it matches are
        excluded from the entries before it, as NNI 2 did.

    Raises
    ------
    ConfigError
        If an entry holds two keys for one thing.

    Warns
    -----
    FutureWarning
        Once for each old key, with the place and the new key.

    Examples
    --------
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore", FutureWarning)
    ...     modern_config(nn.Sequential(nn.Linear(2, 2)), [{"op_types": ["Linear"], "sparsity": 0.5}])
    [{'op_types': ['Linear'], 'sparse_ratio': 0.5}]
    """
    modern: list[Any] = []
    for index, entry in enumerate(deepcopy(list(config_list))):
        if not isinstance(entry, dict) or not LEGACY_KEYS.keys() & entry.keys():
            modern.append(entry)
            continue
        place = f"config_list[{index}]"
        _warn(entry, place)
        _rename_selection(entry, place)
        if entry.pop("exclude", False):
            _exclude(model, entry, modern)
        else:
            modern.append(_rename_ratio(entry, index))
    return modern


def _warn(entry: dict[str, Any], place: str) -> None:
    for key in LEGACY_KEYS:
        if key in entry:
            warnings.warn(f"{key!r} is a key of NNI 2, write {LEGACY_KEYS[key]} ({place})", FutureWarning, stacklevel=4)


def _rename_selection(entry: dict[str, Any], place: str) -> None:
    if "op_partial_names" not in entry:
        return
    _refuse_both(entry, "op_partial_names", "op_names_re", place)
    entry["op_names_re"] = [f".*{re.escape(name)}.*" for name in entry.pop("op_partial_names")]


def _rename_ratio(entry: dict[str, Any], index: int) -> dict[str, Any]:
    place = f"config_list[{index}]"
    given = [key for key in _RATIOS if key in entry]
    for key in given:
        _refuse_both(entry, key, next((other for other in given if other != key), "sparse_ratio"), place)
        entry["sparse_ratio"] = entry.pop(key)
    if given == ["total_sparsity"]:
        entry.setdefault("global_group_id", f"total_sparsity_{index}")
    if "max_sparsity_per_layer" in entry:
        _refuse_both(entry, "max_sparsity_per_layer", "max_sparse_ratio", place)
        entry["max_sparse_ratio"] = entry.pop("max_sparsity_per_layer")
    return entry


def _refuse_both(entry: dict[str, Any], old: str, new: str, place: str) -> None:
    if new in entry:
        raise ConfigError(f"a config_list entry must hold one key for one thing, got {old!r} and {new!r} ({place})")


def _exclude(model: nn.Module, entry: dict[str, Any], before: list[Any]) -> None:
    names = list(select_modules_by_config(model, entry)[0])
    for other in before:
        if isinstance(other, dict):
            other["exclude_op_names"] = sorted({*other.get("exclude_op_names", []), *names})
