"""Networks from programs of ``torch.export``: the table of ATen's operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate
from torch.nn import functional
from torch.utils._pytree import tree_unflatten

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


class Arguments(dict[str, Any]):
    """An operator's arguments by the names of its schema, and its name, for rows of several operators."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        super().__init__(arguments)
        self.name = name


Row = Callable[[Building, Arguments], Any]
"""Converts a call; gets the operator's arguments by the names of its schema, and returns what it returns."""
_Row = TypeVar("_Row", bound=Callable[..., Any])
_ROWS: dict[str, Row] = {}

# PyTorch's functions that take the arguments of the operator of the same name.
_NAMES = """
__and__ __or__ __xor__
abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d add
addcdiv addcmul all amax amin any arange arctan argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d
avg_pool2d avg_pool3d baddbmm bitwise_and bitwise_not bitwise_or bmm broadcast_tensors bucketize cat ceil celu
channel_shuffle chunk clamp clamp_max clamp_min clip clone concat constant_pad_nd cos cosh cosine_similarity cummax
cumprod cumsum diag diagonal diff div divide einsum elu empty empty_like eq erf erfc exp exp2 expand expand_as expm1 eye
fft_fft fft_fft2 fft_irfft fft_irfft2 fft_rfft fft_rfft2 fill flip floor floor_divide fmod frac frobenius_norm full
full_like gather ge gelu glu gt hardshrink hardsigmoid hardswish hardtanh hstack im2col imag index_add index_copy
index_put index_select isfinite isin isinf isnan le leaky_relu lerp linalg_norm linalg_vector_norm linspace log log10
log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit logsumexp lt masked_fill
masked_scatter matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min minimum mish mm movedim
mul multiply mv nan_to_num narrow ne neg negative new_empty new_full new_ones new_zeros nonzero norm normalize
not_equal one_hot ones ones_like outer pad pairwise_distance permute pixel_shuffle pixel_unshuffle polar pow prod
rad2deg real reciprocal relu relu6 remainder repeat repeat_interleave reshape_as roll round rrelu rsqrt rsub
scalar_tensor scaled_dot_product_attention scatter scatter_add scatter_reduce select selu sigmoid sign silu sin sinh
softplus softshrink sort special_erf special_expit split split_with_sizes sqrt square square_ squeeze stack std
std_mean sub subtract sum swapaxes t take take_along_dim tan tanh tensor_split tensordot threshold tile topk transpose
tril triu trunc type_as unbind unfold unfold_copy unsqueeze var var_mean view_as view_as_complex view_as_real vstack
where zeros zeros_like
"""
_SAME = frozenset(_NAMES.split())
_ALSO = {
    "__and__": "bitwise_and", "__or__": "bitwise_or", "__xor__": "bitwise_xor",
    "concat": "cat", "fft_fft": "fft.fft", "fft_fft2": "fft.fft2", "fft_irfft": "fft.irfft", "fft_irfft2": "fft.irfft2",
    "fft_rfft": "fft.rfft", "fft_rfft2": "fft.rfft2", "linalg_vector_norm": "linalg.vector_norm",
    "linalg_norm": "linalg.norm", "special_erf": "special.erf", "special_expit": "special.expit",
    "log_sigmoid": "nn.functional.logsigmoid",
}  # fmt: skip
# Functions of numbers in a program, beside those of the module operator.
_OF_NUMBERS = {
    "sym_max": torch.sym_max, "sym_min": torch.sym_min, "sym_not": torch.sym_not, "sym_float": torch.sym_float,
    "sym_int": torch.sym_int, "sym_ite": torch.sym_ite, "sym_sum": torch.sym_sum,
}  # fmt: skip
_DROPPED = ("device", "layout", "pin_memory", "memory_format", "non_blocking", "copy", "implicit")
_FACTORIES = ("arange", "empty", "eye", "full", "linspace", "ones", "scalar_tensor", "zeros")
_CHECKS = {
    "_assert_async", "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "_check_is_size",
    "sym_constrain_range_for_size",
}  # fmt: skip
_GUARDS = ("_guards_fn", "_guards")


def row(*names: str) -> Callable[[_Row], _Row]:
    """Enter a function as the row of operators."""

    def enter(function: _Row) -> _Row:
        _ROWS.update(dict.fromkeys(names, function))
        return function

    return enter


def _function(name: str) -> Any:
    """Return PyTorch's function, or the name of the tensors' method, that an operator is called as; None without."""
    place: Any = torch
    if name in _ALSO:
        for part in _ALSO[name].split("."):
            place = getattr(place, part)
        return place
    for place in (functional, torch):
        if callable(getattr(place, name, None)) and not (place is functional and name in ("unfold", "pad_copy")):
            return getattr(place, name)
    return name if hasattr(Tensor, name) else None


def name_of(target: Any) -> str:
    """Return the name of an operator without its overload."""
    return str(target._schema.name).partition("::")[2] if isinstance(target, OpOverload) else str(target)


def has_row(node: Node) -> bool:
    """Tell whether an operator of a program can be converted."""
    if not isinstance(node.target, OpOverload):
        return True
    name = name_of(node.target)
    namespace = str(node.target._schema.name).partition("::")[0]
    return namespace == "aten" and (name in _ROWS or name in _CHECKS or _base(name) in (*_SAME, *_ROWS, "copy"))


def _base(name: str) -> str:
    """Return the name of the operator that a variant in place belongs to."""
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def is_program(model: Any) -> bool:
    """Tell whether a model is the module of an exported program: a graph of ATen's operators."""
    return isinstance(model, GraphModule) and any(
        node.op == "call_function" and isinstance(node.target, OpOverload) for node in model.graph.nodes
    )


def inputs_of(module: GraphModule) -> list[Node]:
    """Return the inputs of a program that are tensors."""
    return [
        node for node in module.graph.nodes if node.op == "placeholder" and isinstance(node.meta.get("val"), Tensor)
    ]


def convert(building: Building, module: GraphModule, inputs: list[list[Tensor]]) -> tuple[Any, dict[str, Any]]:
    """Convert a program's module; ``inputs``: for each input, the tensors of the calls.

    Returns the network's outputs, and for each node of the program what became of it.
    """
    values = dict[str, Any]()
    constants = dict[int, Constant]()
    for node, examples in zip(inputs_of(module), inputs, strict=True):
        values[node.name] = building.input(node.name, examples)
    returned = _run(building, module, values, constants)
    info = getattr(module.graph._codegen, "pytree_info", None)
    if info is not None and info.out_spec is not None:
        returned = tree_unflatten(list(returned), info.out_spec)
    return _plain(returned), values


def _plain(value: Any) -> Any:
    """Return containers that a graph can hold: an output of Transformers becomes a dict."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_plain, value)) if type(value) in (tuple, list) else tuple(map(_plain, value))
    return value


def _run(building: Building, module: GraphModule, values: dict[str, Any], constants: dict[int, Constant]) -> Any:
    """Convert the nodes of a graph; return what it returns."""

    def converted(leaf: Any) -> Any:
        return values[leaf.name] if isinstance(leaf, Node) else leaf

    for node in module.graph.nodes:
        if node.op == "placeholder":
            values.setdefault(node.name, None)
        elif node.op == "get_attr":
            held: Any = module
            for part in str(node.target).split("."):
                held = getattr(held, part)
            if isinstance(held, Tensor):
                name = "" if str(node.target).startswith(("lifted_tensor", "_tensor_constant")) else str(node.target)
                held = constants.setdefault(id(held), Constant(held, name, trains=isinstance(held, nn.Parameter)))
            values[node.name] = held
        elif node.op == "call_module":
            values[node.name] = None  # checks of the inputs
        elif node.op == "output":
            return map_aggregate(node.args[0], converted)
        else:
            args, kwargs = map_aggregate((node.args, node.kwargs), converted)
            scope = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            inner = scope[-1].removeprefix("L['self'].").removeprefix("L['self']") if scope else ""
            building.where = f"{inner}.{node.name}" if inner and "[" not in inner else node.name
            values[node.name] = _call(building, node, args, kwargs, values, constants)
    return None


def _call(
    building: Building, node: Node, args: Any, kwargs: Any, values: dict[str, Any], constants: dict[int, Constant]
) -> Any:
    target: Any = node.target
    if isinstance(target, HigherOrderOperator):
        # A part of the network without gradients, or under autocast: the graph, then its inputs.
        inner = next((place for place, each in enumerate(args) if isinstance(each, GraphModule)), None)
        if inner is None:
            raise ConfigError(f"operators of a program must be ATen's, got {target} ({node.name}, from_file)")
        graph = args[inner]
        names = [each.name for each in graph.graph.nodes if each.op == "placeholder"]
        return _run(building, graph, dict(zip(names, args[inner + 1 :], strict=True)), constants)
    if not isinstance(target, OpOverload):
        target = _OF_NUMBERS.get(getattr(target, "__name__", ""), target)
        if target is operator.getitem and not isinstance(args[0], Node):
            return args[0][args[1]]
        return building.call(target, *args, **kwargs)
    name = name_of(target)
    if name in _CHECKS:
        return None
    names = [each.name for each in target._schema.arguments]
    arguments = Arguments(_base(name) if name not in _ROWS else name, dict(zip(names, args, strict=False)) | kwargs)
    if (name == "copy_" or name not in _ROWS) and name != _base(name):
        first = node.args[0]
        assert isinstance(first, Node)
        if name in ("copy_", "index_put_", "fill_", "zero_") or isinstance(values[first.name], Constant):
            kept = {key: value for key, value in kwargs.items() if key not in _DROPPED}
            return building.call(name, *args, **kept)
        # The operator's own input has the new value for all later nodes.
        result = _apply(building, args, kwargs, arguments)
        values[first.name] = result
        return result
    return _apply(building, args, kwargs, arguments)


def _apply(building: Building, args: Any, kwargs: Any, arguments: Arguments) -> Any:
    name = arguments.name
    if name in _ROWS:
        return _ROWS[name](building, arguments)
    kept = {key: value for key, value in kwargs.items() if key not in _DROPPED}
    if name in _FACTORIES and building.has_inputs:
        kept["device"] = building.device()
    result = building.call(_function(name), *args, **kept)
    is_many = isinstance(result, Node) and isinstance(building.values(result, 0), (tuple, list))
    return building.parts(result) if is_many else result


@row("detach", "alias", "lift_fresh_copy", "lift_fresh", "lift", "contiguous", "dropout", "feature_dropout", "detach_",
     "alpha_dropout", "native_dropout", "view_copy_alias", "dropout_", "set_grad")  # fmt: skip
def _same_tensor(_: Building, a: Arguments) -> Any:
    return next(iter(a.values()))


@row("to", "_to_copy", "float", "half", "long", "bool", "int", "double")
def _to(b: Building, a: Arguments) -> Any:
    x = a["self"]
    dtype = b.values(a["other"], 0).dtype if "other" in a else a.get("dtype")
    return x if dtype is None or b.values(x, 0).dtype == dtype else b.call("to", x, dtype)


@row("view", "reshape", "_unsafe_view", "view_copy", "_reshape_alias")
def _view(b: Building, a: Arguments) -> Any:
    if "dtype" in a and "size" not in a:
        return b.call("view", a["self"], a["dtype"])
    return b.reshape(a["self"], a["size"] if "size" in a else a["shape"])


@row("flatten")
def _flatten(b: Building, a: Arguments) -> Any:
    return b.call(torch.flatten, a["self"], a.get("start_dim", 0), a.get("end_dim", -1))


@row("unflatten")
def _unflatten(b: Building, a: Arguments) -> Any:
    sizes = [size if isinstance(size, Node) or size in (1, -1) else b.number(size) for size in a["sizes"]]
    return b.call("unflatten", a["self"], a["dim"], sizes)


@row("sym_size")
def _size(b: Building, a: Arguments) -> Any:
    return b.size(a["self"], a["dim"])


@row("sym_numel", "numel")
def _numel(b: Building, a: Arguments) -> Any:
    return b.call("numel", a["self"])


@row("item", "_local_scalar_dense")
def _item(b: Building, a: Arguments) -> Any:
    return b.call("item", a["self"])


@row("slice", "slice_copy")
def _slice(b: Building, a: Arguments) -> Any:
    dim = a.get("dim", 0) % len(b.shape(a["self"]))
    start, end, step = a.get("start"), a.get("end"), a.get("step", 1)
    start = None if type(start) is int and start == 0 else start
    end = None if type(end) is int and end >= 2**31 else end
    if start is None and end is None and step == 1:
        return a["self"]
    start, end = b.end(a["self"], dim, start), b.end(a["self"], dim, end)
    index = [slice(None)] * dim + [slice(start, end, None if step == 1 else step)]
    return b.call(operator.getitem, a["self"], tuple(index))


@row("split", "split_with_sizes")
def _split(b: Building, a: Arguments) -> Any:
    x, axis = a["self"], a.get("dim", 0)
    sizes: Any = a["split_sizes"] if "split_sizes" in a else a["split_size"]
    if not isinstance(sizes, (list, tuple)):
        width = b.shape(x)[axis]
        is_free = len({b.values(x, call).shape[axis] for call in range(b.calls)}) > 1
        if type(sizes) is not int or width % sizes or is_free:
            return b.parts(b.call(torch.split, x, sizes, axis))
        sizes = [sizes] * (width // sizes)
    return b.split(x, list(sizes), axis)


@row("index")
def _index(b: Building, a: Arguments) -> Any:
    index = tuple(slice(None) if each is None else each for each in a["indices"])
    return b.call(operator.getitem, a["self"], index if len(index) > 1 else index[0])


@row("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax", "special_softmax", "special_log_softmax")
def _softmax(b: Building, a: Arguments) -> Any:
    dtype = a.get("dtype") if isinstance(a.get("dtype"), torch.dtype) else None
    return b.call(torch.log_softmax if "log" in a.name else torch.softmax, a["self"], a["dim"], dtype=dtype)


@row("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
     "_convolution")  # fmt: skip
def _convolution(b: Building, a: Arguments) -> Any:
    return convolution(
        b, a.get("input"), a["weight"], a.get("bias"), stride=a.get("stride", 1), padding=a.get("padding", 0),
        dilation=a.get("dilation", 1), groups=a.get("groups", 1), output_padding=a.get("output_padding", 0),
        transposed=a.get("transposed", "transpose" in a.name),
    )  # fmt: skip


@row("linear")
def _linear(b: Building, a: Arguments) -> Any:
    return linear(b, a["input"], a["weight"], a.get("bias"))


@row("addmm")
def _addmm(b: Building, a: Arguments) -> Any:
    x, matrix, bias = a["mat1"], a["mat2"], a["self"]
    is_layer = isinstance(x, Node) and isinstance(matrix, Constant) and isinstance(bias, Constant)
    if not is_layer or bias.tensor.dim() != 1 or a.get("alpha", 1) != 1 or a.get("beta", 1) != 1:
        return b.call(torch.addmm, bias, x, matrix, beta=a.get("beta", 1), alpha=a.get("alpha", 1))
    return linear(b, x, transposed(matrix), bias)


@row("mm", "matmul")
def _matmul(b: Building, a: Arguments) -> Any:
    return matmul(b, a["self"], a.get("mat2", a.get("other")))


@row("t", "numpy_T")
def _t(b: Building, a: Arguments) -> Any:
    x = a["self"]
    if len(b.shape(x)) > 2:
        return b.call("permute", x, *reversed(range(len(b.shape(x)))))
    return transposed(x) if isinstance(x, Constant) and x.tensor.dim() == 2 else b.call("t", x)


@row("transpose", "permute")
def _transpose(b: Building, a: Arguments) -> Any:
    x = a["self"]
    if "dims" in a:
        return b.call("permute", x, *a["dims"])
    if isinstance(x, Constant) and x.tensor.dim() == 2:
        return transposed(x)
    return b.call("transpose", x, a["dim0"], a["dim1"])


@row("batch_norm", "_native_batch_norm_legit_no_training", "native_batch_norm", "cudnn_batch_norm",
     "_batch_norm_with_update")  # fmt: skip
def _batch_norm(b: Building, a: Arguments) -> Any:
    x, weight, bias, mean, variance = (a.get(key) for key in ("input", "weight", "bias", "running_mean", "running_var"))
    result = batch_norm(b, x, weight, bias, mean, variance, a.get("eps", 1e-5))
    return result if a.name == "batch_norm" else (result, None, None, None)


@row("layer_norm", "native_layer_norm")
def _layer_norm(b: Building, a: Arguments) -> Any:
    shape, weight, bias = a["normalized_shape"], a.get("weight"), a.get("bias")
    result = layer_norm(b, a["input"], shape, weight, bias, a.get("eps", 1e-5))
    return result if a.name == "layer_norm" else (result, None, None)


@row("rms_norm", "_fused_rms_norm")
def _rms_norm(b: Building, a: Arguments) -> Any:
    sizes, weight, eps = tuple(a["normalized_shape"]), a.get("weight"), a.get("eps")
    return b.layer(
        lambda: nn.RMSNorm(sizes, eps=eps, elementwise_affine=weight is not None), [a["input"]], weight=weight
    )


@row("group_norm", "native_group_norm")
def _group_norm(b: Building, a: Arguments) -> Any:
    groups = a["num_groups"] if a.name == "group_norm" else a["group"]
    result = group_norm(b, a["input"], groups, a.get("weight"), a.get("bias"), a.get("eps", 1e-5))
    return result if a.name == "group_norm" else (result, None, None)


@row("instance_norm")
def _instance_norm(b: Building, a: Arguments) -> Any:
    return instance_norm(b, a["input"], a.get("weight"), a.get("bias"), a.get("eps", 1e-5))


@row("embedding")
def _embedding(b: Building, a: Arguments) -> Any:
    return embedding(b, a["weight"], a["indices"])


@row("prelu", "_prelu_kernel")
def _prelu(b: Building, a: Arguments) -> Any:
    return prelu(b, a["self"], a["weight"])


@row("lstm", "gru", "rnn_tanh", "rnn_relu")
def _recurrent(b: Building, a: Arguments) -> Any:
    names = ["weight_ih", "weight_hh", "bias_ih", "bias_hh"][: 4 if a["has_biases"] else 2]
    suffixes = [
        f"_l{layer}{end}" for layer in range(a["num_layers"]) for end in ("", "_reverse")[: 1 + a["bidirectional"]]
    ]
    states: Any = a["hx"] if isinstance(a["hx"], (list, tuple)) else [a["hx"]]
    tensors = a["params"]
    units = tensors[1].tensor.shape[1]
    projected = len(tensors) == len(suffixes) * (len(names) + 1)
    if projected:
        names.append("weight_hr")
        units = tensors[0].tensor.shape[0] // 4
    keys = [f"{name}{suffix}" for suffix in suffixes for name in names]
    knobs = {"num_layers": a["num_layers"], "bias": a["has_biases"], "bidirectional": a["bidirectional"]}
    if projected:
        knobs["proj_size"] = tensors[1].tensor.shape[1]
    kind, _, nonlinearity = a.name.partition("_")
    if nonlinearity:
        knobs["nonlinearity"] = nonlinearity
    tensors_by_name = dict(zip(keys, tensors, strict=True))
    return recurrent(b, kind.upper(), a["input"], states, units, tensors_by_name, batch_first=a["batch_first"], **knobs)


@row("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
     "_upsample_nearest_exact2d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
     "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")  # fmt: skip
def _upsample(b: Building, a: Arguments) -> Any:
    modes = ("nearest_exact", "nearest", "bilinear", "trilinear", "bicubic", "linear")
    mode = next(mode for mode in modes if mode in a.name)
    knobs: dict[str, Any] = {"mode": mode.replace("_", "-")}
    if "linear" in mode or "cubic" in mode:
        knobs |= {"align_corners": a.get("align_corners", False), "antialias": a.name.endswith("_aa")}
    factors: Any = a.get("scale_factors")
    if factors is None and a.get("output_size") is None:
        factors = [a[key] for key in ("scales_d", "scales_h", "scales_w", "scales") if a.get(key) is not None]
    if a.get("output_size") is not None:
        knobs["size"] = list(a["output_size"])
    else:
        knobs["scale_factor"] = list(factors)
    return b.call(functional.interpolate, a.get("self", a.get("input")), **knobs)


@row("reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d", "replication_pad2d",
     "replication_pad3d")  # fmt: skip
def _pad(b: Building, a: Arguments) -> Any:
    mode = "reflect" if a.name.startswith("reflection") else "replicate"
    return b.call(functional.pad, a["self"], list(a["padding"]), mode=mode)


@row("pad", "constant_pad_nd")
def _constant_pad(b: Building, a: Arguments) -> Any:
    return b.call(functional.pad, a["self"], list(a["pad"]), mode=a.get("mode", "constant"), value=a.get("value"))


@row("max_pool2d_with_indices", "max_pool3d_with_indices")
def _max_pool(b: Building, a: Arguments) -> Any:
    function = functional.max_pool2d if len(a["kernel_size"]) == 2 else functional.max_pool3d
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    knobs = {name: a[name] for name in names if name in a and a[name] != []}
    return b.call(function, a["self"], **knobs), None


@row("gelu", "glu", "leaky_relu", "elu", "hardtanh", "softplus", "celu", "threshold", "normalize", "one_hot")
def _activation(b: Building, a: Arguments) -> Any:
    x, *others = a.values()
    names = {"glu": ["dim"], "leaky_relu": ["negative_slope"], "elu": ["alpha"], "hardtanh": ["min_val", "max_val"],
             "softplus": ["beta", "threshold"], "celu": ["alpha"], "threshold": ["threshold", "value"],
             "gelu": ["approximate"], "one_hot": ["num_classes"]}.get(a.name, [])  # fmt: skip
    return b.call(getattr(functional, a.name), x, **dict(zip(names, others, strict=False)))


@row("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_efficient_attention")
def _attention(b: Building, a: Arguments) -> Any:
    return (
        b.call(
            functional.scaled_dot_product_attention, a["query"], a["key"], a["value"],
            attn_mask=a.get("attn_mask", a.get("attn_bias")), is_causal=a.get("is_causal", False), scale=a.get("scale"),
        ),
        None,
    )  # fmt: skip
