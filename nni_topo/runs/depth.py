"""Blocks compete with channels for a budget: which can be removed, in which order, and how many before channels.

Blocks that add to a stream and keep its shape can be removed as a whole, and so can attention or the MLP of a
transformer's block. The layer before the gap makes up for them as far as it can, see :mod:`nni_topo.recovery.blocks`.
The next block to remove is the one without which the loss on held-out images grows least for the cost that it saves;
all are looked at again after each removal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.errors import ConfigError
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
from nni_topo.network.runtime.memory import out_of_memory
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.network.speedup.dense import dense_of, to_dense
from nni_topo.network.speedup.dense_report import dense_report_of
from nni_topo.network.speedup.dependency import groups_of
from nni_topo.pruners.budget import budget_outcome
from nni_topo.pruners.checks import matched_modules
from nni_topo.recovery.blocks import Gap, Stream, find_writer, gap_after, run_watched, solutions
from nni_topo.recovery.lesson import judged
from nni_topo.recovery.outputs import Outputs
from nni_topo.runs.pipeline import Pipeline
from nni_topo.runs.prunable import layers_to_prune
from nni_topo.runs.widths import fewest_channels, inner_layers_of

if TYPE_CHECKING:
    from nni_topo.runs.prepared import Prepared

_SOLVED, _JUDGED = 256, 128  # calibration and held-out images by which blocks are chosen
_LOOKED_AT = 8  # blocks that are looked at again after each removal, those that promised most
_TOGETHER = 4  # networks that are judged at once, each with its own weights in memory
_MIDDLE, _BETWEEN = 0.5, (0.25, 0.75)  # powers of the budget's share that blocks alone keep in the networks tried
_CACHE = "past_key_values"  # what a decoder returns for its next call
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
    loss: float  # on the held-out images, as nni_topo.distill counts it; less is better
    is_met: bool  # whether the budget is met
    is_chosen: bool

    def __str__(self) -> str:
        text = f"channels alone: {100 * self.kept:.4g} % of the cost left"
        if self.removed:
            blocks = "1 block" if self.removed == 1 else f"{self.removed} blocks"
            text = f"{blocks} removed: {100 * self.left:.4g} % of the cost left, {100 * self.kept:.4g} % after channels"
        return f"{text}, held-out loss {self.loss:.4g}" + " (chosen)" * self.is_chosen


@dataclass(frozen=True)
class DepthOutcome:
    """Which blocks were removed for a budget; ``str`` has a line for each fact."""

    removed: tuple[RemovedBlock, ...]  # blocks, and parts of blocks, in the order in which they were removed
    tried: tuple[DepthTried, ...]  # networks among which the held-out images chose
    kept: dict[str, str]  # by block that would be removable, the reason why it stays whatever it costs
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
    outputs: int  # of a part, the length of the tuple that it returns; 0: a tensor

    @property
    def is_part(self) -> bool:
        """Whether the rest of the block stays."""
        return self.name != self.block


@dataclass(frozen=True)
class Removable:
    """What can be removed from a network."""

    candidates: tuple[Removal, ...]
    parts: dict[str, tuple[str, ...]]  # by block, its parts in the order of their calls, where it has any
    kept: dict[str, str]  # why others stay


def removable_blocks(
    model: nn.Module, images: Calibration, keep: Callable[[str], str] = lambda _: "", *, whole_blocks: bool = False
) -> Removable:
    """Find the blocks, and parts of blocks, that a network runs without, by two samples of the images.

    A block lies in a list, is called once, adds to its input and keeps its shape. Blocks that contain others stay.
    ``keep`` gives the reason why a module with a name must stay, or an empty text. With ``whole_blocks`` no parts are
    looked for.
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
    # Of each call what entered, the output, and a copy of its first tensor, which what follows may change in place.
    seen: dict[str, list[tuple[Any, Any, Tensor]]] = {name: [] for name in names}
    entered: dict[str, Any] = {}

    def note(name: str) -> Any:
        def look(_: Any, output: Any) -> None:
            tensors = tensors_of(output)
            if tensors:
                seen[name].append((entered[name], output, tensors[0].clone()))

        return look

    def enter(name: str) -> Any:
        def look(entering: Any) -> None:
            entered[name] = entering.clone() if isinstance(entering, Tensor) else entering

        return look

    own = [(modules[name], name) for name in names]
    before, after = [(module, enter(name)) for module, name in own], [(module, note(name)) for module, name in own]
    outputs = run_watched(model, call, before, after)
    memory = {tensor.untyped_storage().data_ptr() for tensor in _tensors(outputs)}
    shapes = [tensor.shape for tensor in _tensors(outputs)]

    blocks: list[str] = []
    for name, module in listed:
        if not _layers_in(module) or len(seen[name]) != 1 or not isinstance(seen[name][0][0], Tensor):
            continue
        ((entering, _, first),) = seen[name]
        keeps_shape = entering.is_floating_point() and entering.shape == first.shape
        if keeps_shape and _depends(model, module, call, entering):
            blocks.append(name)
    blocks = [name for name in blocks if not any(other.startswith(f"{name}.") for other in blocks)]
    found: list[Removal] = []
    parts: dict[str, tuple[str, ...]] = {}
    kept: dict[str, str] = {}
    for name in blocks:
        wanted = [Removal(name, name, 0)]
        if not whole_blocks:
            # It has parts if its output is its input plus what at least two parts put out.
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
            has_hooks = False
            for each in module.modules():
                own_hooks = each._forward_hooks, each._forward_pre_hooks, each._backward_hooks, each._backward_pre_hooks
                has_hooks |= any(own_hooks)
            mine = {tensor.untyped_storage().data_ptr() for tensor in tensors_of(seen[candidate.name][0][1])}
            if has_hooks:
                why = "a hook meets it"
            elif mine & memory:
                why = "what it puts out is an output of the model"
            else:
                why = keep(candidate.name)
            if not why:
                trial = detached_copy(model, light=True)
                _remove(trial, candidate, candidate.name)
                runs_without = False
                try:
                    # As users run it: PyTorch's fast paths read attributes of attention that nothing else reads.
                    with left_alone(trial), evaluation_mode(trial), torch.no_grad():
                        given = trial(*call[0], **call[1])
                    runs_without = [tensor.shape for tensor in _tensors(given)] == shapes
                except Exception as error:  # a forward may do anything with what its blocks give
                    if out_of_memory(error):
                        raise
                if not runs_without:
                    why = "the model gives other outputs without it, or doesn't run"
            if why:
                kept[candidate.name] = why
            else:
                found.append(candidate)
    return Removable(tuple(found), parts, kept)


def _depends(model: nn.Module, block: nn.Module, call: Call, entering: Tensor) -> bool:
    """Say whether a block's output depends on its input when all of its layers give zeros."""
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    zeros = [(layer, lambda _, output: tree_map_only(Tensor, torch.zeros_like, output)) for layer in _layers_in(block)]
    look = (block, lambda _, output: found.append(tensors_of(output)[0].clone()))
    for _ in range(2):
        given = torch.randn(entering.shape, generator=generator).to(entering)
        try:
            run_watched(model, call, [(block, lambda _, given=given: given)], [*zeros, look])
        except Exception as error:  # what follows may not take such values
            if out_of_memory(error):
                raise
    return len(found) == 2 and not agree(found[:1], found[1:], SAME_CHANNELS)


def _layers_in(module: nn.Module) -> list[nn.Module]:
    """Return the modules with weights that multiply what enters them."""
    kinds = (*WEIGHTED, *RECURRENT, nn.MultiheadAttention)
    return [each for each in module.modules() if isinstance(each, kinds) or is_transposed_linear(each)]


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors that a model puts out for its user, without a decoder's cache."""
    if isinstance(outputs, Mapping):
        outputs = {key: value for key, value in outputs.items() if key != _CACHE}
    return returned_tensors(outputs)


def _remove(net: nn.Module, candidate: Removal, name: str) -> None:
    """Remove a block, or a part of one, which has a name in a network, in place."""
    if candidate.is_part:
        take_out_part(net, name, candidate.outputs)
        return
    parent, _, key = name.rpartition(".")
    keys = list(net.get_submodule(parent)._modules)
    keep_blocks(net, parent, [number for number in range(len(keys)) if keys[number] != key])


@dataclass(frozen=True)
class Shortened:
    """A network without some of its blocks."""

    net: nn.Module
    names: dict[str, str]  # by name of a module here, its name in the unpruned network
    gone: tuple[Removal, ...]
    removed: tuple[RemovedBlock, ...]
    loss: float  # on the held-out images
    left: float  # about what share of the cost is kept

    @property
    def here(self) -> dict[str, str]:
        """By name of a module in the unpruned network, its name here."""
        return {original: name for name, original in self.names.items()}

    def without(self, candidate: Removal, gap: Gap | None, solution: Any) -> tuple[nn.Module, dict[str, str], str]:
        """Return a network that lacks one more block, the names in it, and the layer that makes up for it.

        The network shares all parameters with this one except the parameters of that layer.
        """
        net = detached_copy(self.net, light=True)
        twins = dict(zip(self.net.modules(), net.modules(), strict=True))
        before = {twins[self.net.get_submodule(name)]: original for name, original in self.names.items()}
        replaced_by = ""
        if gap is not None and solution is not None:
            stream, writer = gap.writer.stream, gap.writer
            own = Stream(twins[stream.block], None if stream.end is None else twins[stream.end])
            norm = None if writer.norm is None else twins[writer.norm]
            twin = replace(writer, layer=twins[writer.layer], norm=norm, stream=own)
            replace(gap, writer=twin).fill(solution)
            replaced_by = before[twin.layer]
        _remove(net, candidate, self.here[candidate.name])
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
    ) -> None:
        self._model, self._outputs, self._removable = model, outputs, removable
        self._images, self._judges = _few(images, _SOLVED), _few(judges, _JUDGED)
        self._saved = {candidate: saved(candidate) for candidate in removable.candidates}
        self._scores: dict[Removal, float] = {}
        names = {name: name for name, _ in model.named_modules()}
        self._call = structure_call(model, images)
        self.states = [Shortened(model, names, (), (), 0.0, 1.0)]

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
        """Return the number of the candidate that goes next, by the loss of each for the cost that it saves."""
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
            losses += [each.loss for each in judged(self._model, nets_to_judge, self._judges, self._outputs)]
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
                gone=(*state.gone, chosen),
                removed=(*state.removed, removed),
                loss=losses[best],
                left=max(state.left - self._saved_after(state, chosen), 0.0),
            )
        )
        return True

    def _remaining(self, state: Shortened) -> list[Removal]:
        """Return what can be removed next; of many candidates the most promising ones."""
        gone = {candidate.name for candidate in state.gone}
        found = []
        for candidate in self._removable.candidates:
            parts = [part for part in self._removable.parts.get(candidate.block, ()) if part not in gone]
            is_last_part = candidate.is_part and len(parts) == 1  # the whole block goes instead, its norms too
            if candidate.name not in state.here or candidate.name in gone or is_last_part:
                continue
            parent = state.here[candidate.block].rpartition(".")[0]
            is_last = not candidate.is_part and len(state.net.get_submodule(parent)._modules) == 1
            if not is_last and self._saved_after(state, candidate) > 0.0:
                found.append(candidate)
        found.sort(key=lambda candidate: self._scores.get(candidate, -math.inf))
        return found[:_LOOKED_AT] if self._scores else found

    def _saved_after(self, state: Shortened, candidate: Removal) -> float:
        """Return what a removal saves, as a share of the unpruned network's cost; parts that are gone save nothing."""
        gone = [each for each in state.gone if each.is_part and each.block == candidate.block]
        return self._saved[candidate] - (0.0 if candidate.is_part else sum(self._saved[each] for each in gone))

    def _gap(self, state: Shortened, candidate: Removal) -> Gap | None:
        """Return which layer makes up for a block, and by what; None if none does."""
        parent, _, key = state.here[candidate.block].rpartition(".")
        container = state.net.get_submodule(parent)
        keys = list(container._modules)
        place = keys.index(key)
        if candidate.is_part:
            # The part before it in the stream, of this block or of one before.
            order: list[str] = []
            for other in keys[: place + 1]:
                block = state.names[f"{parent}.{other}" if parent else other]
                order += [part for part in self._removable.parts.get(block, ()) if part in state.here]
            at = order.index(candidate.name)
            if not at:
                return None
            writer = find_writer(state.net, state.net.get_submodule(state.here[order[at - 1]]), self._call)
            part = Stream(state.net.get_submodule(state.here[candidate.name]), None)
            return None if writer is None else Gap(writer, part, is_whole=True)
        if not place:
            return None
        # Blocks after it may be gone already: the stream after the last of them is wanted.
        original_parent, _, original_key = candidate.name.rpartition(".")
        original = self._model.get_submodule(original_parent)
        gone = {each.name for each in state.gone}
        originals = list(original._modules)
        last = originals.index(original_key)
        while last + 1 < len(originals):
            following = f"{original_parent}.{originals[last + 1]}" if original_parent else originals[last + 1]
            if following not in gone:
                break
            last += 1
        wanted: Any = original._modules[originals[last]]
        before: Any = container._modules[keys[place - 1]]
        return gap_after(state.net, before, self._model, wanted, self._call)


def _few(images: Calibration, count: int) -> Calibration:
    """Return so many images, evenly spaced."""
    samples = images.samples
    if samples <= count:
        return images
    return images.chosen(torch.linspace(0, samples - 1, count).round().long().unique())


class Depth:
    """Blocks that compete with channels for the budget."""

    def __init__(self, whole: Prepared, removable: Removable) -> None:
        self.whole, self.removable = whole, removable
        self._prepared: dict[int, Prepared] = {}  # by number of blocks removed, the network without them
        self._lefts = {0: 1.0}  # likewise, about which share of the cost is kept

    @classmethod
    def on(cls, whole: Prepared) -> Prepared:
        """Let blocks compete, too; where no block can go, a warning says so."""
        whole_blocks = bool(whole.budget.equal_blocks)
        removable = removable_blocks(whole.model, whole.images.all, _keeps(whole), whole_blocks=whole_blocks)
        if not removable.candidates:
            why = "; ".join(f"{name}: {reason}" for name, reason in removable.kept.items())
            why = why or "none lies in a list of at least two, adds to its input and keeps its shape"
            whole.leave_out(f"depth=True finds no block that can be removed ({why}), so only channels are removed")
            return whole
        whole.images.judging("depth=True")
        whole = replace(whole, is_search=True)
        return replace(whole, depth=cls(whole, removable))

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
            except ConfigError as error:  # the network has no channels that can be removed
                if not count:
                    raise
                _logger.info("%d blocks are not removed: %s", count, error)
                return
            (judgement,) = judged(whole.model, [made.dense], judges, whole.settings.outputs)
            loss = judgement.loss if math.isfinite(judgement.loss) else math.inf
            is_met = budget_outcome(whole.budget.kind, share, made.left, "").is_met
            found[count] = made
            tried[count] = DepthTried(count, self.left(count), made.left, loss, is_met, is_chosen=False)

        # Where few channels don't make a network fast enough, blocks go first.
        overhead = self.overhead if whole.budget.kind == "latency" else math.nan
        first = path.nearest(share / overhead) if overhead > share else 0
        attempt(first)
        middle = max(first, path.nearest(share**_MIDDLE))
        attempt(middle)
        fewer, more = _BETWEEN
        others = [_order(each) for count, each in tried.items() if count != middle]
        is_better = middle in tried and _order(tried[middle]) < min(others, default=(True, math.inf))
        last = path.nearest(share ** (more if is_better else fewer))
        if is_better:
            # Blocks may bring all of the saving, if the network without them loses less than what was tried.
            all_of_it = path.first_below(share)
            is_no_worse = path.states[all_of_it].loss <= tried[middle].loss
            last = all_of_it if is_no_worse or not any(each.is_met for each in tried.values()) else last
        attempt(max(first, last))
        if not found:
            attempt(0)
        counts = sorted(tried)
        best = min(counts, key=lambda count: _order(tried[count]))
        tried[best] = replace(tried[best], is_chosen=True)
        removed, chosen = path.states[best].removed, found[best]
        layers = replace(chosen.layers, notes=(*chosen.layers.notes, *map(str, removed)))
        depth = DepthOutcome(removed, tuple(tried[count] for count in counts), self.removable.kept, overhead)
        return replace(chosen, layers=layers, depth=depth)

    def without(self, count: int, share: float) -> Pipeline:
        """Remove so many blocks, and channels for the rest of the budget."""
        whole = self.whole
        if not count:
            return whole.make(share)
        left = self.left(count)
        if left <= share:
            short = self.path.states[count].net
            dense = to_dense(short, whole.images.example, {})
            return replace(whole.start, shorter=short, dense=dense, layers=dense_report_of(dense), left=left)
        prepared = self.prepared(count)
        made = prepared.recover(min(share / left, 1.0))
        if whole.budget.latency_table is None:
            return replace(made, left=whole.share_left(made))
        # A table knows the layers by their names in the network without the blocks.
        return replace(made, left=left * prepared.share_left(made))

    def prepared(self, count: int) -> Prepared:
        """Return the network without so many blocks; its layers to prune are those of the whole network."""
        whole = self.whole
        if count in self._prepared:
            return self._prepared[count]
        short = self.path.states[count]
        layers: list[str | Mapping[str, Any]] | None = None
        if not whole.prunable.is_default:
            # The entries by the names that the layers have without the blocks.
            layers = []
            for names, settings in _resolved(whole.prunable.entries, whole.model):
                here = [short.here[name] for name in names if name in short.here]
                if here:
                    layers.append({**settings, "op_names": here})
            if not layers:
                raise ConfigError(
                    "a network must have a layer whose channels can be removed, got none that is named (layers)"
                )
        analysis = Analysis.on(short.net, whole.images.example)
        prunable = layers_to_prune(analysis, layers, is_described=whole.is_described)
        table: Any = whole.budget.latency_table
        budget = whole.budget if table is None else replace(whole.budget, latency_table=_table_of(table, short))
        start = Pipeline(analysis, whole.round_to)
        self._prepared[count] = replace(whole, start=start, budget=budget, prunable=prunable)
        return self._prepared[count]

    def left(self, count: int) -> float:
        """Return the share of the cost that the network keeps without so many blocks, with all channels."""
        if count not in self._lefts:
            whole, short = self.whole, self.path.states[count]
            table: Any = whole.budget.latency_table
            if table is None:
                self._lefts[count] = whole.share_left(replace(whole.start, dense=short.net))
            else:
                left = _table_of(table, short)(NetworkCost.on(short.net, whole.example).widths({}))
                self._lefts[count] = float(left / table(NetworkCost.on(whole.model, whole.example).widths({})))
        return self._lefts[count]

    @cached_property
    def overhead(self) -> float:
        """The share of the time that stays if each layer has as few channels as possible."""
        whole = self.whole
        kept = fewest_channels(whole.counted, whole.prunable.entries, whole.round_to)
        if whole.budget.latency_table is not None:
            return whole.planned_left(kept)
        masks = NetworkCost(whole.counted).masks(kept)
        thin = dense_of(whole.model, whole.images.example, masks, check=False, facts=whole.analysis.facts)
        return whole.share_left(replace(whole.start, dense=thin))

    @cached_property
    def path(self) -> DepthPath:
        """The network without one, two, three ... of its blocks."""
        whole = self.whole
        kind, table = whole.budget.kind, whole.budget.latency_table
        if kind == "latency" and table is None:
            table = measure_latency(whole.model, whole.example)
        own: Any = table  # a file is read when the budget is made
        saved = cost_saved(whole.model, whole.example, kind, own)
        judges: Any = whole.images.judges
        return DepthPath(whole.model, whole.images.learned, judges, whole.settings.outputs, self.removable, saved)


def cost_saved(
    model: nn.Module, example: Any, kind: str, table: LatencyTable | None = None
) -> Callable[[Removal], float]:
    """Return a function that gives the share of a network's cost that removing a block saves; of time by a table."""
    unpruned = cost_of(kind, model, example) if table is None else 0
    known: dict[str, float] = {}

    def saved(candidate: Removal) -> float:
        module = model.get_submodule(candidate.name)
        if table is not None:
            layers = [name for name, _ in module.named_modules(prefix=candidate.name) if name in table.layers]
            return _seconds(table, layers) / _seconds(table, table.layers)
        # Blocks of one kind cost the same, and counting takes a run of the network.
        same = f"{candidate.block.rpartition('.')[0]} {module!r}"
        if same not in known:
            trial = detached_copy(model, light=True)
            _remove(trial, candidate, candidate.name)
            known[same] = float(1.0 - cost_of(kind, trial, example) / unpruned)
        return known[same]

    return saved


def _order(tried: DepthTried) -> tuple[bool, float]:
    """Return by what networks are put in order: those that meet the budget first, by loss, the others by cost."""
    return not tried.is_met, tried.loss if tried.is_met else tried.kept


def _seconds(table: LatencyTable, names: Iterable[str]) -> float:
    """Return the seconds of some layers of a table at full width, and their share of those between layers."""
    total = sum(layer.activation for layer in table.layers.values())
    seconds = 0.0
    for name in names:
        layer = table.layers[name]
        between = table.rest * layer.activation / total if total else 0.0
        seconds += layer.at(layer.entering[-1], layer.leaving[-1]) + between
    return seconds


def _table_of(table: LatencyTable, short: Shortened) -> LatencyTable:
    """Return the table of a network without some blocks."""
    layers = {name: table.layers[original] for name, original in short.names.items() if original in table.layers}
    total = sum(layer.activation for layer in table.layers.values())
    share = sum(layer.activation for layer in layers.values()) / total if total else 1.0
    return replace(table, layers=layers, rest=table.rest * share)


def _resolved(entries: Sequence[Mapping[str, Any]], model: nn.Module) -> list[tuple[list[str], dict[str, Any]]]:
    """Return the layers that each entry of a config_list selects, in network order, and its other keys."""
    found = []
    for entry in entries:
        settings = {key: value for key, value in entry.items() if not key.startswith(("op_", "exclude_op_"))}
        found.append((list(matched_modules(model, [dict(entry)])), settings))
    return found


def _keeps(steps: Prepared) -> Callable[[str], str]:
    """Return a function that says why a block must stay, by a config or for the layers that the caller named."""
    model, analysis, is_default = steps.model, steps.analysis, steps.prunable.is_default
    named: dict[str, float] = {}
    for names, settings in _resolved(steps.prunable.entries, model):
        for name in names:
            named[name] = min(named.get(name, 1.0), float(settings.get("max_sparse_ratio", 1.0)))
    coupled: dict[Any, list[str]] = {}
    prunable = [] if is_default else groups_of(analysis, [{"op_names": inner_layers_of(analysis), "sparse_ratio": 0.0}])
    for entry in prunable:
        key = entry.get("dependency_group_id", entry["op_names"][0])
        coupled.setdefault(key, []).extend(entry["op_names"])

    def why(block: str) -> str:
        siblings = model.get_submodule(block.rpartition(".")[0])._modules
        if steps.is_described and not tells_depth(getattr(model, "config", None), len(siblings)):
            return "no config of Transformers can say that there are fewer of these blocks"
        if is_default:
            return ""
        mine = [name for name in named if name.startswith(f"{block}.")]
        if not mine:
            return "no layer in it is named (layers)"
        for names in coupled.values():
            # What writes into the stream shares its channels with layers outside, which keep them.
            is_inside = all(name.startswith(f"{block}.") for name in names)
            if is_inside and not named.keys() & set(names):
                return f"{names[0]} isn't named (layers)"
        bounded = [name for name in mine if named[name] < 1.0]
        return f"{bounded[0]} has a max_sparse_ratio (layers)" if bounded else ""

    return why
