"""Attributes that count the channels of tensors: a table that users extend, with new numbers for the dense network.

Code around a network, and methods that its forward doesn't call, use such attributes: a pyramid reads ``feature_info``,
a new classifier is as wide as ``num_features``, ultralytics' exporter splits by ``c``. The table says which tensor's
channels an attribute counts. The tensor is measured in the unpruned and in the dense network. If the attribute equals
the unpruned number of channels, it gets the dense number. If it differs, or if the tensor can't be measured, the
attribute is unchanged and reported as stale. Attributes that a forward reads are followed while it is traced, see
`network.graph.traced_int`. All other attributes are unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nni_topo.network.layers.integer_attributes import Place, numbers_of, put_sizes
from nni_topo.network.runtime.copies import evaluation_mode, left_alone
from nni_topo.network.runtime.inputs import Call, run_few
from nni_topo.rules import Rule, checked, is_class


@dataclass(frozen=True)
class Described:
    """The tensor whose channels an attribute counts."""

    module: str  # the name of a module
    part: Literal["input", "output", "features"]  # what enters or leaves it, or what its ``forward_features`` returns
    at: int | None = None  # index of one of several outputs; by default all have that number of channels


Shape = tuple[int, ...]

_TABLE: dict[tuple[type[nn.Module] | str, str], Described] = {
    **{(nn.Module, name): Described("", "input") for name in ("in_channels", "in_features", "in_chs", "in_planes")},
    **{
        (nn.Module, name): Described("", "output") for name in ("out_channels", "out_features", "out_chs", "out_planes")
    },
    ("torchvision.models.resnet.ResNet", "inplanes"): Described("layer4", "output"),  # read by feature pyramids
    ("torchvision.models.mobilenetv2.MobileNetV2", "last_channel"): Described("classifier", "input"),
    ("ultralytics.nn.modules.block.C2f", "c"): Described("m.0", "input"),
    ("ultralytics.nn.modules.block.C2fAttn", "c"): Described("m.0", "input"),
    ("ultralytics.nn.modules.block.RepNCSPELAN4", "c"): Described("cv2", "input"),
}
"""By class, or its full name, and attribute: the tensor, whose module is named relative to the class's module."""


@checked(
    kind=Rule(
        "a class of modules or its full name",
        lambda kind: isinstance(kind, str) or (is_class(kind) and issubclass(kind, nn.Module)),
    )
)
def register_width_attribute(
    kind: type[nn.Module] | str, attribute: str, module: str = "", part: Literal["input", "output"] = "output"
) -> None:
    """Register which tensor's channels an attribute of a module counts, so that pruning updates it.

    Attributes that the module's forward reads are updated anyway. Others, which other methods or code around the
    network read, keep the number of the unpruned network unless a table says what they count. The table has attributes
    of timm, torchvision and ultralytics.

    Parameters
    ----------
    kind : type or str
        The module's class, or its full name, ``"package.module.Class"``, which needn't be imported. Derived classes are
        included.
    attribute : str
        The attribute, which holds an integer.
    module : str, default=""
        The name of a submodule, as for `torch.nn.Module.get_submodule`; ``""``: the module itself.
    part : {"input", "output"}, default="output"
        Whether the attribute counts the channels of that module's first input or of its output.

    Raises
    ------
    ConfigError
        If an argument is invalid.

    See Also
    --------
    nni_topo.register_operator, nni_topo.register_module : What operators and modules do with channels.

    Notes
    -----
    `to_dense` measures the tensor in the unpruned and in the dense network. If the attribute differs from the unpruned
    tensor's number of channels, it is unchanged, and ``report.stale`` lists it if a layer of that width lost channels.

    Examples
    --------
    >>> class Halves(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.first, self.second, self.width = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 2, 1), 4
    ...     def forward(self, images):
    ...         left, right = self.first(images).chunk(2, 1)
    ...         return self.second(left * right)
    >>> register_width_attribute(Halves, "width", "second", "input")
    """
    _TABLE[kind, attribute] = Described(module, part)


def _claims(name: str, module: nn.Module) -> Iterator[tuple[Place, Described]]:
    """Yield a module's attributes and the tensors whose channels they count; later claims override earlier ones."""
    prefix = ""
    if name:
        prefix = f"{name}."
    # In timm's networks a list; in networks that return only features (``features_only``) an object that holds one.
    feature_info: Any = vars(module).get("feature_info")
    entries, key, outputs = feature_info, "feature_info", dict[int, int]()
    if hasattr(feature_info, "out_indices") and getattr(feature_info, "info", None):
        entries, key = feature_info.info, "feature_info.info"
        outputs = {index % len(entries): at for at, index in enumerate(feature_info.out_indices)}
    for index, feature in enumerate(entries if isinstance(entries, (list, tuple)) else ()):
        if isinstance(feature, dict) and isinstance(feature.get("module"), str):
            is_entering = feature.get("hook_type") == "forward_pre"
            described = Described(f"{prefix}{feature['module']}", "input" if is_entering else "output")
            if index in outputs:
                described = Described(name, "output", outputs[index])
            yield (name, key, (index, "num_chs")), described
    # The widths that timm's networks, and their heads, use to make a new classifier.
    if hasattr(module, "forward_features"):
        for width in ("num_features", "embed_dim"):
            yield (name, width, ()), Described(name, "features")
        holder: Any = module
        try:
            classifier = holder.get_classifier()
        except Exception:  # missing, or a user's own method
            classifier = None
        if isinstance(classifier, tuple):
            classifier = classifier[0]
        for inner, submodule in module.named_modules():
            if submodule is classifier:
                yield (name, "head_hidden_size", ()), Described(f"{prefix}{inner}", "input")
    elif "pre_logits" in getattr(getattr(type(module).forward, "__code__", None), "co_varnames", ()):
        layer = "fc" if "fc" in module._modules else "fc2"
        for width in ("num_features", "hidden_size"):
            yield (name, width, ()), Described(f"{prefix}{layer}", "input")
    # A derived class inherits entries of the table, and may have its own.
    for kind in reversed(type(module).__mro__):
        for (owner, attribute), described in _TABLE.items():
            if owner in (kind, f"{kind.__module__}.{kind.__qualname__}"):
                yield (name, attribute, ()), Described(f"{name}.{described.module}".strip("."), described.part)


def count_anew(original: nn.Module, dense: nn.Module, call: Call) -> dict[str, int]:
    """Write the dense network's numbers into the attributes of the table, and return those that may be stale.

    Returns values by name. An attribute may be stale if its tensor has another number of channels or can't be measured,
    and a parameter of its module had this size and is smaller now. Attributes that their module's forward reads are
    skipped: what it computes with them mustn't change.
    """
    claims: dict[Place, tuple[int, Described]] = {}
    numbers, numbers_left = numbers_of(original), numbers_of(dense)
    for name, module in original.named_modules():
        if type(module).__module__.startswith("torch.nn."):
            continue
        kind: Any = type(module)
        read = _read_in_forward(kind)
        for place, described in _claims(name, module):
            # An attribute with another number was updated with the layers.
            if place in numbers and place[1] not in read and numbers[place] == numbers_left.get(place):
                claims[place] = numbers[place], described
    if not claims:
        return {}
    descriptions = {described for _, described in claims.values()}
    full_shapes, dense_shapes = _shapes(original, descriptions, call), _shapes(dense, descriptions, call)
    sizes, stale = dict[Place, int](), dict[str, int]()
    for place, (before, described) in claims.items():
        name, key, path = place
        channels = _channels_kept(before, full_shapes.get(described, []), dense_shapes.get(described, []))
        if channels is not None:
            sizes[place] = channels
            continue
        # A replaced layer may have parameters with other names.
        shapes = {
            parameter_name: parameter.shape
            for parameter_name, parameter in dense.get_submodule(name).named_parameters()
        }
        for parameter_name, parameter in original.get_submodule(name).named_parameters():
            pairs = zip(parameter.shape, shapes.get(parameter_name, parameter.shape), strict=False)
            if any(new < old == before for old, new in pairs):
                stale[f"{name}.{key}".lstrip(".") + "".join(f"[{part!r}]" for part in path)] = before
    put_sizes(dense, sizes)
    return stale


@lru_cache(maxsize=1024)
def _read_in_forward(kind: type) -> frozenset[str]:
    """Return the names read by a class's forward, and by the methods and properties that it uses."""
    names, waiting = set[str](), ["forward"]
    while waiting:
        member = inspect.getattr_static(kind, waiting.pop(), None)
        member = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        code = getattr(inspect.unwrap(member) if callable(member) else member, "__code__", None)
        codes = []
        if code is not None:
            codes = [code]
        for compiled in codes:
            new = set(compiled.co_names) - names
            names |= new
            waiting += sorted(new)
            codes += [inner for inner in compiled.co_consts if inspect.iscode(inner)]
    return frozenset(names)


def _channels_kept(number: int, before: list[Shape], after: list[Shape]) -> int | None:
    """Return how many of ``number`` channels tensors still have, given their shapes; None if that isn't certain.

    Another dimension, such as the height, may have the same size by chance. The channels are the dimension that shrank.
    """
    sizes = set[int]()
    if len(before) != len(after) or not before:
        return None
    for old, new in zip(before, after, strict=True):
        if len(old) != len(new) or number not in old[1:]:
            return None
        of_size = {narrow for wide, narrow in zip(old[1:], new[1:], strict=True) if wide == number}
        fewer = of_size - {number}
        if len(fewer) > 1:
            return None
        sizes |= fewer or of_size
    if len(sizes) == 1:
        return sizes.pop()
    return None


def _shapes(model: nn.Module, descriptions: set[Described], call: Call) -> dict[Described, list[Shape]]:
    """Run a model and return the shapes of the wanted tensors that it computes, at the first call of each module."""
    values: dict[Described, Any] = {}
    modules = dict(model.named_modules())

    def note(name: str, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values.setdefault(Described(name, "input"), next(iter((*args, *kwargs.values())), None))
        values.setdefault(Described(name, "output"), output)

    def features(described: Described, forward: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        values.setdefault(described, output)
        return output

    names = [name for name in dict.fromkeys(described.module for described in descriptions) if name in modules]
    with left_alone(model), evaluation_mode(model), torch.no_grad(), ExitStack() as looking:
        for name in names:
            looking.enter_context(modules[name].register_forward_hook(partial(note, name), with_kwargs=True))
        for described in descriptions:
            if described.part == "features":
                module: Any = modules[described.module]
                looking.callback(vars(module).pop, "forward_features", None)
                module.forward_features = partial(features, described, module.forward_features)
        run_few(model, call)
    shapes: dict[Described, list[Shape]] = {}
    for described in descriptions:
        value = values.get(Described(described.module, described.part))
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if described.at is not None:
            tensors = tensors[described.at : described.at + 1]
        if tensors:
            shapes[described] = [tuple(tensor.shape) for tensor in tensors]
    return shapes
