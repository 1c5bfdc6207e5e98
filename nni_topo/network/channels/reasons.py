"""Why a layer, a channel or a head is kept: every reason the package gives, in one place.

Each function below makes one `Reason`. Rules, the dry run and the speed-up call these functions and word nothing
themselves, so that ``skipped``, ``dense.report``, warnings and errors say the same thing in the same words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Literal

from torch.fx import Node

from nni_topo.network.graph import line_of, place

Kind = Literal[
    "blocks_equal",
    "carries_constant",
    "computed_weight",
    "convolves_channels",
    "coupled_with_itself",
    "dry_run_failed",
    "fixed_channels",
    "fixed_sizes",
    "head_by_head",
    "head_size",
    "inside_module",
    "joins_constant",
    "joins_random",
    "last_read",
    "model_output",
    "needs_all_channels",
    "no_heads",
    "no_rule",
    "no_batch",
    "nonzero_values",
    "norm_follows",
    "not_asked",
    "not_followed",
    "overwritten",
    "random_shape",
    "recurrent_state",
    "result_depends",
    "rounding",
    "rule_keeps",
    "rule_misfits",
    "shared",
    "training_output",
    "training_reader",
    "training_only",
    "transposed_weight",
    "uncut_module",
    "untraced_model",
    "untraced_output",
]


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why channels are kept. ``str(reason)`` is the sentence that reports and warnings show.

    Parameters
    ----------
    kind : str
        A short identifier of the reason.
    place : str, default=""
        The operation, with the module it is written in ("add in layer1.0"), or the module that keeps the channels;
        empty if there is none.
    layer : str, default=""
        The layer or module that the reason names; empty if it names none.
    text : str, default=""
        The reason in words.
    line : str, default=""
        File and line of the forward where the operation is called; empty if that isn't known.
    """

    kind: Kind
    place: str = ""
    layer: str = ""
    text: str = ""
    line: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        return self.text


Reasons = tuple[Reason, ...]
"""All that keeps one layer, each reason once."""


def told(reasons: Iterable[Reason]) -> str:
    """Say several reasons in one line, each text once."""
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons))


def as_text(reasons: Mapping[str, Reasons]) -> dict[str, str]:
    """Say by layer what keeps it."""
    return {name: told(found) for name, found in reasons.items()}


def in_part(kept: int, channels: int, reasons: Reasons) -> str:
    """Say what keeps some of a layer's channels."""
    return f"{kept} of {channels} channels stay: {told(reasons)}"


# What can be done about a reason, by its kind; nothing about those that aren't here.
_ADVICE: dict[Kind, str] = {
    "model_output": "exclude the layer (exclude_op_names); what calls the model needs this size",
    "untraced_output": "write the code after the layer as a module that takes tensors and returns tensors",
    "untraced_model": "change what the message names, or prune the parts of the model one by one",
    "no_rule": "give the operation a rule with nni_topo.register_operator, or use one that has a rule (view, cat)",
    "rule_keeps": "register the operation with the rule 'follow' or 'couple' if it treats every channel by itself",
    "rule_misfits": "register the operation with a dim that fits, or with a function as its rule",
    "joins_constant": (
        "make a constant a parameter of the model (nn.Parameter), which is cut along with the channels that it meets; "
        "channels that meet the network's input can't go"
    ),
    "joins_random": "draw the random numbers without the dimension of the channels, or in training mode only",
    "random_shape": "draw the random numbers without the dimension of the channels, or in training mode only",
    "overwritten": "make a new tensor (torch.cat, torch.where) instead of writing into a part of one",
    "fixed_channels": "read the number from a shape (x.shape[1]) or from the attribute that holds the layer's width",
    "fixed_sizes": "read the sizes from the tensor (x.shape), or give -1 for the dimension of the channels",
    "result_depends": "use an operation that treats every channel by itself, or exclude the layer (exclude_op_names)",
    "nonzero_values": "use an activation that is zero at zero (ReLU, GELU, SiLU) between the layer and the operation",
    "no_batch": "give the convolution a dimension of samples",
    "uncut_module": "say how the module is cut with nni_topo.register_module",
    "recurrent_state": "use recurrent layers of one level and one direction, with biases: these lose units",
    "convolves_channels": "prune the layer whose channels the convolution runs along",
    "needs_all_channels": "prune the heads of the attention instead",
    "training_output": "delete the layer from the model if it isn't trained any more",
    "training_only": "delete the layer from the model if it isn't trained any more",
    "training_reader": "delete the layer from the model if it isn't trained any more",
    "dry_run_failed": "make the forward run on random weights and inputs",
    "head_by_head": "select every layer that adds to the same residual stream: its channels then go instead of heads",
    "no_heads": 'ask for channels: leave out "granularity": "head"',
    "computed_weight": "make the weight a plain parameter; nni_topo.as_torch_layers(model) does so where it can",
    "transposed_weight": "prune nni_topo.as_torch_layers(model) instead of the model",
    "inside_module": "write the module as one that calls its layers; heads of nn.MultiheadAttention can go as it is",
    "not_followed": "call the layer itself (self.layer(x)) rather than a function on its weight",
}


def advice(reasons: Reasons) -> tuple[str, ...]:
    """List what can be done about reasons, each way once."""
    return tuple(dict.fromkeys(_ADVICE[reason.kind] for reason in reasons if reason.kind in _ADVICE))


# What an operation of the forward does with channels.


def no_rule(node: Node) -> Reason:
    """Return the reason for channels that enter an operation without a rule."""
    return _at("no_rule", node, "no rule says where channels go")


def rule_keeps(node: Node) -> Reason:
    """Return the reason for channels that enter an operation which was registered to keep them."""
    return _at("rule_keeps", node, "the operation is registered to keep all channels")


def rule_misfits(node: Node) -> Reason:
    """Return the reason for channels that enter a registered operation whose shapes its rule doesn't fit."""
    return _at("rule_misfits", node, "the rule that the operation is registered with doesn't fit these shapes")


def joins_constant(node: Node) -> Reason:
    """Return the reason for channels that meet, place by place, something that can't be cut."""
    return _at("joins_constant", node, "an operation joins them to the network's input, a constant or a parameter")


def joins_random(node: Node) -> Reason:
    """Return the reason for channels that meet random numbers place by place."""
    return _at("joins_random", node, "an operation joins them to random numbers that the forward draws")


def random_shape(node: Node) -> Reason:
    """Return the reason for channels that random numbers are drawn for: of fewer, others would be drawn."""
    return _at("random_shape", node, "the forward draws random numbers for them")


def overwritten(node: Node) -> Reason:
    """Return the reason for channels of a tensor into which a forward writes."""
    return _at("overwritten", node, "part of a tensor is overwritten")


def fixed_channels(node: Node) -> Reason:
    """Return the reason for channels in front of a fixed place or number, as 4 in ``z[:, 4]``."""
    return _at("fixed_channels", node, "the forward picks or counts channels by fixed numbers")


def result_depends(node: Node) -> Reason:
    """Return the reason for channels whose absence changes what an operation computes of the others."""
    return _at("result_depends", node, "the result of an operation depends on removed channels")


def nonzero_values(node: Node) -> Reason:
    """Return the reason for removed channels that aren't zero any more where an operation reads them."""
    return _at("nonzero_values", node, "removed channels arrive as values that aren't zero")


def fixed_sizes(node: Node, error: Exception | None = None) -> Reason:
    """Return the reason for channels without which an operation fails, or gives another shape."""
    failure = "" if error is None else f": {type(error).__name__}"
    return _at("fixed_sizes", node, f"the sizes of an operation don't fit fewer channels{failure}")


def no_batch(node: Node) -> Reason:
    """Return the reason for what enters a convolution without a dimension of samples."""
    return _of("no_batch", node, f"the input of {node.target} has no batch dimension")


def uncut_module(node: Node, kind: str) -> Reason:
    """Return the reason for channels that enter a module of which nobody knows how it is cut."""
    return _of("uncut_module", node, f"they enter {node.target} ({kind}), which can't be cut")


def recurrent_input(node: Node, kind: str) -> Reason:
    """Return the reason for channels of a state that a recurrent layer is given and can't lose."""
    return _of("recurrent_state", node, f"they are the initial state of {node.target} ({kind}), which keeps its size")


def convolved_elsewhere(node: Node) -> Reason:
    """Return the reason for channels of a convolution along channels that is called on different ones."""
    return _of("convolves_channels", node, f"{node.target}, a convolution along channels, is called on others as well")


def needs_all_channels(node: Node, layer: str) -> Reason:
    """Return the reason for what enters attention and isn't read by its own linear layers."""
    return Reason(
        "needs_all_channels", layer, layer, f"attention ({layer}) needs all channels that enter", line_of(node)
    )


# What runs in training mode only.


def training_output() -> Reason:
    """Return the reason for channels that the model puts out in training mode only."""
    return Reason("training_output", text="they are an output of the model in training mode")


def training_only(layer: str) -> Reason:
    """Return the reason for a layer that evaluation mode never reaches."""
    return Reason("training_only", layer, layer, f"{layer} runs in training mode only")


def training_reader(layer: str) -> Reason:
    """Return the reason for channels that attention reads, or a recurrent layer, that evaluation mode never reaches."""
    return Reason("training_reader", layer, layer, f"{layer} reads them in training mode only")


# What the dry run finds.


def dry_run_failed(error: Exception) -> Reason:
    """Return the reason for all channels of a network that can't be run on random numbers."""
    return Reason("dry_run_failed", text=f"the dry run fails on random numbers: {type(error).__name__}")


def never_settled() -> Reason:
    """Return the reason for all channels where every round of the dry run finds further ones."""
    return Reason("dry_run_failed", text="channels depend on one another in a way that no rule describes")


def cutting_failed(layer: str, error: Exception) -> Reason:
    """Return the reason for channels of a module that raises when it is cut."""
    return Reason("uncut_module", layer, layer, str(error))


# What the layer itself is, and where its channels end.


def model_output() -> Reason:
    """Return the reason for a layer whose channels are the model's output."""
    return Reason("model_output", text="it gives the model's output")


def untraced_output(*, is_noise: bool) -> Reason:
    """Return the reason for a layer that ends a part of a model; ``is_noise``: what isn't traced draws numbers."""
    why = ": the forward draws random numbers of Python's or NumPy's" if is_noise else ""
    return Reason("untraced_output", text=f"its output enters code that could not be traced{why}")


def untraced_model(error: Exception) -> Reason:
    """Return the reason for all layers of a model that can't be traced."""
    return Reason("untraced_model", text=str(error))


def coupled_with_itself() -> Reason:
    """Return the reason for a layer of which no channel can go without all others."""
    return Reason("coupled_with_itself", text="all of its channels are coupled with one another")


def convolves_channels() -> Reason:
    """Return the reason for a convolution that goes along the channels of others and makes none."""
    return Reason("convolves_channels", text="it is a convolution along the channels of another layer")


def head_by_head(layer: str) -> Reason:
    """Return the reason for a layer that shares channels with an output projection, which loses columns and no rows."""
    return Reason("head_by_head", layer, layer, f"it shares channels with {layer}, which loses heads")


def no_heads() -> Reason:
    """Return the reason for a layer asked for heads that has none."""
    return Reason("no_heads", text="it makes no queries, keys or values of attention, so it has no heads")


def unknown_attention(module: str, kind: str) -> Reason:
    """Return the reason for a layer asked for heads in attention whose parts aren't known by name."""
    return Reason("no_heads", module, module, f"it is part of {module} ({kind}), attention of an unknown structure")


def recurrent_state() -> Reason:
    """Return the reason for a recurrent layer whose units can't go."""
    return Reason("recurrent_state", text="a recurrent layer keeps the size of its state")


def computed_weight(*, can_convert: bool) -> Reason:
    """Return the reason for a layer whose weight isn't a parameter."""
    text = "its weight is computed from other parameters"
    if can_convert:
        text += ", by weight norm or another parametrization: nni_topo.as_torch_layers(model) makes it a plain layer, "
        text += "prune the model that it returns"
    return Reason("computed_weight", text=text)


def transposed_weight() -> Reason:
    """Return the reason for Transformers' ``Conv1D``."""
    return Reason(
        "transposed_weight",
        text="its weight is transposed: nni_topo.as_torch_layers(model) makes it a linear layer",
    )


def inside_module(module: str, kind: str) -> Reason:
    """Return the reason for a layer within a module of PyTorch's that doesn't call it."""
    return Reason("inside_module", module, module, f"it is part of {module} ({kind}), which runs as one operation")


def not_followed() -> Reason:
    """Return the reason for a layer that no graph knows."""
    return Reason("not_followed", text="the layer isn't called by itself, or its channels couldn't be followed")


def norm_follows() -> Reason:
    """Return the reason for a masked norm."""
    return Reason("norm_follows", text="a norm keeps the channels of the layer before it, whose mask decides")


def not_asked() -> Reason:
    """Return the reason for a layer that could lose channels and wasn't asked to."""
    return Reason("not_asked", text="not asked for")


# What reconciling the masks of several layers keeps.


def shared(names: Iterable[str], unmasked: Iterable[str]) -> Reason:
    """Return the reason for channels that other layers keep; ``unmasked``: those of them without a mask."""
    free = ", ".join(unmasked)
    return Reason("shared", text=f"shared by {', '.join(names)}{'; of these without a mask: ' if free else ''}{free}")


def kept_by_itself() -> Reason:
    """Return the reason for channels that are coupled with others of the same layer, which its mask keeps."""
    return Reason("coupled_with_itself", text="some of its channels are coupled with one another")


def last_read(reader: str) -> Reason:
    """Return the reason for the one channel that a reader must be left."""
    return Reason("last_read", reader, reader, f"{reader} needs at least one of the channels that it reads")


def blocks_equal() -> Reason:
    """Return the reason for channels that make blocks equally large."""
    return Reason(
        "blocks_equal", text="blocks of a grouped convolution, a group norm or a chunk keep equally many channels"
    )


def head_size(attention: Iterable[str]) -> Reason:
    """Return the reason for heads that keep their size although masks would make all of them smaller."""
    names = ", ".join(attention)
    sentence = "head size unchanged: the attention uses the head size in a way that can't be adapted"
    return Reason("head_size", names, names, f"{sentence} ({names})")


def rounding(round_to: int) -> Reason:
    """Return the reason for channels that make widths a multiple of a number."""
    return Reason("rounding", text=f"round_to={round_to}")


def carries_constant(layer: str) -> Reason:
    """Return the reason for a channel without weights that brings a layer what all removed ones did."""
    return Reason(
        "carries_constant",
        layer,
        layer,
        f"kept to carry the constant contribution of the removed channels ({layer})",
    )


# Why a dense model can't equal the masked one, with what can be done about it.

_UNCHECKED = (
    "check=False gives the dense model all the same, which computes something else by that and has to be fine-tuned"
)


def unchecked() -> str:
    """Say what to do where nothing is known of the difference."""
    return _UNCHECKED


def unequal(layers: Iterable[str], place: str | None, statistics: str = "") -> str:
    """Say why outputs differ from a place on: removed channels of pruned layers that aren't zero there.

    ``place``: a layer that reads the channels; None where that isn't known. ``statistics``: the kind of a module there
    that computes something over all channels.
    """
    before = ", ".join(layers) or "the layers before it"
    leave_out = f"exclude {before} from the config_list (exclude_op_names)"
    if statistics:
        return f"{statistics} takes its statistics over removed channels too: {leave_out}; {_UNCHECKED}"
    if place is None:
        return f"removed channels of {before} aren't zero there: {leave_out}; {_UNCHECKED}"
    arrive = f"removed channels of {before} arrive at {place} as values that aren't zero"
    return f'{arrive}: {leave_out}; constants="keep" takes over what is constant, but for borders; {_UNCHECKED}'


def _at(kind: Kind, node: Node, sentence: str) -> Reason:
    """Make a reason of an operation, which the sentence ends with."""
    where = place(node)
    return Reason(kind, where, "", f"{sentence} ({where})", line_of(node))


def _of(kind: Kind, node: Node, sentence: str) -> Reason:
    """Make a reason of a module, which the sentence names."""
    return Reason(kind, str(node.target), str(node.target), sentence, line_of(node))
