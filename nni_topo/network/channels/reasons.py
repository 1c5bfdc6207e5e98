"""Why a layer, a channel or a head is kept: every reason that the package gives, and the only place that words one.

To change a text, change it here: ``skipped``, ``explain``, ``dense.report``, warnings and errors all show it. To add a
reason, add its kind to `Kind`, its sentence to the tables in the middle of this file, and what a user can do about it
to `_ADVICE`. A reason whose sentence needs more than the name of an operation or layer has a function below the tables.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

from torch.fx import Node

from nni_topo.context import leaving_out
from nni_topo.errors import listed, raised
from nni_topo.network.graph.nodes import described, line_of, place

Kind = Literal[
    "another_name",
    "blocks_equal",
    "call_not_covered",
    "carries_constant",
    "complex_weight",
    "computed_weight",
    "convolves_channels",
    "coupled_with_itself",
    "depends_on_size",
    "dry_run_failed",
    "fixed_channels",
    "fixed_sizes",
    "head_by_head",
    "head_size",
    "heads_stay",
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
    "not_run",
    "number_made",
    "one_head",
    "only_head",
    "overwritten",
    "own_norm",
    "packed_rows",
    "picked_by_value",
    "random_shape",
    "read_as_numbers",
    "recurrent_state",
    "result_depends",
    "rounding",
    "rule_keeps",
    "rule_misfits",
    "several_widths",
    "shared",
    "shared_by_heads",
    "shared_weight",
    "training_reader",
    "transposed_weight",
    "uncut_module",
    "unknown_class",
    "unselected",
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
        The operation, with the module in whose forward it stands ("add in layer1.0"), or the module that keeps the
        channels; empty if there is none.
    layer : str, default=""
        The layer or module that the text is about; empty if there is none.
    text : str, default=""
        The reason in words.
    line : str, default=""
        File and line of the forward that calls the operation ("net.py:12"); empty if they aren't known.
    """

    kind: Kind
    place: str = ""
    layer: str = ""
    text: str = ""
    line: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        return self.text


Reasons = tuple[Reason, ...]
"""All reasons why one layer keeps channels, each once."""


def told(reasons: Iterable[Reason]) -> str:
    """Join the texts of several reasons into one line, each text once."""
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons))


def as_text(reasons: Mapping[str, Reasons]) -> dict[str, str]:
    """Return the reasons of each layer as one line of text, by layer."""
    return {name: told(found) for name, found in reasons.items()}


def in_part(kept: int, channels: int, reasons: Reasons) -> str:
    """Return why a layer keeps some of its channels, as text."""
    return f"{kept} of {channels} channels are kept: {told(reasons)}"


# What a user can do about a reason, by its kind. The kinds that masks, not the model, bring about have no entry.
# {leave_out} stands for how the caller leaves the layer out of what is pruned.
_ADVICE: dict[Kind, str] = {
    "model_output": "{leave_out}: the caller of the model needs this number of channels",
    "untraced_output": "write the code after the layer as a module that takes tensors and returns tensors",
    "untraced_model": "change what the message names, or prune the parts of the model one by one",
    "no_rule": (
        "write this step with operations that have a rule (torch.cat, view), or register a rule for the operation "
        "with nni_topo.register_operator"
    ),
    "read_as_numbers": "{leave_out}: what reads the numbers may need as many",
    "call_not_covered": (
        "write this step with operations that move channels as a whole (torch.cat, view) or treat every channel by "
        "itself, or {leave_out}"
    ),
    "rule_keeps": "register the operation as 'follow' or 'couple' instead, if it treats every channel by itself",
    "rule_misfits": "register the operation with a dim that fits, or with a function as its rule",
    "joins_constant": (
        "store the constant as a parameter of the model (nn.Parameter): its channels are pruned with the layer's; "
        "channels that are combined with the network's input can't be pruned"
    ),
    "joins_random": "draw the random numbers without the dimension of the channels, or in training mode only",
    "random_shape": "draw the random numbers without the dimension of the channels, or in training mode only",
    "overwritten": "make a new tensor (torch.cat, torch.where) instead of writing into a part of one",
    "picked_by_value": (
        "{leave_out}: of a router, for one, that picks experts, each output stands for an expert, which isn't removed"
    ),
    "fixed_channels": "read the number from a shape (x.shape[1]) or from the attribute that holds the layer's width",
    "number_made": (
        "compute with a number that an attribute holds, such as a scale, instead of the width of a tensor, and compare "
        "a width with that of a layer (self.conv.out_channels) instead of a number"
    ),
    "heads_stay": (
        "see why the heads of the other tensor stay (nni_topo.explain of its layer), or give each head its own keys "
        "and values"
    ),
    "one_head": "give the attention its scale as a number, or more heads than one",
    "only_head": "make the head narrower with nni_topo.narrow_heads, or give the attention more heads than one",
    "shared_by_heads": (
        "prune heads, which lose their queries; nni_topo.narrow_heads makes the keys and values of all heads narrower"
    ),
    "fixed_sizes": "read the sizes from the tensor (x.shape), or give -1 for the dimension of the channels",
    "result_depends": "use an operation that treats every channel by itself, or {leave_out}",
    "nonzero_values": (
        "use operations that leave channels of zeros at zero (ReLU, GELU, SiLU) between the layer and the one that "
        "reads it, or {leave_out}"
    ),
    "depends_on_size": (
        "take the mean over places instead of a sum, or keep channels and places in dimensions of their own, or "
        "{leave_out}"
    ),
    "no_batch": "give the convolution's input a batch dimension",
    "unknown_class": "derive the class from PyTorch's layer, or say how it is cut with nni_topo.register_module",
    "uncut_module": "say how the module is cut with nni_topo.register_module",
    "packed_rows": "give it padded sequences: without pack_padded_sequence its units can be pruned",
    "recurrent_state": "use PyTorch's LSTM, GRU or RNN without a projection: their units can be pruned",
    "convolves_channels": "prune the layer whose channels the convolution slides along",
    "needs_all_channels": "prune the heads of the attention instead",
    "training_reader": "delete the layer from the model if it isn't trained any more",
    "dry_run_failed": "change the forward so that it runs on random weights and inputs",
    "head_by_head": (
        "select every layer that adds to the same residual stream: its channels are then pruned instead of heads"
    ),
    "no_heads": 'ask for channels: leave out "granularity": "head"',
    "complex_weight": "hold the complex weights as real ones, their real and imaginary parts in layers of their own",
    "computed_weight": "make the weight a plain parameter; nni_topo.as_torch_layers(model) does so where it can",
    "transposed_weight": "prune nni_topo.as_torch_layers(model) instead of the model",
    "own_norm": "prune nni_topo.as_torch_layers(model) instead of the model",
    "inside_module": (
        "write the module as one that calls its layers; heads of nn.MultiheadAttention can be pruned as it is"
    ),
    "not_followed": "call the layer itself (self.layer(x)) rather than a function on its weight",
    "unselected": "prune the layers that share the channels, too",
    "several_widths": "call a module of its own in each place",
    "shared_weight": "give the layers weights of their own: layer.weight = nn.Parameter(layer.weight.detach().clone())",
    "not_run": "delete the layer from the model if nothing uses it",
    "another_name": "name the layer as the reason does",
}


def advice(reasons: Reasons) -> tuple[str, ...]:
    """List what a user can do about reasons, each advice once."""
    texts = dict.fromkeys(_ADVICE[reason.kind] for reason in reasons if reason.kind in _ADVICE)
    return tuple(text.replace("{leave_out}", leaving_out()) for text in texts)


# The three forms that most reasons have. Each makes a function from a kind and a sentence.


def _of_operation(kind: Kind, sentence: str) -> Callable[[Node], Reason]:
    """Return a function that makes the reason of an operation, which is named after the sentence."""

    def reason(node: Node) -> Reason:
        return _at(kind, node, sentence)

    return reason


def _of_layer(kind: Kind, sentence: str) -> Callable[[str], Reason]:
    """Return a function that makes the reason of a layer or module, whose name takes the place of ``{layer}``."""

    def reason(layer: str) -> Reason:
        return Reason(kind, layer, layer, sentence.format(layer=layer))

    return reason


def _plain(kind: Kind, sentence: str) -> Callable[[], Reason]:
    """Return a function that makes a reason which names nothing."""

    def reason() -> Reason:
        return Reason(kind, text=sentence)

    return reason


def _at(kind: Kind, node: Node, sentence: str) -> Reason:
    """Make the reason of an operation, which is named after the sentence, with its class if it is a module."""
    return Reason(kind, place(node), "", f"{sentence} ({described(node)})", line_of(node))


# Operations of the forward that keep the channels which enter them: kind and sentence.

no_rule = _of_operation("no_rule", "no rule says where channels go")
call_not_covered = _of_operation(
    "call_not_covered", "this operation is called in a way in which channels can't be followed"
)
read_as_numbers = _of_operation("read_as_numbers", "the forward reads the values as a list or an array")
rule_keeps = _of_operation("rule_keeps", "the operation is registered to keep all channels")
rule_misfits = _of_operation("rule_misfits", "the rule that the operation is registered with doesn't fit these shapes")
joins_constant = _of_operation(
    "joins_constant", "an operation joins them to the network's input, a constant or a parameter"
)
joins_random = _of_operation("joins_random", "an operation joins them to random numbers that the forward draws")
random_shape = _of_operation("random_shape", "the forward draws random numbers for them")
overwritten = _of_operation("overwritten", "the forward writes into part of a tensor")
picked_by_value = _of_operation("picked_by_value", "the forward picks places by the values of these channels")
fixed_channels = _of_operation("fixed_channels", "the forward picks or counts channels by fixed numbers")
number_made = _of_operation("number_made", "the forward computes with how many of them there are, or checks it")
heads_stay = _of_operation(
    "heads_stay", "a product multiplies heads with those of a tensor whose heads stay, or with what all heads share"
)
one_head = _of_operation(
    "one_head", "attention of one head, which can't be removed, scales by how many channels its queries and keys have"
)
result_depends = _of_operation("result_depends", "the result of an operation depends on removed channels")

# Layers and modules that keep channels: kind and sentence.

another_name = _of_layer("another_name", "it is {layer} under another name, and loses what that loses")
training_reader = _of_layer("training_reader", "{layer} reads them in training mode only")
own_norm = _of_layer(
    "own_norm",
    "{layer} is a norm of the model's own: nni_topo.as_torch_layers(model) makes it one that can lose channels",
)
head_by_head = _of_layer("head_by_head", "it shares channels with {layer}, which loses heads")
last_read = _of_layer("last_read", "{layer} needs at least one of the channels that it reads")
only_head = _of_layer("only_head", "it makes the only head or unit of {layer}, which needs at least one")
shared_by_heads = _of_layer(
    "shared_by_heads", "all heads of {layer} share these keys and values, which stay as long as one of them does"
)
carries_constant = _of_layer(
    "carries_constant", "kept to carry the constant contribution of the removed channels ({layer})"
)

# What the kept layer is itself, or where its channels go: kind and sentence.

model_output = _plain("model_output", "it gives the model's output")
coupled_with_itself = _plain("coupled_with_itself", "all of its channels are coupled with one another")
kept_by_itself = _plain("coupled_with_itself", "some of its channels are coupled with one another")
convolves_channels = _plain("convolves_channels", "it is a convolution along the channels of another layer")
no_heads = _plain("no_heads", "it makes no queries, keys or values of attention, so it has no heads")
recurrent_state = _plain("recurrent_state", "a recurrent layer keeps the size of its state")
packed_rows = _plain(
    "packed_rows", "a recurrent layer that reads packed sequences, or that isn't called by itself, keeps its units"
)
complex_weight = _plain("complex_weight", "its weights are complex numbers, which stay as they are")
transposed_weight = _plain(
    "transposed_weight", "its weight is transposed: nni_topo.as_torch_layers(model) makes it a linear layer"
)
not_followed = _plain("not_followed", "the layer isn't called by itself, or its channels couldn't be followed")
norm_follows = _plain("norm_follows", "a norm keeps the channels of the layer before it, whose mask decides")
not_run = _plain("not_run", "the forward doesn't use the layer")
not_asked = _plain("not_asked", "not asked for")
never_settled = _plain("dry_run_failed", "channels depend on one another in a way that no rule describes")


# Reasons whose sentences need more.


def nonzero_values(reader: Node, source: Node) -> Reason:
    """Return the reason for removed channels that are zero before ``source`` and not where ``reader`` reads them."""
    where = described(reader)
    if source is not reader:
        where = f"made by {described(source)}, read by {where}"
    text = f"removed channels arrive as values that aren't zero ({where})"
    return Reason("nonzero_values", place(source), "", text, line_of(source) or line_of(reader))


def depends_on_size(reader: str = "") -> Reason:
    """Return the reason for channels that another size of the input couples with others.

    ``reader``: the layer that reads them, if what depends on the size is their constant value once they are removed.
    """
    if reader:
        text = f"if removed they are constants that depend on the size of the input ({reader} reads them)"
        return Reason("depends_on_size", reader, reader, text)
    return Reason("depends_on_size", text="which channels are coupled depends on the size of the input")


def fixed_sizes(node: Node, error: Exception | None = None) -> Reason:
    """Return the reason for channels without which an operation fails, or gives another shape."""
    failure = "" if error is None else f": {type(error).__name__}"
    return _at("fixed_sizes", node, f"the sizes of an operation don't fit fewer channels{failure}")


def no_batch(node: Node) -> Reason:
    """Return the reason for the input of a convolution that has no batch dimension."""
    return _of_module("no_batch", node, f"the input of {node.target} has no batch dimension")


def uncut_module(node: Node, kind: str) -> Reason:
    """Return the reason for channels that enter a module of class ``kind``, which the package can't cut."""
    return _of_module("uncut_module", node, f"they enter {node.target} ({kind}), which can't be cut")


def complex_reader(node: Node) -> Reason:
    """Return the reason for channels that enter a layer whose weights are complex numbers."""
    return _of_module("complex_weight", node, f"they enter {node.target}, whose weights are complex numbers")


def several_widths(node: Node) -> Reason:
    """Return the reason for channels of a module that is called on different numbers of them."""
    return _of_module("several_widths", node, f"{node.target} is called on different numbers of channels")


def cutting_failed(layer: str, error: Exception) -> Reason:
    """Return the reason for channels of a module that raises an error when it is cut."""
    return Reason("uncut_module", layer, layer, str(error))


def recurrent_input(node: Node, kind: str) -> Reason:
    """Return the reason for channels of the initial state of a recurrent layer that keeps its units."""
    text = f"they are the initial state of {node.target} ({kind}), which keeps its size"
    return _of_module("recurrent_state", node, text)


def convolved_elsewhere(node: Node) -> Reason:
    """Return the reason for channels of a channel-wise convolution that is called on different channels too."""
    text = f"{node.target}, a convolution along channels, is called on other channels as well"
    return _of_module("convolves_channels", node, text)


def _of_module(kind: Kind, node: Node, text: str) -> Reason:
    """Make the reason of a module that a node calls; the text names the module."""
    return Reason(kind, str(node.target), str(node.target), text, line_of(node))


def needs_all_channels(node: Node, layer: str) -> Reason:
    """Return the reason for tensors that enter attention and that its own linear layers don't read."""
    text = f"attention ({layer}) needs all channels that enter"
    return Reason("needs_all_channels", layer, layer, text, line_of(node))


def dry_run_failed(error: Exception) -> Reason:
    """Return the reason for all channels of a network that fails on random weights and inputs."""
    return Reason("dry_run_failed", text=f"the dry run fails on random numbers: {raised(error)}")


def untraced_output(*, is_noise: bool) -> Reason:
    """Return the reason for the last layer of a traced part of a model.

    ``is_noise``: whether the code after it draws random numbers of Python's or NumPy's.
    """
    why = ": the forward draws random numbers of Python's or NumPy's" if is_noise else ""
    return Reason("untraced_output", text=f"its output enters code that could not be traced{why}")


def untraced_model(error: Exception) -> Reason:
    """Return the reason for all layers of a model that can't be traced."""
    return Reason("untraced_model", text=str(error))


def unknown_attention(module: str, kind: str) -> Reason:
    """Return the reason for a layer asked for heads, in attention whose layers aren't recognised by their names."""
    return Reason("no_heads", module, module, f"it is part of {module} ({kind}), attention of an unknown structure")


def computed_weight(*, can_convert: bool) -> Reason:
    """Return the reason for a layer whose weight isn't a parameter."""
    text = "its weight is computed from other parameters"
    if can_convert:
        text += ", by weight norm, another parametrization or a pruning mask: "
        text += "model = nni_topo.as_torch_layers(model) makes plain layers that compute the same"
    return Reason("computed_weight", text=text)


def unknown_class(layer: str, kind: type) -> Reason:
    """Return the reason for a layer of a class that can't be cut, though NNI knows one of its name."""
    text = f"its class {kind.__qualname__} ({kind.__module__}) isn't PyTorch's and computes something else"
    return Reason("unknown_class", layer, layer, text)


def inside_module(module: str, kind: str) -> Reason:
    """Return the reason for a layer within a module of PyTorch's that uses its weight and doesn't call it."""
    return Reason("inside_module", module, module, f"it is part of {module} ({kind}), which runs as one operation")


def shared(names: Iterable[str], unmasked: Sequence[str]) -> Reason:
    """Return the reason for channels that other layers keep; ``unmasked``: those of these layers without a mask.

    It names a few of them; `nni_topo.explain` names all.
    """
    text = f"shared by {listed(names)}"
    if unmasked:
        text += f"; of these without a mask: {listed(unmasked)}"
    return Reason("shared", text=text)


def shared_weight(parameter: str, other: str) -> Reason:
    """Return the reason for channels that stay because a layer of the same weight keeps them; both by full name."""
    # Layers that are coupled with the one that holds the parameter get this reason too, so that it names both.
    owner = other.rpartition(".")[0]
    return Reason(
        "shared_weight", owner, owner, f"{parameter} is the same parameter as {other}, where these channels stay"
    )


def unselected(names: Iterable[str]) -> Reason:
    """Return the reason for channels that layers share which aren't among the layers to prune."""
    names = list(names)
    verb = "isn't" if len(names) == 1 else "aren't"
    return Reason("unselected", text=f"shared with {listed(names, 8)}, which {verb} among the layers to prune")


def blocks_equal(places: Iterable[str]) -> Reason:
    """Return the reason for channels that make blocks equally large; ``places``: the operations that need them so."""
    return Reason("blocks_equal", text=f"blocks of channels keep equally many, as {', '.join(places)} requires")


def head_size(attention: Iterable[str]) -> Reason:
    """Return the reason for heads that keep their size although masks would make all of them smaller."""
    names = ", ".join(attention)
    sentence = "head size unchanged: the attention uses the head size in a way that can't be adapted"
    return Reason("head_size", names, names, f"{sentence} ({names})")


def rounding(round_to: int) -> Reason:
    """Return the reason for channels that make a width a multiple of ``round_to``."""
    return Reason("rounding", text=f"round_to={round_to}")


# Why a dense model can't equal the masked one, with what can be done about it.

_UNCHECKED = "check=False returns the dense model all the same; its outputs differ and it has to be fine-tuned"


def unchecked() -> str:
    """Return what to do where the cause of a difference isn't known."""
    return _UNCHECKED


def removed_all_the_same(layers: Iterable[str], why: Reasons) -> str:
    """Return why the outputs differ where masks remove channels that have to stay."""
    names = ", ".join(layers)
    return f"masks remove channels of {names} that have to stay: {told(why)}; {leaving_out(names)}; {_UNCHECKED}"


def unequal(layers: Iterable[str], place: str | None, statistics: str = "") -> str:
    """Return why the outputs differ from a place on: removed channels of pruned layers aren't zero there.

    ``place``: a layer that reads the channels; None if it isn't known. ``statistics``: the class of the module at this
    place if it computes statistics over all channels.
    """
    before = ", ".join(layers) or "the layers before it"
    leave_out = leaving_out(before)
    if statistics:
        return f"{statistics} takes its statistics over removed channels too: {leave_out}; {_UNCHECKED}"
    if place is None:
        return f"removed channels of {before} aren't zero there: {leave_out}; {_UNCHECKED}"
    arrive = f"removed channels of {before} arrive at {place} as values that aren't zero"
    keep = 'constants="keep" keeps constant values, as if they went on beyond padded borders'
    return f"{arrive}: {leave_out}; {keep}; {_UNCHECKED}"
