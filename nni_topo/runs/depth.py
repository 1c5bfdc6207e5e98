"""Blocks compete with channels for a budget: which blocks can be removed, in which order, and how many.

Blocks that add to a stream and keep its shape can be removed as a whole, and so can attention or the MLP of a
transformer's block. The layer before the gap makes up for them as far as it can, see :mod:`nni_topo.recovery.blocks`.
The next block to remove is the one whose removal raises the loss on held-out images least per saved cost.
After each removal the blocks that were most promising before are judged again.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError, out_of_memory
from nni_topo.maths.ties import first_smallest
from nni_topo.network.cost.cost import NetworkCost, cost_of
from nni_topo.network.cost.latency import LatencyTable, measure_latency
from nni_topo.network.io.checkpoint import keep_blocks, take_out_part, tells_depth
from nni_topo.network.layers.kinds import RECURRENT, WEIGHTED, is_transposed_linear
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.comparison import SAME_CHANNELS, agree
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode, left_alone
from nni_topo.network.runtime.fits import structure_call
from nni_topo.network.runtime.inputs import Call, returned_tensors, tensors_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import dense_of
from nni_topo.network.speedup.dense_report import dense_report_of
from nni_topo.pruners.budget import budget_outcome
from nni_topo.recovery.blocks import Gap, Stream, find_writer, gap_after, run_watched, solutions
from nni_topo.recovery.lesson import judged
from nni_topo.recovery.outputs import OutputKind, Outputs
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.prunable import layers_to_prune
from nni_topo.runs.widths import fewest_channels

if TYPE_CHECKING:
    from nni_topo.runs.prepared import Prepared

_SOLVED, _JUDGED = 256, 128  # calibration and held-out images by which blocks are chosen
_LOOKED_AT = 8  # most promising blocks, which are judged again after each removal
_TOGETHER = 4  # networks that are judged at once, each with its own weights in memory
_MIDDLE, _BETWEEN = 0.5, (0.25, 0.75)  # powers of the budget's share: shares kept after removing blocks only
_CACHE = "past_key_values"  # the output of a decoder that is an input of its next call
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemovedBlock:
    """A block, or a part of one, that was removed; ``str`` is a sentence."""

    name: str  # in the unpruned network
    kind: str  # block, or part
    replaced_by: str  # layer, by its name in the unpruned network, whose weights make up for it; empty: nothing does

    def __str__(self) -> str:
        how = f"the weights of {self.replaced_by} make up for it" if self.replaced_by else "nothing takes its place"
        return f"the {self.kind} {self.name} is removed: {how}"


@dataclass(frozen=True)
class DepthTried:
    """A network that was tried: some blocks removed, channels for the rest of the budget."""

    removed: int  # blocks, or parts of blocks
    left: float  # share of the cost that is kept without the blocks, with all channels
    kept: float  # share that is kept in the end
    loss: float  # on the held-out images, as in nni_topo.distill; less is better
    is_met: bool  # whether the budget is met
    is_chosen: bool

    def __str__(self) -> str:
        text = f"channels alone: {100 * self.kept:.4g} % of the cost left"
        if self.removed:
            blocks = "1 block" if self.removed == 1 else f"{self.removed} blocks"
            text = f"{blocks} removed: {100 * self.left:.4g} % of the cost left, {100 * self.kept:.4g} % after channels"
        return f"{text}, held-out loss {self.loss:.4g}" + " (chosen)" * self.is_chosen

    @property
    def rank(self) -> tuple[bool, float]:
        """Less is better: networks that meet the budget come first, by loss, then the others, by cost."""
        return not self.is_met, self.loss if self.is_met else self.kept


@dataclass(frozen=True)
class DepthOutcome:
    """Which blocks were removed for a budget; ``str`` has a line for each fact."""

    removed: tuple[RemovedBlock, ...]  # blocks, and parts of blocks, in the order in which they were removed
    tried: tuple[DepthTried, ...]  # networks among which the held-out images chose
    kept: dict[str, str]  # for each block that could be removed otherwise, the reason why it stays
    # With a latency budget the share of the time that stays with as few channels of each layer as possible; else NaN.
    overhead: float = math.nan

    def __str__(self) -> str:
        lines = [str(each) for each in self.removed] or ["no block is removed"]
        if not math.isnan(self.overhead):
            lines.append(f"{100 * self.overhead:.4g} % of the time stays with as few channels as possible")
        lines += map(str, self.tried)
        lines += [f"{name} stays: {reason}" for name, reason in self.kept.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class Removal:
    """A block, or a part of one, that can be removed."""

    name: str
    block: str  # the block that it is, or is a part of
    outputs: int  # length of the tuple that a part returns; 0: a tensor

    @property
    def is_part(self) -> bool:
        """Whether the rest of the block stays."""
        return self.name != self.block

    def remove_from(self, net: nn.Module, name: str) -> None:
        """Remove the block from a network, where it is called ``name``, in place."""
        if self.is_part:
            take_out_part(net, name, self.outputs)
            return
        parent, _, key = name.rpartition(".")
        keys = list(net.get_submodule(parent)._modules)
        keep_blocks(net, parent, [number for number in range(len(keys)) if keys[number] != key])


@dataclass(frozen=True)
class Removable:
    """Blocks, and parts of blocks, that can be removed from a network."""

    candidates: tuple[Removal, ...]
    parts: dict[str, tuple[str, ...]]  # for each block that has parts, these in the order of their calls
    kept: dict[str, str]  # reasons why other blocks stay


def removable_blocks(
    model: nn.Module, images: Calibration, keep: Callable[[str], str] = lambda _: "", *, whole_blocks: bool = False
) -> Removable:
    """Find the blocks, and parts of blocks, without which a network runs, on two samples of the images.

    A block lies in a list, is called once, adds to its input and keeps its shape. Blocks that contain others stay.
    ``keep`` takes a module's name and returns the reason why it must stay, or an empty text. With ``whole_blocks`` the
    parts of blocks aren't considered.
    """
    call = structure_call(model, images)
    modules = dict(model.named_modules())
    listed = [
        (f"{name}.{key}" if name else key, child)
        for name, module in modules.items()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for key, child in module.named_children()
    ]
    names = dict.fromkeys(name for name, _ in listed)
    names |= dict.fromkeys(f"{name}.{key}" for name, child in listed for key, _ in child.named_children())
    # Of each call: the input, the output, and a copy of its first tensor, which later operations may change in place.
    seen: dict[str, list[tuple[Any, Any, Tensor]]] = {name: [] for name in names}
    entered: dict[str, Any] = {}

    def enter(name: str, entering: Any) -> None:
        entered[name] = entering.clone() if isinstance(entering, Tensor) else entering

    def leave(name: str, output: Any) -> None:
        tensors = tensors_of(output)
        if tensors:
            seen[name].append((entered[name], output, tensors[0].clone()))

    before = [(modules[name], lambda entering, name=name: enter(name, entering)) for name in names]
    after = [(modules[name], lambda _, output, name=name: leave(name, output)) for name in names]
    outputs = run_watched(model, call, before, after)
    memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(outputs)}
    shapes = [tensor.shape for tensor in _tensors(outputs)]

    blocks: list[str] = []
    for name, module in listed:
        if not _layers_in(module) or len(seen[name]) != 1 or not isinstance(seen[name][0][0], Tensor):
            continue
        ((entering, _, first),) = seen[name]
        keeps_shape = entering.is_floating_point() and entering.shape == first.shape
        if keeps_shape and _is_residual(model, module, call, entering):
            blocks.append(name)
    found: list[Removal] = []
    parts: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for name in blocks:
        if any(other.startswith(f"{name}.") for other in blocks):
            continue
        wanted = [Removal(name, name, 0)]
        if not whole_blocks:
            # It has parts if its output is its input plus the outputs of at least two parts.
            ((total, _, reached),) = seen[name]
            for key, child in modules[name].named_children():
                part = f"{name}.{key}"
                if len(seen[part]) == 1 and seen[part][0][2].shape == reached.shape and _layers_in(child):
                    ((_, output, first),) = seen[part]
                    wanted.append(Removal(part, name, len(output) if isinstance(output, tuple) else 0))
                    total = total + first
            if len(wanted) > 2 and agree([reached], [total], SAME_CHANNELS):
                parts[name] = tuple(each.name for each in wanted[1:])
            else:
                del wanted[1:]
        for candidate in wanted:
            module = modules[candidate.name]
            is_only = not candidate.is_part and len(modules[name.rpartition(".")[0]]._modules) == 1
            # A decoder counts the tokens that it has seen by the keys of its first attention.
            counts = candidate.is_part and getattr(module, "layer_idx", None) == 0
            if is_only or counts:
                continue
            why = ""
            for each in module.modules():
                if each._forward_hooks or each._forward_pre_hooks or each._backward_hooks or each._backward_pre_hooks:
                    why = "a hook is registered on it"
            mine = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(seen[candidate.name][0][1])}
            if not why and mine & memory:
                why = "its output is an output of the model"
            why = why or keep(candidate.name)
            if not why and not _runs_without(model, candidate, call, shapes):
                why = "without it the model doesn't run, or its outputs have another shape"
            if why:
                kept[candidate.name] = why
            else:
                found.append(candidate)
    return Removable(tuple(found), parts, kept)


def _is_residual(model: nn.Module, block: nn.Module, call: Call, entering: Tensor) -> bool:
    """Say whether a block's output depends on its input when all of its layers give zeros."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    zeros = [(layer, lambda _, output: tree_map_only(Tensor, torch.zeros_like, output)) for layer in _layers_in(block)]
    look = (block, lambda _, output: found.append(tensors_of(output)[0].clone()))
    for _ in range(2):
        given = torch.randn(entering.shape, generator=generator).to(entering)
        try:
            run_watched(model, call, [(block, lambda _, given=given: given)], [*zeros, look])
        except Exception as error:  # later modules may not accept such values
            if out_of_memory(error):
                raise
    return len(found) == 2 and not agree(found[:1], found[1:], SAME_CHANNELS)


def _runs_without(model: nn.Module, candidate: Removal, call: Call, shapes: list[torch.Size]) -> bool:
    """Say whether a model gives outputs of these shapes without a block or a part."""
    trial = detached_copy(model, light=True)
    candidate.remove_from(trial, candidate.name)
    try:
        # As users run it: PyTorch's fast paths read attributes of attention that nothing else reads.
        with left_alone(trial), evaluation_mode(trial), torch.no_grad():
            given = trial(*call[0], **call[1])
    except Exception as error:  # a forward may do anything with the outputs of its blocks
        if out_of_memory(error):
            raise
        return False
    return [tensor.shape for tensor in _tensors(given)] == shapes


def _layers_in(module: nn.Module) -> list[nn.Module]:
    """Return the modules with weights that multiply their inputs."""
    kinds = (*WEIGHTED, *RECURRENT, nn.MultiheadAttention)
    return [each for each in module.modules() if isinstance(each, kinds) or is_transposed_linear(each)]


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors of a model's output, without a decoder's cache."""
    if isinstance(outputs, Mapping):
        outputs = {key: value for key, value in outputs.items() if key != _CACHE}
    return returned_tensors(outputs)


@dataclass(frozen=True)
class Shortened:
    """A network without some of its blocks."""

    net: nn.Module
    names: dict[str, str]  # the name of each module in the unpruned network, by its name here
    removed: tuple[RemovedBlock, ...]
    loss: float  # on the held-out images
    left: float  # about what share of the cost is kept

    @property
    def here(self) -> dict[str, str]:
        """The name of each module here, by its name in the unpruned network."""
        return {original: name for name, original in self.names.items()}

    def without(self, candidate: Removal, gap: Gap | None, solution: Any) -> tuple[nn.Module, dict[str, str], str]:
        """Return a network that lacks one more block, the names in it, and the layer that makes up for it.

        The network shares all parameters with this one except the parameters of that layer.
        """
        net = detached_copy(self.net, light=True)
        twins = dict(zip(self.net.modules(), net.modules(), strict=True))
        before = {twins[self.net.get_submodule(name)]: original for name, original in self.names.items()}
        replaced_by = ""
        if gap is not None:
            stream, writer = gap.writer.stream, gap.writer
            own = Stream(twins[stream.block], None if stream.end is None else twins[stream.end])
            norm, taker = (None if each is None else twins[each] for each in (writer.norm, writer.taker))
            twin = replace(writer, layer=twins[writer.layer], norm=norm, taker=taker, stream=own)
            replace(gap, writer=twin).fill(solution)
            replaced_by = before[twin.layer]
        candidate.remove_from(net, self.here[candidate.name])
        names = {name: before[module] for name, module in net.named_modules() if module in before}
        return net, names, replaced_by


class DepthPath:
    """A network without one, two, three ... of its blocks."""

    def __init__(
        self,
        model: nn.Module,
        images: Calibration,
        judges: Calibration,
        outputs: Outputs | None,
        removable: Removable,
        saved: Callable[[Removal], float],
        kinds: tuple[OutputKind, ...] = (),
    ) -> None:
        self._model, self._outputs, self._kinds, self.removable = model, outputs, kinds, removable
        self._images, self._judges = _few(images, _SOLVED), _few(judges, _JUDGED)
        self._saved = {candidate: saved(candidate) for candidate in removable.candidates}
        self._scores: dict[Removal, float] = {}
        self._call = structure_call(model, images)
        self.states = [Shortened(model, {name: name for name, _ in model.named_modules()}, (), 0.0, 1.0)]

    def nearest(self, share: float) -> int:
        """Return how many blocks to remove so that about a share of the cost is left; all if there are too few."""
        while self.states[-1].left > share and self._extend():
            pass
        distances = [abs(math.log(max(state.left, 1e-9) / share)) for state in self.states]
        return first_smallest(distances)

    def first_below(self, share: float) -> int:
        """Return how many blocks to remove so that at most a share of the cost is left; all if there are too few."""
        self.nearest(share)
        return next((at for at, state in enumerate(self.states) if state.left <= share), len(self.states) - 1)

    def choose(self, candidates: Sequence[Removal], scores: Sequence[float]) -> int:
        """Return the index of the candidate to remove next; scores are the growth of the loss per saved cost."""
        return first_smallest(scores)

    def _extend(self) -> bool:
        """Remove one more block, if there is one."""
        state = self.states[-1]
        candidates = self._remaining(state)
        if not candidates:
            return False
        gaps = [self._gap(state, candidate) for candidate in candidates]
        present = [gap for gap in gaps if gap is not None]
        nets = (self._model,) if state.net is self._model else (self._model, state.net)
        solved = iter(solutions(nets, present, self._images, "auto") if present else [])
        trials = []
        for candidate, gap in zip(candidates, gaps, strict=True):
            trials.append(state.without(candidate, gap, None if gap is None else next(solved)))
        losses: list[float] = []
        for start in range(0, len(trials), _TOGETHER):
            nets_to_judge = [net for net, *_ in trials[start : start + _TOGETHER]]
            losses += [
                each.loss for each in judged(self._model, nets_to_judge, self._judges, self._outputs, self._kinds)
            ]
        for candidate, loss in zip(candidates, losses, strict=True):
            saved = self._saved_after(state, candidate)
            self._scores[candidate] = (loss - state.loss) / saved if math.isfinite(loss) else math.inf
        best = self.choose(candidates, [self._scores[candidate] for candidate in candidates])
        chosen, (net, names, replaced_by) = candidates[best], trials[best]
        removed = RemovedBlock(chosen.name, "part" if chosen.is_part else "block", replaced_by)
        self.states.append(
            Shortened(
                net=detached_copy(net),  # with weights of its own
                names=names,
                removed=(*state.removed, removed),
                loss=losses[best],
                left=max(state.left - self._saved_after(state, chosen), 0.0),
            )
        )
        return True

    def _remaining(self, state: Shortened) -> list[Removal]:
        """Return the candidates for the next removal, only the most promising ones if they have scores."""
        gone, here = {each.name for each in state.removed}, state.here
        found = []
        for candidate in self.removable.candidates:
            parts = [part for part in self.removable.parts.get(candidate.block, ()) if part not in gone]
            is_last_part = candidate.is_part and len(parts) == 1  # the whole block is removed instead, with its norms
            if candidate.name not in here or candidate.name in gone or is_last_part:
                continue
            parent = here[candidate.block].rpartition(".")[0]
            is_last = not candidate.is_part and len(state.net.get_submodule(parent)._modules) == 1
            if not is_last and self._saved_after(state, candidate) > 0.0:
                found.append(candidate)
        found.sort(key=lambda candidate: self._scores.get(candidate, -math.inf))
        return found[:_LOOKED_AT] if self._scores else found

    def _saved_after(self, state: Shortened, candidate: Removal) -> float:
        """Return the share of the unpruned network's cost that a removal saves; removed parts save nothing."""
        saved, gone = self._saved[candidate], {each.name for each in state.removed}
        for each in self.removable.candidates:
            if not candidate.is_part and each.is_part and each.block == candidate.block and each.name in gone:
                saved -= self._saved[each]
        return saved

    def _gap(self, state: Shortened, candidate: Removal) -> Gap | None:
        """Return the layer that makes up for a block, and the stream that it matches; None if no layer does."""
        here = state.here
        parent, _, key = here[candidate.block].rpartition(".")
        container = state.net.get_submodule(parent)
        keys = list(container._modules)
        place = keys.index(key)
        if candidate.is_part:
            # The part before it in the stream, in this block or an earlier one.
            order: list[str] = []
            for other in keys[: place + 1]:
                block = state.names[f"{parent}.{other}" if parent else other]
                order += [part for part in self.removable.parts.get(block, ()) if part in here]
            at = order.index(candidate.name)
            if not at:
                return None
            writer = find_writer(state.net, state.net.get_submodule(here[order[at - 1]]), self._call)
            part = Stream(state.net.get_submodule(here[candidate.name]), None)
            return None if writer is None else Gap(writer, part, is_whole=True)
        if not place:
            return None
        # Blocks after it may be removed already: the stream after the last of them is to be matched.
        parent, _, key = candidate.name.rpartition(".")
        original = self._model.get_submodule(parent)
        gone = {each.name for each in state.removed}
        originals = list(original._modules)
        last = originals.index(key)
        while last + 1 < len(originals):
            following = f"{parent}.{originals[last + 1]}" if parent else originals[last + 1]
            if following not in gone:
                break
            last += 1
        wanted: Any = original._modules[originals[last]]
        before: Any = container._modules[keys[place - 1]]
        return gap_after(state.net, before, self._model, wanted, self._call)


def _few(images: Calibration, count: int) -> Calibration:
    """Return at most ``count`` images, evenly spaced."""
    samples = images.samples
    if samples <= count:
        return images
    if images.is_whole:
        batches = torch.linspace(0, len(images) - 1, max(1, count * len(images) // samples)).round().long()
        starts = torch.tensor(images.sizes).cumsum(0) - torch.tensor(images.sizes)
        return images.chosen(starts[batches])
    return images.chosen(torch.linspace(0, samples - 1, count).round().long().unique())


def with_depth(whole: Prepared) -> Prepared:
    """Let blocks compete with channels; if no block can be removed, a warning says so."""
    whole_blocks = bool(whole.budget.equal_blocks)
    removable = removable_blocks(whole.model, whole.images.all, _keeps(whole), whole_blocks=whole_blocks)
    if not removable.candidates:
        why = "; ".join(f"{name}: {reason}" for name, reason in removable.kept.items())
        why = why or "none lies in a list of at least two, adds to its input and keeps its shape"
        whole.leave_out(f"depth=True finds no block that can be removed ({why}), so only channels are removed")
        return whole
    judges, kind = whole.images.judging("depth=True"), whole.budget.kind
    table = measure_latency(whole.model, whole.example) if kind == "latency" else None
    saved = cost_saved(whole.model, whole.example, kind, table)
    path = DepthPath(whole.model, whole.images.learned, judges, whole.settings.outputs, removable, saved, whole.kinds)
    whole = replace(whole, is_search=True)
    return replace(whole, depth=Depth(whole, path))


class Depth:
    """Makes networks of any share of the cost by removing blocks and channels."""

    def __init__(self, whole: Prepared, path: DepthPath) -> None:
        self.whole, self.path = whole, path
        self._prepared: dict[int, Prepared] = {}  # by number of blocks removed, the network without them
        self._lefts = {0: 1.0}  # likewise, the share of the cost that it keeps

    def make(self, share: float) -> Pipeline:
        """Try some numbers of blocks, let channels take the rest of the budget, and keep the network that loses least.

        Among networks that miss the budget the one that misses it least is kept.
        """
        whole, path = self.whole, self.path
        judges: Any = whole.images.judges
        found: dict[int, Pipeline] = {}
        tried: dict[int, DepthTried] = {}

        def attempt(count: int) -> None:
            if count in found:
                return
            try:
                made = self.without(count, share)
            except ConfigError as error:  # the network has no removable channels
                if not count:
                    raise
                _logger.info("%d blocks are not removed: %s", count, error)
                return
            (judgement,) = judged(whole.model, [made.dense], judges, whole.settings.outputs, whole.kinds)
            loss = judgement.loss if math.isfinite(judgement.loss) else math.inf
            is_met = budget_outcome(whole.budget.kind, share, made.left, "").is_met
            found[count] = made
            tried[count] = DepthTried(count, self.share_without(count), made.left, loss, is_met, is_chosen=False)

        # If the fewest channels don't make a network fast enough, some blocks are always removed.
        overhead = self.overhead()
        first = path.nearest(share / overhead) if overhead > share else 0
        attempt(first)
        middle = max(first, path.nearest(share**_MIDDLE))
        attempt(middle)
        fewer, more = _BETWEEN
        others = [each.rank for count, each in tried.items() if count != middle]
        is_better = middle in tried and tried[middle].rank < min(others, default=(True, math.inf))
        last = path.nearest(share ** (more if is_better else fewer))
        if is_better:
            # Blocks may save everything, if the network without them loses no more than the tried one.
            all_of_it = path.first_below(share)
            is_no_worse = path.states[all_of_it].loss <= tried[middle].loss
            last = all_of_it if is_no_worse or not any(each.is_met for each in tried.values()) else last
        attempt(max(first, last))
        if not found:
            attempt(0)
        counts = sorted(tried)
        best = min(counts, key=lambda count: tried[count].rank)
        tried[best] = replace(tried[best], is_chosen=True)
        removed, chosen = path.states[best].removed, found[best]
        layers = replace(chosen.layers, notes=(*chosen.layers.notes, *map(str, removed)))
        depth = DepthOutcome(removed, tuple(tried[count] for count in counts), path.removable.kept, overhead)
        return replace(chosen, layers=layers, depth=depth)

    def without(self, count: int, share: float) -> Pipeline:
        """Return a network without ``count`` blocks, from which channels are removed for the rest of the budget."""
        whole = self.whole
        if not count:
            return whole.make(share)
        left = self.share_without(count)
        if left <= share:
            dense = dense_of(self.path.states[count].net, whole.images.example, {})
            return replace(whole.start, dense=dense, layers=dense_report_of(dense), left=left)
        made = self.prepared(count).recover(min(share / left, 1.0))
        return replace(made, left=whole.share_left(made.dense))

    def prepared(self, count: int) -> Prepared:
        """Return the network without ``count`` blocks, with the same layers to prune as the whole network."""
        whole, short = self.whole, self.path.states[count]
        if count not in self._prepared:
            layers = None
            if not whole.prunable.is_default:
                here = short.here
                layers = [here[name] for name in whole.prunable.entries[0]["op_names"] if name in here]
                if not layers:
                    raise ConfigError(
                        "a network must have a layer whose channels can be removed, got none that is named (layers)"
                    )
            analysis = Analysis.on(short.net, whole.images.example)
            prunable = layers_to_prune(analysis, layers, is_described=whole.is_described)
            self._prepared[count] = replace(whole, start=Pipeline(analysis, whole.start.round_to), prunable=prunable)
        return self._prepared[count]

    def share_without(self, count: int) -> float:
        """Return the share of the cost that the network keeps without ``count`` blocks, with all channels."""
        if count not in self._lefts:
            self._lefts[count] = self.whole.share_left(self.path.states[count].net)
        return self._lefts[count]

    def overhead(self) -> float:
        """Return the share of the time that stays if layers have as few channels as possible; NaN for other costs."""
        whole = self.whole
        if whole.budget.kind != "latency":
            return math.nan
        masks = NetworkCost(whole.counted).masks(
            fewest_channels(whole.counted, whole.prunable.entries, whole.start.round_to)
        )
        thin = dense_of(whole.model, whole.images.example, masks, check=False, facts=whole.analysis.facts)
        return whole.share_left(thin)


def cost_saved(
    model: nn.Module, example: Any, kind: str, table: LatencyTable | None = None
) -> Callable[[Removal], float]:
    """Return a function that gives the share of a network's cost that removing a block saves; for time by a table."""
    if table is not None:
        total = sum(layer.activation for layer in table.layers.values())
        # Each layer at full width, with its share of the time between layers.
        seconds = {
            name: layer.at(layer.entering[-1], layer.leaving[-1])
            + (table.rest * layer.activation / total if total else 0.0)
            for name, layer in table.layers.items()
        }

        def time_saved(candidate: Removal) -> float:
            names = [name for name, _ in model.get_submodule(candidate.name).named_modules(prefix=candidate.name)]
            return sum(seconds[name] for name in names if name in seconds) / sum(seconds.values())

        return time_saved
    unpruned, known = cost_of(kind, model, example), dict[str, float]()

    def saved(candidate: Removal) -> float:
        # Blocks of one kind cost the same, and counting takes a run of the network.
        same = f"{candidate.block.rpartition('.')[0]} {model.get_submodule(candidate.name)!r}"
        if same not in known:
            trial = detached_copy(model, light=True)
            candidate.remove_from(trial, candidate.name)
            known[same] = float(1.0 - cost_of(kind, trial, example) / unpruned)
        return known[same]

    return saved


def _keeps(steps: Prepared) -> Callable[[str], str]:
    """Return a function that says why a block must stay, by a config or for the layers that the caller named."""
    named = None if steps.prunable.is_default else steps.prunable.entries[0]["op_names"]

    def why(block: str) -> str:
        siblings = steps.model.get_submodule(block.rpartition(".")[0])._modules
        if steps.is_described and not tells_depth(getattr(steps.model, "config", None), len(siblings)):
            return "no config of Transformers can say that there are fewer of these blocks"
        if named is not None and not any(name.startswith(f"{block}.") for name in named):
            return "no layer in it is named (layers)"
        return ""

    return why
