"""Which operation made a network's outputs, such as a softmax, and along which dimension it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from nni_topo.network.channels.rules import moves_entries
from nni_topo.network.layers.kinds import is_scripted
from nni_topo.network.runtime.hooks import watched

_BY_AXIS = ("softmax", "log_softmax", "normalize")
_BY_ENTRY = {"sigmoid": "sigmoid", "expit": "sigmoid", "tanh": "tanh"}
_LINEAR = ("linear", "addmm", "matmul", "mm", "bmm")
_CONVOLUTIONS = tuple(f"conv{kind}{dims}d" for kind in ("", "_transpose") for dims in (1, 2, 3))
# Operations after which the entries are still what they were, such as probabilities of the same classes.
_KEEPING = (
    "to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "dropout", "alias", "clamp", "clip",
    "clamp_min", "clamp_max", "contiguous", "clone", "detach", "data", "nan_to_num",
)  # fmt: skip
_RESIZING = ("interpolate", "upsample")  # entries between others; along classes they change nothing
_SCORING = ("linear", "convolution")
_SHIFTING = ("add", "sub", "mul", "div", "truediv", "iadd", "imul", "radd", "rmul")  # scores by a number or parameter
_LOGARITHMS = {"log": ("softmax", "log_softmax"), "exp": ("log_softmax", "softmax")}


@dataclass(frozen=True)
class Origin:
    """The operation that made a tensor, apart from later ones that move entries or leave them what they are."""

    operation: str  # softmax, log_softmax, normalize, sigmoid, tanh, linear or convolution
    module: str  # whose forward ran it; empty: the network's own
    # Makes a tensor of the same shape with the number of each entry along the operation's dimension.
    marks: Callable[[], Tensor]

    @property
    def axes(self) -> tuple[int, ...]:
        """Dimensions along which the operation works, counted from the last one; not that of the samples."""
        marks = self.marks()
        return tuple(axis for axis in range(1 - marks.dim(), 0) if bool((marks != marks.narrow(axis, 0, 1)).any()))

    @property
    def axis(self) -> int | None:
        """The only such dimension; None if there is none or more than one."""
        axes = self.axes
        return axes[0] if len(axes) == 1 else None

    def __str__(self) -> str:
        where = f" in `{self.module}`" if self.module else ""
        if self.operation in _SCORING and self.module:
            return f"last layer `{self.module}`"
        return f"{self.operation}{where}"


@contextmanager
def operations_noted(model: nn.Module) -> Iterator[MutableMapping[Tensor, Origin]]:
    """Note within the block which operation made each tensor; a result of other operations isn't in the mapping."""
    noting = _Noting()
    entering, leaving = [], []
    for name, module in model.named_modules():
        if not is_scripted(module):
            entering.append((module, lambda _, name=name: noting.open.append(name)))
            leaving.append((module, lambda *_: noting.close()))
    with ExitStack() as stack:
        stack.enter_context(watched(entering, leaving))
        stack.enter_context(noting)
        yield noting.origins


class _Noting(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.origins: MutableMapping[Tensor, Origin] = WeakTensorKeyDictionary()
        self.open: list[str] = []  # names of the modules whose forward runs

    def close(self) -> None:
        self.open.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        results = [output] if isinstance(output, Tensor) else output
        if isinstance(results, (list, tuple)) and results and all(isinstance(tensor, Tensor) for tensor in results):
            name = getattr(func, "__name__", "").split(".")[0]
            if name == "__get__":
                name = getattr(func.__self__, "__name__", "")
            self._note(name.strip("_").removeprefix("special_"), func, args, kwargs, results)
        return output

    def _note(
        self, name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]
    ) -> None:
        first = args[0] if args else kwargs.get("input")
        before = self.origins.get(first) if isinstance(first, Tensor) else None
        place = self.open[-1] if self.open else ""
        for index, output in enumerate(results):
            origin: Origin | None = None
            is_alike = isinstance(first, Tensor) and output.shape == first.shape
            if name in _BY_AXIS:
                default, position = (1, 2) if name == "normalize" else (None, 1)
                axis = kwargs.get("dim", args[position] if len(args) > position else default)
                if isinstance(axis, int):
                    origin = Origin(name, place, partial(_marks, output.shape, axis))
            elif name in _BY_ENTRY:
                origin = Origin(_BY_ENTRY[name], place, partial(_marks, output.shape, None))
            elif name in _LINEAR:
                origin = Origin("linear", place, partial(_marks, output.shape, -1))
            elif name in _CONVOLUTIONS:
                axis = -1 - int(name[-2])
                origin = Origin("convolution", place, partial(_marks, output.shape, axis))
            elif before is not None and is_alike and name in _KEEPING:
                origin = before
            elif before is not None and name in _LOGARITHMS and before.operation == _LOGARITHMS[name][0]:
                origin = replace(before, operation=_LOGARITHMS[name][1])
            elif before is not None and is_alike and name in _SHIFTING and before.operation in _SCORING:
                operands = [operand for operand in args[1:] if isinstance(operand, Tensor)]
                if all(isinstance(operand, nn.Parameter) or not operand.dim() for operand in operands):
                    origin = before
            elif moves_entries(name) or name in _RESIZING:
                origin = self._origin_after_move(func, args, kwargs, index)
            if origin is None:
                self.origins.pop(output, None)  # changed in place
            else:
                self.origins[output] = origin

    def _origin_after_move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], index: int) -> Origin | None:
        """Return the origin of a result of an operation that moves entries of tensors of one origin."""
        floats: list[Tensor] = []
        tree_map_only(
            Tensor, lambda tensor: floats.append(tensor) if tensor.is_floating_point() else None, (args, kwargs)
        )
        origins = [self.origins.get(tensor) for tensor in floats]
        first = origins[0] if origins else None
        if first is None or any(origin is None or origin.operation != first.operation for origin in origins):
            return None
        # The tensors themselves aren't held.
        origin_by_id = {id(tensor): origin for tensor, origin in zip(floats, origins, strict=True)}
        template = tree_map_only(Tensor, lambda tensor: origin_by_id.get(id(tensor), tensor), (args, kwargs))

        def marks() -> Tensor:
            marked_args, marked_kwargs = tree_map_only(Origin, lambda origin: origin.marks(), template)
            output = func(*marked_args, **marked_kwargs)
            return output if isinstance(output, Tensor) else output[index]

        return replace(first, marks=marks)


def _marks(shape: Sequence[int], axis: int | None) -> Tensor:
    """Return the number of each entry along a dimension; zeros without one."""
    if axis is None:
        return torch.zeros((), device="cpu").expand(*shape)
    dims = [1] * len(shape)
    dims[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=torch.float32, device="cpu").reshape(dims).expand(*shape)
