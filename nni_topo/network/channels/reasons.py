"""Why a layer, a channel or a head is kept: all reasons that the package gives, and their texts.

To change a text, change it here: ``skipped``, ``explain``, ``dense.report``, warnings and errors all show it. To add a
reason, add its kind and sentence to the table in the middle of this file, and what a user can do about it to `_ADVICE`.
A reason whose sentence needs more than an operation, or a layer and its class, has a function below the table.
"""

from __future__ import annotations

import dataclasses
import linecache
from collections.abc import Iterable, Mapping, Sequence

from torch.fx import Node

from nni_topo.context import leaving_out
from nni_topo.errors import listed
from nni_topo.network.graph.nodes import described, line_of, place


@dataclasses.dataclass(frozen=True)
class Reason:
    """Why channels are kept. ``str(reason)`` is the sentence that reports and warnings show.

    Parameters
    ----------
    kind : str
        A short identifier of the reason.
    place : str, default=""
        The operation, with the module whose forward calls it ("add in layer1.0"), or the module that keeps the
        channels; empty without one.
    layer : str, default=""
        The layer or module that the text is about; empty without one.
    text : str, default=""
        The reason in words.
    line : str, default=""
        File and line of the forward that calls the operation ("net.py:12"); empty if they aren't known.
    """

    kind: str
    place: str = ""
    layer: str = ""
    text: str = ""
    line: str = dataclasses.field(default="", compare=False)

    def __str__(self) -> str:
        return self.text


Reasons = tuple[Reason, ...]
"""All reasons why one layer keeps channels, each once."""


def join_texts(reasons: Iterable[Reason]) -> str:
    """Join the texts of several reasons into one line, each text once."""
    return "; ".join(dict.fromkeys(str(reason) for reason in reasons))


def as_text(reasons: Mapping[str, Reasons]) -> dict[str, str]:
    """Return the reasons of each layer as one line of text, by layer."""
    return {name: join_texts(layer_reasons) for name, layer_reasons in reasons.items()}


def in_part(n_kept: int, channels: int, reasons: Reasons) -> str:
    """Return why a layer keeps some of its channels, as text."""
    return f"{n_kept} of {channels} channels are kept: {join_texts(reasons)}"


# Advice to users, by kind of reason. Kinds that masks cause, not the model, have no entry.
# {leave_out} is replaced by the way to exclude the layer from pruning.
_ADVICE: dict[str, str] = {
    "model_output": "{leave_out}: the caller of the model needs this number of channels",
    "untraced_output": "write the code after the layer as a module that takes tensors and returns tensors",
    "untraced_model": "change what the message names, or prune the parts of the model one by one",
    "no_rule": (
        "write this step with operations that have a rule (torch.cat, view), or register a rule for the operation "
        "with nni_topo.register_operator"
    ),
    "read_as_numbers": "{leave_out}: the code that reads the numbers may need all of them",
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
        "{leave_out}: in a router, for example, each output stands for an expert, and experts aren't removed"
    ),
    "fixed_channels": "read the number from a shape (x.shape[1]) or from the attribute that holds the layer's width",
    "number_made": "compute with a number that an attribute holds, such as a scale, instead of the width of a tensor",
    "heads_stay": (
        "see why the heads of the other tensor stay (nni_topo.explain of its layer), or give each head its own keys "
        "and values"
    ),
    "one_head": "give the attention more heads than one",
    "only_head": "give the attention more heads than one",
    "blocks_equal": (
        "choose a number of groups with which every group of the norm or convolution holds channels of one layer, or "
        "{leave_out}"
    ),
    "shared_by_heads": "prune heads: each pruned head loses its queries",
    "fixed_sizes": "read the sizes from the tensor (x.shape), or give -1 for the dimension of the channels",
    "result_depends": (
        "use an operation that treats every channel by itself, let a convolution alone read a mean over channels, take "
        "a maximum over channels after a ReLU, or write it as a module of its own, or {leave_out}"
    ),
    "nonzero_values": (
        "use operations that leave channels of zeros at zero (ReLU, GELU, SiLU) between the layer and the one that "
        "reads it, or {leave_out}"
    ),
    "depends_on_size": (
        "take the mean over places instead of a sum, or keep channels and places in dimensions of their own, or "
        "{leave_out}"
    ),
    "depends_on_samples": "use the same layers in the same way for any number of samples, or {leave_out}",
    "depends_on_values": "compute both branches and choose with torch.where, or {leave_out}",
    "no_batch": "give the convolution's input a batch dimension",
    "unknown_class": "derive the class from PyTorch's layer, or say how it is cut with nni_topo.register_module",
    "uncut_module": "say how the module is cut with nni_topo.register_module",
    "packed_rows": "give it padded sequences: without pack_padded_sequence its units can be pruned",
    "recurrent_state": "use PyTorch's LSTM, GRU or RNN without a projection: their units can be pruned",
    "convolves_channels": "prune the layer whose channels the convolution slides along",
    "needs_all_channels": "prune the heads of the attention instead",
    "training_reader": "delete the layer from the model if it isn't trained any more",
    "training_output": "delete the layer from the model if nothing is trained with what it returns",
    "stored": "if no code reads the attribute after the forward, don't leave a tensor in it",
    "nothing_found": (
        "pass inputs for which the layer's input isn't empty: an image with an object, or a lower score that an object "
        "must have; a graph with nodes of every degree"
    ),
    "dry_run_failed": "change the forward so that it runs on random weights and inputs",
    "head_by_head": (
        "select every layer that adds to the same residual stream: its channels are then pruned instead of heads"
    ),
    "no_heads": 'ask for channels: leave out "granularity": "head"',
    "complex_weight": "hold the complex weights as real ones, their real and imaginary parts in layers of their own",
    "computed_weight": "make the weight a plain parameter; nni_topo.as_torch_layers(model) does so where it can",
    "transposed_weight": "prune nni_topo.as_torch_layers(model) instead of the model",
    "inside_module": (
        "write the module as one that calls its layers; heads of nn.MultiheadAttention can be pruned as it is"
    ),
    "inside_gate": "prune the layers whose channels enter the module, which then runs on the remaining channels",
    "not_followed": "call the layer itself (self.layer(x)) rather than a function on its weight",
    "unselected": "prune the layers that share the channels, too",
    "several_widths": "call a module of its own in each place",
    "shared_weight": "give the layers weights of their own: layer.weight = nn.Parameter(layer.weight.detach().clone())",
    "no_layer_before": "leave the norm out: the channels of the network's input stay",
    "no_scale": "prune the layer before the norm instead",
    "read_before_norm": "select every norm that reads these channels, or prune the layers before them instead",
    "not_run": "delete the layer from the model if nothing uses it",
    "another_name": "use the layer's name that the reason gives",
}


def advice(reasons: Reasons) -> tuple[str, ...]:
    """List what a user can do about reasons, each advice once."""
    texts = dict.fromkeys(_ADVICE[reason.kind] for reason in reasons if reason.kind in _ADVICE)
    return tuple(text.replace("{leave_out}", leaving_out()) for text in texts)


@dataclasses.dataclass(frozen=True)
class Sentence:
    """A kind of reason with one sentence as its text. A call returns a `Reason`."""

    kind: str
    text: str  # ``{layer}`` is replaced by the name of a layer or module, ``{of}`` by its class or another detail

    def __call__(self, where: Node | str = "", of: str = "") -> Reason:
        """Return a reason; ``where``: the operation, named at the end of the text, or the layer or module."""
        if isinstance(where, Node) and "{layer}" not in self.text:
            return Reason(self.kind, place(where), "", f"{self.text} ({described(where)})", line_of(where))
        layer, line = (str(where.target), line_of(where)) if isinstance(where, Node) else (where, "")
        return Reason(self.kind, layer, layer, self.text.format(layer=layer, of=of), line)


# Operations of the forward that keep the channels which enter them: kind and sentence.

no_rule = Sentence("no_rule", "no rule says where channels go")
call_not_covered = Sentence("call_not_covered", "this operation is called in a way in which channels can't be followed")
read_as_numbers = Sentence("read_as_numbers", "the forward reads the values as a list or an array")
rule_keeps = Sentence("rule_keeps", "the operation is registered to keep all channels")
rule_misfits = Sentence("rule_misfits", "the rule that the operation is registered with doesn't fit these shapes")
joins_constant = Sentence("joins_constant", "an operation joins them to the network's input, a constant or a parameter")
joins_random = Sentence("joins_random", "an operation joins them to random numbers that the forward draws")
random_shape = Sentence("random_shape", "the forward draws random numbers for them")
overwritten = Sentence("overwritten", "the forward writes into part of a tensor")
picked_by_value = Sentence("picked_by_value", "the forward picks places by the values of these channels")
fixed_channels = Sentence("fixed_channels", "the forward picks or counts channels by fixed numbers")
number_made = Sentence("number_made", "the forward computes with their number, or checks it")
heads_stay = Sentence(
    "heads_stay", "a product multiplies heads with heads that are kept, or with a tensor that all heads share"
)
one_head = Sentence(
    "one_head", "attention with one head, which can't be removed, scales by the width of its queries and keys"
)
result_depends = Sentence("result_depends", "the result of an operation depends on removed channels")

# Layers and modules that keep channels: kind and sentence.

another_name = Sentence("another_name", "it is {layer} under another name, and is pruned with it")
training_reader = Sentence("training_reader", "{layer} reads them in training mode only")
training_output = Sentence("training_output", "the model returns them in training mode")
stored = Sentence("stored", "the forward leaves them in the attribute {of}, where other code may read them")
head_by_head = Sentence("head_by_head", "it shares channels with {layer}, which loses heads")
last_read = Sentence("last_read", "{layer} needs at least one of the channels that it reads")
only_head = Sentence("only_head", "it makes the only head or unit of {layer}, which needs at least one")
shared_by_heads = Sentence(
    "shared_by_heads", "all heads of {layer} share these keys and values, which stay as long as one of them does"
)

uncut_module = Sentence("uncut_module", "they enter {layer} ({of}), which can't be cut")
no_batch = Sentence("no_batch", "the input of {layer} has no batch dimension")
complex_reader = Sentence("complex_weight", "they enter {layer}, whose weights are complex numbers")
nothing_found = Sentence(
    "nothing_found",
    "its input is empty for the example inputs, as if a detector found no object: pass an image with one, or other "
    "inputs",
)
several_widths = Sentence("several_widths", "{layer} is called on different numbers of channels")
recurrent_input = Sentence("recurrent_state", "they are the initial state of {layer} ({of}), which keeps its size")
convolved_elsewhere = Sentence(
    "convolves_channels", "{layer}, a convolution along channels, is called on other channels as well"
)
unknown_attention = Sentence("no_heads", "it is part of {layer} ({of}), attention of an unknown structure")
inside_gate = Sentence("inside_gate", "it is part of {layer} ({of}), which treats all channels alike")
inside_module = Sentence("inside_module", "it is part of {layer} ({of}), which runs as one operation")

# Properties of the kept layer, or of the operations that its channels enter: kind and sentence.

model_output = Sentence("model_output", "it gives the model's output")
coupled_with_itself = Sentence("coupled_with_itself", "all of its channels are coupled with one another")
kept_by_itself = Sentence("coupled_with_itself", "some of its channels are coupled with one another")
convolves_channels = Sentence("convolves_channels", "it is a convolution along the channels of another layer")
no_heads = Sentence("no_heads", "it makes no queries, keys or values of attention, so it has no heads")
recurrent_state = Sentence("recurrent_state", "a recurrent layer keeps the size of its state")
packed_rows = Sentence(
    "packed_rows", "a recurrent layer that reads packed sequences, or that isn't called by itself, keeps its units"
)
complex_weight = Sentence("complex_weight", "its weights are complex numbers, which stay as they are")
transposed_weight = Sentence(
    "transposed_weight", "its weight is transposed: nni_topo.as_torch_layers(model) makes it a linear layer"
)
not_followed = Sentence("not_followed", "the layer isn't called by itself, or its channels couldn't be followed")
no_layer_before = Sentence("no_layer_before", "no layer is before the norm, so that its mask could remove channels")
no_scale = Sentence("no_scale", "a norm without a weight for each channel has nothing to mask")
read_before_norm = Sentence("read_before_norm", "{layer} reads the channels before a selected norm scales them")
norm_follows = Sentence("norm_follows", "a norm keeps the channels of the layer before it, whose mask decides")
not_run = Sentence("not_run", "the forward doesn't use the layer")
not_asked = Sentence("not_asked", "not asked for")
untraced_output = Sentence("untraced_output", "its output enters code that could not be traced: {of}")
never_settled = Sentence("dry_run_failed", "channels depend on one another in a way that no rule describes")
depends_on_size = Sentence("depends_on_size", "which channels are coupled depends on the size of the input")
depends_on_samples = Sentence(
    "depends_on_samples", "the forward does something else with them for another number of samples"
)
rounding = Sentence("rounding", "round_to={of}")

# Texts of errors: for a module that can't be cut, a model that can't be traced, and a model that fails on random
# numbers.

cutting_failed = Sentence("uncut_module", "{of}")
untraced_model = Sentence("untraced_model", "{of}")
dry_run_failed = Sentence("dry_run_failed", "the dry run fails on random numbers: {of}")


# Reasons whose sentences need more details.


def nonzero_values(reader: Node, source: Node) -> Reason:
    """Return the reason for removed channels that are zero before ``source`` but not where ``reader`` reads them."""
    where = described(reader)
    if source is not reader:
        where = f"made by {described(source)}, read by {where}"
    text = f"removed channels arrive as values that aren't zero ({where})"
    return Reason("nonzero_values", place(source), "", text, line_of(source) or line_of(reader))


def fixed_sizes(node: Node, error: Exception | None = None) -> Reason:
    """Return the reason for channels without which an operation fails, or gives another shape."""
    text = "the sizes of an operation don't fit fewer channels"
    if error is not None:
        text += f": {type(error).__name__}"
    file = line_of(node).rpartition(":")[0]
    if file and not linecache.getlines(file):
        text += "; the source of its forward can't be read, so it can't be rewritten either: define the class in a file"
    return Sentence("fixed_sizes", text)(node)


def depends_on_values(line: str) -> Reason:
    """Return the reason for channels that a branch concerns; ``line``: file and line that read the deciding value."""
    text = "the forward does something else with them for other values of its tensors"
    return Reason("depends_on_values", text=f"{text} ({line})" if line else text, line=line)


def needs_all_channels(node: Node, layer: str) -> Reason:
    """Return the reason for tensors that enter attention and that its own linear layers don't read."""
    text = f"attention ({layer}) needs all channels that enter"
    return Reason("needs_all_channels", layer, layer, text, line_of(node))


def computed_weight(*, can_convert: bool) -> Reason:
    """Return the reason for a layer whose weight isn't a parameter."""
    text = "its weight is computed from other parameters"
    if can_convert:
        text += ", by weight norm, another parametrization or a pruning mask: "
        text += "model = nni_topo.as_torch_layers(model) makes plain layers that compute the same"
    return Reason("computed_weight", text=text)


def unknown_class(layer: str, kind: type) -> Reason:
    """Return the reason for a layer that can't be cut, although its class has the name of a class that NNI prunes."""
    text = f"its class {kind.__qualname__} ({kind.__module__}) isn't PyTorch's and computes something else"
    return Reason("unknown_class", layer, layer, text)


def shared(names: Iterable[str], unmasked: Sequence[str]) -> Reason:
    """Return the reason for channels that other layers keep; ``unmasked``: which of these layers have no mask."""
    text = f"shared by {listed(names)}"
    if unmasked:
        text += f"; of these without a mask: {listed(unmasked)}"
    return Reason("shared", text=text)


def shared_weight(parameter: str, other_name: str) -> Reason:
    """Return the reason for channels that stay because a layer with the same weight keeps them; both by full name."""
    # Layers that are coupled with the owner of the parameter get this reason, too, so the text names both parameters.
    owner = other_name.rpartition(".")[0]
    return Reason(
        "shared_weight", owner, owner, f"{parameter} is the same parameter as {other_name}, where these channels stay"
    )


def unselected(names: Iterable[str]) -> Reason:
    """Return the reason for channels shared with layers that aren't among the layers to prune."""
    names = list(names)
    verb = "isn't" if len(names) == 1 else "aren't"
    return Reason("unselected", text=f"shared with {listed(names, 8)}, which {verb} among the layers to prune")


def blocks_equal(places: Iterable[str]) -> Reason:
    """Return the reason for channels kept so that blocks stay equal; ``places``: the operations that require this."""
    return Reason("blocks_equal", text=f"all blocks keep the same number of channels, as {', '.join(places)} requires")


def unequal(kept_reasons: Mapping[str, Reasons]) -> str:
    """Return why a dense model may differ from the masked one, given why layers have to keep removed channels."""
    text = "an operation reads removed channels of the layers before it"
    if kept_reasons:
        names = ", ".join(kept_reasons)
        why = join_texts(reason for reasons in kept_reasons.values() for reason in reasons)
        text = f"masks remove channels of {names} that have to stay: {why}; {leaving_out(names)}"
    return f"{text}; check=False returns the dense model all the same; its outputs differ and it has to be fine-tuned"
