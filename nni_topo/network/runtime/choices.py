"""Choices by value, such as the boxes of a detector: two equal networks make the same ones, also among equal values.

Two networks that compute the same differ by rounding. Where values are equal but for rounding (the scores of boxes over
a plain background, the distances to two codes), one network may choose another place than the other, and from there on
their results have nothing in common. So the second network gets the first one's choices, as long as it chooses among
the same values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from nni_topo.network.runtime.comparison import agree
from nni_topo.network.runtime.inputs import tensors_of

_CHOOSING = frozenset(
    {
        *("aten.topk", "aten.sort", "aten.argmax", "aten.argmin", "aten.kthvalue", "torchvision.nms"),
        *("aten.max.dim", "aten.min.dim", "aten.median.dim"),
        *("aten.gt", "aten.ge", "aten.lt", "aten.le", "aten.round", "aten.floor", "aten.ceil", "aten.trunc"),
    }
)
# Far above the rounding of equal networks, far below what a missing channel changes.
_SAME_IN_DOUBLE, _SAME_IN_SINGLE = 1e-9, 1e-5


class Choice(NamedTuple):
    """An operation that chose by value, with copies of the tensors that it got and returned."""

    name: str
    entering: list[Tensor]
    output: Any


def _name_of(func: Any, args: tuple[Any, ...]) -> str:
    """Return the name of an operation that chooses by value, else an empty string."""
    packet, _, overload = str(func).rpartition(".")
    name = f"{packet}.{overload}" if overload == "dim" else packet
    is_chosen = name in _CHOOSING and any(tensor.is_floating_point() for tensor in tensors_of(args))
    if is_chosen:
        return name
    return ""


class ChoicesNoted(TorchDispatchMode):
    """Notes in ``choices`` what operations choose by value within the block."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.choices: list[Choice] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it chooses."""
        output = func(*args, **(kwargs or {}))
        name = _name_of(func, args)
        if name:
            entering = [tensor.clone() for tensor in tensors_of(args)]
            self.choices.append(Choice(name, entering, tree_map_only(Tensor, torch.clone, output)))
        return output


class ChoicesRepeated(TorchDispatchMode):
    """Repeats the choices of another network within the block, wherever the operation gets the same values.

    Parameters
    ----------
    choices : list of Choice
        What `ChoicesNoted` noted on the other network.
    """

    def __init__(self, choices: list[Choice]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._choices = iter(choices)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Return the other network's choice, or the operation's own."""
        name = _name_of(func, args)
        choice = next(self._choices, None) if name else None
        if choice is not None and choice.name == name:
            entering = tensors_of(args)
            is_double = all(tensor.dtype == torch.float64 for tensor in entering if tensor.is_floating_point())
            if agree(choice.entering, entering, _SAME_IN_DOUBLE if is_double else _SAME_IN_SINGLE):
                return tree_map_only(Tensor, torch.clone, choice.output)
        return func(*args, **(kwargs or {}))
