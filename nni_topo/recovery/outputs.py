"""Which outputs of two networks distillation and reports compare, and how far apart they are.

They are a model's ``logits``, or else all floating tensors with an entry for each sample. With a user's ``outputs=``
they are taken from what that function returns. Padding doesn't count. Distillation can also compare the outputs of
blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nni_topo.errors import ConfigError, listed
from nni_topo.network.runtime.copies import evaluation_mode
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import (
    Call,
    batch_size,
    cast_floats,
    lists_of_samples,
    on_device,
    returned_by_name,
    returned_tensors,
    taken,
    tensors_of,
)
from nni_topo.network.runtime.modules import device_of

Outputs = Callable[[Any, Any], Any]
"""Takes a model's output and its inputs, as a batch holds them; returns the outputs to compare."""
Places = tuple[int, ...] | None
"""Indices of the floating tensors of an output that have an entry for each sample; None: all of that length."""

READ = 16
"""Number of samples by which the kind of a network's outputs is determined."""
_UNIT = 1e-3  # largest difference from 1 of an embedding's length or a sum of probabilities
_FEWEST_TAGGED = 8  # number of samples needed to distinguish tags from logits


def places_by_sample(model: nn.Module, call: Call, outputs: Outputs | None) -> Places:
    """Return which floating tensors of a model's output have an entry for each sample, by two runs on few samples.

    One run can't distinguish them from a tensor that happens to be as long, such as anchors of shape (1, n, 4) beside
    the output for one image.
    """
    count = min(READ, batch_size(call))
    if count < 2 or lists_of_samples((*call[0], *call[1].values())):
        return None  # lists of samples, as detectors take them, aren't split
    lengths = []
    for some in (count, count - 1):
        args, kwargs = taken(call, torch.arange(some))
        found = model(*args, **kwargs)
        if outputs is not None:
            found = outputs(found, as_in_batch((args, kwargs)))
        lengths.append([len(each) - some for each in _with_entries(found)])
    if len(lengths[0]) != len(lengths[1]):  # the number of tensors depends on the samples
        return None
    return tuple(place for place, both in enumerate(zip(*lengths, strict=True)) if not any(both))


def read_outputs(
    found: Any, call: Call, count: int, outputs: Outputs | None, places: Places = None
) -> tuple[list[Tensor], str]:
    """Return the outputs to compare for a call of ``count`` samples, and the objective that suits them.

    Tags have the shape of logits and get ``kl``, too: see `are_tags`.
    """
    what = "a model's output"
    if outputs is not None:
        found, what = outputs(found, as_in_batch(call)), "what outputs= returns"
    logits = found.get("logits") if isinstance(found, Mapping) else getattr(found, "logits", None)
    if isinstance(logits, Tensor):
        tensors, kind = [logits], "kl"
    else:
        entries = _with_entries(found)
        tensors = [
            each for place, each in enumerate(entries) if len(each) == count and (places is None or place in places)
        ]
        if not tensors:
            told = f"{in_words(found)} for {count} samples"
            if any(len(each) == count for each in entries):
                told += ", whose length doesn't depend on the number of samples"
            if isinstance(found, Tensor) and found.is_floating_point() and found.shape[1:2] == (count,):
                told += (
                    "; if the samples are its second dimension, outputs=lambda output, inputs: output.transpose(0, 1)"
                )
            raise ConfigError(f"{what} must hold a floating tensor with an entry per sample, got {told}")
        kind = "kl" if found is tensors[0] and found.dim() == 2 and found.shape[1] > 1 else "squares"
    # An output that is called logits is no embedding, even if its rows have length one.
    if (outputs is not None or logits is None) and all(map(_are_embeddings, tensors)):
        kind = "cosine"
    return tensors, kind


def entry_count(found: Any, call: Call, outputs: Outputs | None) -> int:
    """Return the number of samples of a whole batch: the length of its inputs, or else that of all outputs.

    The outputs for a batch of graphs have an entry for each graph, its inputs one for each node.
    """
    lengths = {len(tensor) for tensor in _with_entries(found if outputs is None else outputs(found, as_in_batch(call)))}
    count = batch_size(call)
    return count if count in lengths or len(lengths) != 1 else lengths.pop()


def _are_embeddings(rows: Tensor) -> bool:
    """Say whether an output holds vectors of length one, (samples, numbers), other than one-hot probabilities."""
    if rows.dim() != 2 or rows.shape[1] < 2:
        return False
    rows = rows.detach().float()  # in half precision the length of long vectors is too inexact
    are_shares = bool((rows >= 0.0).all()) and bool(((rows.sum(1) - 1.0).abs() <= _UNIT).all())
    return not are_shares and bool(((rows.norm(dim=1) - 1.0).abs() <= _UNIT).all())


def as_in_batch(call: Call) -> Any:
    """Return a call's inputs as a batch holds them: a tensor; for several arguments their tuple or dict."""
    args, kwargs = call
    return kwargs or (args[0] if len(args) == 1 else args)


def are_tags(outputs: Iterable[Tensor]) -> bool:
    """Say whether rows of numbers are probabilities that don't exclude each other, such as sigmoids of several tags.

    ``outputs``: the outputs for several batches, each (samples, numbers); other shapes are no tags. Pass all samples,
    because a few logits may lie in [0, 1] by chance, and zeros alone decide nothing.
    """
    samples, is_between, is_apart = 0, False, False
    for rows in outputs:
        if rows.dim() != 2 or not bool(((rows >= 0.0) & (rows <= 1.0)).all()):
            return False
        samples += len(rows)
        is_between |= bool(((rows > 0.0) & (rows < 1.0)).any())
        is_apart |= bool(((rows.sum(1) - 1.0).abs() > _UNIT).any())
    return samples >= _FEWEST_TAGGED and is_between and is_apart


def _with_entries(found: Any) -> list[Tensor]:
    """Return the floating tensors of a model's output that have a first dimension."""
    return [each for each in returned_tensors(found) if each.is_floating_point() and each.dim()]


class ComparedOutputs(NamedTuple):
    """Names of a model's outputs that are compared with the unpruned network's, and the others; ``str`` is a sentence.

    Both are empty with a user's ``outputs=``.
    """

    compared: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        verb = "is" if len(self.compared) == 1 else "are"
        return (
            f"of the model's outputs {listed(self.compared)} {verb} compared, but not {listed(self.left_out)}: "
            "outputs= chooses others, e.g. outputs=lambda output, inputs: tuple(output.values())"
        )


def compared_outputs(found: Any, read: Sequence[Tensor]) -> ComparedOutputs:
    """Return which tensors of a model's output are compared, given those that `read_outputs` returned."""
    chosen = {id(each) for each in read}
    compared: list[str] = []
    left_out: list[str] = []
    for name, tensor in returned_by_name(found):
        (compared if id(tensor) in chosen else left_out).append(name)
    return ComparedOutputs(tuple(compared), tuple(left_out))


def unpadded(outputs: list[Tensor], real: Tensor | None) -> list[Tensor]:
    """Return outputs by position without padding, ``(positions, ...)``, and other outputs unchanged."""
    if real is None:
        return outputs
    return [each[real.to(each.device)] if each.dim() > 2 and each.shape[:2] == real.shape else each for each in outputs]


def minus(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return `mine` minus `theirs`: zero where both are the same infinity, as masked scores are."""
    return torch.where(mine == theirs, 0.0, mine - theirs)


def finite(outputs: Tensor) -> Tensor:
    """Return outputs with zero in place of values that aren't finite, such as masked scores."""
    return outputs.nan_to_num(0.0, 0.0, 0.0)


def mean_distances(found: list[Tensor], wanted: list[Tensor], scales: list[float]) -> list[Tensor]:
    """Return the mean squared distance of each output, divided by its variance."""
    return [
        minus(mine, theirs).square().mean() / scale for mine, theirs, scale in zip(found, wanted, scales, strict=True)
    ]


def shared_blocks(
    unpruned: nn.Module, student: nn.Module, call: Call, place: tuple[torch.device, torch.dtype]
) -> list[str]:
    """Return the blocks whose last output has the same shape in both networks, in the order of their calls.

    A block is an entry of an ``nn.ModuleList`` or ``nn.Sequential`` that holds at least two layers with weights.
    """
    shapes: list[dict[str, Any]] = []
    for net in (unpruned, student):
        names = [
            f"{parent}.{key}".lstrip(".")
            for parent, module in net.named_modules()
            if isinstance(module, (nn.ModuleList, nn.Sequential))
            for key, child in module._modules.items()
            if child is not None and sum(bool(list(each.parameters(recurse=False))) for each in child.modules()) > 1
        ]
        args, kwargs = on_device(cast_floats(call, place[1]) if net is student else call, device_of(net))
        with evaluation_mode(net), torch.no_grad(), blocks_seen(net, names) as seen:
            net(*args, **kwargs)
        shapes.append({name: each.shape for name, each in seen.items()})
    return [name for name, shape in shapes[0].items() if shapes[1].get(name) == shape]


@contextmanager
def blocks_seen(net: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Collect by name the first floating tensor of each module's last output, with at least two dimensions."""
    seen: dict[str, Tensor] = {}

    def look(name: str, output: Any) -> None:
        tensors = [each for each in tensors_of(output) if each.is_floating_point() and each.dim() > 1]
        if tensors:
            seen[name] = tensors[0]

    looks = [(net.get_submodule(name), lambda _, output, name=name: look(name, output)) for name in names]
    with watched(leaving=looks):
        yield seen


def in_words(found: Any) -> str:
    """Return a value's type, and the shapes of its tensors, for an error."""
    shapes = [f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}" for each in tensors_of(found)]
    return f"{type(found).__name__} ({listed(shapes)})" if shapes else type(found).__name__
