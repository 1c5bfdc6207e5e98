"""The comparison of a dense model with the masked one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from nni_topo.errors import SpeedupError
from nni_topo.speedup.inputs import Call, cast_floats, random_like, tensors_of

Kept = dict[str, list[torch.Tensor]]
Place = tuple[str | None, str]


def check_equal(
    reference: torch.nn.Module,
    dense: torch.nn.Module,
    call: Call,
    kept: Kept,
    rtol: float,
    *,
    advise: Callable[[str | None], str] | None = None,
) -> None:
    """Raise unless two models give the same outputs on random inputs, in evaluation mode.

    Parameters
    ----------
    reference : torch.nn.Module
        The masked model.
    dense : torch.nn.Module
        The dense model. Both are copied, not changed.
    call : tuple of (tuple, dict)
        Inputs whose shapes and types the random ones have.
    kept : dict of str to list of Tensor
        For each module, the indices kept of each dimension of its output.
    rtol : float
        The largest difference allowed, relative to the reference's largest absolute output.
    advise : callable or None, default=None
        Says what to do about a difference, given the first module that differs, None behind the last one.

    Raises
    ------
    SpeedupError
        With the measured difference and the first layer that differs.

    Notes
    -----
    Computed in double precision, where two models that are equal differ by 1e-12 and less however deep
    they are; in the model's own precision if it can't run in double.
    """
    drawn = random_like(call, torch.Generator().manual_seed(1))
    pair = (reference, dense)
    try:
        expected, actual, place = _run(pair, cast_floats(drawn, torch.float64), kept, rtol, double=True)
    except (RuntimeError, TypeError):
        try:
            expected, actual, place = _run(pair, drawn, kept, rtol, double=False)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise SpeedupError(
                "a dense model must run on inputs of the example's shape: a fixed size in its forward may not "
                f"fit the pruned channels, got {type(error).__name__}: {error}"
            ) from error
    _compare(expected, actual, place, rtol, advise)


def _run(
    pair: tuple[torch.nn.Module, torch.nn.Module], call: Call, kept: Kept, rtol: float, *, double: bool
) -> tuple[list[torch.Tensor], list[torch.Tensor], Place]:
    """Run copies of both models; also name the first module whose outputs differ."""
    records: list[dict[str, torch.Tensor]] = [{}, {}]
    outputs = []
    with torch.no_grad():
        for model, record in zip(pair, records, strict=True):
            runner = copy.deepcopy(model).eval()
            runner = runner.double() if double else runner
            for name in kept:
                runner.get_submodule(name).register_forward_hook(_recorder(name, record))
            outputs.append(tensors_of(runner(*call[0], **call[1])))
    return outputs[0], outputs[1], _first_difference(records[0], records[1], kept, rtol)


def _recorder(name: str, record: dict[str, torch.Tensor]) -> Callable[[Any, Any, Any], None]:
    """Make a hook that records the output of a module's first call."""

    def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and name not in record:
            record[name] = output.detach().clone()

    return hook


def _first_difference(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], kept: Kept, rtol: float
) -> Place:
    for name, full in expected.items():
        for d, indices in enumerate(kept[name][1:], start=1):
            if len(indices) < full.shape[d]:
                full = full.index_select(d, indices.to(full.device))
        small = actual.get(name)
        if small is None or small.shape != full.shape:
            return name, f"from {name} on, whose output has another shape than expected"
        if _difference(full, small) > rtol:
            return name, f"from {name} on"
    return None, "behind the last layer"


def _difference(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Measure the largest difference relative to the largest absolute value; NaN against a number is infinite."""
    if expected.numel() == 0:
        return 0.0
    expected, actual = expected.double(), actual.double()
    alike = (expected == actual) | (expected.isnan() & actual.isnan())
    gaps = (expected - actual).abs().nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(alike, 0)
    scale = float(expected[expected.isfinite()].abs().amax()) if bool(expected.isfinite().any()) else 0.0
    largest = float(gaps.max())
    return largest / scale if scale else largest


def _compare(
    expected: list[torch.Tensor],
    actual: list[torch.Tensor],
    place: Place,
    rtol: float,
    advise: Callable[[str | None], str] | None,
) -> None:
    name, where = place
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (expected, actual)]
    if shapes[0] != shapes[1]:
        raise SpeedupError(
            "the shape of the model's output must not change: exclude the layer that gives it from the "
            f"config_list (exclude_op_names), got {shapes[1]} instead of {shapes[0]} ({where})"
        )
    worst = max((_difference(a, b) for a, b in zip(expected, actual, strict=True)), default=0.0)
    if not worst <= rtol:
        raise SpeedupError(
            f"a dense model must compute what the masked one does to {rtol:g} of its largest output, "
            f"got a difference of {worst:.3g} ({where})" + (f"; {advise(name)}" if advise else "")
        )
