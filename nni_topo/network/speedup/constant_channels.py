"""The contribution of pruned channels to the layers that read them, where it doesn't depend on the input.

A channel of zeros is a constant after a sigmoid (0.5) or softplus, and in NNI's masked model after a batch norm (its
shift). A layer turns constants into one number for each of its output channels, which its bias can add instead.

Constant channels: one pruned channel is kept, with zero weights, where its constant output can't be folded into a bias.
For a layer that pads with zeros, say, the contribution of a constant is smaller next to the border. But it doesn't
depend on the input, and that of each pruned channel is a multiple of that of any other. So the layer's weights for the
kept channel become the sum of its weights for all of them, times these factors.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nni_topo.maths.ties import first_largest
from nni_topo.network.channels import reasons
from nni_topo.network.channels.flow import ChannelFlow, only_norm_after
from nni_topo.network.channels.reasons import Reason
from nni_topo.network.layers.derived import call_of, has_own_forward, inner_of, is_followed, kind_of
from nni_topo.network.layers.kinds import CONVOLUTIONS, TRANSPOSED, WEIGHTED, by_channel, is_depthwise, is_plain_norm
from nni_topo.network.layers.original_width import channel_dim
from nni_topo.network.layers.slicing import keep
from nni_topo.network.runtime.copies import left_alone
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import Call, fitting, random_like, run_few

TOLERANCE = 1e-5  # of a channel's largest value; rounding is below


_MOST = 4  # constant channels of one layer, of which all its other pruned channels are multiples


@dataclasses.dataclass(frozen=True)
class Reader:
    """A layer that pruned channels enter, and their values in each of its calls."""

    module: nn.Module
    pruned: Tensor  # which of the channels that enter are pruned: bool, (input channels,)
    rows: list[Tensor] | None = None  # (pruned channels, samples and places), if not all zero; None if not wanted
    ends: list[Tensor] = dataclasses.field(default_factory=list)  # least and largest value of each: (2, pruned)

    def look(self, entered: Tensor) -> None:
        """Record the values that enter in a call."""
        if self.rows is not None and has_own_forward(self.module) and inner_of(self.module) is not None:
            # Only up to its convolution: its padding is no constant of the channels.
            entered = call_of(self.module, entered).entering
        rows, pruned = by_channel(self.module, entered), self.pruned
        if len(rows) == len(pruned):
            found = rows[pruned.to(rows.device)]
        else:  # a call with another number of channels, of which nothing is known
            found = rows.new_full((int(pruned.sum()), 1), torch.nan)
        self.ends.append(torch.stack([found.amin(1), found.amax(1)]).cpu().double())
        if self.rows is not None and bool(self.ends[-1].any()):
            self.rows.append(found.cpu().double())

    def constants(self) -> Tensor:
        """Return the constant value of each channel in all calls; zero for one that stays or isn't constant."""
        ends = torch.stack(self.ends)
        lowest, highest = ends[:, 0].amin(0), ends[:, 1].amax(0)
        largest = torch.maximum(lowest.abs(), highest.abs())
        values = torch.where(highest - lowest <= TOLERANCE * largest, highest, 0.0)
        return torch.zeros(len(self.pruned), dtype=torch.float64).masked_scatter(self.pruned, values)


def readers(
    model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call, *, rows: bool = False
) -> dict[str, Reader]:
    """Run a model on two random inputs; return the layers that pruned channels enter as other values than zero."""
    entering, leaving = list[Any](), list[Any]()
    found = dict[str, Reader]()
    for name in flow.layers:
        module = model.get_submodule(name)
        pruned, kept = (torch.from_numpy(np.asarray(each)) for each in _pruned_and_kept(flow, is_kept, name))
        if isinstance(module, WEIGHTED) and bool(pruned.any()):
            found[name] = Reader(module, pruned, [] if rows else None)
            entering.append((module, found[name].look))
        # A layer with operations after its convolution may give values for a pruned channel.
        if isinstance(module, WEIGHTED) and not bool(kept.all()) and not is_followed(module):
            leaving.append((module, partial(_zeroed, module, kept)))
    # Two inputs, for on one of them a channel with a single place looks constant.
    for seed in range(2):
        with fitting(0, "example_inputs"), torch.no_grad(), watched(entering, leaving):
            run_few(model, random_like(call, torch.Generator().manual_seed(seed)))
        with_values = {name: reader for name, reader in found.items() if any(bool(each.any()) for each in reader.ends)}
        if not with_values:
            break
    return with_values


def stays_zero(
    model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call, entering_norms: dict[str, Tensor]
) -> bool:
    """Run a masked model; tell whether pruned channels are zero where layers read them, and where norms do.

    ``entering_norms``: which channels that enter norms and depth-wise convolutions are pruned, bool, by module.
    """
    are_zero = list[bool]()

    def look(module: nn.Module, pruned: Tensor, entered: Tensor) -> None:
        rows = entered.transpose(0, channel_dim(module) or 1).flatten(1)
        are_zero.append(len(rows) == len(pruned) and not bool(rows[pruned.to(rows.device)].any()))

    modules = {name: model.get_submodule(name) for name in entering_norms}
    looks = [(module, partial(look, module, entering_norms[name])) for name, module in modules.items()]
    with left_alone(model), watched(entering=looks):
        found = readers(model, flow, is_kept, call)
    return not found and all(are_zero)


def constants_read(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call) -> dict[str, Tensor]:
    """Measure the constant values of pruned channels, by the layer that reads them: (input channels,), else zero."""
    found = {name: reader.constants() for name, reader in readers(model, flow, is_kept, call).items()}
    return {name: values for name, values in found.items() if bool(values.any())}


def dropped(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call) -> list[str]:
    """Name the layers that lose a part of the contribution of pruned channels, where constants are kept."""
    names = list[str]()
    for name, reader in readers(model, flow, is_kept, call).items():
        is_lost = torch.stack(reader.ends).ne(0).flatten(0, 1).any(0) & (reader.constants()[reader.pruned] == 0)
        absorbs = can_absorb(reader.module, only_norm_after(model, flow, name), exactly=False)
        if bool(is_lost.any()) or not absorbs:
            names.append(name)
    return names


def is_bordered(model: nn.Module, flow: ChannelFlow, name: str) -> bool:
    """Tell whether a layer's bias can add its response to constants exactly, but for places next to its border."""
    module, norm = model.get_submodule(name), only_norm_after(model, flow, name)
    return can_absorb(module, norm, exactly=False) and not can_absorb(module, norm, exactly=True)


def norms_of_constants(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call) -> list[str]:
    """Name the batch norms whose output for pruned channels isn't zero.

    In training they use the statistics of the batch, which gives other constants.
    """
    found, leaving = set[str](), list[Any]()

    def look(name: str, pruned: Tensor, _: Any, output: Tensor) -> None:
        if bool(output.transpose(0, 1)[pruned.to(output.device)].any()):
            found.add(name)

    for name, module in model.named_modules():
        pruned = torch.from_numpy(~is_kept[flow.entering_group_ids(name)])
        if is_plain_norm(module) and bool(pruned.any()):
            leaving.append((module, partial(look, name, pruned)))
        if name in flow.layers and isinstance(module, WEIGHTED):
            kept = torch.from_numpy(np.asarray(is_kept[flow.group_ids_of(name)]))
            leaving.append((module, partial(_zeroed, module, kept)))
    with torch.no_grad(), watched(leaving=leaving):
        run_few(model, random_like(call, torch.Generator().manual_seed(0)))
    return [name for name, _ in model.named_modules() if name in found]


@torch.no_grad()
def absorb(
    model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, constants: dict[str, Tensor], *, exactly: bool
) -> None:
    """Fold constants into the biases of the layers that read them; ``exactly``: only where no border differs.

    Their weights for these channels become zero. Parameters are replaced; buffers of the model mustn't be shared. For a
    layer without a bias, the running mean of the batch norm after it takes the constant.
    """
    for name, values in constants.items():
        module: Any = model.get_submodule(name)
        norm = only_norm_after(model, flow, name)
        if not can_absorb(module, norm, exactly=exactly):
            continue
        weight = module.weight
        pruned, kept = (torch.from_numpy(np.asarray(each)) for each in _pruned_and_kept(flow, is_kept, name))
        values = values * pruned  # some may be kept again since they were measured
        rows = values.to(weight.device).view(module.groups if hasattr(module, "groups") else 1, -1)
        rows = rows.repeat_interleave(len(weight) // len(rows), 0)
        made = (weight.double().flatten(2).sum(2) if weight.dim() > 2 else weight.double()).mul(rows).sum(1)
        made = (made * kept.to(made)).to(weight)
        keep(module, "weight", weight * (rows == 0).view(*rows.shape, *[1] * (weight.dim() - 2)))
        if module.bias is not None:
            keep(module, "bias", module.bias + made)
        else:
            norm.running_mean.sub_(made)  # type: ignore[union-attr,operator]


def can_absorb(module: nn.Module, norm: nn.Module | None, *, exactly: bool) -> bool:
    """Tell whether the bias of a layer, or the batch norm after it, can add the layer's response to constants."""
    if not isinstance(module, (*CONVOLUTIONS, nn.Linear)) or not reads_plainly(module) or is_depthwise(module):
        return False
    # Beyond the border there are zeros in place of the constant.
    around: Any = getattr(module, "_reversed_padding_repeated_twice", ())
    is_padded = any(around) and module.padding_mode == "zeros"
    if has_own_forward(module):
        inner = inner_of(module)
        is_padded = inner is not None and any(inner.settings.get("_reversed_padding_repeated_twice", ()))
    return not (is_padded and exactly) and (isinstance(module.bias, Tensor) or norm is not None)


def reads_plainly(module: nn.Module) -> bool:
    """Tell whether a layer reads what enters with its own weight, and adds its own bias."""
    if not has_own_forward(module):
        return type(module) is kind_of(module)
    inner = inner_of(module)
    return inner is not None and inner.is_own


def _pruned_and_kept(flow: ChannelFlow, is_kept: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Tell which input channels of a layer are pruned, and which of its output channels stay."""
    return ~is_kept[flow.entering_group_ids(name)], is_kept[flow.group_ids_of(name)]


def _zeroed(module: nn.Module, kept: Tensor, entered: Tensor, output: Tensor) -> Tensor:
    view = [-1] if isinstance(module, nn.Linear) else [-1, *[1] * (output.dim() - 2)]
    return output * kept.to(output).view(view)


@dataclasses.dataclass(frozen=True)
class ConstantChannels:
    """The pruned channels that a layer keeps as inputs, with zero weights, in place of all of its pruned inputs."""

    places: list[int]  # their places among the channels that enter
    factors: Tensor  # each input channel as a multiple of each of them: float64, (input channels, constant channels)


@dataclasses.dataclass(frozen=True)
class ConstantContribution:
    """The contribution of pruned channels that doesn't depend on the input, by the layer that reads them."""

    constants: dict[str, Tensor]  # values that fold into biases: (input channels,), zero elsewhere
    constant_channels: dict[str, ConstantChannels]  # for all others

    def supplied(self, name: str) -> Tensor | None:
        """Return the input channels whose contribution is supplied as a constant: bool, (input channels,)."""
        found: Tensor | None = None
        if name in self.constants:
            found = self.constants[name] != 0
        if name in self.constant_channels:
            by_channels = (self.constant_channels[name].factors != 0).any(1)
            found = by_channels if found is None else found | by_channels
        return found

    def kept_for_others(self, flow: ChannelFlow) -> dict[int, Reason]:
        """Return the constant channels, by group id, and why they stay."""
        found = dict[int, Reason]()
        for name, channels in self.constant_channels.items():
            for group_id in flow.entering_group_ids(name)[channels.places].tolist():
                found.setdefault(group_id, reasons.carries_constant(name))
        return found


def constant_contribution(model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call) -> ConstantContribution:
    """Measure the constant contribution of pruned channels, and choose constant channels where no bias can add it."""
    constants, constant_channels, chosen = dict[str, Tensor](), dict[str, ConstantChannels](), set[int]()
    for name, reader in readers(model, flow, is_kept, call, rows=True).items():
        values = reader.constants()
        if not can_absorb(reader.module, only_norm_after(model, flow, name), exactly=True):
            values = torch.zeros_like(values)
        if bool(values.any()):
            constants[name] = values
        group_ids = flow.entering_group_ids(name)
        if not reads_plainly(reader.module) or getattr(reader.module, "groups", 1) != 1:
            continue
        has_weights = _by_input(reader.module).ne(0).flatten(1).any(1).cpu()
        found = _choose_constant_channels(reader, (values != 0) | ~has_weights, np.isin(group_ids, [*chosen]))
        if found:
            constant_channels[name] = found
            chosen.update(group_ids[found.places].tolist())
    return ConstantContribution(constants, constant_channels)


def changed_constants(
    found: ConstantContribution, model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, call: Call
) -> dict[str, Tensor]:
    """Tell which constants of pruned channels that ``found`` supplies are others on a call, of another size.

    Returns them by the layer that reads them: bool, (input channels,).
    """
    changed = dict[str, Tensor]()
    for name, reader in readers(model, flow, is_kept, call, rows=True).items():
        is_supplied = found.supplied(name)
        if is_supplied is None:  # such as a depth-wise convolution, which goes with its channels
            continue
        count = len(reader.pruned)
        expected = found.constants.get(name, torch.zeros(count, dtype=torch.float64))
        channels = found.constant_channels.get(name)
        differs = torch.zeros(count, dtype=torch.bool)
        for rows in reader.rows or []:
            values = torch.zeros(count, rows.shape[1], dtype=torch.float64)
            values[reader.pruned] = rows
            supplied = expected[:, None].expand(values.shape)
            if channels is not None:
                supplied = supplied + channels.factors @ values[channels.places]
            differs |= (values - supplied).abs().amax(1) > TOLERANCE * values.abs().amax(1)
        differs &= is_supplied
        if bool(differs.any()):
            changed[name] = differs
    return changed


@torch.no_grad()
def add_to_constant_channels(
    model: nn.Module, flow: ChannelFlow, is_kept: np.ndarray, constant_channels: dict[str, ConstantChannels]
) -> None:
    """Add layers' weights for pruned channels to their weights for the constant channels. Parameters are replaced."""
    for name, found in constant_channels.items():
        module: Any = model.get_submodule(name)
        # Some may be kept again since they were measured, with their weights.
        pruned = torch.from_numpy(~is_kept[flow.entering_group_ids(name)])
        rows = _by_input(module)
        factors = (found.factors * pruned[:, None]).to(rows.device)
        factors[found.places] = torch.eye(len(found.places), dtype=factors.dtype, device=factors.device)
        weight = rows.clone()
        weight[found.places] = torch.tensordot(factors, rows.double(), ([0], [0])).to(rows)
        keep(module, "weight", weight if isinstance(module, TRANSPOSED) else weight.transpose(0, 1).contiguous())


def _by_input(module: Any) -> Tensor:
    """Put the weights for each channel that enters a layer of one group into the first dimension."""
    weight: Tensor = module.weight
    return weight if isinstance(module, TRANSPOSED) else weight.transpose(0, 1)


def _choose_constant_channels(reader: Reader, is_settled: Tensor, preferred: np.ndarray) -> ConstantChannels | None:
    """Choose a few pruned channels of which the others are multiples, as far as they don't depend on the input.

    ``is_settled``: input channels that need none, bool; ``preferred``: those that other layers have already chosen.
    """
    rows = reader.rows or []
    if len(rows) < len(reader.ends) or any(each.shape != rows[0].shape for each in rows):
        return None
    first, *others = rows
    size = first.abs().amax(1)
    waiting = (size > 0).numpy() & ~is_settled[reader.pruned].numpy()
    for each in others:
        is_same = (each - first).abs().amax(1) <= TOLERANCE * size
        waiting = waiting & is_same.numpy()
    places, preferred = reader.pruned.nonzero().flatten(), preferred[reader.pruned.numpy()]
    chosen_places, columns = list[int](), list[Tensor]()
    while waiting.any() and len(chosen_places) < _MOST:
        open_ = waiting & preferred if (waiting & preferred).any() else waiting
        chosen = first_largest(np.where(open_, size.numpy(), 0.0))
        # By least squares, though any two values would do: the residual shows whether it is a multiple at all.
        factors = first @ first[chosen] / first[chosen].square().sum()
        alike = (first - factors[:, None] * first[chosen]).abs().amax(1) <= TOLERANCE * size
        taken = waiting & alike.numpy()
        chosen_places.append(int(places[chosen]))
        columns.append(factors * torch.from_numpy(taken))
        waiting = waiting & ~taken
    if not chosen_places:
        return None
    all_factors = torch.zeros(len(reader.pruned), len(chosen_places), dtype=torch.float64)
    all_factors[reader.pruned] = torch.stack(columns, 1)
    return ConstantChannels(chosen_places, all_factors)
