"""Which layers a comparison prunes, and the widths that meet a budget."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.channels import reasons
from nni_topo.network.cost.cost import Kept
from nni_topo.network.layers.kinds import RECURRENT, is_transposed_linear
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense_report import DenseReport
from nni_topo.network.speedup.dependency import (
    DependencyGroups,
    dependency_groups,
    groups_of,
    joining_embeddings,
    unprunable_layers,
    why_not_followed,
)
from nni_topo.pruners.budget import (
    Budget,
    BudgetOutcome,
    BudgetPlanner,
    kept_if,
    network_cost,
    share_left,
    warn_if_missed,
)
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.solving import solve_uniform
from nni_topo.pruners.units import PruningUnit, channels_of_block
from nni_topo.runs.choices import Target


def planned_ratios(
    analysis: Analysis,
    budget: Budget,
    entries: Sequence[Mapping[str, Any]] | None = None,
    round_to: int | None = None,
    *,
    prefers_multiples: bool = False,
) -> tuple[dict[str, float], BudgetOutcome]:
    """Return the ``sparse_ratio``, in [0, 1), of every layer that entries name, in network order, and the outcome.

    The entries of a config_list name the layers and their minimum and maximum ratios; by default all layers that can
    lose channels. Every layer loses the same share; rounding to whole channels is distributed over the layers so that
    the network meets the budget.
    """
    config_list = _grouped(analysis, entries)
    units = _units(analysis, config_list)
    args, kwargs = analysis.call
    planner = BudgetPlanner(budget, kwargs or args, round_to=round_to, prefers_multiples=prefers_multiples, warns=False)
    planner.facts = analysis.facts
    kept = planner.rows(units, lambda unit: np.zeros(unit.blocks), analysis.model)
    assert planner.outcome is not None  # the widths are found
    return _as_ratios(units, [unit.rows - kept[unit.name] for unit in units], config_list), planner.outcome


def layer_ratios(model: nn.Module, example_inputs: Any, target: Target) -> dict[str, float]:
    """Return the ``sparse_ratio``, in [0, 1), of every layer that a comparison prunes, in network order.

    ConfigError if the fewest channels leave more than twice the budget: networks of different sizes would be compared.
    """
    analysis = Analysis.on(model, example_inputs)
    if target.kind == "ratio":
        config_list = _grouped(analysis)
        return {name: target.value for entry in config_list for name in entry["op_names"]}
    share: Any = {target.kind: target.value}
    ratios, outcome = planned_ratios(analysis, Budget(**share))
    warn_if_missed(outcome)
    if outcome.left > 2.0 * target.value:
        raise ConfigError(
            f"a {target.kind} target must be reachable, got {target.value:g} where the fewest channels of each layer "
            f"leave {outcome.left:.3g} (target)"
        )
    return ratios


def fewest_channels(analysis: Analysis, entries: Sequence[Mapping[str, Any]], round_to: int | None = None) -> Kept:
    """Return the kept channels if each layer keeps its first ones, as few as the bounds of the entries allow."""
    units = _units(analysis, _grouped(analysis, entries))
    return kept_if(units, Planner(round_to=round_to).round_rows)([unit.removable_rows[1] for unit in units])


def proposed_ratios(
    model: nn.Module, example_inputs: Tensor, proposed: Mapping[str, float], share: float | None = None
) -> dict[str, float]:
    """Return the proposed ratios, equal within coupled layers and scaled so that this ``share`` of the MACs is kept.

    With None as the share they aren't scaled.
    """
    analysis = Analysis.on(model, example_inputs)
    config_list = _grouped(analysis)
    units = _units(analysis, config_list)
    if share is None:
        agreed = {name: float(proposed[unit.layers[0]]) for unit in units for name in unit.layers}
        return {name: agreed[name] for entry in config_list for name in entry["op_names"]}
    left = share_left(units, network_cost("flops", analysis))
    # The first layer's proposal is used for its dependency group.
    kept = [1.0 - proposed[unit.layers[0]] for unit in units]
    rows, bounds = [unit.rows for unit in units], [(0, unit.rows - 1) for unit in units]
    removed = solve_uniform(rows, left, share, bounds, proportions=[each / min(kept) for each in kept])
    return _as_ratios(units, removed, config_list)


def pruning_config(model: nn.Module, example_inputs: Tensor, ratios: dict[str, float]) -> list[dict[str, Any]]:
    """Return a config_list with a ratio per layer, see :func:`layer_ratios`, and dependency groups."""
    return dependency_groups(model, example_inputs, as_entries(ratios))


def as_entries(ratios: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return config_list entries with a ratio per layer."""
    return [{"op_names": [name], "sparse_ratio": float(ratio)} for name, ratio in ratios.items()]


def inner_layers(model: nn.Module, example_inputs: Tensor) -> list[str]:
    """Return the convolutions and linear layers that can lose channels, in network order; no output layers."""
    return inner_layers_of(Analysis.on(model, example_inputs))


def inner_layers_of(analysis: Analysis) -> list[str]:
    """Return the convolutions and linear layers that can lose channels, in network order; no output layers."""
    names, model = sorted_layers(analysis)[0], analysis.model
    return [name for name in names if not isinstance(model.get_submodule(name), (*RECURRENT, nn.Embedding))]


def sorted_layers(analysis: Analysis) -> tuple[list[str], dict[str, str]]:
    """Return the layers that can lose channels, or units, in network order, and the reasons why others can't.

    They are convolutions, linear and recurrent layers, ``nn.MultiheadAttention``, and embeddings that join the channels
    of such layers.
    """
    model, flow = analysis.model, analysis.flow
    prunable = (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention, *RECURRENT)
    joining = joining_embeddings(flow)
    names = [name for name in flow.layers if isinstance(model.get_submodule(name), prunable) or name in joining]
    others = [
        name
        for name, module in model.named_modules()
        if name not in names and (isinstance(module, prunable) or is_transposed_linear(module))
    ]
    whole = unprunable_layers(analysis, [*names, *others])
    for name in names:
        if flow.reaches_output(name):
            whole.setdefault(name, (reasons.model_output(),))
    for name in others:
        whole.setdefault(name, (why_not_followed(model, name),))
    return [name for name in names if name not in whole], reasons.as_text(whole)


def reasons_of_unpruned_layers(analysis: Analysis, dense: nn.Module) -> dict[str, str]:
    """Return for each layer that lost no channel in the dense network the reason why."""
    report: Any = getattr(dense, "report", None)
    rows = report.rows if isinstance(report, DenseReport) else ()
    known, others = sorted_layers(analysis)[1], str(reasons.not_asked())
    return {row.name: row.reason or known.get(row.name, others) for row in rows if row.before == row.after}


def _grouped(analysis: Analysis, entries: Sequence[Mapping[str, Any]] | None = None) -> DependencyGroups:
    entries = entries or [{"op_names": inner_layers_of(analysis)}]
    return groups_of(analysis, [{**entry, "sparse_ratio": 0.0} for entry in entries])


def _units(analysis: Analysis, config_list: DependencyGroups) -> list[PruningUnit]:
    """Return the layers that lose the same channels, or heads, within the bounds of their entries."""
    flow = analysis.flow
    grouped: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in config_list:
        grouped[entry.get("dependency_group_id", entry["op_names"][0])].append(entry)
    units = []
    for key, members in grouped.items():
        names = [name for entry in members for name in entry["op_names"]]
        # blocks of all members must fit: a step removes one channel of each part
        parts = math.lcm(*(entry.get("internal_metric_block", 1) for entry in members))
        blocks = len(flow.unit_channel_ids(names[0])) // parts * parts
        ties = config_list.ties.get(names[0], ())
        units.append(
            PruningUnit(
                name=str(key),
                members=tuple((name, "weight") for name in names),
                blocks=blocks,
                parts=parts,
                ties=ties if len(ties) == blocks else (),
                elements=1,
                channels=channels_of_block(analysis.model.get_submodule(names[0]), blocks),
                sparse_ratio=0.0,
                sparse_threshold=None,
                min_sparse_ratio=max(entry.get("min_sparse_ratio", 0.0) for entry in members),
                max_sparse_ratio=min(entry.get("max_sparse_ratio", 1.0) for entry in members),
            )
        )
    return units


def _as_ratios(units: list[PruningUnit], removed: Sequence[int], config_list: list[dict[str, Any]]) -> dict[str, float]:
    """Return the ratios of all layers, in network order, that remove these numbers of rows of each unit."""
    # Half a step more than asked keeps int(rows * ratio) from falling short by rounding.
    ratios = {
        name: (count + 0.5) / unit.rows if count else 0.0
        for unit, count in zip(units, removed, strict=True)
        for name in unit.layers
    }
    return {name: ratios[name] for entry in config_list for name in entry["op_names"]}
