"""Configs of Transformers: which layers' widths, and which numbers of heads, their settings count.

To find what a setting counts, the model is built from its config again, with another value of the setting, on the meta
device, where it has shapes and no values.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from nni_topo.network.attention.heads import COUNTS, SHARED_COUNTS, Attention, find_attention
from nni_topo.network.layers.kinds import WEIGHTED, is_transposed_linear, output_channels, with_linear_layers
from nni_topo.network.runtime.comparison import SAME_CHANNELS, agree
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.inputs import Call, run_few, tensors_of
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.switches import random_state_kept
from nni_topo.sharing import named_tensors

Widths = dict[str, dict[str, int]]
"""By setting of a config, the layers whose output channels it counts, with their number."""
HEADS = "the number of heads"
"""Stands for all settings that count heads."""

_HEAD_SIZES = ("head_dim", "d_kv")
_MOST_RATIO = 64.0  # larger fractions, such as a period of rotary positions, multiply no width
_ROUNDING = 1e-9
_BETWEEN = 0.25  # of a channel, which both rounding down and rounding to the nearest number drop
_logger = logging.getLogger(__name__)
_known: dict[tuple[type, str], Widths] = {}  # cache: every dense network of a model needs it


def is_pretrained(model: Any) -> bool:
    """Tell whether a model is one of Transformers, which needn't be installed."""
    # A model of Transformers exists only if Transformers is imported. Models of PEFT and diffusers have a config, too.
    base: Any = getattr(sys.modules.get("transformers"), "PreTrainedModel", ())
    return isinstance(model, base)


def built_by_config(model: Any, config: Any) -> Any:
    """Build a model of the same class from a config, on the meta device; raise what its constructor raises."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(config))


def described_layers(model: Any) -> dict[str, str]:
    """Return the layers whose reduced number of channels a config of Transformers can express.

    By name, with the setting that counts the channels: all layers of one setting must keep the same share of them.
    """
    setting_by_layer = {layer: setting for setting, layers in widths_by_setting(model).items() for layer in layers}
    return setting_by_layer | dict.fromkeys(_layers_of_heads(model), HEADS)


def widths_by_setting(model: Any) -> Widths:
    """Return the settings of a config that change only output channels of layers and the inputs that read these.

    The width of the residual stream isn't included, because norms and embeddings have it too.
    """
    key = type(model), json.dumps(model.config.to_dict(), default=str, sort_keys=True)
    if key not in _known:
        _known[key] = _tried_settings(model)
    module_names = dict(model.named_modules())  # an argument may leave out parts, as add_pooling_layer=False does
    return {
        setting: {name: width for name, width in layers.items() if name in module_names}
        for setting, layers in _known[key].items()
    }


def common_widths(model: Any) -> dict[str, str]:
    """Return the layers of different widths that a single ratio of a config sets, by name, with the setting."""
    if not is_pretrained(model):
        return {}
    settings = widths_by_setting(model).items()
    return {name: setting for setting, layers in settings if len(set(layers.values())) > 1 for name in layers}


def _tried_settings(model: Any) -> Widths:
    layers_by_setting: Widths = {}
    shapes, modules = _tried(model, model.config)
    attention = find_attention(modules[""]) if modules else {}
    of_heads = {layer for module in attention.values() for layer in module.channels}
    widths = {width for name, shape in shapes.items() if _layer_of(modules, name) for width in shape[:2]}
    for setting, value in _settings(model.config).items():
        # One layer may compute gates and values, and so have twice as many channels.
        is_count = type(value) is int
        if value < 2:
            continue
        if is_count and not any(width % value == 0 for width in widths):
            continue
        less = value // 2 if is_count else value / 2
        other_shapes, _ = _tried(model, _changed(model.config, setting, less))
        layers: dict[str, int] = {}
        is_width = other_shapes.keys() == shapes.keys()
        for name, shape in shapes.items():
            if not is_width or other_shapes[name] == shape:
                continue
            layer = _layer_of(modules, name)
            is_width = layer is not None
            if layer is None:
                continue
            at = 1 if is_transposed_linear(modules[layer]) and len(shape) == 2 else 0
            if shape[at] != other_shapes[name][at]:
                layers[layer] = shape[at]
                is_width = other_shapes[name][at] == int(_base(shape[at], value) * less)
        if not layers or not is_width or of_heads & layers.keys():  # else it counts a head's channels
            continue
        one_less = {name: width - 1 for name, width in layers.items() if width == min(layers.values())}
        if not _is_ratio(value, layers) or _ratio_for(model, setting, layers, one_less) is not None:
            layers_by_setting[setting] = layers
    return layers_by_setting


def _changed(config: Any, setting: str, value: float) -> Any:
    """Return a copy of a config with another value of a setting."""
    changed = copy.deepcopy(config)
    _put(changed, setting, value)
    return changed


def _base(width: int, value: float) -> int:
    """Return the number that a setting's value is multiplied by to get a width, whose fraction is dropped."""
    return math.ceil(width / value - _ROUNDING)


def _is_ratio(value: float, layers: Mapping[str, int]) -> bool:
    """Tell whether a setting multiplies other widths, such as that of the residual stream, and isn't a width itself."""
    return type(value) is float or any(_base(width, value) > value for width in layers.values())


def _ratio_for(model: Any, setting: str, layers: Mapping[str, int], new_widths: Mapping[str, int]) -> float | None:
    """Return a ratio by which layers get the widths ``new_widths``, with what the constructor drops; None without any.

    ``layers``: the widths that they have by the config of ``model``.
    """
    value = _settings(model.config)[setting]
    name = min(new_widths, key=lambda layer: new_widths[layer])
    base, width = _base(layers[name], value), new_widths[name]
    # A quotient times the base may be just below the width.
    for ratio in (width / base, (width + _BETWEEN) / base):
        written: float = int(ratio) if isinstance(value, int) and ratio.is_integer() else ratio
        _, modules = _tried(model, _changed(model.config, setting, written))
        if modules and all(output_channels(modules[layer]) == count for layer, count in new_widths.items()):
            return written
    return None


def _settings(config: Any) -> dict[str, float]:
    """Return the numbers of a config by name; those of a nested one, such as ``text_config``, with a dotted name."""
    numbers: dict[str, float] = {}
    for key, value in vars(config).items():
        if callable(getattr(value, "to_dict", None)):
            numbers |= {f"{key}.{inner_key}": number for inner_key, number in _settings(value).items()}
        elif type(value) is int or (type(value) is float and value < _MOST_RATIO):
            numbers[key] = value
    if getattr(config, "n_inner", 0) is None:
        numbers["n_inner"] = 4 * config.hidden_size  # as GPT-2 and its like read it
    return numbers


def _put(config: Any, setting: str, value: float) -> None:
    *within, key = setting.split(".")
    for part in within:
        config = getattr(config, part)
    setattr(config, key, value)


def _tried(model: Any, config: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, nn.Module]]:
    """Return the shapes and the modules of a model that is built from a config; none if it can't be built."""
    try:
        built = built_by_config(model, config)
    except Exception:  # a constructor may need more than a config, or raise anything for its numbers
        return {}, {}
    shapes = {name: tuple(tensor.shape) for name, tensor in named_tensors(built).items()}
    return shapes, dict(built.named_modules())


def _layer_of(modules: dict[str, nn.Module], tensor: str) -> str | None:
    """Return the name of the layer whose weight or bias a tensor is; None for other tensors."""
    name = tensor.rpartition(".")[0]
    module = modules.get(name)
    if module is not None and (isinstance(module, WEIGHTED) or is_transposed_linear(module)):
        return name
    return None


def _layers_of_heads(model: Any) -> list[str]:
    """Return the layers that compute queries, keys and values, if a config can express fewer heads for all."""
    attention_modules, accepted = find_attention(model), accepted_heads(model)
    shares: set[float] = set()
    for attention in attention_modules.values():
        allowed = accepted.get(next(iter(attention.channels)), range(1, attention.heads))
        shares.add(max((count for count in allowed if count < attention.heads), default=0) / attention.heads)
    changed = copy.deepcopy(model.config)
    if len(shares) != 1 or not all(shares) or not put_heads(changed, model, attention_modules, share := shares.pop()):
        return []
    (shapes, modules), (changed_shapes, _) = _tried(model, model.config), _tried(model, changed)
    if changed_shapes.keys() != shapes.keys():
        return []
    of_heads = {layer for attention in attention_modules.values() for layer in attention.channels}
    by_head = {f"{name}.{key}" for name, attention in attention_modules.items() for key in attention.by_head}
    fewer: set[str] = set()
    for name, shape in shapes.items():
        if changed_shapes[name] == shape or name in by_head:
            continue
        layer = _layer_of(modules, name)
        if layer in of_heads and changed_shapes[name][0] == shape[0] * share:
            fewer.add(layer)
        elif layer is None or changed_shapes[name][0] != shape[0]:  # isn't a layer that reads the heads
            return []
    if fewer == of_heads:
        return sorted(of_heads)
    return []


def put_heads(config: Any, model: nn.Module, before: dict[str, Attention], share: float) -> bool:
    """Set a share of the heads in a config, each as large as before; return False if it can't hold a head size.

    ``before``: the attention of the unpruned network, by names in ``model``.
    """
    size = None
    for key in _HEAD_SIZES:
        # Falcon and BLOOM compute the size of a head from other numbers; it can't be set.
        if isinstance(getattr(config, key, None), int) and not isinstance(getattr(type(config), key, None), property):
            size = key
            break
    sizes = {attention.head_size for attention in before.values()}
    if size is None and share != 1.0 and len(sizes) == 1:
        # Some constructors read an optional ``head_dim``, and without it divide the width by the number of heads.
        kinds: list[Any] = [type(model.get_submodule(name)) for name in before]
        if all("head_dim" in inspect.unwrap(kind.__init__).__code__.co_consts for kind in kinds):
            size = "head_dim"
            setattr(config, size, sizes.pop())
    if size is None:
        return False
    channels = getattr(config, size)
    of_keys = () if any(attention.shared for attention in before.values()) else SHARED_COUNTS
    for key in (*COUNTS, *of_keys, "num_decoder_heads"):
        if isinstance(count := vars(config).get(key), int):
            setattr(config, key, round(count * share))
    setattr(config, size, channels)
    return True


def tell_config(model: Any, original: nn.Module, call: Call) -> None:
    """Write the pruned widths into the ``config`` of a model of Transformers, if all blocks have the same.

    ``call``: inputs, on which a model built with a narrower residual stream is compared.
    """
    if not is_pretrained(original):
        return
    after, before = find_attention(model), find_attention(original)
    # Count heads of queries: if one of two sets that share keys and values is left, all its heads share them.
    shares = {attention.query_heads / before[name].query_heads for name, attention in after.items()}
    if len(shares) == 1:
        put_heads(model.config, model, {name: before[name] for name in after}, shares.pop())
    channels = {name: output_channels(module) or 0 for name, module in model.named_modules()}
    put_widths(model.config, original, channels)
    _tell_hidden_size(model, original, after, before, call)


def _tell_hidden_size(
    model: Any, original: Any, after: dict[str, Attention], before: dict[str, Attention], call: Call
) -> None:
    """Write the pruned width of the residual stream into a config, if a model built from that config computes the same.

    ``after``, ``before``: the attention of both networks. If the heads together have that width, the number of heads is
    set too. Gemma multiplies by the root of its config's width, so its config keeps the old one.
    """
    config, key = model.config, original.config.attribute_map.get("hidden_size", "hidden_size")
    old_width = getattr(original.config, key, None)
    # Norms show the width. If norms have no parameters, as OLMo's, matrices show it, which have other widths as well.
    widths = {1: set[int](), 2: set[int]()}
    shapes = {name: tensor.shape for name, tensor in named_tensors(model).items()}
    for name, tensor in named_tensors(original).items():
        if tensor.dim() in widths and name in shapes:
            pairs = zip(tensor.shape, shapes[name], strict=True)
            widths[tensor.dim()].update(new for old, new in pairs if old == old_width)
    shares = {attention.query_heads / before[name].query_heads for name, attention in after.items()}
    for width in sorted((widths[1] or widths[2]) - {old_width}):
        changed = copy.deepcopy(config)
        setattr(changed, key, width)
        if len(shares) == 1 and {attention.query_heads * attention.head_size for attention in after.values()} == {
            width
        }:
            for count in COUNTS:
                count = original.config.attribute_map.get(count, count)
                if isinstance(vars(original.config).get(count), int):
                    setattr(changed, count, round(getattr(original.config, count) * next(iter(shares))))
        elif len(sizes := {attention.head_size for attention in after.values()}) == 1:
            changed.head_dim = sizes.pop()  # optional in OLMo's config, but its attention reads it
        old_values = dict(vars(config))
        with left_alone(model), torch.no_grad(), random_state_kept():
            expected = tensors_of(run_few(model, call))
            vars(config).update(vars(changed))
            try:
                built = with_linear_layers(type(model)(copy.deepcopy(changed)))
                built.load_state_dict(model.state_dict())
                built = built.to(device_of(model)).to(next(model.parameters()).dtype).eval()
                if all(
                    agree(expected, tensors_of(run_few(network, call)), SAME_CHANNELS) for network in (model, built)
                ):
                    return
            except Exception:  # a constructor, and a forward, may raise anything
                _logger.debug("no model is built by a hidden size of %d", width, exc_info=True)
            vars(config).clear()
            vars(config).update(old_values)


def put_widths(config: Any, original: Any, channels: dict[str, int]) -> None:
    """Write each width that all layers of a setting have into a config; ``left``: output channels of some layers."""
    for setting, layers in widths_by_setting(original).items():
        value = _settings(original.config)[setting]
        counts = {name: channels[name] for name in layers if name in channels}
        if all(channels[name] == layers[name] for name in counts):
            continue
        if _is_ratio(value, layers):
            ratio = _ratio_for(original, setting, layers, counts)
            if ratio is not None:
                _put(config, setting, ratio)
            continue
        values = {value * count / layers[name] for name, count in counts.items()}
        if len(values) == 1 and (new_value := values.pop()).is_integer():
            _put(config, setting, int(new_value))


def accepted_heads(model: nn.Module) -> dict[str, list[int]]:
    """Return the numbers of heads that configs of Transformers accept, by layer that computes queries, keys or values.

    Transformers 5 checks its configs: in most classes the number of heads must divide the width, even if the size of a
    head is given separately. Layers whose config accepts every number are left out.
    """
    accepted = dict[str, list[int]]()
    cached: dict[tuple[int, int], list[int]] = {}  # blocks share a config
    for name, attention in find_attention(model).items():
        module: Any = model.get_submodule(name)
        config: Any = getattr(module, "config", getattr(model, "config", None))
        # Transformers 4 has no such method, but a config may have a setting with its name
        if not callable(getattr(config, "validate", None)):
            continue
        heads = attention.heads
        key = (id(config), heads)
        if key not in cached:
            cached[key] = []
            for n_heads in range(1, heads + 1):
                changed = copy.deepcopy(config)
                for count in COUNTS if attention.shared else (*COUNTS, *SHARED_COUNTS):
                    if isinstance(getattr(changed, count, None), int):
                        setattr(changed, count, getattr(changed, count) // heads * n_heads)
                try:
                    changed.validate()
                except Exception:  # each class has its own errors
                    continue
                cached[key].append(n_heads)
        if len(cached[key]) < heads:
            accepted.update(dict.fromkeys(attention.channels, cached[key]))
    return accepted
