"""Why a layer keeps its channels, and what to change."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from torch import nn

from nni_topo.context import in_context
from nni_topo.errors import ConfigError, SpeedupError, unknown_name
from nni_topo.network.channels import reasons
from nni_topo.network.channels.constraints import blocks_of, partial_couplings
from nni_topo.network.channels.ids import FIXED
from nni_topo.network.channels.reasons import Reasons
from nni_topo.network.graph.nodes import described, line_of
from nni_topo.network.layers.derived import with_known_layers
from nni_topo.network.layers.kinds import RECURRENT, is_transposed_linear, output_channels
from nni_topo.network.runtime.arguments import INPUTS, MODEL, check_unwrapped
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dependency import unprunable_layers

# Readers of an explanation may use either function.
_LEAVE_OUT = "leave {} out of what is pruned (layers of shrink, exclude_op_names of a config_list)"
_LISTED = 4  # names that a message lists before it counts the others


@dataclasses.dataclass(frozen=True, repr=False)
class Explanation:
    """Which channels of a layer can be pruned, and why others can't. Its ``repr`` is a summary in a few lines.

    Parameters
    ----------
    layer : str
        The layer's name.
    channels, kept : int
        The number of its output channels, and how many of them can't be removed.
    coupled : tuple of str, default=()
        Other layers with which it shares channels, in network order.
    in_part : bool, default=False
        Whether it shares only some channels with those layers, or shares them in another order.
    couplings : tuple of str, default=()
        The operations that couple its channels with those layers' or with one another, in network order: each with the
        module whose forward calls it, and the line of the forward if known.
    blocks : int, default=1
        Number of blocks of channels that must lose equally many.
    block_places : tuple of str, default=()
        What requires these blocks: grouped convolutions, group norms, chunks, views and attributes, in network order.
    heads : str, default=""
        The attention or recurrent module whose heads or units the layer computes.
    mixes : str, default=""
        The attention module whose output projection the layer is: it loses columns with the heads.
    reasons : tuple of Reason, default=()
        Why channels are kept; empty if all can be pruned.
    """

    layer: str
    channels: int
    kept: int
    coupled: tuple[str, ...] = ()
    in_part: bool = False
    couplings: tuple[str, ...] = ()
    blocks: int = 1
    block_places: tuple[str, ...] = ()
    heads: str = ""
    mixes: str = ""
    reasons: Reasons = ()

    @property
    def advice(self) -> tuple[str, ...]:
        """What to change so that more channels can be pruned."""
        with in_context(leaves_out=_LEAVE_OUT):
            return reasons.advice(self.reasons)

    def __repr__(self) -> str:
        if self.kept == 0 and self.heads:
            lines = [f"{self.layer}: its {self.channels} channels can be pruned but for those of one head or unit"]
        elif self.kept == 0:
            fewest = "one" if self.blocks == 1 else self.blocks
            lines = [f"{self.layer}: all but {fewest} of {self.channels} channels can be pruned"]
        elif self.kept < self.channels:
            lines = [f"{self.layer}: {self.kept} of {self.channels} channels are kept, the others can be pruned"]
        else:
            lines = [f"{self.layer}: all {self.channels} channels are kept"]
        if self.coupled:
            how = "some channels are shared" if self.in_part else "the same channels are pruned in all of them"
            lines.append(f"coupled with {', '.join(self.coupled)}: {how}")
        if self.couplings:
            lines.append(f"coupled by {_first(self.couplings)}")
        if self.blocks > 1:
            lines.append(f"{self.blocks} blocks of channels lose equally many, because of {_first(self.block_places)}")
        if self.heads:
            lines.append(f"channels are pruned by whole heads or units of {self.heads}")
        if self.mixes:
            lines.append(f"columns of its weight are pruned with the heads of {self.mixes}")
        for reason in self.reasons:
            line = f"kept: {reason}"
            if reason.line:
                line += f", at {reason.line}"
            lines.append(line)
        lines += [f"what to change: {text}" for text in self.advice]
        return "\n".join(lines)


def _first(names: Sequence[str]) -> str:
    """Join the first names, and count the others: a residual stage has an addition for each block."""
    shown = ", ".join(names[:_LISTED])
    if len(names) > _LISTED:
        return f"{shown} and {len(names) - _LISTED} more"
    return shown


@public(model=MODEL, example_inputs=INPUTS)
def explain(model: nn.Module, example_inputs: Any, layer: str) -> Explanation:
    """Explain which channels of a layer can be pruned, which layers it is coupled with, and why it keeps others.

    Parameters
    ----------
    model : torch.nn.Module
        The model. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments.
    layer : str
        The name of a layer with output channels, as in ``model.named_modules()``.

    Returns
    -------
    Explanation
        The facts that `dependency_groups` and `to_dense` use. Each of its ``reasons`` has a kind, the operation, and
        the line of the forward that calls it if known.

    Raises
    ------
    ConfigError
        If the model has no such layer, the module has no output channels, or the inputs don't fit the model.
    DataError
        If memory is too small to run the model.

    See Also
    --------
    dependency_groups : The same for all layers: ``skipped`` has the reasons.

    Examples
    --------
    >>> import torch
    >>> from torch.nn import Conv2d, Sequential, Softmax
    >>> model = Sequential(Conv2d(1, 8, 3), Softmax(dim=1), Conv2d(8, 4, 3), Conv2d(4, 2, 1))
    >>> print(explain(model, torch.ones(1, 1, 8, 8), "2"))
    2: all but one of 4 channels can be pruned
    >>> print(explain(model, torch.ones(1, 1, 8, 8), "0"))  # doctest: +ELLIPSIS
    0: all 8 channels are kept
    kept: the result of an operation depends on removed channels (1: Softmax)
    what to change: use an operation that treats every channel by itself, let a convolution alone read ...
    """
    check_unwrapped(model)
    model = with_known_layers(model)
    counts = dict[str, int]()  # by layer, its output channels; of a recurrent layer, its units
    for name, submodule in model.named_modules(remove_duplicate=False):
        module: Any = submodule
        if is_transposed_linear(module):
            count = module.weight.shape[1]
        elif isinstance(module, RECURRENT):
            count = module.hidden_size
        else:
            count = output_channels(module)
        if count is not None:
            counts[name] = int(count)
    layers = list(counts)
    if layer not in counts:
        try:
            module = model.get_submodule(layer)
        except AttributeError:
            raise unknown_name("layer", layer, layers, "explain") from None
        rule = "layer must name a convolution, a linear or recurrent layer or an embedding"
        if layer == "":
            hint = f"; the model's layers are {_first(layers)}" if layers else "; the model has no such layer"
            raise ConfigError(f"{rule}, got the empty name, which is the model itself (layer){hint}")
        inner = [name for name in layers if name.startswith(f"{layer}.")]
        hint = f"; it holds {_first(inner)}" if inner else ""
        raise ConfigError(f"{rule}, got {type(module).__name__} ({layer}){hint}")
    channels = counts[layer]
    try:
        analysis = Analysis.on(model, example_inputs)
        flow = analysis.flow
    except SpeedupError as error:
        return Explanation(layer, channels, channels, reasons=(reasons.untraced_model(of=str(error)),))
    why = unprunable_layers(analysis, [layer]).get(layer, ())
    if layer not in flow.layers:
        return Explanation(layer, channels, channels, reasons=why)
    channels = flow.layers[layer].channels
    n_kept = channels if why else int((flow.class_ids_of(layer) == FIXED).sum())
    coupled = tuple(flow.coupled_with(layer))
    couplings = []
    if coupled or any(reason.kind == "coupled_with_itself" for reason in why):
        for node in flow.coupling_operations(layer):
            line = line_of(node)
            couplings.append(f"{described(node)} at {line}" if line else described(node))
    heads, mixed = flow.heads.get(layer), flow.output_projections().get(layer)
    return Explanation(
        layer,
        channels,
        n_kept,
        coupled,
        in_part=layer in partial_couplings(flow, [layer, *coupled], with_staying=False),
        couplings=tuple(couplings),
        blocks=blocks_of(flow).get(layer, 1),
        block_places=flow.block_places(layer),
        heads=heads.name if heads else "",
        mixes=mixed.name if mixed else "",
        reasons=why or (flow.why_pinned(layer) if n_kept else ()),
    )
