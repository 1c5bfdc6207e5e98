"""What `to_dense` removed and what it kept, layer by layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.nn.utils.parametrize import is_parametrized

from nni_topo.network.channels import Reason, Reasons, reasons
from nni_topo.network.layers import (
    PER_CHANNEL,
    RECURRENT,
    is_transposed_linear,
    kept_channels,
    output_channels,
    weight_is_computed,
)
from nni_topo.network.speedup.reconcile import FullMasks


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The channels of one layer.

    Parameters
    ----------
    name : str
        Its name in the model.
    before : int
        Channels of the model that was pruned.
    asked : int
        Channels that the layer's own mask keeps; all of them without a mask.
    after : int
        Channels of the dense model.
    reason : str, default=""
        Why channels stay that the mask removes; empty if none does.
    """

    name: str
    before: int
    asked: int
    after: int
    reason: str = ""

    @property
    def kept(self) -> int:
        """How many channels stay although they are masked."""
        return max(self.after - self.asked, 0)


@dataclasses.dataclass(frozen=True)
class DenseReport:
    """The channels of every layer, before and after.

    Parameters
    ----------
    rows : tuple of LayerReport
        Convolutions, linear layers and embeddings, and masked norms, in the order of the model.
    checked : str, default=""
        On what inputs the dense model was found to compute what the masked one does; empty if that wasn't compared.
    stale : mapping of str to int, default={}
        Attributes, by name, that hold what was the number of channels of a layer that lost some, and the number; they
        may count something else.
    notes : tuple of str, default=()
        What else to know of it: where it would train another way than the masked model, or lacks a part of that.

    Examples
    --------
    >>> DenseReport((LayerReport("conv1", 8, 4, 4), LayerReport("conv2", 8, 4, 8, "shared with conv3")))
    layer  channels  asked  after  kept although masked
    conv1         8      4      4
    conv2         8      4      8  4: shared with conv3
    """

    rows: tuple[LayerReport, ...]
    checked: str = ""
    stale: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that keep channels although they are masked."""
        return tuple(row for row in self.rows if row.kept)

    def __repr__(self) -> str:
        width = max([5, *(len(row.name) for row in self.rows)])
        lines = [f"{'layer':{width}}  channels  asked  after  kept although masked"]
        for row in self.rows:
            why = f"  {row.kept}: {row.reason}" if row.kept else ""
            lines.append(f"{row.name:{width}}  {row.before:8}  {row.asked:5}  {row.after:5}{why}")
        if self.stale:
            lines.append("as before: " + ", ".join(f"{name} {number}" for name, number in self.stale.items()))
        lines += [f"compared on {self.checked}"] if self.checked else []
        lines += self.notes
        return "\n".join(lines)


def dense_report(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    masks: FullMasks,
    why: Mapping[str, Reasons],
    stale: Mapping[str, int],
) -> DenseReport:
    """Compare a model with its dense one: a row for each layer that makes channels, and for each masked norm."""
    rows = []
    for name, module in model.named_modules():
        before, after = _channels(module), _channels(dense.get_submodule(name))
        is_layer = output_channels(module) is not None
        if before is None or after is None or not (is_layer or name in masks):
            continue
        asked = _asked(module, masks.get(name, {}), before)
        found: Reasons = ()
        if after > asked:
            found = why.get(name, ()) or (why_not_followed(model, name) if is_layer else reasons.norm_follows(),)
        rows.append(LayerReport(name, before, asked, after, reasons.told(found)))
    return DenseReport(tuple(rows), stale=stale)


def _channels(module: torch.nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    if isinstance(module, PER_CHANNEL) and isinstance(weight, torch.Tensor):
        return weight.numel()
    return output_channels(module)


def _asked(module: torch.nn.Module, targets: Mapping[str, torch.Tensor], before: int) -> int:
    kept = kept_channels(module, targets)
    if kept is None and isinstance(module, PER_CHANNEL) and "weight" in targets:
        kept = targets["weight"].ne(0)
    return before if kept is None else int(kept.sum())


def why_not_followed(model: torch.nn.Module, name: str) -> Reason:
    """Return why a layer keeps its channels although no other layer knows of them."""
    if isinstance(model.get_submodule(name), RECURRENT):
        return reasons.recurrent_state()
    if weight_is_computed(model.get_submodule(name)):
        is_known = is_parametrized(model.get_submodule(name)) or bool(model.get_submodule(name)._forward_pre_hooks)
        return reasons.computed_weight(can_convert=is_known)
    if is_transposed_linear(model.get_submodule(name)):
        return reasons.transposed_weight()
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        owner = model.get_submodule(".".join(parts[:length]))
        if type(owner).__module__.startswith("torch.nn.modules.") and not _is_container(owner):
            return reasons.inside_module(".".join(parts[:length]), type(owner).__name__)
    return reasons.not_followed()


def _is_container(module: torch.nn.Module) -> bool:
    return isinstance(module, (torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict))
