"""Attributes of timm's and torchvision's networks that count channels, counted anew from tensors that they describe.

Code around a network relies on such attributes: a pyramid reads ``feature_info``, a new classifier is made as wide as
``num_features``. A reader says of which tensor an attribute counts the channels, as the library defines it. The tensor
is measured in the unpruned and in the dense network. Where it has as many channels in the unpruned one as the attribute
says, the attribute gets the number of the dense one. Any other attribute stays, and is named as stale.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_topo.network.layers import Place, number_at, put_sizes, read_in_forward
from nni_topo.network.runtime import Call, called, evaluation_mode, left_alone, out_of_memory, watched

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Described:
    """The tensor whose channels an attribute counts.

    Parameters
    ----------
    module : str
        The name of a module.
    part : {"input", "output", "features", "pre_logits"}
        What enters or leaves the module, what its ``forward_features`` returns, or what enters its classifier.
    at : int, optional
        Which one of several outputs. By default all outputs have that number of channels.
    """

    module: str
    part: Literal["input", "output", "features", "pre_logits"]
    at: int | None = None


Claim = tuple[Place, Described]
"""An attribute, and the tensor whose channels it counts."""
ContractReader = Callable[[str, nn.Module], Iterable[Claim]]
"""Lists what a module's attributes count, given its name and the module."""
Shape = tuple[int, ...]

_OF_INPUT = ("in_channels", "in_features", "in_chs", "in_planes")
_OF_OUTPUT = ("out_channels", "out_features", "out_chs", "out_planes")


def named_sizes(name: str, module: nn.Module) -> Iterator[Claim]:
    """Read what its name says to count a module's input or output, as ``out_channels`` of a detector's backbone."""
    for key in _OF_INPUT:
        yield (name, key, ()), Described(name, "input")
    for key in _OF_OUTPUT:
        yield (name, key, ()), Described(name, "output")


def timm_features(name: str, module: nn.Module) -> Iterator[Claim]:
    """Read ``feature_info`` of timm's networks, and of the wrappers that return features alone (``features_only``)."""
    held: Any = getattr(module, "feature_info", None)
    wraps = hasattr(held, "info") and hasattr(held, "out_indices")
    key, entries = ("feature_info.info", held.info) if wraps else ("feature_info", held)
    if not isinstance(entries, (list, tuple)):
        return
    outputs: dict[int, int] = {}  # by entry, its place among the outputs
    if wraps:
        outputs = {index % len(entries): at for at, index in enumerate(held.out_indices)}
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("module"), str):
            continue
        place = name, key, (index, "num_chs")
        if index in outputs:
            yield place, Described(name, "output", outputs[index])
        else:
            part: Literal["input", "output"] = "input" if entry.get("hook_type") == "forward_pre" else "output"
            yield place, Described(f"{name}.{entry['module']}".lstrip("."), part)


def timm_widths(name: str, module: nn.Module) -> Iterator[Claim]:
    """Read the widths by which timm's networks, and their heads, make a new classifier."""
    if hasattr(module, "forward_features"):
        for key in ("num_features", "embed_dim"):
            yield (name, key, ()), Described(name, "features")
    if _takes_pre_logits(getattr(module, "forward_head", None)):
        yield (name, "head_hidden_size", ()), Described(name, "pre_logits")
    elif _takes_pre_logits(module.forward):
        for key in ("num_features", "hidden_size"):
            yield (name, key, ()), Described(name, "pre_logits")


def torchvision_widths(name: str, module: nn.Module) -> Iterator[Claim]:
    """Read the width by which torchvision makes a pyramid of a ResNet."""
    last = f"{name}.layer4".lstrip(".")
    if type(module).__module__ == "torchvision.models.resnet" and hasattr(module, "layer4"):
        yield (name, "inplanes", ()), Described(last, "output")


def _counting_nothing(model: nn.Module) -> set[Place]:
    """List attributes that count no channels of the finished network: ``base_width`` of torchvision's ResNets.

    It is the width per group by which a bottleneck is made, 64 in a plain ResNet; nothing reads it afterwards.
    """
    return {
        (name, "base_width", ())
        for name, module in model.named_modules()
        if type(module).__module__ == "torchvision.models.resnet" and "base_width" in vars(module)
    }


READERS: tuple[ContractReader, ...] = (named_sizes, timm_features, timm_widths, torchvision_widths)


def count_anew(original: nn.Module, dense: nn.Module, call: Call) -> set[Place]:
    """Write the dense network's numbers into the attributes that the readers know, and return all that are right now.

    Attributes that the forward of their module reads are left alone: what it computes with them mustn't change.
    """
    claims: dict[Place, Described] = {}
    for name, module in original.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        kind: Any = type(module)
        read = read_in_forward(kind)
        for reader in READERS:
            for place, described in reader(name, module):
                before, key = number_at(original, place), place[1]
                is_held = key.partition(".")[0] in vars(module) and key not in read  # no property
                # An attribute that has another number already was counted anew with the layers.
                if before is not None and is_held and number_at(dense, place) == before:
                    claims[place] = described
    settled = _counting_nothing(original)
    if not claims:
        return settled
    wanted = set(claims.values())
    whole, narrow = _shapes(original, wanted, call), _shapes(dense, wanted, call)
    sizes: dict[Place, int] = {}
    for place, described in claims.items():
        before = number_at(original, place)
        if before is not None and described in whole and described in narrow:
            found = channels_kept(before, whole[described], narrow[described])
            if found is not None:
                sizes[place] = found
    put_sizes(dense, sizes)
    return settled | set(sizes)


def channels_kept(number: int, before: list[Shape], after: list[Shape]) -> int | None:
    """Return how many of so many channels tensors still have, given their shapes; None where that isn't certain.

    A dimension may have the same size by chance, as that of places. The channels are those that became fewer.
    """
    found = set[int]()
    if len(before) != len(after) or not before:
        return None
    for old, new in zip(before, after, strict=True):
        if len(old) != len(new) or number not in old[1:]:
            return None
        of_size = {narrow for wide, narrow in zip(old[1:], new[1:], strict=True) if wide == number}
        fewer = of_size - {number}
        if len(fewer) > 1:
            return None
        found |= fewer or of_size
    return found.pop() if len(found) == 1 else None


def _shapes(model: nn.Module, wanted: set[Described], call: Call) -> dict[Described, list[Shape]]:
    """Run a model and return the shapes of the tensors that are there, of each at the first call of its module."""
    values: dict[Described, Any] = {}
    arguments: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}  # of the modules whose methods are called after
    modules = dict(model.named_modules())

    def entered(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments.setdefault(name, (args, kwargs))
        values.setdefault(Described(name, "input"), next(iter((*args, *kwargs.values())), None))

    def left(name: str, _: Any, output: Any) -> None:
        values.setdefault(Described(name, "output"), output)

    names = [name for name in dict.fromkeys(each.module for each in wanted) if name in modules]
    with left_alone(model), evaluation_mode(model), torch.no_grad():
        with ExitStack() as looking:
            for name in names:
                looking.enter_context(called(modules[name], partial(entered, name)))
            looking.enter_context(watched(leaving=[(modules[name], partial(left, name)) for name in names]))
            model(*call[0], **call[1])
        for each in wanted:
            if each.part in ("features", "pre_logits") and each.module in arguments:
                try:
                    values[each] = _by_method(modules[each.module], each.part, *arguments[each.module])
                except Exception as error:  # a method of the user's, which the model itself needn't call
                    if out_of_memory(error):
                        raise
                    _logger.debug("%s of %s can't be measured", each.part, each.module, exc_info=True)
    found: dict[Described, list[Shape]] = {}
    for each in wanted:
        value = values.get(Described(each.module, each.part) if each.at is not None else each)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if each.at is not None:
            tensors = tensors[each.at : each.at + 1]
        if tensors:
            found[each] = [tuple(tensor.shape) for tensor in tensors]
    return found


def _by_method(module: Any, part: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Compute the features of one of timm's networks, or what enters the classifier of a network or a head."""
    if not hasattr(module, "forward_features"):
        return module(*args, **{**kwargs, "pre_logits": True})
    features = module.forward_features(*args, **kwargs)
    return features if part == "features" else module.forward_head(features, pre_logits=True)


def _takes_pre_logits(function: Any) -> bool:
    """Tell whether a function can be asked for what enters the classifier."""
    try:
        return callable(function) and "pre_logits" in inspect.signature(function).parameters
    except ValueError:  # a method of a scripted module
        return False
