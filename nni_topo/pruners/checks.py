"""What is checked about a model and its config_list before NNI wraps anything."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from nni.compression.base.config import default_config_schema, select_modules_by_config
from nni.compression.base.setting import PruningSetting
from nni.compression.base.target_space import PruningTargetSpace
from schema import SchemaError
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.layers import CONVOLUTIONS, check_names

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
    """Return a copy of a config_list in NNI 3's words; warn of NNI 2's keys, refuse two keys for one thing."""
    modern: list[Any] = []
    for index, entry in enumerate(deepcopy(list(config_list))):
        if not isinstance(entry, dict) or not LEGACY_KEYS.keys() & entry.keys():
            modern.append(entry)
            continue
        place = f"config_list[{index}]"
        _warn(entry, place)
        _rename_selection(entry, place)
        # As in NNI 2: what the entry matches is left out of the entries before it, not of those behind.
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


_logger = logging.getLogger(__name__)

_RULES = ("sparse_ratio", "sparse_threshold")


def check_request(
    model: nn.Module,
    config_list: list[dict[str, Any]],
    existed_wrappers: Mapping[str, Any] | None = None,
    *,
    needs_rule: bool = True,
) -> list[dict[str, Any]]:
    """Return a checked config_list in NNI 3's words, or raise ConfigError or DataError; the model isn't changed."""
    if not isinstance(config_list, (list, tuple)):
        raise ConfigError(f"config_list must be a list of dicts, got {type(config_list).__name__} (config_list)")
    # With inherited wrappers the config_list may be empty, as that of NNI's LinearPruner is.
    if not config_list and existed_wrappers is None:
        raise ConfigError("a config_list must have at least one entry, got none (config_list)")
    _check_unwrapped(model, existed_wrappers or {})
    check_names(model, config_list)
    matched: dict[str, nn.Module] = {}
    modern = modern_config(model, config_list)
    for index, config in enumerate(modern):
        place = f"config_list[{index}]"
        _check_entry(config, place)
        modules, _, _ = select_modules_by_config(model, config)
        if not modules:
            _logger.warning("%s matches no module: %s", place, config)
        matched.update(modules)
    if needs_rule:
        _check_rules(modern)
    if config_list and not matched:
        types = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise ConfigError(
            f"config_list must match at least one module, got none; layer types in this model: {', '.join(types)} "
            "(config_list)"
        )
    for name, module in matched.items():
        _check_module(name, module)
    return modern


def matched_modules(model: nn.Module, config_list: list[dict[str, Any]]) -> dict[str, nn.Module]:
    """Return the modules that a checked config_list names, by name in network order."""
    found: dict[str, nn.Module] = {}
    for config in config_list:
        found.update(select_modules_by_config(model, config)[0])
    return {name: found[name] for name, _ in model.named_modules(remove_duplicate=False) if name in found}


def _check_unwrapped(model: nn.Module, existed_wrappers: Mapping[str, Any]) -> None:
    own = {id(wrapper) for wrapper in existed_wrappers.values()}
    for name, module in model.named_modules():
        wrapper = getattr(module, "_nni_wrapper", None)
        if wrapper is not None and id(wrapper) not in own:
            raise ConfigError(
                "a model must not be wrapped by another compressor; call its unwrap_model() or use from_compressor, "
                f"got a wrapped module ({name})"
            )


def _check_entry(config: Any, place: str) -> None:
    if not isinstance(config, dict):
        raise ConfigError(f"a config_list entry must be a dict, got {type(config).__name__} ({place})")
    try:
        default_config_schema("pruning").validate(config)
    except SchemaError as error:
        raise ConfigError(f"a config_list entry must follow NNI's schema; {_reason(error)} ({place})") from error
    settings = {
        "": config,
        **{f".target_settings.{name}": s for name, s in config.get("target_settings", {}).items()},
    }
    for suffix, setting in settings.items():
        ratio = setting.get("sparse_ratio")
        if ratio is not None and not 0.0 <= ratio < 1.0:
            raise ConfigError(f"sparse_ratio must be in [0, 1), got {ratio} ({place}{suffix})")
        threshold = setting.get("sparse_threshold")
        if threshold is not None and math.isnan(threshold):
            raise ConfigError(f"sparse_threshold must be a number, got {threshold} ({place}{suffix})")


def _check_rules(config_list: Sequence[dict[str, Any]]) -> None:
    """Refuse entries that say nowhere how much goes: they would prune nothing, or make NNI fail without a word."""
    ruled = [config for config in config_list if any(key in s for s in _settings(config) for key in _RULES)]
    groups = {group for config in ruled for group in _groups(config)}
    for index, config in enumerate(config_list):
        if config not in ruled and not groups & _groups(config):
            raise ConfigError(
                "a config_list entry must have a sparse_ratio or a sparse_threshold, got neither "
                f"(config_list[{index}])"
            )


def _settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an entry and what it says of single targets."""
    return [config, *config.get("target_settings", {}).values()]


def _groups(config: dict[str, Any]) -> set[int | str]:
    return {s["dependency_group_id"] for s in _settings(config) if "dependency_group_id" in s}


def _reason(error: SchemaError) -> str:
    return " ".join(str(part) for part in dict.fromkeys(error.autos + error.errors) if part)


def _check_module(name: str, module: nn.Module) -> None:
    if type(module).__name__ not in PruningSetting.registry:
        known = ", ".join(sorted(PruningSetting.registry))
        raise ConfigError(
            f"a pruned module's type must be registered with NNI's PruningSetting, got {type(module).__name__}; "
            f"known: {known} ({name})"
        )
    for target, tensor in module.named_parameters(recurse=False):
        if not tensor.is_floating_point():
            raise DataError(f"weights must be real floating-point tensors, got {tensor.dtype} ({name}.{target})")
        bad = int((~torch.isfinite(tensor.detach())).sum())
        if bad:
            raise DataError(f"weights must be finite, got {bad} NaN or infinite values ({name}.{target})")


def check_weight_target(name: str, target: str, space: PruningTargetSpace, what: str) -> None:
    """Raise unless a target is a linear layer's or convolution's weight, and not empty; ``what`` begins the message."""
    module = space._wrapper.module
    if target != "weight" or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        raise ConfigError(
            f"{what} of a Linear, Conv1d, Conv2d or Conv3d, got the {target} of a {type(module).__name__} ({name})"
        )
    if space.target is None or space.target.numel() == 0:
        raise DataError(f"a pruned layer must have weights, got none ({name})")
