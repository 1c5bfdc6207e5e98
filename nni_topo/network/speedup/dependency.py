"""Dependency groups: layers that must lose the same channels."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from nni.compression.base.config import select_modules_by_config, trans_legacy_config_list
from nni.compression.base.setting import PruningSetting
from torch.nn.utils.parametrize import is_parametrized

from nni_topo.compat.wrapping import ListedModules, derived_types
from nni_topo.errors import ConfigError, SpeedupError, hint_of, listed
from nni_topo.network.attention.heads import Attention, is_attention
from nni_topo.network.channels import reasons
from nni_topo.network.channels.constraints import Share, asked_of, blocks_of, coupled_names, partial_couplings, shares
from nni_topo.network.channels.flow import ChannelFlow, why_read_beside
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.reasons import Reason, Reasons
from nni_topo.network.graph.tracing import is_in_parts, why_in_parts
from nni_topo.network.layers.derived import with_known_layers
from nni_topo.network.layers.kinds import (
    RECURRENT,
    check_names,
    follows_channels,
    has_channels,
    has_complex_weights,
    is_normalizing,
    is_recurrent,
    is_transposed_linear,
    masked_channels,
    weight_is_computed,
)
from nni_topo.network.layers.norms import is_over_channels, scales_channels
from nni_topo.network.runtime.arguments import INPUTS, MODEL, UNGROUPED, check_unwrapped
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.switches import as_written
from nni_topo.network.speedup.analysis import Analysis, Facts
from nni_topo.rules import NONE, Rule, checked

_logger = logging.getLogger(__name__)

OUTPUT = str(reasons.model_output())


# Check only the outer types: a mapping has a number for every channel, and checking all would take long.
_BY_LAYER = Rule(
    "a mapping of layers' names to tuples",
    lambda value: (
        isinstance(value, Mapping)
        and all(isinstance(name, str) and isinstance(layer_numbers, tuple) for name, layer_numbers in value.items())
    ),
)


class DependencyGroups(list[dict[str, Any]]):
    """A config_list with a dependency group for each coupled layer, and the layers that were left out.

    Parameters
    ----------
    entries : iterable of dict
        The entries.
    skipped : mapping of str to str
        By layer, why it keeps channels. First, in network order, the layers that the user's config_list selects and
        this one doesn't. Then layers of this list that must keep some channels (how many, and why), and layers that
        ``to_dense`` keeps whole because layers coupled with them aren't selected.
    named : iterable of str
        The layers in ``op_names``. The package's pruners raise if they can't prune one of these; other layers that they
        can't prune keep all channels, with a warning.
    ties : mapping of str to tuple of int
        By layer that shares only some channels with other layers, or shares channels with itself, or has channels in
        the same blocks as other layers: a number for each channel, (channels,). Channels with equal numbers are removed
        together; those with a negative number are kept. The pruners follow it, NNI's own too; NNI's entries can't
        express it.
    shares : mapping of str to Share
        By layer whose channels are shuffled and split: how many channels of each segment are kept at the ratio of the
        layer's entry. Used like ``ties``.
    reasons : mapping of str to tuple of Reason
        The reasons behind the texts of ``skipped``, by layer, each with its kind and place.
    """

    @checked(ties=_BY_LAYER | NONE, shares=_BY_LAYER | NONE)
    def __init__(
        self,
        entries: Iterable[dict[str, Any]] = (),
        skipped: Mapping[str, str] | None = None,
        named: Iterable[str] = (),
        ties: Mapping[str, tuple[int, ...]] | None = None,
        shares: Mapping[str, Share] | None = None,
        reasons: Mapping[str, Reasons] | None = None,
    ) -> None:
        super().__init__(entries)
        self.skipped = dict(skipped or {})
        self.named = frozenset(named)
        self.ties = dict(ties or {})
        self.shares = dict(shares or {})
        self.reasons = dict(reasons or {})
        self._facts: Facts | None = None
        self._sizes: dict[str, torch.Size] = {}  # of the parameters of the model

    def take_facts(self, analysis: Analysis) -> None:
        """Store the facts about a model, for :func:`nni_topo.to_dense`."""
        self._facts = analysis.facts
        self._sizes = {
            name: parameter.shape for name, parameter in analysis.model.named_parameters(remove_duplicate=False)
        }

    def facts_for(self, model: torch.nn.Module) -> Facts | None:
        """Return the facts found about a model when the groups were made; None for a copy of the groups."""
        if self._facts is None or self._facts.trace is None:
            return None
        sizes = {name: parameter.shape for name, parameter in model.named_parameters(remove_duplicate=False)}
        if sizes != self._sizes:
            changed = [name for name in {**self._sizes, **sizes} if sizes.get(name) != self._sizes.get(name)]
            raise ConfigError(
                "groups must come from dependency_groups on this model, got groups of a model with other "
                f"parameters: {listed(changed)} (groups)"
            )
        return self._facts

    def with_entries(self, entries: Iterable[dict[str, Any]]) -> DependencyGroups:
        """Return these groups with other entries."""
        return DependencyGroups(entries, self.skipped, self.named, self.ties, self.shares, self.reasons)

    def unnamed(self) -> DependencyGroups:
        """Return the groups as if ``op_types`` had selected all: layers that a pruner can't prune keep all channels."""
        return DependencyGroups(self, self.skipped, (), self.ties, self.shares, self.reasons)

    def layers(self) -> list[list[str]]:
        """Return the layers of the entries, one list for each group."""
        by_group: dict[Any, list[str]] = {}
        for index, entry in enumerate(self):
            by_group.setdefault(entry.get("dependency_group_id", index), []).extend(entry["op_names"])
        return list(by_group.values())

    def without(self, layers: Iterable[str]) -> DependencyGroups:
        """Return the groups without the entries of some layers and of layers in the same groups."""
        out = set(layers)
        groups = {entry.get("dependency_group_id") for entry in self if out & set(entry["op_names"])} - {None}
        return self.with_entries(
            entry for entry in self if not (out & set(entry["op_names"]) or entry.get("dependency_group_id") in groups)
        )


@public(model=MODEL, example_inputs=INPUTS, config_list=UNGROUPED)
@as_written()
def dependency_groups(
    model: torch.nn.Module, example_inputs: Any, config_list: list[dict[str, Any]], *, strict: bool = False
) -> DependencyGroups:
    """Make a config_list with an entry for each layer, and with coupled layers in one group.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not wrapped by a pruner. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments.
    config_list : list of dict
        NNI's pruning config_list. It isn't changed.
    strict : bool, default=False
        Raise where a layer that an entry selects can't lose channels, instead of leaving it out.

    Returns
    -------
    DependencyGroups
        One entry for each selected layer: in the order of the entries of ``config_list``, and in network order within
        an entry. Coupled layers (by a residual addition, say) get a common ``dependency_group_id`` ("group_0",
        "group_1", ... in network order), which replaces the old one. Layers before or at a grouped convolution or a
        group norm get ``internal_metric_block``, the number of blocks that must lose equally many channels.
        ``op_types`` selects derived classes too. ``skipped`` has the reason for each layer that was left out, or that
        can lose only some channels.

    Raises
    ------
    ConfigError
        If an entry names an unknown layer or selects no layer, or the inputs don't fit the model; with ``strict``, if a
        selected layer, other than the model's output, can't lose channels.
    DataError
        If a parameter or an input has no values, as on the meta device, or memory is too small to run the model.
    SpeedupError
        If the model can't be traced, and an entry names a layer in ``op_names`` or ``strict`` is given.

    Notes
    -----
    Layers in ``op_names`` are always in the result. Other layers are left out, with one warning and an entry in
    ``skipped``, if `to_dense` couldn't remove their channels: because they compute the model's output, or because their
    channels enter an operation that needs all of them or a fixed size in the forward. A dry run, which prunes random
    channels, finds the latter; it takes about two forward passes. An attribute (``self.width``) isn't a fixed size if
    the forward only uses it to split, slice or view channels. A model that can't be traced as a whole is traced in
    parts, and the outputs of each part are kept.

    If a selected layer is coupled with one that isn't selected, ``to_dense`` keeps its channels, as NNI does; a warning
    names both, and ``skipped`` has the layer. A depth-wise convolution needn't be selected: it loses the channels of
    the layer before it. If several layers come before it, it gets no entry, because NNI can't express such a group, and
    loses the channels that these lose. If layers share only some channels, as through a concatenation or a split before
    an addition, ``ties`` says which; it also couples layers whose concatenation a group norm or grouped convolution
    reads, at equal positions of all blocks. The pruners, NNI's own too, then prune as close to each layer's ratio as
    the coupling allows. Given ``list(groups)``, NNI's pruners choose channels for each layer separately, and
    `to_dense` keeps every channel that any of the layers keeps. Layers that share a weight are coupled, like one layer
    that is called twice.

    Norms may be selected: their masks remove channels of the layers before them. Norms that read the same channels are
    in one group. A norm is left out if the layers before it are selected by the same list, or if something else reads
    their channels before the norm does.

    Layers that compute queries, keys or values of attention lose whole heads: they get a granularity and a group. The
    output projection loses rows if every layer that adds to the residual stream is selected, or if ``op_names`` has it;
    otherwise it loses columns, in the group of the heads. ``"granularity": "head"``, which NNI doesn't know, selects
    only the heads of these layers, or of a module that contains them. An entry with a list as granularity keeps it.
    Units of a recurrent layer without a projection are pruned like heads, the same in all stacked layers and
    directions.

    Examples
    --------
    >>> from torch.nn import Conv2d, Sequential
    >>> model = Sequential(Conv2d(1, 4, 3), Conv2d(4, 4, 3, groups=4), Conv2d(4, 2, 1))
    >>> config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    >>> groups = dependency_groups(model, torch.ones(1, 1, 8, 8), config)
    >>> [(entry["op_names"], entry["dependency_group_id"]) for entry in groups]
    [(['0'], 'group_0'), (['1'], 'group_0')]
    >>> groups.skipped
    {'2': "it gives the model's output"}
    """
    check_unwrapped(model)
    analysis = Analysis.on(model, example_inputs)
    groups = groups_of(analysis, config_list, strict=strict)
    groups.take_facts(analysis)
    return groups


def groups_of(
    analysis: Analysis, config_list: list[dict[str, Any]], *, strict: bool = False, warns: bool = True
) -> DependencyGroups:
    """Do the work of :func:`dependency_groups`; ``warns``: whether to warn of layers that were left out."""
    check_names(analysis.model, config_list)
    analysis = analysis.of(with_known_layers(analysis.model))
    model = analysis.model
    config_selection = _select(model, config_list)
    try:
        flow = analysis.flow
    except SpeedupError as error:
        if strict or config_selection.layers & config_selection.named:
            raise
        selected = [name for name, _ in model.named_modules() if name in config_selection.layers]
        untraced = {name: (reasons.untraced_model(of=str(error)),) for name in selected}
        _logger.warning("all layers keep all channels and are left out: %s", error)
        return DependencyGroups([], reasons.as_text(untraced), reasons=untraced)
    # If heads are selected, replace attention modules by their layers.
    selected_entries = list[tuple[frozenset[str], dict[str, Any]]]()
    for names, settings in config_selection.entries:
        if config_selection.by_head & names:
            names = _parts(names, flow)
        selected_entries.append((names, settings))
    selection = _Selection(tuple(selected_entries), config_selection.named, _parts(config_selection.by_head, flow))
    # In the order of first calls, followed by the modules that are never called.
    order = list(dict.fromkeys([*flow.layers, *(name for name, _ in model.named_modules(remove_duplicate=False))]))
    # Layers that share any channel, in network order; a layer without shared channels is a group of its own.
    groups = coupled_names({name: set(flow.group_ids_of(name).tolist()) - {FIXED} for name in flow.layers})
    # Named layers stay selected in any case: a pruner that can't prune one raises.
    unpruned = unprunable_layers(analysis, [name for name in order if name in selection.by_type])
    projections = _projections_by_column(flow, groups, selection, unpruned)
    left_out = {name: why for name, why in unpruned.items() if name not in projections}
    # An output projection that loses columns keeps its rows, and so the channels that it shares.
    rows = dict[int, str]()
    for name in projections:
        rows |= dict.fromkeys(flow.group_ids_of(name).tolist(), name)
    rows.pop(FIXED, None)
    for name in order:
        # Layers that can't lose channels anyway have a reason already.
        if name in selection.by_type and name in flow.layers and name not in {*projections, *left_out}:
            for group_id in flow.group_ids_of(name).tolist():
                if group_id in rows:
                    left_out[name] = (reasons.head_by_head(rows[group_id]),)
                    break
    for name in order:
        if name in selection.by_head and name not in flow.heads and name not in projections:
            place = name.rpartition(".")[0]
            owner = type(model.get_submodule(place)).__name__
            if name in flow.shared:
                left_out[name] = flow.why_pinned(name)
            elif is_transposed_linear(model.get_submodule(name)):
                left_out[name] = (why_not_followed(model, name),)
            elif "attention" in owner.lower() and not is_attention(model.get_submodule(place)):
                left_out[name] = (reasons.unknown_attention(place, owner),)
            else:
                left_out[name] = (reasons.no_heads(),)
    norms = [name for name in order if name in selection.layers and name not in left_out and is_masked_norm(flow, name)]
    layers = [name for name in flow.layers if name in selection.layers - left_out.keys() - projections.keys()]
    left_out |= _norms_left_out(flow, norms, layers, selection)
    norms = [name for name in norms if name not in left_out]
    by_row = selection.layers - left_out.keys() - projections.keys()
    in_part = dict[str, Reasons]()  # by layer or norm that loses some channels, why it keeps others
    for name in [*layers, *norms]:
        if FIXED in flow.class_ids_of(name):
            in_part[name] = flow.why_pinned(name)
    if strict:
        for name, why in left_out.items():
            if why != (reasons.model_output(),):
                text = reasons.join_texts(why)
                raise ConfigError(f"every selected layer must be able to lose channels, got {name}: {text}")
    group_settings = _settings(flow, projections, by_row | projections.keys(), norms)
    followers = _followers(flow)
    entries = []
    for names, settings in selection.entries:
        # A user's blocks, such as NNI's 64 by 64, make no group: the masks decide which heads are kept.
        has_blocks = isinstance(settings.get("granularity"), list)
        for name in order:
            if name in names and name not in left_out and name not in followers:
                is_alone = has_blocks and (name in flow.heads or name in projections)
                group = {} if is_alone else group_settings.get(name, {})
                entries.append({"op_names": [name], **copy.deepcopy(settings), **group})
    # Output projections that lose columns keep all rows.
    ties = partial_couplings(flow, [*(name for name in layers if name not in followers), *norms])
    skipped = reasons.as_text(left_out)
    for name, why in in_part.items():
        class_ids = flow.class_ids_of(name)
        skipped[name] = reasons.in_part(int((class_ids == FIXED).sum()), len(class_ids), why)
    unselected_partners = held_by_unselected(flow, DependencyGroups(entries).layers())
    alone = {name: (reasons.unselected(partners),) for name, partners in unselected_partners.items()}
    skipped |= reasons.as_text(alone)
    by_why = by_reason({name: why for name, why in skipped.items() if why != OUTPUT})
    if warns and by_why:
        _logger.warning(
            "these layers keep channels (.skipped has all; nni_topo.explain says what to change): %s",
            "; ".join(f"{listed(names)}: {why}" for why, names in by_why.items()),
        )
    heads = [name for name in [*layers, *norms] if flow.reaches_output(name)]
    if warns and heads:
        _logger.warning("the layer that gives the model's output should be excluded, got %s", ", ".join(heads))
    # For a named layer, a pruner that can't prune it raises instead.
    listed_layers = [name for name in skipped if name in left_out or name not in selection.named]
    all_reasons = left_out | in_part | alone
    return DependencyGroups(
        entries,
        skipped={name: skipped[name] for name in listed_layers},
        named=selection.named & selection.layers,
        ties=ties,
        shares=shares(flow, asked_of(flow, entries, ties)),
        reasons={name: all_reasons[name] for name in listed_layers},
    )


@dataclasses.dataclass(frozen=True)
class _Selection:
    """The layers that a config_list selects."""

    entries: tuple[tuple[frozenset[str], dict[str, Any]], ...]  # names, and the settings that don't select layers
    named: frozenset[str]  # by ``op_names``
    by_head: frozenset[str]  # whose heads are selected

    @cached_property
    def layers(self) -> frozenset[str]:
        """All selected layers."""
        return frozenset().union(*(names for names, _ in self.entries))

    @cached_property
    def by_type(self) -> frozenset[str]:
        """Selected layers that no entry names."""
        return self.layers - self.named


def _select(model: torch.nn.Module, config_list: list[dict[str, Any]]) -> _Selection:
    """Return the layers that a config_list selects, by NNI's rules, and layers of derived classes."""
    listed: Any = ListedModules(model)
    entries, named, by_head = list[tuple[frozenset[str], dict[str, Any]]](), set[str](), set[str]()
    for index, config in enumerate(trans_legacy_config_list(copy.deepcopy(config_list))):
        named.update(config.get("op_names") or ())
        if config.get("op_types"):
            types = {*config["op_types"], *derived_types(model, config["op_types"])}
            # PyTorch changes a layer's class to a derived one when it parametrizes a weight.
            parametrized = {type(module) for module in model.modules() if is_parametrized(module)}
            types |= {kind.__name__ for kind in parametrized if kind.__bases__[0].__name__ in types}
            config["op_types"] = sorted(types)
        asks_for_heads = config.get("granularity") == "head"
        if asks_for_heads:
            del config["granularity"]
        modules, settings, _ = select_modules_by_config(listed, config)
        # PEFT's layers have the type name and the weight of the layer within them, which is selected anyway.
        modules = {
            name: module
            for name, module in modules.items()
            if is_parametrized(module) or not isinstance(getattr(type(module), "weight", None), property)
        }
        if asks_for_heads:
            # A pattern for attention modules also matches modules within them, such as dropout.
            modules = {name: module for name, module in modules.items() if next(module.parameters(), None) is not None}
        if not modules:
            rule = f"every entry of a config_list must select a layer, got none for {config}"
            kinds = {type(module).__name__ for module in model.modules() if not list(module.children())}
            unknown = [kind for kind in config.get("op_types") or () if kind not in kinds]
            hints = [f"; of op_types {kind!r}: {hint_of(kind, kinds)}" for kind in unknown]
            raise ConfigError(f"{rule}{''.join(hints)} (config_list[{index}])")
        derived_types(torch.nn.ModuleList(modules.values()), PruningSetting.registry)  # named layers, too
        entries.append((frozenset(modules), settings))
        if asks_for_heads:
            by_head.update(modules)
    return _Selection(tuple(entries), frozenset(named), frozenset(by_head))


def _projections_by_column(
    flow: ChannelFlow, groups: list[list[str]], selection: _Selection, unpruned: Mapping[str, Reasons]
) -> dict[str, Attention]:
    """Return the output projections that lose the columns of pruned heads, and no rows.

    An output projection loses rows instead if all layers of its group can, and none of these was selected by head.
    """
    prunable = selection.layers - unpruned.keys()
    projections = dict[str, Attention]()
    for name, attention in flow.output_projections().items():
        is_asked = name in selection.by_head or name in selection.by_type
        if is_asked and attention.channels.keys() <= prunable:
            projections[name] = attention
    # After a norm the values of a pruned head aren't zero: only a mask on the columns removes them.
    by_head = selection.by_head | {name for name, attention in projections.items() if attention.shifted}
    by_row = set[str]()
    for names in groups:
        inside = {name for name in names if not flow.layers[name].depthwise}
        if inside <= prunable - by_head and not any(FIXED in flow.group_ids_of(name) for name in inside):
            by_row |= inside
    return {name: attention for name, attention in projections.items() if name not in by_row}


def _parts(names: frozenset[str], flow: ChannelFlow) -> frozenset[str]:
    """Replace attention modules by their layers."""
    holders = {name for name in names - flow.heads.keys() if name in flow.attention}
    inner = set[str]()
    for name in holders:
        inner.update([*flow.attention[name].channels, *filter(None, [flow.attention[name].out])])
    return (names - holders) | inner


def unprunable_layers(analysis: Analysis, names: Sequence[str]) -> dict[str, Reasons]:
    """Return the layers that must keep all channels, and why."""
    flow, unprunable = analysis.flow, analysis.unprunable
    skipped = dict[str, Reasons]()
    for name in names:
        if name not in flow.layers:
            module = analysis.model.get_submodule(name)
            if is_normalizing(module):
                if why := _why_norm_stays(analysis, name):
                    skipped[name] = why
            elif has_channels(module) or (module._parameters and not follows_channels(module)):
                aliases = [layer for layer in flow.layers if analysis.model.get_submodule(layer) is module]
                if aliases:
                    skipped[name] = (reasons.another_name(aliases[0]),)
                elif name in flow.channel_wise:
                    skipped[name] = (reasons.convolves_channels(),)
                elif name and not _is_used(flow, analysis.model, name) and name not in analysis.sizes:
                    skipped[name] = (reasons.not_run(),)
                else:
                    skipped[name] = (why_not_followed(analysis.model, name),)
            continue
        group_ids = flow.group_ids_of(name)
        causes = dict.fromkeys(unprunable[group_id] for group_id in group_ids.tolist() if group_id in unprunable)
        is_pinned = bool((group_ids == FIXED).all())
        if causes or (is_pinned and not flow.is_output(name)):
            skipped[name] = tuple(causes) or flow.why_pinned(name)
        elif not is_pinned and len(set(group_ids.tolist())) == 1 < len(group_ids):
            attention = flow.heads.get(name)
            reason = reasons.coupled_with_itself() if attention is None else reasons.only_head(attention.name)
            skipped[name] = (reason,)
        elif not is_pinned and len(set(flow.class_ids_of(name).tolist())) == 1 < len(group_ids):
            skipped[name] = (reasons.blocks_equal(flow.block_places(name)),)
        elif is_pinned or flow.reaches_output(name):
            graph = flow.traced.graph
            is_untraced = is_in_parts(graph)
            kept_for = reasons.untraced_output(of=why_in_parts(graph)) if is_untraced else reasons.model_output()
            skipped[name] = (kept_for,)
    return skipped


def is_masked_norm(flow: ChannelFlow, name: str) -> bool:
    """Tell whether a mask of a module's weight removes channels of the layers before it: whether it is such a norm."""
    return name not in flow.layers and len(flow.entering_channel_ids(name)) == masked_channels(flow.fetch_attr(name))


def _why_norm_stays(analysis: Analysis, name: str) -> Reasons:
    """Return why a mask of a norm removes no channels of the layers before it; empty if it can."""
    flow, module = analysis.flow, analysis.model.get_submodule(name)
    group_ids = flow.entering_group_ids(name)
    if not scales_channels(module):
        return (reasons.no_scale(),)
    if aliases := [
        reader for reader in flow.readers if reader != name and analysis.model.get_submodule(reader) is module
    ]:
        return (reasons.another_name(aliases[0]),)
    if not len(group_ids):
        if _is_used(flow, analysis.model, name):
            return (reasons.not_followed(),)
        return (reasons.not_run(),)
    unprunable = analysis.unprunable
    if causes := dict.fromkeys(unprunable[group_id] for group_id in group_ids.tolist() if group_id in unprunable):
        return tuple(causes)
    if bool((group_ids == FIXED).all()):
        return flow.why_pinned(name) or (reasons.no_layer_before(),)
    if flow.reaches_output(name):
        return (reasons.model_output(),)
    return ()


def _norms_left_out(
    flow: ChannelFlow, norms: Iterable[str], layers: Iterable[str], selection: _Selection
) -> dict[str, Reasons]:
    """Return the selected norms that make no masks: layers before them do, or something else reads their channels.

    ConfigError for a norm in ``op_names`` without a layer before it.
    """
    of_layers = {FIXED}.union(*(flow.group_ids_of(name).tolist() for name in layers))
    left_out = dict[str, Reasons]()
    for name in norms:
        entering = set(flow.entering_group_ids(name).tolist())
        if name in selection.named:
            if entering == {FIXED}:
                why = reasons.join_texts(flow.why_pinned(name) or (reasons.no_layer_before(),))
                raise ConfigError(f"a selected norm must follow a layer that can lose channels, got {name}: {why}")
        elif entering <= of_layers:
            left_out[name] = (reasons.norm_follows(),)
    before = -1
    while before != len(left_out):  # without a norm, channels may reach a reader that it scaled them for
        before = len(left_out)
        remaining = [name for name in norms if name not in left_out]
        for name in remaining:
            group_ids = np.setdiff1d(flow.entering_group_ids(name), FIXED)
            # as if the masks of all remaining norms removed all channels
            removed = {norm: np.zeros(len(flow.entering_channel_ids(norm)), dtype=np.bool_) for norm in remaining}
            if name not in selection.named and flow.kept_groups(removed)[group_ids].all():
                left_out[name] = why_read_beside(flow, remaining, group_ids)
    return left_out


def _is_used(flow: ChannelFlow, model: torch.nn.Module, name: str) -> bool:
    """Tell whether the forward calls a layer, calls an untraced module around it, or reads its weights."""
    layer = model.get_submodule(name)
    targets = {str(node.target) for node in flow.graph.nodes if node.op in ("call_module", "get_attr")}
    for alias, module in model.named_modules(remove_duplicate=False):  # one module may have several names
        if module is layer and any(
            f"{alias}.".startswith(f"{target}.") or target.startswith(f"{alias}.") for target in targets
        ):
            return True
    return False


def held_by_unselected(flow: ChannelFlow, groups: Iterable[Collection[str]]) -> dict[str, tuple[str, ...]]:
    """Return, by selected layer that can't lose channels, the layers that would have to be selected with it.

    ``groups``: the selected layers, grouped by the channels or heads that they lose together. An output projection that
    loses columns shares its rows with layers that needn't be selected, so a group is held as a whole or not at all.
    """
    selected = {name for group in groups for name in group}
    owners = dict[int, list[str]]()  # by channel, the unselected layers that share it
    for name, layer in flow.layers.items():
        if name not in selected and not layer.depthwise:  # a depth-wise convolution follows the layer before it
            for class_id in set(flow.class_ids_of(name).tolist()) - {FIXED}:
                owners.setdefault(class_id, []).append(name)
    blockers = dict[str, tuple[str, ...]]()
    for group in groups:
        partners = dict[str, dict[str, None]]()
        for name in group:
            class_ids = set[int]()
            if name in flow.layers:
                class_ids = set(flow.class_ids_of(name).tolist()) - {FIXED}
            if class_ids and class_ids <= owners.keys():
                partners[name] = {owner: None for class_id in sorted(class_ids) for owner in owners[class_id]}
        if partners.keys() == set(group):
            blockers |= {name: tuple(unselected) for name, unselected in partners.items()}
    return blockers


def joining_embeddings(flow: ChannelFlow) -> list[str]:
    """List the embeddings that join the channels of other layers, such as a class embedding added to features.

    Tables of tokens and their positions, from which the other layers compute, don't join, nor does any table of the
    channels or heads of attention.
    """
    of_attention = set[int]()
    for name in (*flow.heads, *flow.shared):
        of_attention.update(flow.group_ids_of(name).tolist(), flow.entering_group_ids(name).tolist())
    joining = list[str]()
    for names in coupled_names({name: set(flow.group_ids_of(name).tolist()) - {FIXED} for name in flow.layers}):
        embeddings = {name for name in names if isinstance(flow.fetch_attr(name), torch.nn.Embedding)}
        group_ids = {group_id for name in embeddings for group_id in flow.group_ids_of(name).tolist()} - {FIXED}
        if not group_ids or group_ids & of_attention:
            continue
        computed = set[torch.fx.Node]()  # from the embeddings
        for node in flow.traced.graph.nodes:
            if str(node.target) in embeddings or not computed.isdisjoint(node.all_input_nodes):
                computed.add(node)
        called = {str(node.target): node for node in reversed(flow.traced.graph.nodes)}  # at their first call
        if any(name in called and called[name] not in computed for name in names):
            joining += [name for name in names if name in embeddings]
    return joining


def _settings(
    flow: ChannelFlow, projections: Mapping[str, Attention], chosen: frozenset[str], norms: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the keys that dependency groups add to entries; `projections` lose the columns of heads."""
    blocks = blocks_of(flow, norms)
    # NNI can express only groups that couple channel i of each layer with channel i of the others, and no groups of
    # layers and norms, whose scores have other shapes.
    stated: dict[tuple[int | str, ...], list[str]] = {}
    for name in flow.layers:
        source = next(iter(projections[name].channels)) if name in projections else name
        group_ids = tuple(flow.group_ids(flow.unit_channel_ids(source)).tolist())
        if set(group_ids) != {FIXED}:
            stated.setdefault(group_ids, []).append(name)
    for name in norms:
        group_ids = tuple(flow.entering_group_ids(name).tolist())
        stated.setdefault(("norms", *group_ids), []).append(name)
    # These need a group even alone: recurrent layers, for their two weights, and layers with blocks.
    alone = {name for name, attention in flow.heads.items() if attention.recurrent}
    alone |= {name for name, count in blocks.items() if count > 1}
    settings: dict[str, dict[str, Any]] = {}
    rank = 0
    for names in stated.values():
        is_needed = len(names) > 1 or names[0] in alone
        if not is_needed or chosen.isdisjoint(names):
            continue
        for name in names:
            settings[name] = {"dependency_group_id": f"group_{rank}"}
            if blocks.get(name, 1) > 1:
                settings[name]["internal_metric_block"] = blocks[name]
        rank += 1
    for name in flow.layers:
        if name not in flow.heads and (size := flow.units(name).shape[1]) > 1:
            weight: Any = flow.fetch_attr(name).weight
            settings.setdefault(name, {})["granularity"] = [size, *[-1] * (weight.dim() - 1)]
        if isinstance(flow.fetch_attr(name), torch.nn.Embedding):
            settings.setdefault(name, {})["granularity"] = [-1, 1]  # by column, where NNI's default is by row
    for name, attention in flow.heads.items():
        settings.setdefault(name, {})["granularity"] = attention.granularity(name)
    for name, attention in projections.items():
        settings.setdefault(name, {})["granularity"] = [-1, attention.size]
    return settings


def _followers(flow: ChannelFlow) -> set[str]:
    """Return depth-wise convolutions after several layers, with reordered channels, or with several for each input."""

    def key(name: str) -> tuple[bytes, bytes]:
        # By channel and by unit: a depth-wise convolution that makes two channels of each input is pruned by single
        # ones, so it can't be in a group with a layer that is pruned by pairs.
        return flow.group_ids_of(name).tobytes(), flow.group_ids(flow.unit_channel_ids(name)).tobytes()

    owners = [name for name, layer in flow.layers.items() if not layer.depthwise]
    stated = {key(name) for name in owners}
    owned = {group_id for name in owners for group_id in flow.group_ids_of(name).tolist()}
    followers = set[str]()
    for name, layer in flow.layers.items():
        if layer.depthwise and key(name) not in stated and not owned.isdisjoint(flow.group_ids_of(name).tolist()):
            followers.add(name)
    return followers


def by_reason(skipped: Mapping[str, str]) -> dict[str, list[str]]:
    """Group layers by the reason why they keep channels."""
    by_why: dict[str, list[str]] = {}
    for name, why in skipped.items():
        by_why.setdefault(why, []).append(name or "the model itself")
    return by_why


def why_not_followed(model: torch.nn.Module, name: str) -> Reason:
    """Return why a layer keeps its channels although no coupling is known."""
    if not name:
        return reasons.model_output()  # the layer is the whole model
    module = model.get_submodule(name)
    if is_recurrent(module):
        return reasons.packed_rows()
    if isinstance(module, RECURRENT):
        return reasons.recurrent_state()
    if weight_is_computed(module):
        return reasons.computed_weight(can_convert=is_parametrized(module) or bool(module._forward_pre_hooks))
    if has_complex_weights(module):
        return reasons.complex_weight()
    if is_transposed_linear(module):
        return reasons.transposed_weight()
    if not has_channels(module):
        return reasons.unknown_class(name, type(module))
    owner = name.rpartition(".")[0]
    while owner:
        holder = model.get_submodule(owner)
        is_container = isinstance(holder, (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict))
        if is_over_channels(holder):
            return reasons.inside_gate(owner, type(holder).__name__)
        if type(holder).__module__.startswith("torch.nn.modules.") and not is_container:
            return reasons.inside_module(owner, type(holder).__name__)
        owner = owner.rpartition(".")[0]
    return reasons.not_followed()
