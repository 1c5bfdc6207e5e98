"""The report of a dense network: the channels of every layer before and after, and why some were kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from weakref import WeakKeyDictionary

import torch

from nni_topo.network.channels import reasons
from nni_topo.network.channels.reasons import Reasons
from nni_topo.network.layers.kinds import PER_CHANNEL, follows_channels, kept_channels, output_channels
from nni_topo.network.runtime.reports import ModelReport, give_report, told_of_changes
from nni_topo.network.speedup.dependency import why_not_followed
from nni_topo.network.speedup.reconcile import FullMasks


@dataclasses.dataclass(frozen=True)
class LayerChannels:
    """The channels of one layer.

    Parameters
    ----------
    name : str
        Its name in the model.
    before, after : int
        Channels in the unpruned model, and in the dense model.
    asked : int
        Channels that the layer's own mask keeps; all of them without a mask.
    reason : str, default=""
        Why the layer keeps masked channels; empty if it keeps none.
    """

    name: str
    before: int
    asked: int
    after: int
    reason: str = ""

    @property
    def kept(self) -> int:
        """How many masked channels are kept."""
        return max(self.after - self.asked, 0)


@dataclasses.dataclass(frozen=True)
class DenseReport(ModelReport):
    """The channels of every layer, before and after.

    Parameters
    ----------
    rows : tuple of LayerChannels
        Convolutions, linear layers and embeddings, and masked norms, in the order of the model.
    checked : str, default=""
        The inputs on which the dense and the masked model agree; empty if they weren't compared.
    stale : mapping of str to int, default={}
        Attributes that may be out of date, by name, with their value: the tensor whose channels they count, in the
        table of `register_width_attribute`, has another number of channels or wasn't computed, and a layer of that
        width lost channels.
    notes : tuple of str, default=()
        Other remarks: where the model would train differently from the masked one, lacks a contribution of removed
        channels, or holds tensors that no run has read.
    answers : str, default=""
        With at least 32 samples in ``example_inputs``, the shares of the model's answers that the dense model gives.
    changed_since : tuple of str, default=()
        Later changes by functions of the package, in order, such as ``"distilled (nni_topo.distill)"``.

    Examples
    --------
    >>> DenseReport((LayerChannels("conv1", 8, 4, 4), LayerChannels("conv2", 8, 4, 8, "shared with conv3")))
    layer  channels  asked  after  kept although masked
    conv1         8      4      4
    conv2         8      4      8  4: shared with conv3
    """

    rows: tuple[LayerChannels, ...]
    checked: str = ""
    stale: Mapping[str, int] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    answers: str = ""
    changed_since: tuple[str, ...] = ()

    @property
    def pruned_layers(self) -> tuple[str, ...]:
        """Names of the layers that lost channels."""
        return tuple(row.name for row in self.rows if row.after < row.before)

    @property
    def kept(self) -> tuple[LayerChannels, ...]:
        """The layers that keep masked channels."""
        return tuple(row for row in self.rows if row.kept)

    def __repr__(self) -> str:
        width = max([5, *(len(row.name) for row in self.rows)])
        lines = [f"{'layer':{width}}  channels  asked  after  kept although masked"]
        for row in self.rows:
            why = ""
            if row.kept:
                why = f"  {row.kept}: {row.reason}"
            lines.append(f"{row.name:{width}}  {row.before:8}  {row.asked:5}  {row.after:5}{why}")
        if self.stale:
            lines.append(
                "attributes not updated: " + ", ".join(f"{name} {number}" for name, number in self.stale.items())
            )
        if self.checked:
            lines.append(f"equal to the masked network on {self.checked}")
        if self.answers:
            lines.append(self.answers)
        lines += self.notes
        if self.changed_since:
            lines.append(told_of_changes(self.changed_since))
        return "\n".join(lines)


def dense_report(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    masks: FullMasks,
    why: Mapping[str, Reasons],
    stale: Mapping[str, int],
) -> DenseReport:
    """Compare a model with its dense one: a row for each layer with output channels, and for each masked module."""
    rows = []
    for name, module in model.named_modules():
        if output_channels(module) is None and name not in masks:
            continue
        targets, small = masks.get(name, {}), dense.get_submodule(name)
        channels = output_channels(module)
        if channels is not None:
            before, after = channels, output_channels(small) or 0
            is_kept = kept_channels(module, targets)
        elif isinstance(module, PER_CHANNEL) and isinstance(module.weight, torch.Tensor):
            before, after = (layer.get_parameter("weight").numel() for layer in (module, small))
            is_kept = targets["weight"].ne(0) if "weight" in targets else None
        else:
            # The package doesn't know this layer: NNI masks rows of its first parameter.
            target, mask = next(iter(targets.items()))
            before, after = (len(torch.atleast_1d(layer.get_parameter(target))) for layer in (module, small))
            is_kept = mask.reshape(before, -1).any(1)
        n_asked = before if is_kept is None else int(is_kept.sum())
        why_kept: Reasons = ()
        if after > n_asked:
            reason = reasons.norm_follows() if follows_channels(module) else why_not_followed(model, name)
            why_kept = why.get(name, ()) or (reason,)
        rows.append(LayerChannels(name, before, n_asked, after, reasons.join_texts(why_kept)))
    return DenseReport(tuple(rows), stale=stale)


# Includes models that have got another report since, or that have their own attribute `report`.
_REPORTS: WeakKeyDictionary[torch.nn.Module, DenseReport] = WeakKeyDictionary()


def remember_report(dense: torch.nn.Module, report: DenseReport) -> None:
    """Give a dense model its report."""
    _REPORTS[dense] = report
    give_report(dense, report)


def dense_report_of(dense: torch.nn.Module) -> DenseReport:
    """Return the report of a model that :func:`to_dense` returned."""
    return _REPORTS[dense]
