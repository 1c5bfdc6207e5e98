"""Networks from ONNX: the table of its operators."""

from __future__ import annotations

import functools
import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn import functional

from nni_topo.errors import ConfigError
from nni_topo.network.io.importing.building import Building, Constant
from nni_topo.network.io.importing.layers import (
    batch_norm,
    convolution,
    embedding,
    group_norm,
    instance_norm,
    layer_norm,
    linear,
    matmul,
    prelu,
    recurrent,
    transposed,
)

_MANY = 64  # most numbers of a constant that may be sizes
_LAST = 2**31 - 1  # an end of a slice from here on is the end of the axis


@dataclass
class Operator:
    """A node of a file, with its inputs as they were converted; None for one that is left out."""

    name: str
    kind: str
    inputs: list[Any]
    attributes: dict[str, Any]
    outputs: list[str]
    opset: int

    def get(self, place: int) -> Any:
        """Return an input; None if it is left out."""
        return self.inputs[place] if place < len(self.inputs) else None

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute."""
        return self.attributes.get(name, default)


Row = Callable[[Building, Operator], Any]
_Row = TypeVar("_Row", bound=Callable[..., Any])
_ROWS: dict[str, Row] = {}

# Operators of tensors by name, and PyTorch's functions.
_SAME: dict[str, Any] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "And": torch.logical_and, "Asin": torch.asin,
    "Asinh": torch.asinh, "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseAnd": torch.bitwise_and,
    "BitwiseNot": torch.bitwise_not, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
    "Ceil": torch.ceil, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": functional.hardswish, "IsInf": torch.isinf, "IsNaN": torch.isnan,
    "Log": torch.log, "Mish": functional.mish, "Neg": torch.neg, "Not": torch.logical_not, "Or": torch.logical_or,
    "Reciprocal": torch.reciprocal, "Relu": functional.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": functional.softplus,
    "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Xor": torch.logical_xor,
}  # fmt: skip
_OF_SIZES: dict[str, Any] = {
    "Abs": abs, "And": operator.and_, "Ceil": math.ceil, "Floor": math.floor, "Max": max, "Min": min,
    "Neg": operator.neg, "Not": operator.not_, "Or": operator.or_, "Sqrt": math.sqrt,
}  # fmt: skip
_BINARY: dict[str, tuple[Any, Any]] = {  # of tensors, and of sizes
    "Add": (torch.add, operator.add), "Sub": (torch.sub, operator.sub), "Mul": (torch.mul, operator.mul),
    "Div": (torch.div, operator.floordiv), "Pow": (torch.pow, operator.pow),
    "Equal": (torch.eq, operator.eq), "Greater": (torch.gt, operator.gt), "Less": (torch.lt, operator.lt),
    "GreaterOrEqual": (torch.ge, operator.ge), "LessOrEqual": (torch.le, operator.le),
    "Mod": (torch.remainder, operator.mod),
}  # fmt: skip
_DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul",
              "ConvInteger", "MatMulInteger", "MatMulNBits")  # fmt: skip


def row(*names: str) -> Callable[[_Row], _Row]:
    """Enter a function as the row of operators."""

    def enter(function: _Row) -> _Row:
        _ROWS.update(dict.fromkeys(names, function))
        return function

    return enter


def dtype_of(number: int, place: str) -> torch.dtype:
    """Return PyTorch's type for one of ONNX."""
    if number not in _DTYPES:
        raise ConfigError(f"tensors of a file must have a type that PyTorch has, got ONNX's type {number} ({place})")
    return _DTYPES[number]


def to_tensor(proto: Any) -> Tensor:
    """Return the values of a tensor in a file."""
    import onnx

    array = onnx.numpy_helper.to_array(proto)
    if proto.data_type == onnx.TensorProto.BFLOAT16:
        return torch.from_numpy(np.ascontiguousarray(array.astype(np.float32))).bfloat16()
    return torch.from_numpy(np.array(array))


def check_operators(graph: Any, domains: set[str]) -> None:
    """Refuse a file with an operator that no row converts; ``domains``: those of ONNX's own operators."""
    for node in _nodes(graph):
        name = node.name or (node.output[0] if node.output else "")
        if node.op_type in _QUANTIZED:
            raise ConfigError(
                "a file must hold a float network, which export(..., int8=...) quantises again when it is smaller, got "
                f"the operator {node.op_type} (node {name!r}, from_file)"
            )
        if node.op_type not in _ROWS or node.domain not in domains:
            kind = f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
            raise ConfigError(
                f"operators of a file must be ones that can be converted, got {kind} (node {name!r}, from_file)"
            )


def _nodes(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        if node.op_type == "If":
            for attribute in node.attribute:
                yield from _nodes(attribute.g)


def convert(building: Building, graph: Any, values: dict[str, Any], opset: int) -> list[Any]:
    """Convert a graph of a file; return its outputs. ``values`` gets what became of each value, by name."""
    import onnx

    for tensor in graph.initializer:
        values[tensor.name] = Constant(to_tensor(tensor), tensor.name, trains=len(tensor.dims) > 0)
    # How often a value is used, to join a product and a sum into one layer.
    uses = Counter(name for node in _nodes(graph) for name in node.input)
    uses.update(each.name for each in graph.output)
    for node in graph.node:
        name = node.name or node.output[0]
        inputs = [values[each] if each else None for each in node.input]
        attributes = {}
        for each in node.attribute:
            value = onnx.helper.get_attribute_value(each)
            attributes[each.name] = value.decode() if isinstance(value, bytes) else value
        building.where = module_name(name, node.op_type)
        one = Operator(name, node.op_type, inputs, attributes, list(node.output), opset)
        if node.op_type == "If":
            results = _branch(building, one, values)
        elif node.op_type == "Add" and (joined := _joined_bias(building, node, inputs, uses)) is not None:
            results = joined
        else:
            results = _ROWS[node.op_type](building, one)
        results = results if isinstance(results, tuple) else (results,)
        values.update(zip(node.output, results, strict=False))
    return [values[each.name] for each in graph.output]


def module_name(node: str, kind: str) -> str:
    """Return the name of a layer after a node, such as ``layer1.0.conv1`` for ``/layer1/layer1.0/conv1/Conv``.

    TensorFlow joins the names of nodes that it has made one.
    """
    node = node.partition(";")[0]
    parts = [part for part in node.split("/") if part]
    if len(parts) > 1 and parts[-1].startswith(kind):
        parts.pop()
    names = list[str]()
    for part in parts:
        if names and part.startswith(f"{names[-1]}."):  # an entry of a list has the list's name again
            part = part.removeprefix(f"{names[-1]}.")
        names.append(part)
    return ".".join(names) if "/" in node else node.replace(".", "_")


def _joined_bias(b: Building, node: Any, inputs: list[Any], uses: Counter[str]) -> Any:
    """Make a sum the bias of the linear layer before it; None if it can't be."""
    for x, bias, name in (*[(inputs[0], inputs[1], node.input[0])], (inputs[1], inputs[0], node.input[1])):
        if isinstance(x, Node) and isinstance(bias, Constant) and uses[name] == 1 and bias.trains:
            return b.with_bias(x, bias)
    return None


def _branch(b: Building, one: Operator, values: dict[str, Any]) -> Any:
    """Convert the branch that the inputs' sizes choose, or a scalar input such as a sampling rate."""
    condition = tensor_of(b, one.inputs[0])
    choices = {bool(b.values(condition, call)) for call in range(b.calls)}
    inputs = b.inputs_behind(condition)
    if len(choices) > 1 or any(b.values(each, 0).numel() > 1 for each in inputs):
        raise ConfigError(f"the condition of an If must not depend on the inputs' values ({one.name}, from_file)")
    b.settings |= inputs
    return tuple(convert(b, one.attribute("then_branch" if choices.pop() else "else_branch"), values, one.opset))


# Sizes: a list of numbers and of nodes that are numbers stands for a vector of them, and a node or number for a scalar.
def is_sizes(b: Building, value: Any) -> bool:
    """Tell whether a value is a size or a list of sizes, not a tensor."""
    if isinstance(value, Node):
        return not isinstance(b.values(value, 0), Tensor)
    return not isinstance(value, Constant)


def sizes_of(b: Building, value: Any) -> list[Any]:
    """Return a vector as a list of sizes."""
    if isinstance(value, Constant):
        return list(value.tensor.reshape(-1).tolist())
    if isinstance(value, list):
        return value
    if is_sizes(b, value):
        return [value]
    return [
        b.call("item", b.call(operator.getitem, b.call("flatten", value), place))
        for place in range(b.values(value, 0).numel())
    ]


def tensor_of(b: Building, value: Any) -> Any:
    """Return a value as a tensor."""
    if not is_sizes(b, value):
        return value
    if (not isinstance(value, list) and not isinstance(value, Node)) or (
        isinstance(value, list) and not any(isinstance(each, Node) for each in value)
    ):
        return Constant(torch.tensor(value))
    return b.call(torch.tensor, value, device=b.device())


def number_of(b: Building, value: Any) -> Any:
    """Return a constant of one element as a number; any other value unchanged."""
    if isinstance(value, Constant) and value.tensor.numel() == 1 and value.tensor.dim() <= 1:
        return value.tensor.item()
    return value


def _like_sizes(b: Building, values: list[Any]) -> bool:
    """Tell whether values are sizes, or small constants beside sizes."""
    has_sizes = any(isinstance(value, list) or is_sizes(b, value) for value in values)
    small = all(
        is_sizes(b, value) or (isinstance(value, Constant) and value.tensor.dim() <= 1 and value.tensor.numel() <= _MANY
                               and not value.tensor.is_floating_point())
        for value in values
    )  # fmt: skip
    return has_sizes and small


def _elementwise(b: Building, function: Callable[..., Any], values: list[Any]) -> Any:
    """Compute with sizes, element by element."""
    lists = [value.tensor.tolist() if isinstance(value, Constant) else value for value in values]
    length = max([len(each) for each in lists if isinstance(each, list)], default=None)
    if length is None:
        return b.call(function, *lists)
    columns = list[list[Any]]()
    for each in lists:
        entries = each if isinstance(each, list) else [each]
        columns.append(entries * length if len(entries) == 1 else entries)
    return [b.call(function, *entries) for entries in zip(*columns, strict=True)]


@row(*_SAME)
def _same(b: Building, one: Operator) -> Any:
    if _like_sizes(b, one.inputs) and one.kind in _OF_SIZES:
        return _elementwise(b, _OF_SIZES[one.kind], one.inputs)
    return b.call(_SAME[one.kind], *[tensor_of(b, value) for value in one.inputs])


@row(*_BINARY)
def _binary(b: Building, one: Operator) -> Any:
    of_tensors, of_sizes = _BINARY[one.kind]
    if _like_sizes(b, one.inputs):
        return _elementwise(b, of_sizes, one.inputs)
    first, second = (tensor_of(b, value) for value in one.inputs)
    if one.kind == "Div" and not b.values(first, 0).is_floating_point():
        return b.call(torch.div, first, second, rounding_mode="trunc")
    if one.kind == "Mod" and one.attribute("fmod", 0):
        return b.call(torch.fmod, first, second)
    # A number beside a tensor is written as a number.
    if isinstance(first, Node) and one.kind != "Mod":
        second = number_of(b, second) if b.shape(first) else second
    elif isinstance(second, Node) and b.shape(second) and one.kind in ("Add", "Mul"):
        first, second = second, number_of(b, first)
    elif isinstance(second, Node) and b.shape(second) and one.kind in ("Sub", "Div"):
        first = number_of(b, first)
        if not isinstance(first, (Constant, Node)):
            return b.call({"Sub": operator.sub, "Div": operator.truediv}[one.kind], first, second)
    result = b.call(of_tensors, first, second)
    wanted = b.values(tensor_of(b, one.inputs[0]), 0).dtype
    if one.kind == "Pow" and b.values(result, 0).dtype != wanted:
        result = b.call("to", result, wanted)
    return result


@row("Max", "Min", "Sum", "Mean")
def _variadic(b: Building, one: Operator) -> Any:
    if _like_sizes(b, one.inputs) and one.kind in _OF_SIZES:
        return _elementwise(b, _OF_SIZES[one.kind], one.inputs)
    function = {"Max": torch.maximum, "Min": torch.minimum}.get(one.kind, torch.add)
    total = functools.reduce(
        lambda left, right: b.call(function, left, right), [tensor_of(b, each) for each in one.inputs]
    )
    return b.call(torch.div, total, len(one.inputs)) if one.kind == "Mean" else total


@row("Identity", "Dropout")
def _identity(_: Building, one: Operator) -> Any:
    return one.inputs[0]


@row("Constant")
def _constant(_: Building, one: Operator) -> Any:
    (name, value), *_others = one.attributes.items()
    if name == "value":
        return Constant(to_tensor(value))
    kind = torch.float32 if "float" in name else torch.int64
    return Constant(torch.tensor(list(value) if name.endswith("s") else value, dtype=kind))


@row("Cast", "CastLike")
def _cast(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    dtype = (
        b.values(tensor_of(b, one.inputs[1]), 0).dtype
        if one.kind == "CastLike"
        else dtype_of(one.attribute("to"), one.name)
    )
    if is_sizes(b, x):
        if dtype in (torch.int64, torch.int32, torch.bool):  # a size is as true as its tensor
            return x
        if dtype.is_floating_point and b.is_fixed(x):  # as the width of a head under a root: it doesn't change
            return Constant(torch.tensor(b.values(x, 0), dtype=dtype))
        x = tensor_of(b, x)
    return x if b.values(x, 0).dtype == dtype else b.call("to", x, dtype)


@row("Where")
def _where(b: Building, one: Operator) -> Any:
    if _like_sizes(b, one.inputs):
        return (
            _elementwise(b, lambda condition, yes, no: yes if condition else no, one.inputs)
            if not any(isinstance(each, Node) for each in one.inputs[0] if isinstance(one.inputs[0], list))
            else _elementwise(b, torch.sym_ite, one.inputs)
        )
    condition, yes, no = (tensor_of(b, each) for each in one.inputs)
    if isinstance(condition, Node):
        yes, no = number_of(b, yes), number_of(b, no)
        if not isinstance(yes, (Node, Constant)) and not isinstance(no, (Node, Constant)):
            no = one.inputs[2]
    return b.call(torch.where, condition, yes, no)


@row("Shape")
def _shape(b: Building, one: Operator) -> Any:
    x = tensor_of(b, one.inputs[0])
    axes = range(len(b.shape(x)))[one.attribute("start", 0) : one.attribute("end", None)]
    return [b.size(x, axis) for axis in axes]


@row("Size")
def _size(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    return len(x) if isinstance(x, list) else b.call("numel", tensor_of(b, x))


@row("Reshape")
def _reshape(b: Building, one: Operator) -> Any:
    x, sizes = one.inputs
    if is_sizes(b, x):
        return list(x) if isinstance(x, list) else [x] if sizes_of(b, sizes) else x
    sizes = sizes_of(b, sizes)
    if one.attribute("allowzero", 0) and 0 in sizes:
        return b.call("reshape", x, *sizes)
    return b.reshape(x, sizes)


@row("Flatten")
def _flatten(b: Building, one: Operator) -> Any:
    x, axis = one.inputs[0], one.attribute("axis", 1) % (len(b.shape(one.inputs[0])) + 1)
    if axis == 1:
        return b.call(torch.flatten, x, 1)
    return b.reshape(
        x, [math.prod(b.shape(x)[:axis]) if axis == 0 else -1, math.prod(b.shape(x)[axis:]) if axis else -1]
    )


def _axes(b: Building, one: Operator, place: int = 1) -> list[int] | None:
    """Return the axes, an attribute in old operators and an input in new ones; None if there are none."""
    axes = one.attribute("axes")
    if axes is None and one.get(place) is not None:
        axes = sizes_of(b, one.get(place))
    return None if axes is None else list(axes)


@row("Unsqueeze")
def _unsqueeze(b: Building, one: Operator) -> Any:
    x, axes = one.inputs[0], _axes(b, one) or []
    if is_sizes(b, x):
        return x if isinstance(x, list) else [x]
    rank = len(b.shape(x)) + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = b.call("unsqueeze", x, axis)
    return x


@row("Squeeze")
def _squeeze(b: Building, one: Operator) -> Any:
    x, axes = one.inputs[0], _axes(b, one)
    if is_sizes(b, x):
        return x[0] if isinstance(x, list) and len(x) == 1 else x
    if axes is None:
        return b.call("squeeze", x)
    rank = len(b.shape(x))
    for axis in sorted((axis % rank for axis in axes), reverse=True):
        x = b.call("squeeze", x, axis)
    return x


@row("Transpose")
def _transpose(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    dims = list(one.attribute("perm", range(len(b.shape(x)))[::-1]))
    if isinstance(x, Constant) and dims == [1, 0]:
        return transposed(x)
    return x if dims == sorted(dims) else b.call("permute", x, *dims)


@row("Concat")
def _concat(b: Building, one: Operator) -> Any:
    values = one.inputs
    if _like_sizes(b, values):
        return [size for value in values for size in sizes_of(b, value)]
    tensors = [tensor_of(b, value) for value in values]
    return tensors[0] if len(tensors) == 1 else b.call(torch.cat, tensors, one.attribute("axis"))


@row("Split")
def _split(b: Building, one: Operator) -> Any:
    x, axis = one.inputs[0], one.attribute("axis", 0)
    sizes = one.attribute("split") or (sizes_of(b, one.get(1)) if one.get(1) is not None else None)
    if is_sizes(b, x):
        parts = sizes or [len(x) // len(one.outputs)] * len(one.outputs)
        ends = np.cumsum(parts).tolist()
        return tuple(x[end - part : end] for end, part in zip(ends, parts, strict=True))
    count, width = len(one.outputs), b.shape(x)[axis]
    if sizes is None and -(-width // count) * (count - 1) < width:
        return b.parts(b.call(torch.chunk, x, count, axis))
    if sizes is None:
        sizes = [-(-width // count)] * (count - 1) + [width - -(-width // count) * (count - 1)]
    return b.split(x, sizes, axis)


@row("Slice")
def _slice(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    if one.attributes:
        starts, ends = list(one.attribute("starts")), list(one.attribute("ends"))
        axes, steps = one.attribute("axes"), None
    else:
        starts, ends = sizes_of(b, one.inputs[1]), sizes_of(b, one.inputs[2])
        axes, steps = (None if one.get(place) is None else sizes_of(b, one.get(place)) for place in (3, 4))
    axes, steps = list(axes or range(len(starts))), list(steps or [1] * len(starts))
    if is_sizes(b, x):
        return x[_bound(starts[0]) : _bound(ends[0]) : steps[0]]
    rank = len(b.shape(x))
    index = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if type(step) is int and step < 0:
            x = b.call("flip", x, (axis % rank,))
            last = (type(start) is int and start in (-1, _LAST)) or (
                type(start) is int and start >= b.shape(x)[axis] - 1
            )
            first = type(end) is int and end <= -b.shape(x)[axis] - 1
            if not last or not first:
                raise ConfigError(f"a slice with a negative step must take the whole axis ({one.name}, from_file)")
            start, end, step = None, None, -step
        first, last = (b.end(x, axis, _bound(bound)) for bound in (start, end))
        index[axis % rank] = slice(first or None, last, None if step == 1 else step)
    while index and index[-1] == slice(None):
        index.pop()
    return b.call(operator.getitem, x, tuple(index)) if index else x


def _bound(bound: Any) -> Any:
    """Return an end of a slice as Python writes it."""
    return None if type(bound) is int and abs(bound) >= _LAST else bound


@row("Gather")
def _gather(b: Building, one: Operator) -> Any:
    x, index = one.inputs
    axis = one.attribute("axis", 0)
    if is_sizes(b, x):
        places = index.tensor.tolist() if isinstance(index, Constant) else b.values(index, 0)
        return [x[place] for place in places] if isinstance(places, list) else x[places]
    if (
        isinstance(x, Constant)
        and x.tensor.dim() == 2
        and axis == 0
        and isinstance(index, Node)
        and x.trains
        and not is_sizes(b, index)
    ):
        return embedding(b, x, index)
    if (isinstance(index, Constant) and index.tensor.dim() == 0) or not isinstance(index, (Constant, Node, list)):
        place = index.tensor.item() if isinstance(index, Constant) else index
        return b.call("select", x, axis, place)
    index = tensor_of(b, index)
    rank = len(b.shape(index))
    if rank == 0:
        return b.call("squeeze", b.call(torch.index_select, x, axis, b.call("reshape", index, 1)), axis)
    axis %= len(b.shape(x))
    if rank == 1:
        if isinstance(index, Constant) and bool((index.tensor < 0).any()):
            index = Constant(index.tensor % b.shape(x)[axis])
        return b.call(torch.index_select, x, axis, index)
    return b.call(operator.getitem, x, (*[slice(None)] * axis, index))


@row("GatherElements")
def _gather_elements(b: Building, one: Operator) -> Any:
    x, index = one.inputs
    return b.call(torch.gather, x, one.attribute("axis", 0), index)


@row("GatherND")
def _gather_nd(b: Building, one: Operator) -> Any:
    x, index = one.inputs
    if one.attribute("batch_dims", 0):
        raise ConfigError(f"GatherND must have no batch_dims ({one.name}, from_file)")
    parts = b.parts(b.call("unbind", index, -1))
    return b.call(operator.getitem, x, tuple(parts))


@row("ScatterND")
def _scatter_nd(b: Building, one: Operator) -> Any:
    x, index, updates = (tensor_of(b, each) for each in one.inputs)
    if one.attribute("reduction", "none") not in ("none", "add"):
        raise ConfigError(f"ScatterND must put or add ({one.name}, from_file)")
    parts = b.parts(b.call("unbind", index, -1))
    return b.call(torch.index_put, x, tuple(parts), updates, accumulate=one.attribute("reduction", "none") == "add")


@row("ScatterElements")
def _scatter_elements(b: Building, one: Operator) -> Any:
    x, index, updates = one.inputs
    kind = one.attribute("reduction", "none")
    if kind == "none":
        return b.call(torch.scatter, x, one.attribute("axis", 0), index, updates)
    names = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}
    return b.call(torch.scatter_reduce, x, one.attribute("axis", 0), index, updates, names[kind])


@row("Expand")
def _expand(b: Building, one: Operator) -> Any:
    x, sizes = tensor_of(b, one.inputs[0]), sizes_of(b, one.inputs[1])
    shape = b.shape(x)
    ahead = len(sizes) - len(shape)
    if ahead < 0:
        sizes, ahead = [-1] * -ahead + sizes, 0
    known = b.values(sizes, 0)
    sizes = [
        -1 if place >= ahead and (known[place] in (1, -1) or known[place] == shape[place - ahead]) else size
        for place, size in enumerate(sizes)
    ]
    return x if sizes == [-1] * len(shape) else b.call("expand", x, *sizes)


@row("Tile")
def _tile(b: Building, one: Operator) -> Any:
    return b.call("repeat", one.inputs[0], *sizes_of(b, one.inputs[1]))


@row("ConstantOfShape")
def _constant_of_shape(b: Building, one: Operator) -> Any:
    value = one.attribute("value")
    number = torch.zeros(1) if value is None else to_tensor(value)
    sizes = sizes_of(b, one.inputs[0])
    if not any(isinstance(size, Node) for size in sizes):
        return Constant(torch.full(sizes, number.item(), dtype=number.dtype))
    return b.call(torch.full, sizes, number.item(), dtype=number.dtype, device=b.device())


@row("Range")
def _range(b: Building, one: Operator) -> Any:
    values = [number_of(b, each) for each in one.inputs]
    if not any(isinstance(value, Node) for value in values):
        return Constant(torch.arange(*values))
    return b.call(
        torch.arange,
        *[b.call("item", v) if isinstance(v, Node) and not is_sizes(b, v) else v for v in values],
        device=b.device(),
    )


@row("Trilu")
def _trilu(b: Building, one: Operator) -> Any:
    shift = number_of(b, one.get(1)) if one.get(1) is not None else 0
    return b.call(torch.triu if one.attribute("upper", 1) else torch.tril, one.inputs[0], shift)


@row("OneHot")
def _one_hot(b: Building, one: Operator) -> Any:
    index, depth, values = one.inputs
    if one.attribute("axis", -1) != -1 or b.values(values, 0).tolist() != [0, 1]:
        raise ConfigError(f"OneHot must have values 0 and 1 along the last axis ({one.name}, from_file)")
    dtype = b.values(values, 0).dtype
    return b.call("to", b.call(functional.one_hot, b.call("to", index, torch.int64), sizes_of(b, depth)[0]), dtype)


@row("CumSum")
def _cumsum(b: Building, one: Operator) -> Any:
    if one.attribute("reverse", 0) or one.attribute("exclusive", 0):
        raise ConfigError(f"CumSum must be neither reverse nor exclusive ({one.name}, from_file)")
    x = tensor_of(b, one.inputs[0])
    return b.call(torch.cumsum, x, sizes_of(b, one.inputs[1])[0], dtype=b.values(x, 0).dtype)


@row("NonZero")
def _nonzero(b: Building, one: Operator) -> Any:
    return b.call("t", b.call(torch.nonzero, one.inputs[0]))


@row("Einsum")
def _einsum(b: Building, one: Operator) -> Any:
    return b.call(torch.einsum, one.attribute("equation"), *one.inputs)


@row("TopK")
def _topk(b: Building, one: Operator) -> Any:
    largest, ordered = bool(one.attribute("largest", 1)), bool(one.attribute("sorted", 1))
    return b.parts(
        b.call(torch.topk, one.inputs[0], sizes_of(b, one.inputs[1])[0], one.attribute("axis", -1), largest, ordered)
    )


@row("ArgMax", "ArgMin")
def _arg(b: Building, one: Operator) -> Any:
    function = torch.argmax if one.kind == "ArgMax" else torch.argmin
    return b.call(function, one.inputs[0], one.attribute("axis", 0), bool(one.attribute("keepdims", 1)))


@row("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
     "ReduceSumSquare", "ReduceLogSum")  # fmt: skip
def _reduce(b: Building, one: Operator) -> Any:
    x, axes, keeps = one.inputs[0], _axes(b, one), bool(one.attribute("keepdims", 1))
    if is_sizes(b, x):
        if one.kind == "ReduceProd":
            total = functools.reduce(lambda left, right: b.call(operator.mul, left, right), x)
            return [total] if keeps else total
        x = tensor_of(b, x)
    if not axes:
        if one.attribute("noop_with_empty_axes", 0):
            return x
        axes = list(range(len(b.shape(x))))
    if one.kind == "ReduceProd":
        for axis in sorted((axis % len(b.shape(x)) for axis in axes), reverse=True):
            x = b.call(torch.prod, x, axis, keeps)
        return x
    if one.kind in ("ReduceL1", "ReduceL2"):
        return b.call(torch.linalg.vector_norm, x, 1 if one.kind == "ReduceL1" else 2, axes, keeps)
    if one.kind == "ReduceSumSquare":
        x = b.call(torch.square, x)
    function: Any = {"ReduceMean": torch.mean, "ReduceMax": torch.amax, "ReduceMin": torch.amin,
                "ReduceLogSumExp": torch.logsumexp}.get(one.kind, torch.sum)  # fmt: skip
    result = b.call(function, x, axes, keeps)
    return b.call(torch.log, result) if one.kind == "ReduceLogSum" else result


@row("Softmax", "LogSoftmax")
def _softmax(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    axis = one.attribute("axis", -1 if one.opset >= 13 else 1)
    function = torch.softmax if one.kind == "Softmax" else torch.log_softmax
    if one.opset < 13 and axis % len(b.shape(x)) != len(b.shape(x)) - 1:
        flat = b.call(torch.flatten, x, axis)
        return b.call("view_as", b.call(function, flat, -1), x)
    return b.call(function, x, axis)


@row("Clip")
def _clip(b: Building, one: Operator) -> Any:
    low, high = one.attribute("min"), one.attribute("max")
    low = number_of(b, one.get(1)) if one.get(1) is not None else low
    high = number_of(b, one.get(2)) if one.get(2) is not None else high
    x = tensor_of(b, one.inputs[0])
    if (low, high) == (0, 6) and b.values(x, 0).is_floating_point():
        return b.call(functional.relu6, x)
    return b.call(torch.clamp, x, low, high)


# Activations whose first parameter is alpha, and its default.
_WITH_ALPHA: dict[str, tuple[Any, float]] = {
    "LeakyRelu": (functional.leaky_relu, 0.01), "Elu": (functional.elu, 1.0), "Celu": (functional.celu, 1.0),
}  # fmt: skip


@row(*_WITH_ALPHA, "HardSigmoid", "Gelu", "ThresholdedRelu", "Swish", "Selu")
def _activation(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    if one.kind in _WITH_ALPHA:
        function, default = _WITH_ALPHA[one.kind]
        return b.call(function, x, one.attribute("alpha", default))
    if one.kind == "Gelu":
        return b.call(functional.gelu, x, approximate=one.attribute("approximate", "none"))
    if one.kind == "ThresholdedRelu":
        return b.call(functional.threshold, x, one.attribute("alpha", 1.0), 0.0)
    if one.kind == "HardSigmoid":
        alpha, beta = one.attribute("alpha", 0.2), one.attribute("beta", 0.5)
        if math.isclose(alpha, 1 / 6, rel_tol=1e-5) and beta == 0.5:
            return b.call(functional.hardsigmoid, x)
        return b.call(torch.clamp, b.call(torch.add, b.call(torch.mul, x, alpha), beta), 0.0, 1.0)
    if one.kind == "Swish" and one.attribute("alpha", 1.0) == 1.0:
        return b.call(functional.silu, x)
    if one.kind == "Selu" and not one.attributes:
        return b.call(functional.selu, x)
    raise ConfigError(f"{one.kind} must have its usual parameters ({one.name}, from_file)")


@row("PRelu")
def _prelu(b: Building, one: Operator) -> Any:
    x, slope = one.inputs
    if isinstance(slope, Constant) and slope.tensor.numel() in (1, b.shape(x)[1]):
        return prelu(b, x, slope)
    return b.call(torch.where, b.call(torch.gt, x, 0), x, b.call(torch.mul, x, slope))


def _window(
    b: Building, one: Operator, x: Any, kernel: list[int], strides: list[int], dilations: list[int]
) -> tuple[list[int] | None, list[int]]:
    """Return how the input is padded before a layer, where a layer can't pad so, and the layer's own padding."""
    dims = len(kernel)
    pads = list(one.attribute("pads", [0] * 2 * dims))
    automatic = one.attribute("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        begins, ends = list[int](), list[int]()
        for axis in range(dims):
            totals = set()
            for call in range(b.calls):
                width = b.values(x, call).shape[axis + 2]
                reach = (kernel[axis] - 1) * dilations[axis] + 1
                totals.add(max((-(-width // strides[axis]) - 1) * strides[axis] + reach - width, 0))
            if len(totals) > 1:
                raise ConfigError(f"the padding {automatic} of a free axis can't be converted ({one.name}, from_file)")
            total = totals.pop()
            small, large = total // 2, total - total // 2
            begins.append(small if automatic == "SAME_UPPER" else large)
            ends.append(total - begins[-1])
        pads = begins + ends
    begins, ends = pads[:dims], pads[dims:]
    if begins == ends:
        return None, begins
    around = [side for begin, end in zip(begins[::-1], ends[::-1], strict=True) for side in (begin, end)]
    return around, [0] * dims


@row("Conv")
def _conv(b: Building, one: Operator) -> Any:
    x, weight, bias = one.inputs[0], one.inputs[1], one.get(2)
    kernel = list(b.shape(weight)[2:])
    ones = [1] * len(kernel)
    strides, dilations = list(one.attribute("strides", ones)), list(one.attribute("dilations", ones))
    around, padding = _window(b, one, x, kernel, strides, dilations)
    x = b.call(functional.pad, x, around) if around is not None else x
    return convolution(
        b, x, weight, bias, stride=strides, padding=padding, dilation=dilations, groups=one.attribute("group", 1)
    )


@row("ConvTranspose")
def _conv_transpose(b: Building, one: Operator) -> Any:
    x, weight, bias = one.inputs[0], one.inputs[1], one.get(2)
    kernel = list(b.shape(weight)[2:])
    dims, ones = len(kernel), [1] * len(kernel)
    strides, dilations = list(one.attribute("strides", ones)), list(one.attribute("dilations", ones))
    extra, pads = list(one.attribute("output_padding", [0] * dims)), list(one.attribute("pads", [0] * 2 * dims))
    automatic = one.attribute("auto_pad", "NOTSET")
    if automatic in ("SAME_UPPER", "SAME_LOWER") and one.attribute("output_shape") is None:
        totals = [(k - 1) * d + 1 + e - s for k, d, e, s in zip(kernel, dilations, extra, strides, strict=True)]
        small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
        pads = small + large if automatic == "SAME_UPPER" else large + small
    elif one.attribute("output_shape") is not None:
        raise ConfigError(f"ConvTranspose must state its padding, not its output's shape ({one.name}, from_file)")
    begins, ends = pads[:dims], pads[dims:]
    knobs = {"stride": strides, "dilation": dilations, "groups": one.attribute("group", 1), "transposed": True}
    if begins == ends:
        return convolution(b, x, weight, bias, padding=begins, output_padding=extra, **knobs)
    y = convolution(b, x, weight, bias, padding=[0] * dims, output_padding=extra, **knobs)
    index = [slice(None)] * 2 + [slice(begin or None, -end or None) for begin, end in zip(begins, ends, strict=True)]
    return b.call(operator.getitem, y, tuple(index))


@row("MaxPool", "AveragePool", "LpPool")
def _pool(b: Building, one: Operator) -> Any:
    x, kernel = one.inputs[0], list(one.attribute("kernel_shape"))
    dims, ones = len(kernel), [1] * len(kernel)
    strides, dilations = list(one.attribute("strides", ones)), list(one.attribute("dilations", ones))
    around, padding = _window(b, one, x, kernel, strides, dilations)
    knobs: dict[str, Any] = {"stride": strides, "padding": padding, "ceil_mode": bool(one.attribute("ceil_mode", 0))}
    too_wide = any(2 * pad > size for pad, size in zip(padding, kernel, strict=True))
    if too_wide:
        around, knobs["padding"] = [side for pad in padding[::-1] for side in (pad, pad)], [0] * dims
    if one.kind == "MaxPool":
        if around is not None:
            x = b.call(functional.pad, x, around, value=-math.inf)
        function = getattr(functional, f"max_pool{dims}d")
        result = b.call(function, x, kernel, dilation=dilations, **knobs)
        return result
    if one.kind == "LpPool" or dilations != ones:
        raise ConfigError(f"{one.kind} must be an average or maximum without gaps ({one.name}, from_file)")
    counts = bool(one.attribute("count_include_pad", 0))
    if around is not None:
        if not counts:
            raise ConfigError(
                f"an average that leaves out padding must be padded alike at both ends ({one.name}, from_file)"
            )
        x = b.call(functional.pad, x, around)
    return b.call(getattr(functional, f"avg_pool{dims}d"), x, kernel, count_include_pad=counts, **knobs)


@row("GlobalAveragePool", "GlobalMaxPool")
def _global_pool(b: Building, one: Operator) -> Any:
    x = one.inputs[0]
    kind = "avg" if one.kind == "GlobalAveragePool" else "max"
    return b.call(getattr(functional, f"adaptive_{kind}_pool{len(b.shape(x)) - 2}d"), x, 1)


@row("Gemm")
def _gemm(b: Building, one: Operator) -> Any:
    x, weight, bias = one.inputs[0], one.inputs[1], one.get(2)
    alpha, beta = one.attribute("alpha", 1.0), one.attribute("beta", 1.0)
    if one.attribute("transA", 0):
        x = transposed(x) if isinstance(x, Constant) else b.call("t", x)
    if not one.attribute("transB", 0):
        weight = transposed(weight) if isinstance(weight, Constant) else b.call("t", weight)
    is_layer = isinstance(weight, Constant) and alpha == 1
    if is_layer and (
        bias is None or (isinstance(bias, Constant) and beta == 1 and bias.tensor.numel() == b.shape(weight)[0])
    ):
        if bias is not None and bias.tensor.dim() != 1:
            bias = Constant(bias.tensor.flatten(), bias.name, trains=bias.trains)
        return linear(b, x, weight, bias)
    y = linear(b, x, weight, None)
    y = y if alpha == 1 else b.call(torch.mul, y, alpha)
    if bias is None:
        return y
    return b.call(torch.add, y, bias if beta == 1 else b.call(torch.mul, bias, beta))


@row("MatMul")
def _matmul(b: Building, one: Operator) -> Any:
    return matmul(b, tensor_of(b, one.inputs[0]), tensor_of(b, one.inputs[1]))


@row("BatchNormalization")
def _batch_norm(b: Building, one: Operator) -> Any:
    x, weight, bias, mean, variance = one.inputs[:5]
    return batch_norm(b, x, weight, bias, mean, variance, one.attribute("epsilon", 1e-5))


@row("InstanceNormalization")
def _instance_norm(b: Building, one: Operator) -> Any:
    x, weight, bias = one.inputs
    return instance_norm(b, x, weight, bias, one.attribute("epsilon", 1e-5))


@row("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
def _layer_norm(b: Building, one: Operator) -> Any:
    x, weight, bias = one.inputs[0], one.inputs[1], one.get(2)
    axis, epsilon = one.attribute("axis", -1), one.attribute("epsilon", 1e-5)
    shape = b.shape(x)[axis % len(b.shape(x)) :]
    is_layer = all(isinstance(each, (Constant, type(None))) for each in (weight, bias))
    if is_layer and tuple(b.shape(weight)) == tuple(shape):
        if one.kind == "LayerNormalization":
            return layer_norm(b, x, shape, weight, bias, epsilon)
        return b.layer(lambda: nn.RMSNorm(shape, eps=epsilon), [x], weight=weight)
    function = functional.layer_norm if one.kind == "LayerNormalization" else functional.rms_norm
    y = b.call(torch.mul, b.call(function, x, list(shape), eps=epsilon), weight)
    return y if bias is None else b.call(torch.add, y, bias)


@row("GroupNormalization")
def _group_norm(b: Building, one: Operator) -> Any:
    x, weight, bias = one.inputs
    groups, width = one.attribute("num_groups"), b.shape(x)[1]
    if b.shape(weight)[0] != width:  # before opset 21 one number for each group
        weight, bias = (
            Constant(each.tensor.repeat_interleave(width // groups), each.name, trains=True) for each in (weight, bias)
        )
    return group_norm(b, x, groups, weight, bias, one.attribute("epsilon", 1e-5))


@row("LpNormalization")
def _normalize(b: Building, one: Operator) -> Any:
    return b.call(functional.normalize, one.inputs[0], p=one.attribute("p", 2), dim=one.attribute("axis", -1))


@row("LRN")
def _lrn(b: Building, one: Operator) -> Any:
    alpha, beta, bias = one.attribute("alpha", 1e-4), one.attribute("beta", 0.75), one.attribute("bias", 1.0)
    return b.call(functional.local_response_norm, one.inputs[0], one.attribute("size"), alpha, beta, bias)


@row("Pad")
def _pad(b: Building, one: Operator) -> Any:
    x, mode = one.inputs[0], one.attribute("mode", "constant")
    pads = list(one.attribute("pads") or sizes_of(b, one.get(1)))
    rank = len(b.shape(x))
    axes = [axis % rank for axis in sizes_of(b, one.get(3))] if one.get(3) is not None else list(range(rank))
    by_axis = {axis: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    around = list[Any]()
    for axis in reversed(range(rank)):
        around += by_axis.get(axis, (0, 0))
    while len(around) > 2 and around[-2:] == [0, 0]:
        around = around[:-2]
    if mode == "constant":
        value = one.attribute("value", 0.0) if one.get(2) is None else number_of(b, one.get(2))
        return b.call(functional.pad, x, around, value=value)
    return b.call(functional.pad, x, around, mode={"edge": "replicate", "wrap": "circular"}.get(mode, mode))


@row("Resize", "Upsample")
def _resize(b: Building, one: Operator) -> Any:
    x, mode = one.inputs[0], one.attribute("mode", "nearest")
    dims = len(b.shape(x)) - 2
    scales, sizes = (one.get(1), None) if one.kind == "Upsample" else (one.get(2), one.get(3))
    how = one.attribute("coordinate_transformation_mode", "half_pixel" if one.kind == "Resize" else "asymmetric")
    knobs: dict[str, Any] = {}
    axes = [axis % (dims + 2) for axis in one.attribute("axes", range(dims + 2))]
    if scales is not None and not (isinstance(scales, Constant) and not scales.tensor.numel()):
        factors = dict(zip(axes, sizes_of(b, scales), strict=True))
        knobs["scale_factor"] = [factors.get(axis, 1.0) for axis in range(2, dims + 2)]
    else:
        ends = dict(zip(axes, sizes_of(b, sizes), strict=True))
        knobs["size"] = [ends.get(axis, b.size(x, axis)) for axis in range(2, dims + 2)]
    if mode == "nearest":
        factors_known = b.values(knobs.get("scale_factor", [0.5]), 0)
        is_whole = "scale_factor" in knobs and all(float(factor).is_integer() for factor in factors_known)
        exact = how == "half_pixel" and one.attribute("nearest_mode", "round_prefer_floor").startswith("round")
        knobs["mode"] = "nearest-exact" if exact and not is_whole else "nearest"
    else:
        knobs["mode"] = {1: "linear", 2: "bilinear", 3: "trilinear"}[dims] if mode == "linear" else "bicubic"
        knobs["align_corners"] = how == "align_corners"
        knobs["antialias"] = bool(one.attribute("antialias", 0))
        if how not in ("align_corners", "half_pixel", "pytorch_half_pixel"):
            raise ConfigError(f"a Resize must place its corners as PyTorch does, got {how} ({one.name}, from_file)")
    return b.call(functional.interpolate, x, **knobs)


@row("DepthToSpace", "SpaceToDepth")
def _depth_to_space(b: Building, one: Operator) -> Any:
    x, block = one.inputs[0], one.attribute("blocksize")
    if one.kind == "DepthToSpace" and one.attribute("mode", "DCR") == "CRD":
        return b.call(functional.pixel_shuffle, x, block)
    height, width = b.size(x, 2), b.size(x, 3)
    if one.kind == "DepthToSpace":
        parts = b.call("reshape", x, b.size(x, 0), block, block, -1, height, width)
        moved = b.call("permute", parts, 0, 3, 4, 1, 5, 2)
        ends = [b.call(operator.mul, each, block) for each in (height, width)]
        return b.call("reshape", moved, b.size(x, 0), -1, *ends)
    ends = [b.call(operator.floordiv, each, block) for each in (height, width)]
    parts = b.call("reshape", x, b.size(x, 0), b.size(x, 1), ends[0], block, ends[1], block)
    moved = b.call("permute", parts, 0, 3, 5, 1, 2, 4)
    return b.call("reshape", moved, b.size(x, 0), -1, *ends)


@row("LSTM", "GRU", "RNN")
def _recurrent(b: Building, one: Operator) -> Any:
    x, weights, states_weights, biases, lengths = one.inputs[0], one.inputs[1], one.inputs[2], one.get(3), one.get(4)
    units, direction = one.attribute("hidden_size"), one.attribute("direction", "forward")
    refused = {
        "sequence lengths": lengths is not None and len(set(b.values(lengths, 0).tolist())) > 1,
        "peepholes": one.get(7) is not None,
        "a layout with the batch first": bool(one.attribute("layout", 0)),
        "linear_before_reset=0": one.kind == "GRU" and not one.attribute("linear_before_reset", 0),
        "a clip": one.attribute("clip") is not None,
        "weights that depend on the inputs": not (
            isinstance(weights, Constant) and isinstance(states_weights, Constant)
        ),
    }
    for what, is_refused in refused.items():
        if is_refused:
            raise ConfigError(f"a {one.kind} must be one that PyTorch has, got {what} ({one.name}, from_file)")
    order = {"LSTM": [0, 2, 3, 1], "GRU": [1, 0, 2], "RNN": [0]}[one.kind]

    def gates(matrix: Tensor) -> Tensor:
        return torch.cat([matrix.split(units)[gate] for gate in order])

    x = b.call("flip", x, (0,)) if direction == "reverse" else x
    tensors = dict[str, Constant]()
    directions = weights.tensor.shape[0]
    for place, end in zip(range(directions), ("", "_reverse")):  # noqa: B905
        parts = {"weight_ih": weights.tensor[place], "weight_hh": states_weights.tensor[place]}
        if biases is not None:
            parts |= dict(zip(("bias_ih", "bias_hh"), biases.tensor[place].chunk(2), strict=True))
        tensors |= {f"{name}_l0{end}": Constant(gates(part), trains=True) for name, part in parts.items()}
    states = [tensor_of(b, each) for each in (one.get(5), one.get(6)) if each is not None]
    outputs, *last = recurrent(
        b, one.kind, x, states, units, tensors, bias=biases is not None, bidirectional=directions == 2,
    )  # fmt: skip
    outputs = b.call("flip", outputs, (0,)) if direction == "reverse" else outputs
    if directions == 1:
        return (b.call("unsqueeze", outputs, 1), *last)
    split = b.call("unflatten", outputs, -1, (2, -1))
    return (b.call("permute", split, 0, 2, 1, 3), *last)


@row("If")
def _if(_: Building, one: Operator) -> Any:
    raise AssertionError(one)
