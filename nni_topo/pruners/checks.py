"""Checks of a model, its config_list and a pruner's knobs, before NNI wraps anything.

Tables hold the rules for the arguments and knobs that pruners share.
"""

from __future__ import annotations

import functools
import inspect
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from nni.compression.base.config import default_config_schema, select_modules_by_config
from nni.compression.base.setting import INPUT_PREFIX, OUTPUT_PREFIX, PruningSetting
from nni.compression.base.target_space import PruningTargetSpace
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from schema import SchemaError
from torch import Tensor, nn

from nni_topo.compat.wrapping import ListedModules, derived_types
from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.network.layers.kinds import CONVOLUTIONS, check_names, is_recurrent
from nni_topo.network.runtime.arguments import BATCHES, CONFIG_LIST, INPUTS, MODEL, check_entry
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.progress import quiet_if_asked
from nni_topo.network.speedup.dependency import DependencyGroups, by_reason
from nni_topo.rules import ANYTHING, NONE, Rule, all_of, check_knobs, checked, instance, whole

_Given = ParamSpec("_Given")
_Returned = TypeVar("_Returned")


REQUEST = {
    "model": MODEL,
    "config_list": CONFIG_LIST,
    "evaluator": instance(Evaluator) | NONE,
    "existed_wrappers": all_of(instance(ModuleWrapper), Mapping) | NONE,
}
"""Rules for NNI's own four arguments of every pruner; :func:`check_request` checks the config_list's entries."""

KNOBS = {
    "calibration": BATCHES | NONE,
    "budget": ANYTHING,  # checked by Budget
    "example_inputs": INPUTS | NONE,
    "round_to": whole(1) | NONE,
}
"""Rules for the knobs that mean the same for every pruner."""


def pruner_arguments(**further_rules: Rule) -> Callable[[Callable[_Given, _Returned]], Callable[_Given, _Returned]]:
    """Check a constructor's arguments: shared ones by the tables above, ``further_rules`` for others, the rest by type.

    Afterwards the model's modes and buffers and the global generators are as before.
    The pruner keeps each knob as an attribute of the same name, set before the constructor's own code runs.
    """

    def decorate(function: Callable[_Given, _Returned]) -> Callable[_Given, _Returned]:
        parameters = inspect.signature(function).parameters
        rules = {name: rule for name, rule in {**REQUEST, **KNOBS, **further_rules}.items() if name in parameters}
        keyword_only = [parameter for parameter in parameters.values() if parameter.kind is parameter.KEYWORD_ONLY]
        knobs = {parameter.name: parameter.default for parameter in keyword_only}

        @quiet_if_asked
        @checked(**rules)
        @functools.wraps(function)
        def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Returned:
            if function.__name__ == "__init__":
                vars(args[0]).update({**knobs, **{name: kwargs[name] for name in knobs if name in kwargs}})
            with left_alone(args[1] if len(args) > 1 else kwargs.get("model")):
                return function(*args, **kwargs)

        return run

    return decorate


def of_single_weights(config_list: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drop the coupling of channels from dependency groups, because weights are pruned one by one."""
    if not isinstance(config_list, DependencyGroups):
        return config_list
    together = ("dependency_group_id", "internal_metric_block", "granularity")
    return config_list.with_entries({k: v for k, v in e.items() if k not in together} for e in config_list)


_logger = logging.getLogger(__name__)

_RULES = ("sparse_ratio", "sparse_threshold")


def check_request(
    model: nn.Module,
    config_list: list[dict[str, Any]],
    existed_wrappers: Mapping[str, Any] | None = None,
    rules: Mapping[str, Rule] = {},
    *,
    needs_rule: bool = True,
) -> None:
    """Raise ConfigError or DataError for an invalid request; the model isn't changed."""
    check_knobs("pruner", {"model": model, "config_list": config_list}, REQUEST)
    # With inherited wrappers the config_list may be empty, as in NNI's LinearPruner.
    if not config_list and existed_wrappers is None:
        skipped = config_list.skipped if isinstance(config_list, DependencyGroups) else {}
        hint = ""
        if skipped:
            why = "".join(f"; {', '.join(names)}: {reason}" for reason, names in by_reason(skipped).items())
            hint = f": all layers that were asked for stay unpruned{why}"
        raise ConfigError(f"a config_list must have at least one entry, got none (config_list){hint}")
    inherited = {id(wrapper) for wrapper in (existed_wrappers or {}).values()}
    for name, module in model.named_modules():
        wrapper = getattr(module, "_nni_wrapper", None)
        if wrapper is not None and id(wrapper) not in inherited:
            raise ConfigError(
                "a model must not be wrapped by another compressor; call its unwrap_model() or use from_compressor, "
                f"got a wrapped module ({name})"
            )
    for index, config in enumerate(config_list):
        check_entry(config, f"config_list[{index}]", rules)
    check_names(model, config_list)
    matched: dict[str, nn.Module] = {}
    first: dict[tuple[str, str], str] = {}
    followed: dict[tuple[str, str], tuple[str, str]] = {}
    listed = ListedModules(model)
    for index, config in enumerate(config_list):
        place = f"config_list[{index}]"
        try:
            default_config_schema("pruning").validate(config)
        except SchemaError as error:
            reason = " ".join(str(part) for part in dict.fromkeys(error.autos + error.errors) if part)
            raise ConfigError(
                f"a config_list entry must follow NNI's schema; {reason} ({place}); see docs/config_list.md"
            ) from error
        # In network order, so that an error names the same layer each time: NNI's order depends on the hash seed.
        modules = _select_modules(listed, [config])
        if not modules:
            _logger.warning("%s matches no module: %s", place, config)
        for name, module in modules.items():
            _check_module(name, module)
            for target in _targets(name, module, config, place):
                if first.setdefault((name, target), place) != place:
                    raise ConfigError(
                        f"a target must have one config_list entry, got {first[name, target]} and {place} "
                        f"({name}.{target})"
                    )
                source = _source_of(name, module, target, config)
                if source is not None:
                    followed[name, target] = source
        matched.update(modules)
    if needs_rule:
        # An entry without a ratio or threshold would prune nothing, or make NNI fail without a message.
        ruled = [config for config in config_list if any(key in s for s in _settings(config) for key in _RULES)]
        groups = {group for config in ruled for group in _groups(config)}
        for index, config in enumerate(config_list):
            if config not in ruled and not groups & _groups(config):
                raise ConfigError(
                    "a config_list entry must have a sparse_ratio or a sparse_threshold, got neither "
                    f"(config_list[{index}]); see docs/config_list.md"
                )
    for (name, target), source in followed.items():
        # Inherited wrappers may hold the target that another one follows.
        if source not in first and existed_wrappers is None:
            raise ConfigError(
                f"a target that follows another one must be configured with it or have a rule of its own, got "
                f"{target} without {'.'.join(source)} ({name}.{target})"
            )
    if config_list and not matched:
        types = sorted({type(module).__name__ for module in model.modules() if not list(module.children())})
        raise ConfigError(
            f"config_list must match at least one module, got none; layer types in this model: {', '.join(types)} "
            "(config_list)"
        )


def matched_modules(model: nn.Module, config_list: list[dict[str, Any]]) -> dict[str, nn.Module]:
    """Return the modules that a checked config_list names, by name in network order."""
    return _select_modules(ListedModules(model), config_list)


def _select_modules(listed: Any, config_list: list[dict[str, Any]]) -> dict[str, nn.Module]:
    modules: dict[str, nn.Module] = {}
    for config in config_list:
        modules.update(select_modules_by_config(listed, config)[0])
    return {name: modules[name] for name, _ in listed.named_modules() if name in modules}


def _targets(name: str, module: nn.Module, config: dict[str, Any], place: str) -> list[str]:
    """Return the names of a module's targets in an entry; ConfigError for a target that the module doesn't have."""
    settings = {**PruningSetting.get(module, {}), **config.get("target_settings", {})}
    targets = list(config.get("target_names") or settings)
    for target in targets:
        is_own = not target.startswith((INPUT_PREFIX, OUTPUT_PREFIX))
        usual = target if is_own or target in settings else re.sub(r"[^_]*$", "", target)
        if usual not in settings:
            raise unknown_name(f"target of {name}", target, settings, place)
        value = getattr(module, target, None) if is_own else None
        if not isinstance(value, (Tensor, type(None))) or (is_own and not hasattr(module, target)):
            got = f"a {type(value).__name__}" if hasattr(module, target) else "none of that name"
            raise ConfigError(f"a target must be a tensor of its layer, got {got} ({name}.{target})")
        granularity = config.get("target_settings", {}).get(target, config).get("granularity")
        refused = ["per_channel"] if is_own else ["in_channel", "out_channel"]
        if granularity in refused:
            kind = "parameters" if is_own else "inputs and outputs"
            raise ConfigError(f"granularity of {kind} must be another one, got {granularity!r} ({name}.{target})")
    return targets


def _source_of(name: str, module: nn.Module, target: str, config: dict[str, Any]) -> tuple[str, str] | None:
    """Return module and name of the target that another one follows, as a bias its weight; None if it has a rule."""
    target_settings = config.get("target_settings", {}).get(target, {})
    setting = {**PruningSetting.get(module, {}).get(target, {}), **target_settings}
    if getattr(module, target, None) is None or any(key in target_settings for key in (*_RULES, "dependency_group_id")):
        return None
    align = setting.get("align")
    if not align or "target_name" not in align:
        return None
    return align.get("module_name") or name, align["target_name"]


def check_no_ratios(config_list: Sequence[Mapping[str, Any]], place: str = "config_list") -> None:
    """Raise ConfigError if an entry says how much to prune, because the budget decides this."""
    for index, config in enumerate(config_list):
        for key in (*_RULES, "global_group_id"):
            if any(setting.get(key) is not None for setting in _settings(config)):
                raise ConfigError(f"a budget replaces {key}, got both ({place}[{index}])")


def _settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return an entry and its settings of single targets."""
    return [config, *config.get("target_settings", {}).values()]


def _groups(config: dict[str, Any]) -> set[int | str]:
    return {s["dependency_group_id"] for s in _settings(config) if "dependency_group_id" in s}


def _check_module(name: str, module: nn.Module) -> None:
    derived_types(module, PruningSetting.registry)  # registers classes derived from PyTorch's with NNI
    if type(module).__name__ not in PruningSetting.registry:
        types = ", ".join(sorted(PruningSetting.registry))
        raise ConfigError(
            f"a pruned module's type must be registered with NNI's PruningSetting, got {type(module).__name__}; "
            f"known: {types} ({name})"
        )
    if isinstance(module, nn.RNNBase) and not is_recurrent(module):
        raise ConfigError(
            f"a pruned recurrent layer must be PyTorch's LSTM, GRU or RNN without a projection, got {module} ({name})"
        )
    if isinstance(getattr(type(module), "weight", None), property):
        raise ConfigError(
            f"a pruned layer must hold its weight itself, got {type(module).__module__}.{type(module).__name__} around "
            f"another layer ({name}): name the layer within it, or merge adapters first"
        )
    for target, tensor in module.named_parameters(recurse=False):
        if tensor.numel() == 0:
            raise DataError(f"a pruned layer must have weights, got none ({name})")
        if not tensor.is_floating_point():
            raise DataError(f"weights must be real floating-point tensors, got {tensor.dtype} ({name}.{target})")
        bad = int((~torch.isfinite(tensor.detach())).sum())
        if bad:
            raise DataError(f"weights must be finite, got {bad} NaN or infinite values ({name}.{target})")


def check_single_weights(
    name: str, target: str, space: PruningTargetSpace, subject: str, refused: Sequence[str] = ()
) -> None:
    """Raise unless a target is the weight of a linear layer or convolution, and pruned weight by weight.

    ``subject`` begins the message; ``refused``: further NNI keys that must be left out.
    """
    module = space._wrapper.module
    if target != "weight" or not isinstance(module, (nn.Linear, *CONVOLUTIONS)):
        raise ConfigError(
            f"{subject} of a Linear, Conv1d, Conv2d or Conv3d, got the {target} of a {type(module).__name__} ({name})"
        )
    for key in ("granularity", "dependency_group_id", "internal_metric_block", *refused):
        value = getattr(space, key)
        if value is not None and (key, value) != ("granularity", "default"):
            raise ConfigError(f"single weights are pruned: {key} must be left out, got {value} ({name})")
