"""Whole blocks of a transformer taken out; what they did, as far as it is linear, goes into the layer before them.

A block adds to the stream that the blocks before it made, so that the model runs without it. The last linear layer that
writes into the stream before a gap is solved anew, such that the stream after the gap is the unpruned one: [1]_ does it
with a linear map of that layer's output, here all of its weights may change.

References
----------
.. [1] D. Shopkhoev et al., "ReplaceMe: network simplification via depth pruning and transformer block linearization",
   https://arxiv.org/abs/2505.02819
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, checked, unknown_name
from nni_topo.maths.least_squares.normal import NormalEquations, fit
from nni_topo.network.io import take_out, tell_depth
from nni_topo.network.runtime import (
    BATCHES,
    MODEL,
    Calibration,
    batches_of,
    calls,
    check_model,
    detached_copy,
    evaluation_mode,
    first_call,
    fitting,
    leaves_models_alone,
    left_alone,
    real_positions_of,
    tensors_of,
    watched,
)

_HELD_OUT = 5
_NEAR = 1e-3

_logger = logging.getLogger(__name__)


@checked(model=MODEL, calibration=BATCHES)
@leaves_models_alone
def remove_blocks(
    model: nn.Module,
    names: Sequence[str],
    calibration: Iterable[Any] | Evaluator,
    *,
    ridge: float | Literal["auto"] = "auto",
) -> nn.Module:
    """Take whole blocks out of a model, and let the layer before each gap make up for them, without labels.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model, not wrapped by NNI, whose blocks lie in an ``nn.ModuleList`` or ``nn.Sequential``. It isn't
        changed.
    names : sequence of str
        Names of the blocks, e.g. ``["model.layers.5", "model.layers.6"]``; at least one block of each list stays.
    calibration : iterable or nni.compression.utils.Evaluator
        Batches of inputs, as for :func:`nni_topo.compensate`; what a mask says is padding doesn't count.
    ridge : float or "auto", default="auto"
        As for :func:`nni_topo.compensate`.

    Returns
    -------
    torch.nn.Module
        A new model, in the modes of ``model``, without the blocks; those after them have lower numbers, and the
        ``config`` of a model of Transformers says how many there are.

    Raises
    ------
    ConfigError
        If a name is no block's, a block changes the shape of what enters it, or none would remain.
    DataError
        If there is no batch, a batch doesn't fit the model, or what it gives isn't finite.

    Notes
    -----
    Where a norm stands between that layer and the gap, as after the sums of BERT, or no block stands before it, blocks
    are taken out and nothing makes up for them; a warning says so.

    Memory is that of one layer's products, whatever the number of samples.
    """
    is_number = isinstance(ridge, (int, float)) and not isinstance(ridge, bool)
    if ridge != "auto" and not (is_number and 0.0 <= ridge < math.inf):
        raise ConfigError(f"ridge must be 'auto' or a finite number of at least 0, got {ridge!r} (ridge)")
    gaps = _gaps(model, names)
    check_model(model)
    batches = batches_of(calibration, model)
    _check_shapes(model, names, batches)
    result: nn.Module = detached_copy(model)
    removed: set[tuple[str, int]] = set()
    for parent, first, last in gaps:
        container: Any = result.get_submodule(parent)
        whole: Any = model.get_submodule(parent)
        at = first - sum(parent == other and number < first for other, number in removed)
        removed |= {(parent, number) for number in range(first, last + 1)}
        take_out(result, parent, at, last - first + 1)
        writer = _writer(result, container[at - 1], batches) if at else None
        if writer is None:
            _logger.warning("nothing makes up for the blocks %d to %d of %s: no sum before them", first, last, parent)
            continue
        found = _solved(model, whole[last], result, container[at - 1], writer, batches, ridge)
        with torch.no_grad():
            writer.weight += found.weights[0].T.to(writer.weight)
            if writer.bias is not None:
                writer.bias += found.shift[0].to(writer.bias)
    counts = {parent: len(model.get_submodule(parent)._modules) for parent, _, _ in gaps}
    numbers_kept = {}
    for name, count in counts.items():
        numbers_kept[name] = (count, [number for number in range(count) if (name, number) not in removed])
    tell_depth(result, numbers_kept)
    return result


def _gaps(model: nn.Module, names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return runs of neighbouring blocks: the name of their container, the first and the last number."""
    modules = dict(model.named_modules())
    if isinstance(names, str) or not len(names):
        raise ConfigError(f"names must be a sequence of at least one block's name, got {names!r} (names)")
    places: dict[str, set[int]] = {}
    for name in names:
        if name not in modules:
            raise unknown_name("a block", name, modules)
        parent, _, key = name.rpartition(".")
        if not isinstance(modules[parent], (nn.ModuleList, nn.Sequential)):
            kind = type(modules[parent]).__name__
            raise ConfigError(f"a block must lie in a ModuleList or Sequential, got one of {kind} ({name})")
        places.setdefault(parent, set()).add(list(modules[parent]._modules).index(key))
    gaps = []
    for parent, numbers in places.items():
        if len(numbers) == len(modules[parent]._modules):
            raise ConfigError(f"at least one block must stay, got all {len(numbers)} ({parent})")
        ordered = sorted(numbers)
        for _, run in itertools.groupby(enumerate(ordered), lambda pair: pair[1] - pair[0]):
            segment = [number for _, number in run]
            gaps.append((parent, segment[0], segment[-1]))
    return gaps


def _check_shapes(model: nn.Module, names: Sequence[str], batches: Calibration) -> None:
    args, kwargs = first_call(model, batches)
    shapes: dict[str, tuple[Any, Any]] = {}

    def look(name: str) -> Any:
        return lambda entering, output: shapes.update({name: (entering.shape, tensors_of(output)[0].shape)})

    looks = [(model.get_submodule(name), look(name)) for name in names]
    with left_alone(model), evaluation_mode(model), torch.no_grad(), watched(leaving=looks):
        model(*args, **kwargs)
    for name in names:
        before, after = shapes.get(name, (None, None))
        if before is None or before != after:
            raise ConfigError(f"a block must put out what enters it, changed, got shapes {before} and {after} ({name})")


def _writer(model: nn.Module, block: nn.Module, batches: Calibration) -> Any:
    """Return the last linear layer of a block if all that it puts out is added to what leaves the block, or None."""
    args, kwargs = first_call(model, batches)
    called: list[Any] = []
    outputs: list[Tensor] = []
    linear = [module for module in block.modules() if type(module) is nn.Linear]
    looks = [(module, lambda _, __, module=module: called.append(module)) for module in linear]
    with left_alone(model), evaluation_mode(model), torch.no_grad():
        with watched(leaving=[*looks, (block, lambda _, output: outputs.append(tensors_of(output)[0]))]):
            model(*args, **kwargs)
        width = outputs[0].shape[-1]
        if not called or called.count(called[-1]) > 1 or called[-1].out_features != width:
            return None
        added = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(outputs[0])
        more = [(called[-1], lambda _, output: output + added)]
        with watched(leaving=[*more, (block, lambda _, output: outputs.append(tensors_of(output)[0]))]):
            model(*args, **kwargs)
    return (
        called[-1]
        if torch.allclose(outputs[1] - outputs[0], added.expand_as(outputs[0]), atol=_NEAR, rtol=_NEAR)
        else None
    )


def _solved(
    model: nn.Module,
    wanted: nn.Module,
    result: nn.Module,
    block: nn.Module,
    writer: nn.Linear,
    batches: Calibration,
    ridge: float | Literal["auto"],
) -> Any:
    """Solve for what a layer lacks so that its block in `result` gives what `wanted` does in the unpruned network."""
    seen: dict[str, Tensor] = {}
    looks = [
        (wanted, lambda _, output: seen.update(wanted=tensors_of(output)[0])),
        (block, lambda _, output: seen.update(reached=tensors_of(output)[0])),
    ]
    equations, samples = (NormalEquations(), NormalEquations()), 0
    is_held_out = batches.held_out(_HELD_OUT)
    with (
        left_alone(model, result),
        evaluation_mode(model, result),
        torch.no_grad(),
        watched([(writer, lambda entering: seen.update(entering=entering))], looks),
    ):
        for index, call in enumerate(calls(model, batches)):
            with fitting(index, batches.name):
                for net in (model, result):
                    net(*call[0], **call[1])
            held = is_held_out[samples : samples + len(seen["wanted"])]
            samples += len(held)
            marks = held.view(-1, *[1] * (seen["wanted"].dim() - 2)).expand(seen["wanted"].shape[:-1])
            real = real_positions_of(model, call)
            stays = torch.ones_like(marks) if real is None or real.shape != marks.shape else real.to(marks.device)
            for each, rows in zip(equations, (stays & ~marks, stays & marks), strict=True):
                if bool(rows.any()):
                    chosen = {key: value[rows.to(value.device)].double() for key, value in seen.items()}
                    lacking = chosen["wanted"] - chosen["reached"]
                    each.add(*(part.unsqueeze(0) for part in (chosen["entering"], lacking, chosen["wanted"])))
    if not all(each.is_finite() for each in equations):
        raise DataError("what blocks give must be finite, got NaN or infinity (calibration)")
    return fit(*equations, None if ridge == "auto" else float(ridge), intercept=writer.bias is not None).solution
