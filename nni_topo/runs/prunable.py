"""Which layers of a network are pruned, and why the others keep their channels."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_topo.context import advice
from nni_topo.errors import ConfigError, listed
from nni_topo.network.attention.config import described_layers
from nni_topo.network.channels import reasons
from nni_topo.network.layers.kinds import has_channels
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import (
    DependencyGroups,
    by_reason,
    groups_of,
    held_by_unselected,
    unprunable_layers,
)
from nni_topo.pruners.checks import matched_modules
from nni_topo.runs.settings import Layers, free_widths
from nni_topo.runs.widths import sorted_layers


class NoneDescribedError(ConfigError):
    """A model whose config can describe fewer channels of no layer that can lose any."""


@dataclass(frozen=True)
class Prunable:
    """The layers to prune, as entries of a config_list without ratios."""

    entries: list[dict[str, Any]]
    # For each layer that can't lose channels, the reason; if the caller names layers, for these alone.
    unpruned: dict[str, str]
    is_default: bool  # the caller named no layer
    groups: DependencyGroups  # of the entries


def layers_to_prune(analysis: Analysis, layers: Layers | None, *, is_described: bool = False) -> Prunable:
    """Return config_list entries for the named layers; by default for all layers that can lose channels.

    ``is_described``: whether a config of Transformers has to describe the smaller network. Then ConfigError if the
    caller names layers that it can't describe, or only some of the layers with a common width, or if no layer is left:
    a NoneDescribedError if it can describe none.
    """
    entries: list[dict[str, Any]]
    unpruned: dict[str, str] = {}
    if layers is not None:
        _check_have_channels(analysis, layers)
        entries = [dict(each) for each in layers if isinstance(each, Mapping)]
        names = [each for each in layers if isinstance(each, str)]
        entries = [{"op_names": names}, *entries] if names else entries
    else:
        names, unpruned = sorted_layers(analysis)
        entries = [{"op_names": names}]
        if not names:
            raise _none_left(unpruned)
    is_default = layers is None
    if not is_described:
        return _without_held(analysis, entries, unpruned, is_default)
    model = analysis.model
    settings = described_layers(model)
    # Layers with a common width in the config are pruned together.
    together: dict[str, set[str]] = {}
    for name, setting in settings.items():
        together.setdefault(setting, set()).add(name)

    def described(names: Collection[str]) -> list[str]:
        return [name for name in names if name in settings and together[settings[name]] <= set(names)]

    if is_default:
        while True:
            named = entries[0]["op_names"]
            kept = described(named)
            if not kept:
                raise NoneDescribedError(
                    f"a model of Transformers must have layers for which its config can describe fewer channels, got "
                    f"none in {type(model).__name__}; {free_widths()} (shrink)"
                )
            how = advice("{'equal_blocks': False} in the budget", "--no-equal-blocks")
            no_config = f"the config of Transformers can't describe fewer channels ({how})"
            unpruned = unpruned | dict.fromkeys((name for name in named if name not in kept), no_config)
            # Layers that are left out may keep channels of others from being removed.
            prunable = _without_held(analysis, [{"op_names": kept}], unpruned, is_default)
            entries, unpruned = prunable.entries, prunable.unpruned
            if entries[0]["op_names"] == named:
                return prunable
    prunable = _without_held(analysis, entries, unpruned, is_default)
    asked: list[str] = []
    for entry in prunable.groups:
        sizes = entry.get("granularity")
        if not (isinstance(sizes, list) and sizes[0] == -1):  # otherwise it loses the columns that read heads
            asked += [name for name in entry["op_names"] if name not in prunable.unpruned]
    if not settings:
        raise NoneDescribedError(
            f"the config must describe fewer channels of a layer, got none; {free_widths()} (layers)"
        )
    possible = described(asked)
    if refused := [name for name in asked if name not in possible]:
        raise ConfigError(
            "layers must be ones for which the config can describe fewer channels, with all others of the same width, "
            f"got {listed(refused, 4)}; it can for {listed(settings, 4) or 'none'}; "
            f"{free_widths()} (layers)"
        )
    return prunable


def _without_held(
    analysis: Analysis, entries: list[dict[str, Any]], unpruned: dict[str, str], is_default: bool
) -> Prunable:
    """Find layers to prune that keep all channels because layers that share these channels aren't pruned.

    ConfigError if that is true of all layers.
    """
    groups = groups_of(analysis, entries, warns=not is_default)
    held = held_by_unselected(analysis.flow, groups.layers())
    why = {name: str(reasons.unselected(partners)) for name, partners in held.items()}
    if held and len(held) == len({name for group in groups.layers() for name in group}):
        if is_default:
            raise _none_left(unpruned | why)
        raise ConfigError(
            f"layers must include all that share channels with the named ones, got {_why_text(why)}: name these, too "
            "(layers)"
        )
    if is_default:
        # Without masks that would be undone later, these layers can be reconstructed.
        entries = [{"op_names": [name for name in entries[0]["op_names"] if name not in held]}]
        groups = groups_of(analysis, entries)
    return Prunable(entries, unpruned | why, is_default, groups)


def _check_have_channels(analysis: Analysis, layers: Layers) -> None:
    """Raise ConfigError for layers without channels of their own, and for named layers that must keep all channels.

    Layers selected by type may keep all channels if others lose some.
    """
    model = analysis.model
    selected: dict[str, nn.Module] = {}
    named: set[str] = set()
    by_head = False
    for each in layers:
        entry: dict[str, Any] = {"op_names": [each]} if isinstance(each, str) else dict(each)
        if entry.get("granularity") == "head":  # it also names modules that hold layers; dependency_groups checks them
            by_head = True
            continue
        selected |= matched_modules(model, [entry])
        named.update(entry.get("op_names") or ())
    prunable, unpruned = sorted_layers(analysis)
    with_channels = [name for name, module in selected.items() if has_channels(module)]
    others = [name for name in with_channels if name not in unpruned and name not in prunable]
    unpruned |= reasons.as_text(unprunable_layers(analysis, others))
    keeping = [name for name in with_channels if name in unpruned]
    if len(keeping) < len(with_channels) or by_head:
        keeping = [name for name in keeping if name in named]
    refused = {name: "it has no channels of its own" for name in selected if name not in with_channels}
    refused |= {name: unpruned[name] for name in keeping}
    if refused:
        raise ConfigError(
            f"layers must be layers whose channels can be removed, got {_why_text(refused)}; layers of this model that "
            f"can be named: {listed(prunable, 8) or 'none'} (layers)"
        )


def _none_left(unpruned: Mapping[str, str]) -> ConfigError:
    """Return the error for a model of which no layer can be pruned; ``unpruned``: why its layers keep all channels."""
    found = "no convolution, linear or recurrent layer"
    if unpruned:
        found = f"{_why_text(unpruned)}; nni_topo.explain(model, inputs, layer) says what to change"
    return ConfigError(f"a model must have a layer whose channels can be removed, got none: {found} (shrink)")


def _why_text(why: Mapping[str, str]) -> str:
    """Return the reasons in words, each with its layers."""
    return "; ".join(f"{listed(names)}: {each}" for each, names in by_reason(why).items())
