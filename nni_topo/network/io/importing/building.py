"""Build a `torch.fx.GraphModule` of PyTorch's layers and functions, operator by operator, while it runs on examples."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_aggregate

_EXAMPLES = "examples"


class Constant:
    """A tensor that doesn't depend on the inputs.

    Parameters
    ----------
    tensor : Tensor
        Its value.
    name : str
        Its name in the file, empty for one that was computed.
    trains : bool
        Whether it becomes a parameter, not a buffer.
    transposed : Constant, optional
        The matrix whose transpose it is, so that layers that share a matrix go on sharing it.
    """

    def __init__(self, tensor: Tensor, name: str = "", *, trains: bool = False, transposed: Any = None) -> None:
        self.tensor, self.name, self.transposed = tensor.detach(), name, transposed
        self.trains = trains and tensor.is_floating_point() and bool(tensor.isfinite().all())


class Building:
    """A graph under construction; each node holds its values on one call, or on two calls of different sizes."""

    def __init__(self, calls: int) -> None:
        self.calls = calls
        self.graph = Graph()
        self._root = nn.Module()
        self._tensors = dict[int, tuple[Constant, Tensor]]()  # with the constant, so that its id isn't used again
        self._paths = dict[int, str]()
        self._layers = dict[Any, str]()
        self._sizes = dict[tuple[Node, int], Node]()
        self._inputs = list[Node]()
        self.settings = set[Node]()  # inputs whose values chose a branch
        self.where = ""  # the operator that is converted, for names and messages

    def values(self, value: Any, call: int) -> Any:
        """Return what an argument is on one of the example calls."""

        def example(leaf: Any) -> Any:
            if isinstance(leaf, Node):
                return leaf.meta[_EXAMPLES][call]
            return leaf.tensor if isinstance(leaf, Constant) else leaf

        return map_aggregate(value, example)

    def shape(self, value: Any) -> tuple[int, ...]:
        """Return the shape of a tensor on the first call."""
        return tuple(self.values(value, 0).shape)

    def is_fixed(self, value: Any) -> bool:
        """Tell whether an argument's values are the same on all calls."""
        return all(self.values(value, 0) == self.values(value, call) for call in range(1, self.calls))

    def input(self, name: str, examples: Sequence[Tensor]) -> Node:
        """Add an input."""
        self._inputs.append(self._with_examples(self.graph.placeholder(name), list(examples)))
        return self._inputs[-1]

    def call(self, target: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
        """Add a call of a function, or of a tensor's method by its name; compute it at once if all is constant."""
        leaves: list[Any] = []
        map_aggregate((args, kwargs), lambda leaf: leaves.append(leaf))

        def run(call: int) -> Any:
            values, named = self.values(args, call), self.values(kwargs, call)
            with torch.no_grad():
                return (
                    getattr(values[0], target)(*values[1:], **named)
                    if isinstance(target, str)
                    else target(*values, **named)
                )

        if not any(isinstance(leaf, Node) for leaf in leaves):
            trains = any(isinstance(leaf, Constant) and leaf.trains for leaf in leaves)

            def constant(leaf: Any) -> Any:
                return Constant(leaf, trains=trains) if isinstance(leaf, Tensor) else leaf

            return map_aggregate(run(0), constant)
        examples = [run(call) for call in range(self.calls)]
        args, kwargs = map_aggregate((args, kwargs), self._graph_argument)
        if isinstance(target, str):
            return self._with_examples(self.graph.call_method(target, args, kwargs), examples)
        return self._with_examples(self.graph.call_function(target, args, kwargs), examples)

    @property
    def has_inputs(self) -> bool:
        """Whether the graph has an input."""
        return bool(self._inputs)

    def device(self) -> Node:
        """Return the device on which the network runs."""
        return self._with_examples(
            self.graph.call_function(getattr, (self._inputs[0], "device")), [torch.device("cpu")] * self.calls
        )

    def inputs_behind(self, value: Any) -> set[Node]:
        """Return the inputs on whose values a value depends, not on their sizes alone."""
        waiting, seen = [value], set[Any]()
        while waiting:
            node = waiting.pop()
            if isinstance(node, Node) and node not in seen and node not in self._sizes.values():
                seen.add(node)
                waiting += node.all_input_nodes if node.target is not getattr else []
        return seen & set(self._inputs)

    def depends_on_inputs(self, value: Any) -> bool:
        """Tell whether a value depends on the inputs' values, not on their sizes alone."""
        return bool(self.inputs_behind(value))

    def parts(self, value: Any) -> tuple[Any, ...]:
        """Return the parts of a tuple that a node returns."""
        if not isinstance(value, Node):
            return tuple(value)
        return tuple(self.call(operator.getitem, value, place) for place in range(len(self.values(value, 0))))

    def tensor(self, constant: Constant) -> Tensor:
        """Return the parameter or buffer of a constant."""
        if id(constant) not in self._tensors:
            held = constant.tensor.clone(memory_format=torch.contiguous_format)
            self._tensors[id(constant)] = constant, nn.Parameter(held) if constant.trains else held
        return self._tensors[id(constant)][1]

    def layer(self, kind: Callable[[], nn.Module], inputs: Sequence[Any], **tensors: Constant | None) -> Any:
        """Add a call of a layer, named after its first tensor in the file or after the operator.

        A second call with the same tensors is one of the same layer.
        """
        if not any(isinstance(each, Node) for each in inputs):
            raise ValueError("a layer must have an input that depends on the network's inputs")
        with torch.device("meta"):
            layer = kind().eval()
        key = (repr(layer), *(id(each) for each in tensors.values()))
        if key not in self._layers:
            for name, constant in tensors.items():
                if constant is None:
                    continue
                tensor = self.tensor(constant)
                if name in layer._parameters:
                    if not isinstance(tensor, nn.Parameter):
                        tensor = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
                        self._tensors[id(constant)] = constant, tensor
                    layer._parameters[name] = tensor
                else:
                    layer._buffers[name] = tensor.detach()
            for name, buffer in layer._buffers.items():  # such as the number of batches that a norm has seen
                if buffer is not None and buffer.is_meta:
                    layer._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)
            named = [each.name for each in tensors.values() if each is not None and "." in each.name]
            self._layers[key] = self._put(named[0].rpartition(".")[0] if named else self.where, layer)
        path = self._layers[key]
        module = self._root.get_submodule(path)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        return self._call_of_layer(path, inputs)

    def _call_of_layer(self, path: str, inputs: Sequence[Any]) -> Node:
        layer = self._root.get_submodule(path)
        with torch.no_grad():
            examples = [layer(*self.values(list(inputs), call)) for call in range(self.calls)]
        args = map_aggregate(tuple(inputs), self._graph_argument)
        return self._with_examples(self.graph.call_module(path, args), examples)

    def with_bias(self, node: Node, bias: Constant) -> Node | None:
        """Give the layer that a node calls a bias; None if the layer has one, or is called elsewhere."""
        path = str(node.target)
        if node.op != "call_module" or sum(other.target == node.target for other in self.graph.nodes) > 1:
            return None
        layer: Any = self._root.get_submodule(path)
        width = getattr(layer, "out_features", None)
        if width is None or layer.bias is not None or bias.tensor.numel() != width or bias.tensor.shape[-1] != width:
            return None
        flat = bias if bias.tensor.dim() == 1 else Constant(bias.tensor.reshape(-1), bias.name, trains=bias.trains)
        tensor = self.tensor(flat)
        layer.bias = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
        self._layers = {key: other for key, other in self._layers.items() if other != path}
        with torch.no_grad():
            node.meta[_EXAMPLES] = [layer(*self.values(node.args, call)) for call in range(self.calls)]
        return node

    def size(self, x: Any, axis: int) -> Any:
        """Return the size of an axis: a node, or a number for a constant."""
        if not isinstance(x, Node):
            return x.tensor.shape[axis]
        axis %= len(self.shape(x))
        if (x, axis) not in self._sizes:
            self._sizes[x, axis] = self.call("size", x, axis)
        return self._sizes[x, axis]

    def number(self, value: int) -> Any:
        """Return a number that an attribute of the network holds, so that it can change with a width."""
        name = self._name(f"{self.where.rpartition('.')[2]}_size")
        setattr(self._root, name, value)
        return self._with_examples(self.graph.get_attr(name), [value] * self.calls)

    def end(self, x: Any, axis: int, end: Any) -> Any:
        """Return an end of a slice: where it may count channels, a number that an attribute holds."""
        is_inside = type(end) is int and 1 < end < self.shape(x)[axis]
        widths = {self.values(x, call).shape[axis] for call in range(self.calls)}
        return self.number(end) if is_inside and len(widths) == 1 and isinstance(x, Node) else end

    def split(self, x: Any, sizes: Sequence[Any], axis: int) -> tuple[Any, ...]:
        """Split a tensor; into equal parts by their number, into others by numbers that attributes hold."""
        if all(type(size) is int for size in sizes) and len(set(sizes)) == 1:
            return self.parts(self.call(torch.chunk, x, len(sizes), axis))
        sizes = [self.number(size) if type(size) is int and size > 1 else size for size in sizes]
        return self.parts(self.call(torch.split, x, sizes, axis))

    def reshape(self, x: Any, sizes: Sequence[Any]) -> Any:
        """Reshape a tensor; sizes that are numbers in the file follow the tensor's, as the network's source has them.

        An axis that goes through takes the input's size, several that are joined give their product, and the parts of
        one that is split are numbers in attributes.
        """
        sizes = [self.size(x, place) if type(size) is int and size == 0 else size for place, size in enumerate(sizes)]
        if not isinstance(x, Node):
            return self.call(torch.reshape, x, sizes)
        source, target = self.shape(x), tuple(self.values(x, 0).reshape(self.values(sizes, 0)).shape)
        if 0 in source:
            return self.call("reshape", x, *sizes)
        joined = list[tuple[list[int], list[int]]]()  # axes with more than one entry, and the size that they become
        first = second = 0
        while first < len(source) or second < len(target):
            start, begin, left, right = first, second, 1, 1
            if first < len(source):
                left, first = source[first], first + 1
            if second < len(target):
                right, second = target[second], second + 1
            while left != right:
                if left < right:
                    left, first = left * source[first], first + 1
                else:
                    right, second = right * target[second], second + 1
            axes, places = range(start, first), [place for place in range(begin, second) if type(sizes[place]) is int]
            wide = [axis for axis in axes if source[axis] != 1]
            if second - begin > 1:
                # Beside a size that is computed from a width, numbers of parts are numbers.
                is_computed = any(isinstance(sizes[place], Node) for place in range(begin, second))
                for place in places:
                    if sizes[place] not in (1, -1) and not is_computed:
                        sizes[place] = self.number(sizes[place])
            elif places and (len(wide) == 1 or (len(axes) == 1 and start == begin == 0)):
                # An axis goes through; a batch of one in the file may be any batch.
                sizes[begin] = self.size(x, wide[0] if wide else 0)
            elif places and len(wide) > 1:
                joined.append((wide, places))
        for wide, (place,) in joined:
            if sizes[place] == -1 or all(type(size) is not int or size != -1 for size in sizes):
                sizes[place] = -1
                continue
            sizes[place] = self.size(x, wide[0])
            for axis in wide[1:]:
                sizes[place] = self.call(operator.mul, sizes[place], self.size(x, axis))
        return self.call("reshape", x, *sizes)

    def finish(self, outputs: Any) -> GraphModule:
        """Return the network."""
        self.graph.output(map_aggregate(outputs, self._graph_argument))
        self._compute_shuffled_sizes()
        self._join_slices()
        network = GraphModule(self._root, self.graph, "Imported")

        def stays(node: Node) -> bool:
            return node.op in ("placeholder", "output") or (node.op == "call_method" and str(node.target).endswith("_"))

        network.graph.eliminate_dead_code(stays)
        network.delete_all_unused_submodules()
        network.recompile()
        return network.eval()

    def _compute_shuffled_sizes(self) -> None:
        """Let channel shuffles compute the channels of a group from the tensor's width, as their source does.

        A shuffle splits an axis into groups and their channels, exchanges the two, and joins them.
        """
        for split in self.graph.nodes:
            chain = [split]
            while len(chain) < 3 and len(users := [user for user in chain[-1].users if user.target != "size"]) == 1:
                chain += users
            targets = [node.target for node in chain]
            if targets not in (["reshape", "transpose", "reshape"], ["reshape", "permute", "reshape"]):
                continue
            x, *sizes = split.args
            axes = list(range(len(sizes)))
            if targets[1] == "permute":
                axes = [axis % len(sizes) for axis in chain[1].args[1:]]
            else:
                first, second = (axis % len(sizes) for axis in chain[1].args[1:])
                axes[first], axes[second] = second, first
            exchanged = [place for place, axis in enumerate(axes) if place != axis]
            if self.shape(chain[2]) != self.shape(x) or exchanged != [exchanged[0], exchanged[0] + 1]:
                continue
            axis = exchanged[0]
            if any(getattr(sizes[place], "op", "") != "get_attr" for place in exchanged):
                continue
            sizes[axis] = self.values(sizes[axis], 0)
            with self.graph.inserting_before(split):
                width = self.graph.call_method("size", (x, axis))
                sizes[axis + 1] = self.graph.call_function(operator.floordiv, (width, sizes[axis]))
            split.args = (x, *sizes)

    def _join_slices(self) -> None:
        """Make slices that cut an axis into equal parts, at computed ends, one chunk, as their source has it."""
        for x in list(self.graph.nodes):
            slices: dict[int, list[tuple[int, Node]]] = {}
            for node in x.users:
                index = node.args[1] if node.target is operator.getitem and node.args[0] is x else None
                if isinstance(index, tuple) and all(each == slice(None) for each in index[:-1]):
                    end = index[-1]
                    if isinstance(end, slice) and end.step is None and isinstance(end.stop, Node):
                        start = 0 if end.start is None else self.values(end.start, 0)
                        slices.setdefault(len(index) - 1, []).append((start, node))
            for axis, parts in slices.items():
                parts.sort(key=operator.itemgetter(0))
                if all(self._are_chunks(x, axis, [node for _, node in parts], call) for call in range(self.calls)):
                    with self.graph.inserting_after(x):
                        chunk = self.graph.call_function(torch.chunk, (x, len(parts), axis))
                    with self.graph.inserting_after(chunk):
                        for place, (_, part) in enumerate(parts):
                            one = self.graph.call_function(operator.getitem, (chunk, place))
                            part.replace_all_uses_with(one)
                            self.graph.erase_node(part)

    def _are_chunks(self, x: Node, axis: int, parts: list[Node], call: int) -> bool:
        """Tell whether parts of a tensor are those of a chunk."""
        chunks = torch.chunk(self.values(x, call), len(parts), axis)
        return len(chunks) == len(parts) > 1 and all(
            torch.equal(chunk, self.values(part, call)) for chunk, part in zip(chunks, parts, strict=True)
        )

    def _with_examples(self, node: Node, examples: list[Any]) -> Node:
        node.meta[_EXAMPLES] = examples
        return node

    def _graph_argument(self, leaf: Any) -> Any:
        """Return an argument as the graph holds it: a constant is an attribute of the network."""
        if not isinstance(leaf, Constant):
            return leaf
        tensor = self.tensor(leaf)
        if id(tensor) not in self._paths:
            self._paths[id(tensor)] = self._put(leaf.name or f"{self.where}.constant", tensor)
        return self._with_examples(self.graph.get_attr(self._paths[id(tensor)]), [leaf.tensor] * self.calls)

    def _put(self, path: str, value: nn.Module | Tensor) -> str:
        """Store a layer, parameter or buffer under a name like the wanted one; return the name."""
        parts = [re.sub(r"\W", "_", part) for part in path.split(".") if part]
        if isinstance(value, Tensor) and parts and parts[-1][0].isdigit():
            parts[-1] = f"_{parts[-1]}"
        module = self._root
        for part in parts[:-1]:
            inner = module._modules.get(part)
            if part not in module._modules and not hasattr(module, part):
                inner = module._modules[part] = nn.Module()
            if inner is None:  # another value has the name of the folder
                parts = ["_".join(parts)]
                module = self._root
                break
            module = inner
        name, tries = parts[-1] if parts else "part", 1
        while hasattr(module, name):
            tries += 1
            name = f"{parts[-1]}_{tries}"
        if isinstance(value, nn.Module):
            module._modules[name] = value
        elif isinstance(value, nn.Parameter):
            module._parameters[name] = value
        else:
            module.register_buffer(name, value)
        return ".".join([*parts[:-1], name])

    def _name(self, wanted: str) -> str:
        plain = re.sub(r"\W", "_", wanted)
        name, tries = plain, 1
        while hasattr(self._root, name):
            tries += 1
            name = f"{plain}_{tries}"
        return name
