"""Removal of whole blocks, and a new solution for a layer before each gap to make up for their linear part.

Blocks add to the residual stream, so the model runs without them. In the block before a gap, a linear layer or a
convolution whose output is added to the stream is solved anew, so that the stream after the gap is close to the
unpruned network's. [1]_ solves for a linear map of the layer's output; here all its weights may change. Where a ReLU
or a norm follows the sum, as in ResNet and BERT, its input is solved for, and the norm of the block before the gap
takes the parameters of the norm of the last removed block.

References
----------
.. [1] D. Shopkhoev et al., "ReplaceMe: network simplification via depth pruning and transformer block linearization",
   https://arxiv.org/abs/2505.02819
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, listed, unknown_name
from nni_topo.maths.least_squares.normal import NormalEquations, Solution, fit
from nni_topo.network.io.checkpoint import keep_blocks
from nni_topo.network.layers.kinds import CONVOLUTIONS, NORMS
from nni_topo.network.runtime.arguments import BATCHES, MODEL, check_model
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.comparison import SAME_CHANNELS, agree
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode, left_alone
from nni_topo.network.runtime.fits import first_call, structure_call
from nni_topo.network.runtime.hooks import batches_of, watched
from nni_topo.network.runtime.inputs import Call, batch_size, calls, fitting, real_positions_of, tensors_of
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.reports import hand_on_report, tell_solved_on
from nni_topo.network.runtime.switches import as_written
from nni_topo.recovery.frozen import FROZEN, frozen_layers, frozen_parameters
from nni_topo.recovery.samples import (
    HELD_OUT_ENTRIES,
    check_ridge,
    draw_positions,
    input_rows,
    output_rows,
    position_count,
    samples_to_solve_on,
)

_POSITIONS = 64  # positions of each image in a convolution's output; neighbouring ones are nearly equal
_ENDS = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LayerNorm, nn.RMSNorm)  # what may follow the sum at a block's end

_logger = logging.getLogger(__name__)


@public(model=MODEL, calibration=BATCHES)
def remove_blocks(
    model: nn.Module,
    names: Sequence[str],
    calibration: Iterable[Any] | Evaluator,
    *,
    ridge: float | Literal["auto"] = "auto",
) -> nn.Module:
    """Remove whole blocks from a model, and solve a layer before each gap to make up for them, without labels.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model, not wrapped by NNI, whose blocks lie in an ``nn.ModuleList`` or ``nn.Sequential``. It isn't
        changed.
    names : sequence of str
        Names of the blocks, e.g. ``["model.layers.5", "model.layers.6"]``; at least one block of each list stays.
    calibration : iterable or nni.compression.utils.Evaluator
        Batches of inputs, as for :func:`nni_topo.compensate`; places that a mask marks as padding don't count.
    ridge : float or "auto", default="auto"
        As for :func:`nni_topo.compensate`.

    Returns
    -------
    torch.nn.Module
        A new model without the blocks, with the training modes of ``model``; later blocks have lower numbers, and the
        ``config`` of a model of Transformers has the new number of blocks.

    Raises
    ------
    ConfigError
        If a name isn't a block's, a block's output has another shape than its input, or no block would remain.
    DataError
        If there is no batch, a batch doesn't fit the model, or activations are NaN or infinite.

    Notes
    -----
    If no block precedes the gap, or no layer of it has an output that is added to the stream, nothing makes up for the
    removed blocks; a warning says so. Parameters that don't require gradients aren't changed, unless the model has no
    parameter that requires them.

    Memory holds the products of one layer, whatever the number of samples. A convolution is sampled at 64 output
    positions of each image.
    """
    check_ridge(ridge)
    gaps = _gaps(model, names)
    check_model(model)
    batches = samples_to_solve_on(model, batches_of(calibration, model))
    call = first_call(model, batches)
    shapes: dict[nn.Module, tuple[Any, Any]] = {}

    def look(block: nn.Module) -> Any:
        return lambda entering, output: shapes.update({block: (entering.shape, tensors_of(output)[0].shape)})

    run_watched(model, call, leaving=[(block, look(block)) for block in map(model.get_submodule, names)])
    for name in names:
        before, after = shapes.get(model.get_submodule(name), (None, None))
        if before is None or before != after:
            raise ConfigError(
                f"a block to remove must have an output of its input's shape, got {before} and {after} ({name})"
            )
    shortened: nn.Module = detached_copy(model)
    removed: set[tuple[str, int]] = set()
    for parent, first, last in gaps:
        container: Any = shortened.get_submodule(parent)
        unpruned_container: Any = model.get_submodule(parent)
        at = first - sum(parent == container_name and number < first for container_name, number in removed)
        removed |= {(parent, number) for number in range(first, last + 1)}
        keep_blocks(shortened, parent, [*range(at), *range(at + last - first + 1, len(container))])
        call = structure_call(model, batches)
        gap = gap_after(shortened, container[at - 1], model, unpruned_container[last], call) if at else None
        if gap is None:
            why = "no sum before them"
            before = set(container[at - 1].modules()) if at else set()
            if frozen := [name for name in frozen_layers(shortened) if shortened.get_submodule(name) in before]:
                why += f" to which a layer adds that isn't {FROZEN}: {listed(frozen)}"
            _logger.warning("nothing makes up for the blocks %d to %d of %s: %s", first, last, parent, why)
            continue
        (solution,) = solutions((model, shortened), [gap], batches, ridge)
        gap.fill(solution)
    tell_solved_on(shortened, batches.digests)
    hand_on_report(model, shortened, f"blocks removed (nni_topo.remove_blocks): {listed(names, 8)}")
    return shortened


def _gaps(model: nn.Module, names: Sequence[str]) -> list[tuple[str, int, int]]:
    """Group neighbouring blocks: name of their container, first number, last number."""
    modules = dict(model.named_modules())
    if not len(names):
        raise ConfigError(f"names must be a sequence of at least one block's name, got {names!r} (names)")
    places: dict[str, set[int]] = {}
    for name in names:
        if name not in modules:
            raise unknown_name("a block", name, modules, "names")
        parent, _, key = name.rpartition(".")
        if not isinstance(modules[parent], (nn.ModuleList, nn.Sequential)):
            kind = type(modules[parent]).__name__
            raise ConfigError(f"a block must lie in a ModuleList or Sequential, got one of {kind} ({name})")
        places.setdefault(parent, set()).add(list(modules[parent]._modules).index(key))
    gaps: list[tuple[str, int, int]] = []
    for parent, numbers in places.items():
        if len(numbers) == len(modules[parent]._modules):
            raise ConfigError(f"at least one block must stay, got all {len(numbers)} ({parent})")
        for number in sorted(numbers):
            if gaps and gaps[-1][0] == parent and gaps[-1][2] == number - 1:
                gaps[-1] = (parent, gaps[-1][1], number)
            else:
                gaps.append((parent, number, number))
    return gaps


@dataclass(frozen=True)
class Stream:
    """A module whose input or output is the residual stream after a block."""

    block: nn.Module
    end: nn.Module | None  # the ReLU or norm after the sum, if its input is the stream; None: the block's output is

    def watch(self, look: Callable[[Tensor], Any]) -> tuple[list[Any], list[Any]]:
        """Return the arguments of `watched` that observe the stream."""
        # Copies, because the next operation may work in place.
        if self.end is None:
            return [], [(self.block, lambda _, output: look(tensors_of(output)[0].detach().clone()))]
        return [(self.end, lambda entering: look(entering.detach().clone()))], []


@dataclass(frozen=True)
class Writer:
    """A layer whose whole output is added to the residual stream."""

    layer: Any  # a linear layer or a convolution
    norm: Any  # the batch norm between the layer and the sum; None without one
    stream: Stream
    taker: Any = None  # the norm or the layer: its bias takes a constant; None: neither can

    def add(self, solution: Solution) -> None:
        """Add to the layer's output, by new parameters because other networks may share the old ones."""
        weight = self.layer.weight
        more = solution.weights[0].T.to(weight.device)
        shift = solution.shift[0].to(weight.device)
        scale = torch.ones_like(shift)
        if self.norm is not None:
            scale = (self.norm.running_var.double() + self.norm.eps).rsqrt()
            if self.norm.affine:
                scale = scale * self.norm.weight.double()
        # A channel with a norm factor of zero can't be changed.
        inverse = torch.where(scale == 0.0, 0.0, 1.0 / scale)
        with torch.no_grad():
            new = weight + (more * inverse.unsqueeze(1)).view_as(weight).to(weight)
            self.layer.weight = nn.Parameter(new, requires_grad=weight.requires_grad)
            if self.taker is not None:
                shift = shift * inverse if self.taker is self.layer else torch.where(scale == 0.0, 0.0, shift)
                old = self.taker.bias
                self.taker.bias = nn.Parameter(old + shift.to(old), requires_grad=old.requires_grad)


@dataclass(frozen=True)
class Gap:
    """A layer before a gap, and the streams that it should match."""

    writer: Writer
    target: Stream
    is_whole: bool  # whether it adds the whole target stream, or the difference to its own stream

    def fill(self, solution: Solution) -> None:
        """Add a solution to the writer, and copy the parameters of the target stream's norm."""
        self.writer.add(solution)
        end, target_end = self.writer.stream.end, self.target.end
        if end is not None and target_end is not None and not self.is_whole:
            for name, parameter in target_end.named_parameters(recurse=False):
                is_trained = getattr(end, name).requires_grad
                setattr(end, name, nn.Parameter(parameter.detach().clone(), requires_grad=is_trained))


def gap_after(
    shortened: nn.Module, block: nn.Module, model: nn.Module, target_block: nn.Module, call: Call
) -> Gap | None:
    """Return how a block of one model can replace another block of the unpruned model; None if it can't."""
    writer = find_writer(shortened, block, call)
    if writer is None:
        return None
    stream = Stream(target_block, _calls_in(model, target_block, call)[2])
    # A norm can get the parameters of the other block's norm, unless its own must stay; a ReLU has none.
    is_frozen = any(shortened.get_submodule(name) is writer.stream.end for name in frozen_layers(shortened))
    is_alike = type(stream.end) is type(writer.stream.end)
    return Gap(writer, stream, is_whole=False) if is_alike and not is_frozen else None


def _calls_in(
    model: nn.Module, block: nn.Module, call: Call
) -> tuple[list[tuple[nn.Module, Any, Any]], Tensor, nn.Module | None]:
    """Return the calls of a block's modules, the block's output, and the ReLU or norm that returns it."""
    module_calls: list[tuple[nn.Module, Any, Any]] = []  # keeps the tensors, so that no address is reused

    def look(module: nn.Module) -> Any:
        return lambda entering, output: module_calls.append((module, entering, output))

    run_watched(model, call, leaving=[(module, look(module)) for module in block.modules()])
    block_output = next(tensors_of(output)[0] for module, _, output in reversed(module_calls) if module is block)
    inner = [module_call for module_call in module_calls if module_call[0] is not block]
    ends = [module for module, _, output in inner if isinstance(module, _ENDS) and _is_same(output, block_output)]
    return inner, block_output, ends[-1] if ends else None


def _is_same(value: Any, other_value: Any) -> bool:
    """Return whether two values are tensors in the same memory."""
    are_tensors = isinstance(value, Tensor) and isinstance(other_value, Tensor)
    return are_tensors and value.data_ptr() == other_value.data_ptr() and value.shape == other_value.shape


def run_watched(model: nn.Module, call: Call, entering: Iterable[Any] = (), leaving: Iterable[Any] = ()) -> Any:
    """Run a model once in evaluation mode, with its layers' inputs and outputs observed."""
    # Fused code doesn't call hooks.
    with left_alone(model), evaluation_mode(model), torch.no_grad(), as_written(), watched(entering, leaving):
        return model(*call[0], **call[1])


def find_writer(model: nn.Module, block: nn.Module, call: Call) -> Writer | None:
    """Return a layer of a block that isn't frozen and whose whole output is added to the block's output, or None."""
    module_calls, block_output, end = _calls_in(model, block, call)
    frozen, names = frozen_parameters(model), {module: name for name, module in model.named_modules()}
    stream = Stream(block, end)
    called: list[Any] = [module for module, _, _ in module_calls if type(module) in (*CONVOLUTIONS, nn.Linear)]
    once = [layer for layer in reversed(called) if called.count(layer) == 1]
    for layer in sorted(once, key=lambda layer: -layer.weight[0].numel()):  # with most unknowns first
        if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
            continue
        if f"{names[layer]}.weight" in frozen:
            continue
        (layer_output,) = (output for module, _, output in module_calls if module is layer)
        norms: list[Any] = [
            module
            for module, entering, _ in module_calls
            if isinstance(module, NORMS) and _is_same(entering, layer_output)
        ]
        norm = next((module for module in norms if module.running_var is not None), None)
        takers = [module for module in (norm, layer) if module is not None and module.bias is not None]
        taker = next((module for module in takers if f"{names[module]}.bias" not in frozen), None)
        writer = Writer(layer, norm, stream, taker)
        width = len(layer.weight)
        added = torch.randn(width, generator=torch.Generator().manual_seed(0)).to(block_output)
        if not isinstance(layer, nn.Linear):
            added = added.view(-1, *[1] * len(layer.kernel_size))
        if block_output.dim() < added.dim() or block_output.shape[1 if added.dim() > 1 else -1] != width:
            continue
        changed = layer if norm is None else norm
        streams: list[Tensor] = []
        for more in ([], [(changed, lambda _, output, added=added: output + added)]):
            before, after = stream.watch(streams.append)
            first = len(streams)
            run_watched(model, call, before, [*more, *after])
            # A ReLU may be called several times; the last call ends the block.
            del streams[first:-1]
        unchanged, shifted = streams
        if agree([added.expand_as(unchanged)], [shifted - unchanged], SAME_CHANNELS):
            return writer
    return None


def solutions(
    nets: Sequence[nn.Module], gaps: Sequence[Gap], batches: Calibration, ridge: float | Literal["auto"]
) -> list[Solution]:
    """Solve for the writers of gaps, each by itself, in one pass over the batches.

    ``nets`` are the networks of the streams; the writers are in the last one.
    """
    tensors_by_gap: list[dict[str, Tensor]] = [{} for _ in gaps]
    before, after = list[Any](), list[Any]()
    for gap, gap_tensors in zip(gaps, tensors_by_gap, strict=True):
        before.append(
            (gap.writer.layer, lambda entering, gap_tensors=gap_tensors: gap_tensors.update(entering=entering))
        )
        for key, stream in (("wanted", gap.target), ("reached", None if gap.is_whole else gap.writer.stream)):
            if stream is not None:
                more = stream.watch(lambda value, key=key, gap_tensors=gap_tensors: gap_tensors.update({key: value}))  # type: ignore[misc]
                before += more[0]
                after += more[1]
    equations = [(NormalEquations(), NormalEquations()) for _ in gaps]
    samples = 0
    is_held_out = batches.held_out(HELD_OUT_ENTRIES)
    with left_alone(*nets), evaluation_mode(*nets), torch.no_grad(), as_written(), watched(before, after):
        for index, call in enumerate(calls(nets[0], batches)):
            with fitting(index, batches):
                for net in nets:
                    net(*call[0], **call[1])
            # Within a model, samples may be the second dimension; then positions are held out instead.
            size, entries = batch_size(call), len(tensors_by_gap[0]["wanted"])
            is_held = is_held_out[samples : samples + size]
            if entries != size:
                is_held = (torch.arange(entries) + 1) % HELD_OUT_ENTRIES == 0
            samples += size
            real = real_positions_of(nets[0], call)
            for gap, gap_tensors, parts in zip(gaps, tensors_by_gap, equations, strict=True):
                reached = gap_tensors.get("reached", torch.zeros_like(gap_tensors["wanted"])).double()
                lacking = gap_tensors["wanted"].double() - reached
                if isinstance(gap.writer.stream.end, nn.ReLU) and not gap.is_whole:
                    # Where the ReLU returns zero, any negative input is as good.
                    lacking = torch.where(gap_tensors["wanted"] > 0.0, lacking, -reached.clamp(min=0.0))
                values = gap_tensors["entering"], lacking, gap_tensors["wanted"]
                for sums, rows in zip(parts, (~is_held, is_held), strict=True):
                    chosen = _rows(gap.writer.layer, values, rows, real)
                    if chosen is not None:
                        sums.add(*chosen)
    gap_solutions = []
    for gap, parts in zip(gaps, equations, strict=True):
        if not all(sums.is_finite() for sums in parts):
            raise DataError("outputs of blocks must be finite, got NaN or infinity (calibration)")
        used = None if ridge == "auto" else float(ridge)
        gap_solutions.append(fit(*parts, used, intercept=gap.writer.taker is not None).solution)
    return gap_solutions


def _rows(
    layer: Any, values: tuple[Tensor, Tensor, Tensor], is_chosen: Tensor, real: Tensor | None
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return a layer's inputs, residuals and target outputs of some samples, (1, rows, ...); None without samples.

    ``is_chosen`` says which samples, bool (samples,); ``real`` which positions aren't padding, bool (samples, places).
    """
    entering, lacking, targets = values
    marks = is_chosen
    if isinstance(layer, nn.Linear):
        marks = is_chosen.view(-1, *[1] * (targets.dim() - 2)).expand(targets.shape[:-1])
        if real is not None and real.shape == marks.shape:
            marks = marks & real.to(marks.device)
    if not bool(marks.any()):
        return None
    marks = marks.to(targets.device)
    entering, lacking, targets = entering[marks], lacking[marks], targets[marks]
    if isinstance(layer, nn.Linear):
        return entering[None], lacking[None], targets[None]
    generator = torch.Generator().manual_seed(0)
    positions = draw_positions(position_count(layer, targets.shape), len(targets), _POSITIONS, generator)
    positions = positions.to(targets.device)
    columns = torch.arange(layer.in_channels, device=targets.device)[None]
    rows = torch.arange(layer.out_channels, device=targets.device)[None]
    return (
        input_rows(layer, entering, columns, positions, targets.shape),
        output_rows(layer, lacking, rows, positions),
        output_rows(layer, targets, rows, positions),
    )
