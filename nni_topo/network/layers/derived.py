"""Layers with a forward of their own: find the convolution, or the linear product, that they compute.

A class derived from one of PyTorch's layers may pad its input differently, compute its weight from another tensor, or
add a norm or an activation. Then inherited attributes, such as ``padding``, may not hold. So the layer is run, up to
its call of PyTorch's function.

Some layers compute their weight, as weight standardization does. Such a weight depends on all inputs of the layer. It
must stay the same when some are pruned, so it is computed once and becomes the layer's own. A plain layer is also
faster, and known to other tools.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from nni_topo.errors import ConfigError
from nni_topo.maths.topology.layer_graphs import LayerGraph, convolution_graph
from nni_topo.network.runtime.comparison import SAME_LAYER, agree
from nni_topo.network.runtime.copies import detached_copy, evaluating, evaluation_mode
from nni_topo.network.runtime.modules import put_attribute
from nni_topo.network.runtime.switches import as_written

_CONVOLVED = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SPREAD = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_FUNCTIONS: dict[Any, tuple[type[nn.Module], tuple[str, ...]]] = {
    functional.conv1d: (nn.Conv1d, _CONVOLVED),
    functional.conv2d: (nn.Conv2d, _CONVOLVED),
    functional.conv3d: (nn.Conv3d, _CONVOLVED),
    functional.conv_transpose1d: (nn.ConvTranspose1d, _SPREAD),
    functional.conv_transpose2d: (nn.ConvTranspose2d, _SPREAD),
    functional.conv_transpose3d: (nn.ConvTranspose3d, _SPREAD),
    functional.linear: (nn.Linear, ("input", "weight", "bias")),
}
# The same as a linear layer if the last factor is a weight's transpose: `x @ self.weight.T`.
_PRODUCTS = (torch.matmul, torch.mm, torch.addmm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)
_KINDS = tuple(kind for kind, _ in _FUNCTIONS.values())
Size = tuple[int, ...]


def _several(value: Any, dims: int) -> tuple[int, ...]:
    """Return a setting as a tuple with a number for each axis."""
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if len(values) == 1:
        return values * dims
    return values


@dataclass(frozen=True)
class InnerCall:
    """A call of one of PyTorch's functions: its tensors and settings."""

    function: Any
    entering: Tensor
    weight: Tensor
    bias: Tensor | None
    stride: tuple[int, ...]  # a number for each axis; () for a linear layer
    padding: tuple[tuple[int, int], ...]  # before and after each axis, with zeros
    dilation: tuple[int, ...]
    groups: int
    arguments: dict[str, Any]  # all arguments by name

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel elements along each axis."""
        return tuple(self.weight.shape[2:])

    @property
    def padded(self) -> Tensor:
        """The padded input."""
        ends = [amount for pair in reversed(self.padding) for amount in pair]
        if any(ends):
            return functional.pad(self.entering, ends)
        return self.entering

    @property
    def padded_size(self) -> tuple[int, ...]:
        """Size of the padded input, in pixels."""
        size = self.entering.shape[self.entering.dim() - len(self.kernel) :]
        return tuple(length + sum(pair) for length, pair in zip(size, self.padding, strict=True))

    @property
    def output_size(self) -> tuple[int, ...]:
        """Size of a convolution's output, in pixels; () for a linear layer."""
        if not self.kernel:
            return ()
        arguments = dict(self.arguments)
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                arguments[name] = value.to("meta")
        return tuple(self.function(**arguments).shape[2:])

    @property
    def settings(self) -> dict[str, Any]:
        """The given settings, in the form of a PyTorch layer's attributes."""
        settings: dict[str, Any] = {}
        for name in ("stride", "padding", "dilation", "output_padding"):
            value = self.arguments.get(name)
            if value is not None:
                settings[name] = value if isinstance(value, str) else _several(value, len(self.kernel))
        if "padding" in settings:
            settings["_reversed_padding_repeated_twice"] = [
                amount for pair in reversed(self.padding) for amount in pair
            ]
        return settings

    def run(self) -> Tensor:
        """Call the function."""
        output: Tensor = self.function(**self.arguments)
        return output

    def windows(self) -> Tensor:
        """Return a view ``(n, channels, *output size, *kernel size)`` of a convolution's padded input."""
        windows = self.padded
        for dim, (kernel, stride, dilation) in enumerate(
            zip(self.kernel, self.stride, self.dilation, strict=True), start=2
        ):
            windows = windows.unfold(dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        return windows


class Within(TorchFunctionMode):
    """While a layer runs, pass its calls of convolutions and products to ``meet``, which returns their results."""

    def __init__(self, meet: Callable[[InnerCall], Any]) -> None:
        super().__init__()
        self._meet = meet

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass a call to ``meet``, or compute it."""
        if func in _FUNCTIONS:
            return self._meet(_call(func, args, kwargs or {}))
        if func in _PRODUCTS and (weight := _transposed(args[-1])) is not None:
            bias = args[0] if len(args) > 2 else None
            return self._meet(_call(functional.linear, (args[-2], weight, bias), {}))
        return func(*args, **(kwargs or {}))


def _transposed(factor: Any) -> Tensor | None:
    """Return the matrix whose transpose is the last factor of a product; None if there is none."""
    weight = getattr(factor, "_base", None)  # a parameter, or what NNI's wrapper has in its place
    if not isinstance(weight, Tensor) or weight.dim() != 2 or factor.dim() != 2:
        return None
    is_whole = factor.shape == weight.shape[::-1] and factor.data_ptr() == weight.data_ptr()
    if is_whole and factor.stride() == weight.stride()[::-1]:
        return weight
    return None


def is_inner(func: Any) -> bool:
    """Tell whether a function is a convolution or linear product of PyTorch's."""
    return func in _FUNCTIONS


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Return the class of PyTorch's weighted layers that a module has, or is derived from; None if neither."""
    return next((kind for kind in _KINDS if isinstance(module, kind)), None)


def has_own_forward(module: nn.Module) -> bool:
    """Tell whether a layer's class overrides the forward of the PyTorch class that it is derived from."""
    kind: Any = kind_of(module)
    if kind is None:
        return False
    return any(getattr(type(module), name, None) is not getattr(kind, name, None) for name in ("forward", *_INNER))


_INNER = ("_conv_forward",)  # what the forward of PyTorch's convolutions calls


def forward_of(module: nn.Module, *args: Any) -> Any:
    """Run the forward of a layer's class, even if NNI or a hook has replaced it in the layer."""
    forward: Any = type(module).forward
    return forward(module, *args)


def call_of(module: Any, entering: Tensor) -> InnerCall:
    """Return a layer's call of PyTorch's function on an input; raise a TypeError if it makes none."""
    try:
        with Within(_stop):
            forward_of(module, entering)
    except _Reached as reached:
        return reached.call
    raise TypeError(f"a layer must call a convolution or a product, got {type(module).__name__}")


class _Reached(BaseException):
    """Raised to leave a forward at its call; ``except Exception`` in a layer's code doesn't catch it."""

    def __init__(self, call: InnerCall) -> None:
        super().__init__()
        self.call = call


def _stop(call: InnerCall) -> Any:
    raise _Reached(call)


def _call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> InnerCall:
    kind, names = _FUNCTIONS[function]
    arguments = dict(zip(names, args, strict=False)) | kwargs
    weight = arguments["weight"]
    dims = len(weight.shape) - 2 if kind is not nn.Linear else 0

    def several(name: str, default: int) -> tuple[int, ...]:
        return _several(arguments.get(name, default), dims)

    dilation, padding = several("dilation", 1), arguments.get("padding", 0)
    if padding == "same":
        spare = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        # If the padding is odd, PyTorch puts the spare pixel at the end.
        pairs = tuple((total // 2, total - total // 2) for total in spare)
    else:
        if padding == "valid":
            padding = 0
        pairs = tuple((amount, amount) for amount in _several(padding, dims))
    return InnerCall(
        function=function,
        entering=arguments["input"],
        weight=weight,
        bias=arguments.get("bias"),
        stride=several("stride", 1),
        padding=pairs[:dims],
        dilation=dilation,
        groups=arguments.get("groups", 1),
        arguments=arguments,
    )


@dataclass(frozen=True)
class Inner:
    """The one call that a layer with a forward of its own makes; nothing after the call needs the input."""

    kind: type[nn.Module]  # PyTorch's layer that calls the same function
    groups: int
    reads_input: bool  # the call reads the layer's input unchanged; else the input is padded, for example
    is_bare: bool  # the layer returns the call's result; else it computes more with it
    is_own: bool  # weight and bias are the parameters themselves; else they are computed, without the input
    settings: dict[str, Any]  # stride, padding and dilation that a PyTorch layer would need
    weight: Tensor
    bias: Tensor | None


def inner_of(module: Any) -> Inner | None:
    """Run a layer with a forward of its own on trial inputs, and return its call; None if it doesn't work as follows.

    It makes one call, with a weight of its parameter's shape. Before the call it may transform its input without
    parameters. What it computes after the call depends only on the call's result.
    """
    if not has_own_forward(module) or not isinstance(getattr(module, "weight", None), Tensor):
        return None
    return _inner_on(module, trial_inputs(module))


def _inner_on(module: Any, inputs: list[Tensor]) -> Inner | None:
    """Run a layer on these trial inputs, and return its call."""
    tried: Any = evaluating(detached_copy(module, light=True))
    inners: list[Inner] = []
    with torch.no_grad():
        for x in inputs:
            try:
                inner = _tried(tried, x)
            except Exception:  # a forward may raise anything
                return None
            if inner is None or (inners and not _alike(inner, inners[0])):
                return None
            inners.append(inner)
    return inners[0]


def trial_inputs(module: Any) -> list[Tensor]:
    """Make trial inputs of several sizes, because with one size two kinds of padding may look the same."""
    if isinstance(module, nn.Linear):
        shapes = [(2, module.in_features), (3, module.in_features)]
    else:
        reach = [max(4, 2 * ((k - 1) * d + 1)) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        sizes = range(min(max(2, *module.stride), 4))
        shapes = [(2, module.in_channels, *(extent + more for extent in reach)) for more in sizes]
    return [_waves(shape, module.weight) for shape in shapes]


def _waves(shape: Size, like: Tensor) -> Tensor:
    """Make an input of a shape, with the type and the device of a tensor."""
    return torch.linspace(-9, 9, torch.Size(shape).numel()).sin().view(shape).to(like)


def _tried(module: Any, x: Tensor) -> Inner | None:
    calls: list[InnerCall] = []
    results: list[tuple[Tensor, Tensor]] = []
    early, x_before = set[str](), x.clone()

    def meet(call: InnerCall) -> Tensor:
        calls.append(call)
        output = call.run()
        results.append((output, output.clone()))
        return output

    def note(name: str) -> Callable[..., None]:
        return lambda *_: None if calls else early.add(name)

    with ExitStack() as hooks, Within(meet):
        for name, child in module.named_modules():
            if child is not module and (child._parameters or child._buffers):
                hooks.enter_context(child.register_forward_pre_hook(note(name)))
        out = forward_of(module, x)
    if len(calls) != 1 or early:
        return None
    call, (output, before) = calls[0], results[0]
    kind = _FUNCTIONS[call.function][0]
    if kind_of(module) not in (kind, None):
        return None
    dim = -1 if kind is nn.Linear else 1
    same_channels = call.entering.dim() == x.dim() and call.entering.shape[dim] == x.shape[dim]
    if not same_channels or len(call.entering) != len(x) or call.weight.shape != module.weight.shape:
        return None
    if call.groups != getattr(module, "groups", 1):
        return None
    is_bare = out is output and torch.equal(output, before)
    if not is_bare:
        # Operations after the call mustn't read the input again.
        with Within(lambda _: before.clone()):
            again = forward_of(module, 0.5 * x + 0.25)
        pairs = list(zip(tree_leaves(out), tree_leaves(again), strict=True))
        tensors = [pair for pair in pairs if isinstance(pair[0], Tensor)]
        if not tensors or not all(torch.equal(first, second) for first, second in tensors):
            return None
    is_own = call.weight is module.weight and call.bias is getattr(module, "bias", None)
    bias = None if call.bias is None else call.bias.detach()
    reads_input = torch.equal(call.entering, x_before)
    return Inner(kind, call.groups, reads_input, is_bare, is_own, call.settings, call.weight.detach(), bias)


def _alike(first: Inner, second: Inner) -> bool:
    """Tell whether two inputs show the same behaviour, with the same weight."""
    facts = [
        (inner.reads_input, inner.is_bare, inner.is_own, inner.settings, inner.bias is None)
        for inner in (first, second)
    ]
    if facts[0] != facts[1]:
        return False
    same_bias = first.bias is None or second.bias is None or torch.equal(first.bias, second.bias)
    return torch.equal(first.weight, second.weight) and same_bias


def weight_used(module: Any) -> Tensor:
    """Return the weight with which a layer convolves or multiplies: a parameter, or what its forward computes."""
    inner = inner_of(module)
    weight: Tensor = module.weight if inner is None or inner.is_own else inner.weight
    return weight


def is_followed(module: nn.Module) -> bool:
    """Tell whether a layer computes more after its convolution or product; a graph splits it, see `head`."""
    inner = inner_of(module)
    return inner is not None and inner.is_own and not inner.is_bare


class _UpToCall(nn.Module):
    """A layer that stops after its convolution or product."""

    def forward(self, *args: Any) -> Any:
        """Return the result of the convolution or product."""
        try:
            with Within(_stop):
                super().forward(*args)
        except _Reached as reached:
            return reached.call.run()
        raise TypeError(f"a layer must call a convolution or a product, got {type(self).__name__}")


HEAD = "nni_topo_head"
"""Key in a node's meta: the node runs a layer only up to its convolution or product, see `head`."""


def with_heads(graph_module: GraphModule) -> GraphModule:
    """Replace layers of nodes with `HEAD` by their parts up to the call; return the graph module."""
    for node in graph_module.graph.nodes:
        if node.meta.get(HEAD):
            graph_module.set_submodule(str(node.target), head(graph_module.get_submodule(str(node.target))))
    return graph_module


_HEADS: dict[type[nn.Module], type[nn.Module]] = {}


def is_head(module: nn.Module) -> bool:
    """Tell whether a module is a layer that stops after its call."""
    return isinstance(module, _UpToCall)


def head(module: nn.Module) -> nn.Module:
    """Return a layer that stops after its call, with the same parameters and children; the graph holds the rest."""
    if is_head(module):
        return module
    kind = type(module)
    if kind not in _HEADS:
        _HEADS[kind] = type(kind.__name__, (_UpToCall, kind), {"__module__": kind.__module__})
    layer = nn.Module.__new__(_HEADS[kind])
    layer.__dict__ = dict(vars(module))
    return layer


LayerSizes = dict[str, list[tuple[Size, Size]]]
"""``{layer: input and output shapes, call by call}``, for all layers that are called."""


def spatial(module: Any, size: Size) -> Size:
    """Return the spatial size of a convolution's input or output."""
    return size[-len(module.kernel_size) :]


def call_at(module: Any, input_size: Size) -> InnerCall:
    """Return the call that a convolution, PyTorch's or derived, makes on an input of a size in pixels."""
    with torch.no_grad(), evaluation_mode(module):
        return call_of(module, module.weight.new_zeros(1, module.in_channels, *input_size))


def padded_size(module: Any, input_size: Size) -> Size:
    """Return the size of a convolution's input, in pixels, with all padding."""
    return call_at(module, input_size).padded_size


def check_covers_kernel(name: str, call: InnerCall) -> None:
    """Raise a ConfigError unless a convolution's input, padding included, is as large as its kernel."""
    reach = tuple(d * (k - 1) + 1 for d, k in zip(call.dilation, call.kernel, strict=True))
    if any(have < need for have, need in zip(call.padded_size, reach, strict=True)):
        kernel, size = ("x".join(map(str, lengths)) for lengths in (reach, call.padded_size))
        raise ConfigError(
            f"an input, padding included, must be at least as large as the kernel {kernel}, got {size} ({name})"
        )


def graph_of_convolution(module: Any, input_size: Size) -> LayerGraph:
    """Return the graph of a convolution's Toeplitz matrix; ``input_size`` is without padding."""
    call = call_at(module, input_size)
    return convolution_graph(
        tuple(call.weight.shape), call.padded_size, stride=call.stride, dilation=call.dilation, groups=call.groups
    )


class PaddedAlike(nn.Conv2d):
    """A convolution with TensorFlow's "SAME" padding: it depends on the input's size; an odd pixel is the last."""

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(batch, channels, height, width)``."""
        ends = list[int]()
        for size, kernel, stride, dilation in zip(
            x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], self.dilation[::-1], strict=True
        ):
            missing = max((math.ceil(size / stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
            ends += [missing // 2, missing - missing // 2]
        return super().forward(functional.pad(x, ends))


@torch.no_grad()
@as_written()
def fold(module: Any) -> bool:
    """Turn a layer that computes its weight into a plain one with that weight, in place; False for other layers."""
    if isinstance(module, PaddedAlike) or not has_own_forward(module):
        return False
    # NNI holds a wrapped layer's parameters, and a parametrized layer's are computed before the forward.
    if not isinstance(module._parameters.get("weight"), Tensor) or "_nni_wrapper" in module._modules:
        return False
    inner = inner_of(module)
    if inner is None or inner.is_own or not inner.is_bare or (inner.bias is None) != (module.bias is None):
        return False
    kind: Any = inner.kind
    settings = inner.settings | {"padding_mode": "zeros"}
    if kind is nn.Linear:
        settings = inner.settings
    if not inner.reads_input:
        kind = PaddedAlike
        if inner.kind is not nn.Conv2d:
            return False
        padded: Any = nn.Module.__new__(kind)
        padded.__dict__ = {**vars(module), **settings, "_buffers": {}}
        padded._parameters = {"weight": inner.weight, "bias": inner.bias}
        tried = evaluating(detached_copy(module, light=True))
        for x in trial_inputs(module):
            if not agree([forward_of(tried, x)], [padded.forward(x)], SAME_LAYER[inner.weight.dtype]):
                return False
    for table in (module._parameters, module._buffers):
        for name in table.keys() - {"weight", "bias"}:
            del table[name]
    module._modules.clear()
    put_attribute(module, "weight", nn.Parameter(inner.weight.clone(), requires_grad=module.weight.requires_grad))
    if inner.bias is not None:
        put_attribute(module, "bias", nn.Parameter(inner.bias.clone(), requires_grad=module.bias.requires_grad))
    vars(module).update(settings)
    put_attribute(module, "__class__", kind)
    return True


def plain_layer(module: Any) -> nn.Module | None:
    """Return the linear layer or convolution of PyTorch's that computes the same as a module of another class.

    It has the module's weight and bias, or those that the module computes without its input. None if the class is
    PyTorch's or derived from it, or computes more. The module is run to find out.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return None
    weight = module._parameters.get("weight")
    is_other = not type(module).__module__.startswith(("torch.", "nni_topo."))
    if not is_other or kind_of(module) is not None or not isinstance(weight, Tensor) or is_lazy(weight):
        return None
    if weight.dim() not in (2, 3, 4, 5) or not weight.is_floating_point():
        return None
    return _plain_layer_with(module, weight)


@torch.no_grad()
@as_written()
def _plain_layer_with(module: Any, weight: Tensor) -> nn.Module | None:
    """Run a module of another class with a weight, for `plain_layer`."""
    # Large enough for any usual dilation and stride, and of several sizes, which tell kinds of padding apart.
    groups = getattr(module, "groups", 1)
    channels = weight.shape[1]
    if isinstance(groups, int):
        channels *= groups
    sizes = [[max(16, 4 * kernel) + more for kernel in weight.shape[2:]] for more in range(4)]
    shapes = [(2 + more, channels, *size) for more, size in enumerate(sizes)]
    if weight.dim() == 2:
        shapes = [(2, channels), (3, channels), (2, 3, channels)]
    inner = _inner_on(module, [_waves(shape, weight) for shape in shapes])
    if inner is None or not (inner.is_bare and inner.reads_input):
        return None
    if inner.kind not in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d):
        return None
    names = {*module._parameters, *module._buffers, *module._modules}
    if inner.is_own and names - {"weight", "bias"}:  # other modules may read these
        return None
    kind: Any = inner.kind
    settings: dict[str, Any] = {"bias": inner.bias is not None, "device": "meta", "dtype": weight.dtype}
    if kind is not nn.Linear:
        inner_settings = {name: value for name, value in inner.settings.items() if not name.startswith("_")}
        settings |= {"kernel_size": tuple(weight.shape[2:]), "groups": inner.groups, **inner_settings}
    layer: Any = kind(channels, len(weight), **settings)
    layer.weight = weight if inner.is_own else nn.Parameter(inner.weight.clone(), weight.requires_grad)
    if inner.bias is not None:
        own_bias = module._parameters.get("bias")
        needs_grad = weight.requires_grad if own_bias is None else own_bias.requires_grad
        layer.bias = own_bias if inner.is_own else nn.Parameter(inner.bias.clone(), needs_grad)
    plain: nn.Module = layer
    return plain


def adopt(model: nn.Module) -> None:
    """Turn modules of a model that `plain_layer` knows into PyTorch's layers, in place; the model keeps its class."""
    for name, module in list(model.named_modules()):
        plain = plain_layer(module) if name else None
        if plain is None:
            continue
        for table in (module._parameters, module._buffers, module._modules):
            table.clear()
        vars(module).update({key: value for key, value in vars(plain).items() if key not in vars(nn.Module())})
        for key, parameter in plain._parameters.items():
            module.register_parameter(key, parameter)
        module.__class__ = type(plain)


def with_known_layers(model: nn.Module) -> nn.Module:
    """Return a model, or a light copy in which the modules that `plain_layer` knows are PyTorch's layers."""
    if all(not name or plain_layer(module) is None for name, module in model.named_modules()):
        return model
    copied: nn.Module = detached_copy(model, light=True)
    adopt(copied)
    return copied


def give_back_classes(model: nn.Module, changed: nn.Module) -> None:
    """Undo `with_known_layers` in a network made from its result: layers get back their classes in ``model``.

    Layers that compute their weight, or whose class needs the old size, stay PyTorch's.
    """
    for name, module in model.named_modules():
        plain = plain_layer(module) if name else None
        if plain is None or plain.weight is not module.weight:
            continue
        layer = changed.get_submodule(name)
        added = {key: vars(layer).pop(key) for key in vars(plain).keys() - vars(module).keys()}
        layer.__class__ = type(module)
        if plain_layer(layer) is None:
            layer.__class__ = type(plain)
            vars(layer).update(added)
