"""Rules for models, inputs, masks and config_lists; rules for numbers and names are in `nni_topo.rules`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from nni_topo.errors import ConfigError, DataError, SpeedupError, shown, unknown_name
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.network.runtime.modules import is_plain
from nni_topo.rules import NONE, Rule, all_of, check_knobs, instance, number, one_of, whole


def unusable(tensor: Tensor, *, needs_values: bool = True) -> str:
    """Return why a tensor can't be used, empty if it can; tensors on the meta device have no values."""
    if is_lazy(tensor):
        return "a lazy one, which has no shape before the model has run"
    if needs_values and tensor.is_meta:
        return "one on the meta device, which has no values"
    if tensor.layout != torch.strided:
        return f"one of layout {tensor.layout}, which to_dense() converts"
    return ""


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _no_batches(value: Any) -> str:
    if value is None:
        cure = "nni_topo.synthetic_images(model, example_inputs) makes some from the model alone"
        return f"None: without data, {cure}"
    return _kind(value)


# Other modules there, such as stubs and FloatFunctional, belong to float networks that will be quantised.
_QUANTIZED = (
    "torch.ao.nn.qat",
    "torch.ao.nn.quantized",
    "torch.ao.nn.intrinsic.qat",
    "torch.ao.nn.intrinsic.quantized",
    "torch.ao.quantization.fake_quantize",
    "torch.ao.quantization.observer",
    "torchao.",
)


def check_float(name: str, model: nn.Module, place: str) -> None:
    """Raise ConfigError for a network that torchao or PyTorch has quantised or prepared for quantisation."""
    kinds = [(key, type(value)) for key, value in [*model.named_modules(), *model.named_parameters()]]
    for key, kind in kinds:
        if kind.__module__.startswith(_QUANTIZED) and not kind.__name__.endswith("FloatFunctional"):
            raise ConfigError(
                f"a {name} must be a float network, which is quantised after it is pruned, got "
                f"{kind.__module__}.{kind.__qualname__} ({key or type(model).__name__}, {place})"
            )


def _look_at_model(
    name: str, model: nn.Module, place: str, *, needs_values: bool = True, needs_layers: bool = True
) -> None:
    if needs_layers:
        check_float(name, model, place)
    for parameter, tensor in model.named_parameters():
        if fault := unusable(tensor, needs_values=needs_values):
            if tensor.is_meta:
                fault += (
                    "; nni_topo.shrink_pretrained prunes a folder of Transformers that doesn't fit into memory; load "
                    "other models without offloading"
                )
            raise DataError(f"parameters of a {name} must be tensors with values, got {fault} ({parameter}, {place})")


def _look_at_inputs(name: str, inputs: Any, place: str, *, needs_values: bool = True) -> None:
    tensors = tensors_of(inputs)
    for tensor in tensors:
        if fault := unusable(tensor, needs_values=needs_values):
            raise DataError(f"{name} must be tensors with values, got {fault} ({place})")
    if all(tensor.dim() and not len(tensor) for tensor in tensors):
        raise DataError(f"{name} must hold at least one sample, got shape {tuple(tensors[0].shape)} ({place})")


def _look_at_masks(name: str, masks: Mapping[str, Any], place: str) -> None:
    for module, targets in masks.items():
        if not isinstance(module, str) or not isinstance(targets, Mapping):
            raise ConfigError(f"{name} must be {_MASKS}, got {shown(targets)} ({module}, {place})")
        for target, mask in targets.items():
            if mask is None:
                continue
            if not isinstance(mask, Tensor):
                raise ConfigError(f"a mask must be a tensor, got {type(mask).__name__} ({module}.{target})")
            if fault := unusable(mask):
                raise DataError(f"a mask must be a tensor with values, got {fault} ({module}.{target})")


def _is_device(value: Any) -> bool:
    try:
        return isinstance(value, torch.device) or (isinstance(value, str) and bool(torch.device(value)))
    except RuntimeError:
        return False


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _holds_tensors(value: Any) -> bool:
    return bool(tensors_of(value))


def _is_pattern(value: Any) -> bool:
    try:
        return isinstance(value, str) and re.compile(value) is not None
    except re.error:
        return False


def _is_granularity(value: Any) -> bool:
    if not isinstance(value, (list, tuple)) or not value:
        return False
    steps, padding = (value[0], value[1:]) if isinstance(value[0], (list, tuple)) else (value, ())
    is_padding = all(rule.holds(pad) for rule, pad in zip((_PADDING, _STEP), padding, strict=False))
    return bool(steps) and all(map(_STEP.holds, steps)) and len(padding) <= 2 and is_padding


def check_entry(entry: Any, place: str, rules: Mapping[str, Rule] = {}) -> None:
    """Raise ConfigError for an invalid entry of a config_list; ``rules``: rules for further keys."""
    if not isinstance(entry, dict):
        raise ConfigError(f"a config_list entry must be a dict, got {type(entry).__name__} ({place})")
    _check_keys(entry, [*_ENTRY, *rules], place)
    check_knobs(place, entry, {**_ENTRY, **rules})
    for target, setting in entry.get("target_settings", {}).items():
        setting_place = f"{place}.target_settings.{target}"
        _check_keys(setting, [*_SETTING, *rules], setting_place)
        check_knobs(setting_place, setting, {**_SETTING, **rules})


def _check_keys(setting: Mapping[Any, Any], known_keys: Sequence[str], place: str) -> None:
    """Raise ConfigError for a key that NNI doesn't know, with the nearest known key: NNI's own error names none."""
    for key in setting:
        if key in LEGACY_KEYS:
            raise ConfigError(f"{key!r} is a key of NNI 2: write {LEGACY_KEYS[key]} ({place})")
        if key not in known_keys:
            raise unknown_name("key of a config_list entry", str(key), known_keys, place)


def _look_at_entries(name: str, config_list: Sequence[Any], place: str, *, rules: Mapping[str, Rule] = {}) -> None:
    for index, entry in enumerate(config_list):
        check_entry(entry, f"config_list[{index}]", rules)


_MODEL = (
    "a torch.nn.Module that isn't scripted, compiled or spread over devices: pass the inner module, such as "
    "model.module or model._orig_mod"
)
_INPUTS = "a tensor, a tuple of arguments or a dict of keyword arguments with a tensor in it"
_MASKS = "a mapping of names of modules to mappings of names of parameters to masks"

DEVICE = Rule("a device's name, e.g. 'cpu' or 'cuda:1', or a torch.device", lambda value: _is_device(value))
MODEL = Rule(_MODEL, is_plain, tell=_kind, look=_look_at_model)
STRUCTURE = Rule(_MODEL, is_plain, tell=_kind, look=partial(_look_at_model, needs_values=False))
"""For a model whose values aren't read."""
COMPUTING = Rule("a torch.nn.Module", _is_module, tell=_kind, look=partial(_look_at_model, needs_layers=False))
"""For a model that may be compiled or spread over devices."""
NETWORK = replace(COMPUTING, look=partial(_look_at_model, needs_values=False, needs_layers=False))
"""For a model that may be compiled or spread over devices, and whose values aren't read."""
TENSOR = Rule("a tensor", lambda value: isinstance(value, Tensor), look=_look_at_inputs)
INPUTS = Rule(_INPUTS, _holds_tensors, look=_look_at_inputs)
SHAPES = Rule(_INPUTS, _holds_tensors, look=partial(_look_at_inputs, needs_values=False))
"""For inputs whose values aren't read."""
BATCHES = Rule("an iterable of batches", lambda value: not isinstance(value, (nn.Module, type(None))), tell=_no_batches)
"""For batches, which are checked as they are read."""
MASKS = Rule(_MASKS, lambda value: isinstance(value, Mapping), look=_look_at_masks)
_NAMES, _GROUP = all_of(instance(str), list), instance(str, int)
_STEP = Rule("a number of elements, or -1 for all", lambda value: value != 0 and whole(-1).holds(value))
_PADDING = one_of(("front", "back"))
_SETTING = {
    "sparse_ratio": number(0, 1, "left"),
    "sparse_threshold": number(),
    "max_sparse_ratio": number(0, 1, "right"),
    "min_sparse_ratio": number(0, 1, "left"),
    "global_group_id": _GROUP,
    "dependency_group_id": _GROUP,
    "internal_metric_block": whole(1),
    "granularity": one_of(("default", "in_channel", "out_channel", "per_channel"))
    | Rule("a list of steps, or of these, 'front' or 'back', and a step", _is_granularity),
    "apply_method": one_of(("bypass", "mul", "add")),
    "align": instance(Mapping),
}
_ENTRY = _SETTING | {
    "op_names": _NAMES,
    "op_types": _NAMES,
    "op_names_re": all_of(Rule("a regular expression", _is_pattern), list),
    "exclude_op_names": _NAMES,
    "exclude_op_types": _NAMES,
    "exclude_op_names_re": all_of(Rule("a regular expression", _is_pattern), list),
    "target_names": _NAMES,
    "target_settings": all_of(instance(dict), dict),
}
LEGACY_KEYS = {
    "sparsity": "sparse_ratio",
    "sparsity_per_layer": "sparse_ratio",
    "total_sparsity": "sparse_ratio with global_group_id",
    "max_sparsity_per_layer": "max_sparse_ratio",
    "op_partial_names": "op_names_re, with '.*' around the names",
    "exclude": "exclude_op_names into the other entries",
}
"""Keys of NNI 2, and their names in NNI 3."""
ROUND_TO = whole(1) | NONE
CONFIG_LIST = Rule("a list of dicts", lambda value: isinstance(value, (list, tuple)), look=_look_at_entries)
BY_HEAD = {"granularity": one_of(("head",)) | _SETTING["granularity"]}
UNGROUPED = Rule(CONFIG_LIST.words, CONFIG_LIST.holds, look=partial(_look_at_entries, rules=BY_HEAD))
"""For a config_list for `dependency_groups`, whose granularity may be heads."""


def check_unwrapped(model: torch.nn.Module) -> None:
    """Raise a SpeedupError if a module still has NNI's wrapper."""
    for name, _ in model.named_modules():
        if name.endswith("_nni_wrapper"):
            raise SpeedupError(
                "a model must be unwrapped (pruner.unwrap_model()) before it is analysed, made dense or saved, got one "
                f"wrapped by NNI ({name.removesuffix('._nni_wrapper')})"
            )


def check_model(model: torch.nn.Module) -> None:
    """Check a model; raise ConfigError, DataError, or SpeedupError if it is still wrapped."""
    MODEL.check("model", model, "model")
    check_unwrapped(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        # A finite sum shows it in one pass.
        if not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.sum().isfinite()):
            continue
        if bool(tensor.isnan().any()):
            raise DataError(f"parameters and buffers must hold no NaN, got NaN ({name})")
        # A mask of attention may hold infinite values in a buffer.
        if isinstance(tensor, nn.Parameter) and not bool(tensor.isfinite().all()):
            raise DataError(f"parameters must be finite, got infinite values ({name})")
