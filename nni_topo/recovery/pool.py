"""The inputs that distillation compares networks on: samples that form any batch, or batches that stay whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from nni_topo.context import advice
from nni_topo.errors import DataError, raised
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.fits import failure_on
from nni_topo.network.runtime.inputs import Call, batch_size, calls, lists_of_samples, take_samples
from nni_topo.network.runtime.memory import check_memory

_COPIES = 3
DIFFERENT_SHAPES = "the inputs of its batches differ in shape"


class Pool:
    """Numbered units of inputs: samples, or whole batches if the model doesn't run on other ones.

    ``calls`` are one call of all samples, or a list of calls that stay whole.
    """

    def __init__(self, calls: Call | list[Call]) -> None:
        self.are_whole = isinstance(calls, list)
        self._calls = calls if isinstance(calls, list) else [calls]
        self._sizes = torch.tensor([batch_size(call) for call in self._calls])
        self.count = len(self._calls) if self.are_whole else int(self._sizes)

    def samples(self, index: Tensor) -> int:
        """Return the number of samples of some units."""
        return int(self._sizes[index].sum()) if self.are_whole else len(index)

    def of(self, index: Tensor) -> Call:
        """Return the call for some units; of whole batches for one alone."""
        return self._calls[int(index)] if self.are_whole else take_samples(self._calls[0], index)

    def few(self, samples: int) -> Call:
        """Return a call for the first samples, or for the first whole batch."""
        return self.of(torch.arange(1 if self.are_whole else min(samples, self.count)))

    def together(self, index: Tensor, most: int) -> tuple[Tensor, ...]:
        """Split units into those that run together: at most so many samples, or one whole batch."""
        parts: tuple[Tensor, ...] = index.split(1 if self.are_whole else most) if len(index) else ()
        return parts

    def first(self, index: Tensor, most: int) -> Tensor:
        """Return the first units, of at most so many samples, and at least one."""
        if not self.are_whole:
            return index[:most]
        return index[: max(1, int((self._sizes[index].cumsum(0) <= most).sum()))]

    def spread(self, index: Tensor, most: int) -> Tensor:
        """Return evenly spaced units, of about at most so many samples."""
        return index[:: max(1, -(-self.samples(index) // most))]


def without_distillation() -> str:
    """Return how distillation is left out, for messages."""
    return advice("distill=False", "--no-distill")


def have_one_shape(parts: Iterable[Call]) -> bool:
    """Return whether the inputs of all calls fit together, sample by sample; DataError for lists of samples."""
    first = None
    is_one = True
    for args, kwargs in parts:
        if lists_of_samples((*args, *kwargs.values())):
            raise DataError(
                "distillation must have samples along the first dimension of tensors, got a list, as detectors take "
                f"it: {without_distillation()} recovers without it (images)"
            )
        leaves, spec = tree_flatten((args, kwargs))
        # Numbers, such as a batch's greatest length, are the same in all batches that are joined.
        shapes = (
            spec,
            [
                (tuple(leaf.shape[1:]) if leaf.dim() else leaf.item()) if isinstance(leaf, Tensor) else leaf
                for leaf in leaves
                if isinstance(leaf, (Tensor, int, float, str))
            ],
        )
        first = first or shapes
        is_one = is_one and shapes == first
    return is_one


def join_calls(parts: Sequence[Call]) -> Call:
    """Concatenate calls into one, whose inputs fit together."""
    flat = [tree_flatten(part) for part in parts]
    leaves = []
    for column in zip(*(values for values, _ in flat), strict=True):
        has_samples = any(isinstance(leaf, Tensor) and leaf.dim() for leaf in column)
        size = sum(leaf.nbytes for leaf in column if isinstance(leaf, Tensor))
        check_memory(_COPIES * size, "images and a view of them", "fewer images take less", "images")
        leaves.append(torch.cat(column) if has_samples else column[0])
    call: Call = tree_unflatten(leaves, flat[0][1])
    return call


def are_joinable(model: nn.Module, images: Calibration) -> bool:
    """Return whether samples of all batches can form new ones, by what is known of the batches."""
    return not images.is_whole and have_one_shape(calls(model, images))


def inputs_to_compare(nets: Mapping[str, nn.Module], images: Sequence[Calibration]) -> tuple[Call | list[Call], str]:
    """Return the inputs of all images as one call; where that can't be cut anew, as calls that stay whole, and why.

    ``nets``: the networks that must run on samples that form a new batch, by their names in messages.
    """
    parts = [call for part in images for call in calls(next(iter(nets.values())), part)]
    if not have_one_shape(parts):
        return parts, DIFFERENT_SHAPES
    if why := next((part.why_whole for part in images if part.why_whole), ""):
        return parts, why
    call = join_calls(parts)
    count = batch_size(call)
    for name, net in nets.items():
        # The first samples and the last ones: a batch may be sorted, with the longest sample in front.
        numbers = torch.arange(count)
        for index in (numbers[:1], numbers[:2], numbers[-2:], numbers[-1:]):
            error = failure_on(net, take_samples(call, index))
            if error is not None:
                return parts, f"of {count} samples it got {len(index)} and raised {raised(error)} ({name})"
    return call, ""


def first_inputs(model: nn.Module, images: Calibration) -> tuple[Call | list[Call], str]:
    """Return what `inputs_to_compare` does, of the first batch alone; whether it is cut depends on all batches."""
    first = Calibration.of(images[:1], images.name)
    if images.is_whole:
        first = first.as_whole_batches(images.why_whole)
    inputs, why = inputs_to_compare({"model": model}, [first])
    if isinstance(inputs, tuple) and not have_one_shape(calls(model, images)):
        return [inputs], DIFFERENT_SHAPES
    return inputs, why
