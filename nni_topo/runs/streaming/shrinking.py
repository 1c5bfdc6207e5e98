"""A folder of Transformers pruned block by block: one block, and the states between blocks, are in memory at a time."""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.disk import (
    MIN_FREE_BYTES,
    check_free_disk,
    disk_errors,
    only_process,
    path_of,
    read_json,
    reading,
    write_json,
    write_text,
)
from nni_topo.errors import ConfigError, DataError, listed, raised, shown, unknown_name
from nni_topo.maths.ties import first_smallest
from nni_topo.network.attention.heads import find_attention
from nni_topo.network.cost.measure import count_macs, counting_macs
from nni_topo.network.io.card import CARD, may_write_card, model_card
from nni_topo.network.io.checkpoint import tell_depth
from nni_topo.network.runtime.calibration import HELD_OUT, Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluating, evaluation_mode
from nni_topo.network.runtime.inputs import (
    Call,
    bind_arguments,
    calls,
    cast_floats,
    fitting,
    on_device,
    real_positions_of,
    taken,
)
from nni_topo.network.runtime.memory import check_memory, free_memory_of, freed_at_once, give_back_memory, out_of_memory
from nni_topo.network.runtime.processes import Processes
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.public import public
from nni_topo.network.speedup.dense import DenseReport
from nni_topo.pruners.budget import Budget, as_budget, budget_outcome
from nni_topo.recovery import RecoveryMethod, distillation
from nni_topo.recovery.blocks import gap_after, solutions
from nni_topo.recovery.likeness import NO_SCALE, Answers, Likeness
from nni_topo.rules import ANYTHING, FLAG, NONE, SEED, instance, whole
from nni_topo.runs.images import ImageParts
from nni_topo.runs.prepared import Prepared
from nni_topo.runs.run import resolve_device
from nni_topo.runs.settings import Settings
from nni_topo.runs.streaming.block import STATES, UNPRUNED, WANTED, BlockNet, WantedStates, entering, with_states
from nni_topo.runs.streaming.journal import FOLDER, REPORT, WRITTEN, Journal, finished_report
from nni_topo.runs.streaming.report import BlockRow, StreamingReport, as_report, as_row
from nni_topo.runs.streaming.shards import CONFIG, INDEX, SINGLE, Shards, write_index
from nni_topo.runs.streaming.skeleton import Skeleton, empty_model, output_length, states_of

_COSTS = ("flops", "params")
_COPIES = 12  # of a block while it is pruned, with what the heap holds beside them, as measured
_LEARNING = 20  # values as large as the states that a block keeps for its gradients
_LEARNED_AT_ONCE = 64  # samples of a step of distillation
_CACHE = 2**28  # bytes for intermediate values of a block
_COMPARED = 2  # samples on which the written block is compared with the pruned one
# How far their outputs may be apart: a share of what the block adds, as a GPU may multiply in less than single
# precision, and a share of what it puts out, for rounding.
_ALIKE, _ROUNDED = 1e-2, 1e-5
_WEIGHTS = (".safetensors", ".bin", ".index.json", ".gguf", ".h5", ".msgpack", ".pt", ".pth")
_logger = logging.getLogger(__name__)


@public(
    budget=ANYTHING,
    pruner=instance(str),
    knobs=instance(Mapping) | NONE,
    remove_blocks=ANYTHING,
    compensate=instance(str, RecoveryMethod) | NONE,
    distill=instance(bool, Mapping),
    round_to=whole(1) | NONE,  # not "auto": the widths don't depend on the device
    card=FLAG,
    seed=SEED,
    device=instance(str, torch.device) | NONE,
)
@freed_at_once()
def shrink_pretrained(
    source: str | PathLike[str],
    batches: Iterable[Any],
    folder: str | PathLike[str],
    budget: Budget | Mapping[str, Any],
    *,
    pruner: str = "reconstruction",
    knobs: Mapping[str, Any] | None = None,
    layers: Iterable[str] | None = None,
    remove_blocks: int | Iterable[str] = 0,
    compensate: str | RecoveryMethod | None = "reconstruct",
    distill: Mapping[str, Any] | bool = True,
    round_to: int | None = None,
    card: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> StreamingReport:
    """Prune a model of Transformers that needn't fit into memory, block by block, from a folder into another one.

    Parameters
    ----------
    source : str or path-like
        A folder as ``save_pretrained`` of Transformers writes it: ``config.json`` and safetensors files. It isn't
        changed.
    batches : iterable
        Batches of the model's inputs, without labels, as for :func:`nni_topo.shrink`: for a language model dicts of
        ``input_ids`` and ``attention_mask``. All samples have one length; padding doesn't count where the
        ``attention_mask`` says so. Every eighth sample is held out. Several processes can share them
        (``process_group`` of :class:`nni_topo.Calibration`): each has the states of its own samples, the first one
        writes the weights, and all need the same ``folder``.
    folder : str or path-like
        The folder for the pruned model, new or empty. ``from_pretrained`` of Transformers loads it without this
        package. If the run is stopped, the same call goes on after the last finished block; where it is finished, the
        same call returns its report, which the folder holds as ``shrink_pretrained.json``. Other arguments than
        ``device``, ``card`` and ``progress`` must be the same.
    budget : Budget or mapping
        The share of the whole model's ``flops`` or ``params`` to keep, e.g. ``{"params": 0.5}``. Embeddings and head
        stay as they are, so the blocks lose more. All blocks keep the same widths.
    pruner : str, default="reconstruction"
        Name of a structured pruner that accepts a budget.
    knobs : mapping, optional
        The pruner's own arguments.
    layers : iterable of str, optional
        Names of the layers to prune within a block, such as ``["mlp.gate_proj", "mlp.up_proj"]``. By default all that
        can lose channels.
    remove_blocks : int or iterable of str, default=0
        How many whole blocks are removed, or their names, such as ``["model.layers.5"]``. Of a number those go that
        change the states least, by the mean cosine of the states before and after a block [1]_. The block before a gap
        makes up for it. The first block stays. Blocks that are removed count for the budget; the others lose what is
        still needed.
    compensate : str, RecoveryMethod or None, default="reconstruct"
        Method of :func:`nni_topo.compensate`; None: the weights are not reconstructed.
    distill : mapping or bool, default=True
        Whether each pruned block learns, after reconstruction, what the unpruned block puts out; or knobs of
        :func:`nni_topo.distill`, e.g. ``{"steps": 200}``. The learned weights are kept only if the loss on the held-out
        samples falls.
    round_to : int, optional
        Pruned layers keep a multiple of this number of channels.
    card : bool, default=True
        Whether to write a model card, ``README.md``, as :func:`nni_topo.save_pretrained` does.
    seed : int, default=0
        Seed of all steps.
    device : str, torch.device or None, default=None
        Where everything is computed: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or another device of PyTorch; ``"auto"``: CUDA
        if there, else the CPU. None: the CPU, as ``from_pretrained`` of Transformers loads a model. Inputs may lie on
        any device. A run that was stopped can be continued on another one.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    StreamingReport
        What was done to each block, and how much the outputs of the whole model change, on the held-out samples.

    Raises
    ------
    ConfigError
        If the folders, the device or a knob can't be used, ``folder`` holds a run with other arguments or other files,
        the budget is smaller than what the embeddings and the head take, the model isn't one of Transformers with one
        list of blocks, or its config can't describe the pruned blocks: ``from_pretrained`` would build others, of other
        shapes or, as on a batch of each block, with other outputs.
    DataError
        If files of weights are missing or damaged, weights or states are NaN or infinite (the block is named), samples
        differ in length, or the disk or the memory isn't enough. Blocks that are finished stay on the disk.
    ProcessError
        If one of the processes that share the batches is gone, or doesn't answer within the group's timeout.

    See Also
    --------
    nni_topo.shrink : A model in memory, with all its choices.
    nni_topo.save_pretrained : Writes a model that was pruned in memory.

    Notes
    -----
    Blocks are the entries of the largest ``nn.ModuleList``. Each is loaded by itself and written in the precision of
    ``source``; distillation learns in single precision. A pruned block gets the states that the pruned blocks before it
    put out, and is to reproduce what the unpruned block makes of the states of the unpruned model, so that it makes up
    for errors of the blocks before it.

    Memory: the embeddings and the head, about twelve times one block, 8 bytes for each pair of input channels of its
    widest layer, the states of all samples three times in single precision (four times where blocks are removed), and
    with distillation what 64 samples need for gradients. States lie in files of ``folder``, in the precision of the
    model. With another ``device`` than the CPU all of this is the device's memory. The machine's memory then holds the
    states and attention masks of all samples, and one block while it is read or written.

    Other files of ``source``, such as those of the tokenizer, are copied.

    References
    ----------
    .. [1] X. Men et al., "ShortGPT: layers in large language models are more redundant than you expect",
       https://arxiv.org/abs/2403.03853
    """
    began = time.perf_counter()
    place, target = path_of(source, "source").expanduser(), path_of(folder, "folder").expanduser()
    calibration = Calibration.of(batches, "batches", shared=True)
    processes = calibration.processes
    is_first = processes is None or processes.rank == 0
    named = _checked_layers(layers)
    settings = Settings(
        pruner=pruner,
        knobs={} if knobs is None else knobs,
        layers=named,
        compensate=compensate,
        distill=distill,
        narrow_heads=False,
        round_to=round_to or 1,  # the widths don't depend on the device
        seed=seed,
        progress=False,
        place="shrink_pretrained",
    )
    wanted = as_budget(budget)
    _check_budget(wanted, settings)
    settings.check_one_distilled("one for each block, which a stopped run needn't start again")
    if target.resolve() == place.resolve():
        raise ConfigError(f"the pruned model needs a folder of its own, got that of the source ({target})")
    going = _checked_blocks(remove_blocks)
    where = torch.device("cpu") if device is None else resolve_device(device)
    shards = Shards(place)
    is_finished = (target / REPORT).is_file()
    if processes is not None:  # the first one's disk counts
        is_finished = processes.first(is_finished, "the folder for the pruned model")
    if not is_finished:
        # What a stopped run has written needn't be written again.
        written = sum(path.stat().st_size for path in target.glob(WRITTEN))
        check_free_disk(target, max(shards.nbytes - written, MIN_FREE_BYTES))
    skeleton = Skeleton(shards, where)
    _check_blocks_of(skeleton, going)
    settings.check_shared(calibration, wanted)
    if distill is not False and calibration.samples < 2:
        raise DataError(
            f"distillation must have at least two samples, one to judge by, got {calibration.samples}: pass more, or "
            "leave distillation out: shrink_pretrained(..., distill=False) (batches)"
        )
    given = [on_device(call, torch.device("cpu")) for call in calls(skeleton.model, calibration)]
    _check_alike(given)
    if processes is not None:
        _check_alike_everywhere(given[0], processes)
    identity = {
        "source": [str(place.resolve()), shards.identity()],
        "budget": [wanted.kind, wanted.share],
        "batches": _digest(given) if processes is None else processes.gather(_digest(given), "the inputs"),
        "pruner": [pruner, _as_text(knobs or {})],
        "layers": named,
        "remove_blocks": going,
        "compensate": [_told(compensate), _as_text(vars(compensate) if isinstance(compensate, RecoveryMethod) else {})],
        "distill": _as_text(distill) if isinstance(distill, Mapping) else distill,
        "round_to": round_to,
        "seed": seed,
    }
    if is_finished:
        content = finished_report(target, identity)
        with reading(target / REPORT, "the report of a run"):
            return as_report(content)
    with only_process(target, wait=False) if is_first else nullcontext():
        journal = Journal(target, identity, processes)
        run = _Run(skeleton, calibration, given, journal, wanted, settings, going)
        if journal.done == 0:
            run.begin()
        shows = progress if is_first else False
        for number in bar("shrink_pretrained", shows, range(journal.done, len(journal.kept)), done=journal.done):
            run.prune(number)
            give_back_memory(skeleton.model)  # of the block, which is let go
        report = run.report()
        run.finish(report, place, card=card)
    if is_first:
        (target / ".lock").unlink(missing_ok=True)
    _logger.info("%d blocks were pruned in %.0f s", len(report.blocks), time.perf_counter() - began)
    return report


def _check_budget(budget: Budget, settings: Settings) -> None:
    """Raise ConfigError for a budget that can't be counted block by block."""
    if budget.kind not in _COSTS:
        raise ConfigError(
            f"a model that is pruned block by block needs a budget of {' or '.join(_COSTS)}, got {budget.kind} (budget)"
        )
    if budget.allocation != "uniform":
        raise ConfigError(
            f"all blocks keep the same widths, by the allocation 'uniform', got {budget.allocation!r} (budget)"
        )
    settings.check_has_size("shrink_pretrained needs")


def _checked_layers(layers: Iterable[str] | None) -> list[str] | None:
    """Return the names of layers as a list."""
    if layers is None:
        return None
    named = [layers] if isinstance(layers, str) else list(layers)
    if not named or not all(isinstance(each, str) for each in named):
        raise ConfigError(f"layers must name layers within a block, got {named!r} (layers, shrink_pretrained)")
    return named


def _checked_blocks(remove_blocks: int | Iterable[str]) -> int | list[str]:
    """Return the number of blocks to remove, or their names as a list."""
    if isinstance(remove_blocks, int) and not isinstance(remove_blocks, bool) and remove_blocks >= 0:
        return remove_blocks
    if isinstance(remove_blocks, Iterable) and not isinstance(remove_blocks, str):
        named = list(remove_blocks)
        if named and all(isinstance(each, str) for each in named):
            return sorted(set(named))
    raise ConfigError(
        "remove_blocks must be an integer of at least 0 or a list of names of blocks, got "
        f"{shown(remove_blocks)} (shrink_pretrained)"
    )


def _check_blocks_of(skeleton: Skeleton, going: int | Sequence[str]) -> None:
    """Raise ConfigError for blocks that a model lacks, or can't do without."""
    names = [skeleton.name_of(index) for index in range(len(skeleton))]
    if not isinstance(going, int):
        for name in going:
            if name not in names:
                raise unknown_name("a block", name, names, "remove_blocks")
        if names[0] in going:
            raise ConfigError(f"the first block must stay, got its name, {names[0]} (remove_blocks)")
    elif going >= len(names):
        raise ConfigError(f"the first of {len(names)} blocks must stay, got {going} to remove (remove_blocks)")


def _check_alike(given: Sequence[Call]) -> None:
    """Raise DataError unless all batches have the same inputs."""
    for number, (args, kwargs) in enumerate(given):
        if len(args) != len(given[0][0]):
            raise DataError(
                f"all batches must have the same inputs, got {len(args)} and {len(given[0][0])} without a name "
                f"(batches {number} and 0)"
            )
        different = sorted(kwargs.keys() ^ given[0][1].keys())
        if different:
            raise DataError(
                f"all batches must have the same inputs, got {different[0]} in one of two alone; give it in all or in "
                f"none: an attention_mask of ones says that nothing is padding (batches {number} and 0)"
            )


def _check_alike_everywhere(call: Call, processes: Processes) -> None:
    """Raise DataError unless the batches of all processes have the same inputs."""
    found = processes.gather((len(call[0]), sorted(call[1])), "the inputs")
    for rank, each in enumerate(found):
        if each != found[0]:
            shown = [
                f"{count} without a name and {listed(names) or 'none'} by name" for count, names in (found[0], each)
            ]
            raise DataError(
                f"batches must have the same inputs in all processes, got {shown[0]} in rank 0, {shown[1]} in rank "
                f"{rank} (batches)"
            )


def _digest(given: Sequence[Call]) -> str:
    """Return a digest of all inputs."""
    digest = hashlib.sha256()
    for args, kwargs in given:
        for value in (*args, *(kwargs[name] for name in sorted(kwargs))):
            if isinstance(value, Tensor):
                plain = value.detach().cpu().contiguous()
                digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
                digest.update(plain.flatten().view(torch.uint8).numpy().data)
            else:
                digest.update(_told(value).encode())
    return digest.hexdigest()


def _as_text(knobs: Mapping[str, Any]) -> dict[str, str]:
    return {name: _told(value) for name, value in sorted(knobs.items())}


def _told(value: Any) -> str:
    """Return the ``repr`` of a value without addresses, which are others in each process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


@dataclass
class _BlockWork:
    """One block while it is pruned."""

    name: str
    unpruned: BlockNet  # reads the states after unpruned blocks
    entered: BlockNet  # the same block, which reads those after pruned blocks
    batches: list[dict[str, Any]]
    calibration: Calibration
    wanted: BlockNet | WantedStates  # puts out the states that the pruned block is to reach


class _Run:
    """The steps of a run, whose state is in a journal."""

    def __init__(
        self,
        skeleton: Skeleton,
        calibration: Calibration,
        given: list[Call],
        journal: Journal,
        budget: Budget,
        settings: Settings,  # layers by their names within a block
        remove_blocks: int | list[str],
    ) -> None:
        self._skeleton, self._calls, self._journal = skeleton, given, journal
        self._samples = calibration
        self._is_first = calibration.processes is None or calibration.processes.rank == 0
        self._budget, self._settings = budget, settings
        self._going = remove_blocks
        self._is_held_out = calibration.split()[1] is not None
        self._config_path = journal.folder / CONFIG
        self._described_skeleton: Skeleton | None = None  # of the model that the written config builds
        if journal.rows:
            # A run that goes on doesn't run the first block, which shows it.
            skeleton.output_length = int(journal.rows[0]["output_length"])

    def begin(self) -> None:
        """Choose the blocks that stay; write the states that enter the first, and everything outside of the blocks."""
        skeleton, journal = self._skeleton, self._journal
        with fitting(0, "batches"):
            self._check_room()
        journal.begin_states()
        for number, call in enumerate(self._calls):
            with fitting(number, "batches"):
                args, kwargs = skeleton.entering(call, 0)
            states = args[0] if args else kwargs[STATES]
            if number == 0:
                args, kwargs = skeleton.entering(call, 0)
                again = args[0] if args else kwargs[STATES]
                if not torch.equal(states, again):  # as random masks bring them
                    raise ConfigError(
                        "the same inputs must bring the same states into the first block, got others in the second "
                        "pass, as from random numbers that the model draws; give it what it draws as an input, such as "
                        f"the noise of a masked autoencoder (batches, {type(skeleton.model).__name__})"
                    )
            journal.add_states(number, {STATES: states, UNPRUNED: states.clone()})
        journal.end_states(0)
        journal.kept = self._blocks_that_stay()
        inside = {key for index in range(len(skeleton)) for key in skeleton.keys_of(index).values()}
        prefix = f"{skeleton.blocks_name}."
        # Buffers of older versions of Transformers that lie in blocks aren't needed.
        in_blocks = tuple(f"{start}{prefix}" for start in ("", f"{skeleton.prefix}."))
        rest = [name for name in skeleton.shards.names if name not in inside and not name.startswith(in_blocks)]
        if self._is_first:
            journal.write_weights(self._file(0), skeleton.shards.read(rest))
        journal.note(0)

    def _blocks_that_stay(self) -> list[int]:
        """Return the numbers of the blocks that aren't removed."""
        count = len(self._skeleton)
        if not isinstance(self._going, int):
            return [index for index in range(count) if self._skeleton.name_of(index) not in self._going]
        if not self._going:
            return list(range(count))
        scores: list[float] = []
        states = self._journal.states(len(self._calls))
        for index in range(count):
            cosine, places = 0.0, 0.0
            for state, call, after in self._unpruned_through(index, states):
                before = state[UNPRUNED].to(after)
                # Cosines in single precision: half precision has three digits.
                found = torch.cosine_similarity(before.float(), after.float(), dim=-1)
                real = real_positions_of(self._skeleton.model, call)
                if real is not None and real.shape == found.shape:
                    found = found[real.to(found.device)]
                cosine, places = cosine + float(found.double().sum()), places + found.numel()
                state[UNPRUNED] = after.to(state[UNPRUNED])
            if self._samples.processes is not None:
                sums = torch.tensor([cosine, places], dtype=torch.float64, device="cpu")
                self._samples.processes.add([sums], f"the states before and after {self._skeleton.name_of(index)}")
                cosine, places = sums.tolist()
            scores.append(1.0 - cosine / places)
        going: set[int] = set()
        for _ in range(self._going):
            others = [index for index in range(1, count) if index not in going]
            going.add(others[first_smallest([scores[index] for index in others])])
        return [index for index in range(count) if index not in going]

    def _unpruned_through(
        self, index: int, states: Sequence[dict[str, Tensor]]
    ) -> Iterator[tuple[dict[str, Tensor], Call, Tensor]]:
        """Yield for each batch its states, its call, and what an unpruned block makes of the unpruned states."""
        skeleton = self._skeleton
        entered = entering(skeleton, self._calls, index)
        net: BlockNet = evaluating(BlockNet(skeleton.block(index), skeleton.config, entered.frame, reads_unpruned=True))
        if index == 0:
            self._note_outputs(net, {**states[0], **entered.batches[0]})
        for number, (state, extras, call) in enumerate(zip(states, entered.batches, self._calls, strict=True)):
            with torch.no_grad():
                after = net(**on_device({**state, **extras}, skeleton.device))
            _check_finite(after, skeleton.name_of(index), number)
            yield state, call, after

    def _file(self, number: int) -> str:
        """Return the name of a file of weights: 0 is what lies outside of the blocks, then one for each block."""
        return f"model-{number + 1:05d}-of-{len(self._journal.kept) + 1:05d}.safetensors"

    def _check_room(self) -> None:
        """Raise DataError unless a block can be pruned in the free memory, and the model and its states be written."""
        skeleton = self._skeleton
        widest = 0
        for module in skeleton.blocks[0].modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1:
                widest = max(widest, weight.shape[0], weight[0].numel())
        args, kwargs = skeleton.entering(self._calls[0], 0)
        states = args[0] if args else kwargs[STATES]
        copies = 4 if self._going else 3
        nbytes = copies * 4 * states[0].numel() * self._samples.samples
        block = sum(each.nbytes for each in skeleton.blocks[0].parameters())
        needed = _COPIES * block + 8 * widest**2 + nbytes + _CACHE
        if self._settings.distill is not False:
            needed += 4 * _LEARNING * states[0].numel() * min(self._samples.samples, _LEARNED_AT_ONCE)
        what, cure = "a block with its statistics and states", "pass fewer or shorter samples"
        if skeleton.device.type == "cuda":
            free = free_memory_of(skeleton.device)
            check_memory(needed, f"{what} (on {skeleton.device})", cure, "batches", free=free)
        if skeleton.device.type != "cpu":
            needed = 2 * block + nbytes + _CACHE
        check_memory(needed, what, cure, "batches")
        # States of the unpruned and the pruned network, before and after a block.
        files = 2 * 2 * states[0].nbytes * self._samples.samples
        check_free_disk(self._journal.folder, skeleton.shards.nbytes + files)

    def _work(self, number: int) -> _BlockWork:
        """Load a block that stays, and what enters it in all batches."""
        skeleton, kept = self._skeleton, self._journal.kept
        index = kept[number]
        removed = range(index + 1, kept[number + 1] if number + 1 < len(kept) else len(skeleton))
        entered = entering(skeleton, self._calls, index)
        processes = self._samples.processes
        if processes is not None:
            # A block gets a mask in one process and none in another where one has samples without padding alone.
            known = processes.gather(sorted(entered.batches[0]), f"the inputs of {skeleton.name_of(index)}")
            if any(each != known[0] for each in known):
                entered = entering(skeleton, self._calls, index, adds_padding=True)
        states = self._journal.states(len(self._calls))
        batches = [{**own, **other} for own, other in zip(states, entered.batches, strict=True)]
        block, config = skeleton.block(index), copy.deepcopy(skeleton.config)
        unpruned: BlockNet = evaluating(BlockNet(block, config, entered.frame, reads_unpruned=True))
        own: BlockNet = evaluating(BlockNet(block, config, entered.frame))
        calibration = self._data(batches)
        if index:
            calibration.instead = {STATES: UNPRUNED}
        wanted: BlockNet | WantedStates = unpruned
        if removed:
            wanted = WantedStates(skeleton.device)
            after = [{STATES: batch[STATES], UNPRUNED: batch[UNPRUNED]} for batch in batches]
            for each in (index, *removed):
                for state, _, reached in self._unpruned_through(each, after):
                    state[UNPRUNED] = reached.to(state[UNPRUNED])
            for batch, state in zip(batches, after, strict=True):
                batch[WANTED] = state[UNPRUNED]
        return _BlockWork(skeleton.name_of(index), unpruned, own, batches, calibration, wanted)

    def _data(self, batches: list[dict[str, Any]]) -> Calibration:
        """Return calibration data of states, of the same samples and processes as the model's inputs."""
        found = Calibration(batches, name="batches", groups=self._samples.groups)
        found.processes = self._samples.processes
        return found

    def prune(self, number: int) -> None:
        """Prune one block that stays, write its weights and the states after it and after the gap that follows."""
        began = time.perf_counter()
        work = self._work(number)
        if number == 0:
            self._note_outputs(work.unpruned, work.batches[0])
        for batch, call in enumerate(calls(work.unpruned, work.calibration)):
            with torch.no_grad():
                _check_finite(work.unpruned(*call[0], **call[1]), work.name, batch)
        self._settings.check_layers(work.entered.block)
        images = ImageParts.of(work.calibration, work.entered)
        share: Any = {self._budget.kind: self._block_share(work, images.example)}
        budget = Budget(**share, equal_blocks=True)
        inner = self._settings.layers
        settings = replace(self._settings, layers=None if inner is None else [f"block.{name}" for name in inner])
        made = Prepared.of(work.entered, images, settings, budget).recover(budget.share)
        dense, layers = made.dense, made.layers
        del made
        warnings: list[str] = []
        if isinstance(work.wanted, WantedStates):
            # The last layer of the block brings into the states what the removed blocks after it did.
            wanted = work.wanted
            (call, *_) = calls(wanted, Calibration(work.batches[:1]))
            gap = gap_after(dense, dense.block, wanted, wanted.states, call)
            if gap is None:
                warnings.append(
                    f"no weights of {work.name} are solved to make up for the blocks removed after it: none of its "
                    "layers is added to the states without a norm before the sum, as in Gemma 3, or after it, as in "
                    "BERT"
                )
                _logger.warning("%s", warnings[-1])
            else:
                gap.fill(solutions((wanted, dense), [gap], images.learned, "auto")[0])
        give_back_memory(work.entered)
        is_distilled = False
        if self._settings.distill is not False:
            knobs = dict(self._settings.distillation_knobs)
            offered = {
                "objective": "squares",
                "held_out": images.judges,
                "seed": self._settings.seed,
                "progress": False,
            }
            done = distillation(dense, work.wanted, images.learned, **offered | knobs)
            dense, is_distilled = done.model, done.is_kept
        if self._is_first:
            self._write(number, work.entered, dense, layers)
        distances = self._advance(number, work, dense)
        row = BlockRow(
            block=work.name,
            params_before=_parameters(work.entered),
            params=_parameters(dense),
            distance=distances[-1],
            calibration_distance=distances[0],
            is_distilled=is_distilled,
            seconds=time.perf_counter() - began,
        )
        costs = {
            "cost_before": self._cost_of(work.entered, images.example),
            "cost": self._cost_of(dense, images.example),
        }
        others = {"output_length": self._skeleton.output_length, "warnings": warnings}
        self._journal.note(number + 1, asdict(row) | costs | others)

    def _note_outputs(self, net: BlockNet, batch: dict[str, Any]) -> None:
        """Note whether blocks return a tensor or a tuple; the model must know it to pass by a block."""
        found: list[Any] = []
        handle = net.block.register_forward_hook(lambda module, args, output: found.append(output))
        with torch.no_grad():
            net(**on_device(batch, self._skeleton.device))
        handle.remove()
        self._skeleton.output_length = output_length(found[0])

    def _block_share(self, work: _BlockWork, example: Any) -> float:
        """Return the share of each block's cost that is kept, so that the whole model keeps its share."""
        total, rest = self._costs(work, example)
        left = len(self._journal.kept) / len(self._skeleton)
        share = (self._budget.share * total - rest) / (total - rest) / left
        if share <= 0.0:
            raise ConfigError(
                f"a budget must leave something for the blocks, got {self._budget.share:g} of the {self._budget.kind} "
                f"where {rest / total:.3g} lie outside of the blocks (budget)"
            )
        return min(share, 1.0)

    def _costs(self, work: _BlockWork, example: Any) -> tuple[float, float]:
        """Return the cost of the whole model, and of what lies outside of the blocks."""
        skeleton = self._skeleton
        inside = sum(_parameters(block) for block in skeleton.blocks)
        if self._budget.kind == "params":
            total = _parameters(skeleton.model)
            return float(total), float(total - inside)
        own = self._cost_of(work.entered, example)
        if own == 0:
            raise ConfigError(
                "blocks must have linear layers or convolutions whose cost can be counted, got none "
                f"({type(work.entered.block).__name__})"
            )
        rest = self._macs_of_rest()
        return rest + own * len(skeleton), rest

    def _cost_of(self, net: nn.Module, example: Any) -> int:
        """Return the multiply-accumulates of one sample, or the parameters."""
        if self._budget.kind == "params":
            return _parameters(net)
        return count_macs(net, example)

    def _macs_of_rest(self) -> float:
        """Return the multiply-accumulates of one sample outside of the blocks, as PyTorch counts them."""
        call = self._calls[0]
        args, kwargs = self._skeleton.entering(call, 0)
        states = args[0] if args else kwargs[STATES]
        with counting_macs(self._skeleton.model) as counted:
            self._skeleton.outputs(call, states)
        return counted.all / len(states)

    def _write(self, number: int, unpruned: BlockNet, dense: Any, layers: DenseReport) -> None:
        """Write the weights of a pruned block, and with the first one the config that describes it."""
        index = self._journal.kept[number]
        # The block gets another number.
        blocks = self._skeleton.blocks_name.rpartition(".")[2]
        old, new = rf"(^|\.){re.escape(blocks)}\.{index}\.", rf"\g<1>{blocks}.{number}."
        keys = {name: re.sub(old, new, key, count=1) for name, key in self._skeleton.keys_of(index).items()}
        tensors = self._skeleton.stored(dense.block, index)
        if number == 0:
            widths = {row.name.removeprefix("block."): [row.before, row.after] for row in layers.rows}
            narrower = [name for name, (before, after) in widths.items() if after < before]
            config = self._described(unpruned, dense, narrower)
            config.architectures = [type(self._skeleton.model).__name__]
            with disk_errors(self._config_path):
                config.save_pretrained(self._journal.folder)
            write_json(self._journal.folder / FOLDER / "widths.json", widths)
        if self._described_skeleton is None:
            config = type(self._skeleton.model).config_class.from_pretrained(self._journal.folder)
            self._described_skeleton = self._skeleton.described(config)
        shapes = {
            name: tuple(value.shape) for name, value in self._described_skeleton.blocks[number].state_dict().items()
        }
        for name, tensor in tensors.items():
            expected = shapes.get(name)
            if expected != tuple(tensor.shape):
                raise ConfigError(
                    f"all blocks must keep the same widths, as the config has one number for all, got "
                    f"{tuple(tensor.shape)} where it makes {expected} ({self._skeleton.name_of(index)}.{name})"
                )
        self._check_computes(number, self._described_skeleton, dense, tensors)
        types = {name: tensor.dtype for name, tensor in unpruned.block.state_dict().items()}  # those of the files
        values = {keys[name]: tensor.to(types[name]) for name, tensor in tensors.items()}
        self._journal.write_weights(self._file(number + 1), values)

    def _check_computes(self, number: int, described: Skeleton, dense: Any, tensors: Mapping[str, Tensor]) -> None:
        """Raise ConfigError unless the block that the written config builds puts out what the pruned block does.

        What a class computes from its config, such as a scale from the number of heads, shows in no shape.
        """
        index = self._journal.kept[number]
        states = self._journal.states(1)[0]
        few = torch.arange(min(_COMPARED, len(states[STATES])))
        call, entered = taken(self._calls[0], few), states[STATES][few].to(self._skeleton.device)
        wide = torch.promote_types(entered.dtype, torch.float32)
        entered = entered.to(wide)
        place = f"{self._skeleton.name_of(index)}, {type(self._skeleton.model).__name__}"
        rule = "the block that from_pretrained builds by the config must put out what the pruned block does"
        cure = "prune other layers only (layers), or use nni_topo.shrink and nni_topo.save in memory"
        outputs = []
        try:
            for skeleton, place_of_block, block in (
                (self._skeleton, index, detached_copy(dense.block)),
                (described, number, described.filled(number, tensors)),
            ):
                args, kwargs = cast_floats(with_states(skeleton.entering(call, place_of_block), entered), wide)
                with evaluation_mode(block), torch.no_grad():
                    outputs.append(states_of(block.to(wide)(*args, **kwargs)).double())
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if out_of_memory(error) or not outputs:
                raise
            raise ConfigError(f"{rule}, got {raised(error)}; {cure} ({place})") from error
        wanted, found = outputs
        apart, added = float((wanted - found).norm()), float((wanted - entered).norm())
        if not apart <= _ALIKE * added + _ROUNDED * float(wanted.norm()):
            share = f"{apart / added:.2g} times what the block adds to the states" if added else f"{apart:.2g}"
            raise ConfigError(f"{rule}, got outputs that differ by {share}; {cure} ({place})")

    def _described(self, unpruned: BlockNet, dense: Any, pruned: Sequence[str]) -> Any:
        """Return a config that describes blocks like the first pruned one; ConfigError where none does."""
        config, kept = copy.deepcopy(dense.config), self._journal.kept
        blocks = self._skeleton.blocks_name
        tell_depth(SimpleNamespace(config=config), {blocks: (len(self._skeleton), kept)})
        if len(kept) < len(self._skeleton) and getattr(config, "num_hidden_layers", None) != len(kept):
            raise ConfigError(
                "a config must have the number of blocks as num_hidden_layers, where blocks are removed, got none; use "
                f"nni_topo.shrink and nni_topo.save in memory ({type(config).__name__})"
            )
        heads = copy.deepcopy(config)
        before, after = find_attention(unpruned.block), find_attention(dense.block)
        removed = {each.heads - after[name].heads for name, each in before.items()}
        if len(removed) == 1:
            count = removed.pop()
            heads.pruned_heads = {index: list(range(count)) for index in range(len(kept))}
        wanted = {name: tuple(value.shape) for name, value in self._skeleton.stored(dense.block, 0).items()}
        first = f"{self._skeleton.blocks_name}.0."
        different = ""
        described: list[str] = []  # pruned layers that a config can describe
        for candidate in (config, heads):
            try:
                validate = getattr(candidate, "validate", None)  # of Transformers 5
                if callable(validate):
                    validate()
                built = empty_model(type(self._skeleton.model), candidate).state_dict()
            except Exception as error:  # a constructor may refuse such numbers in its own words
                different = different or " ".join(str(error).split())
                continue
            shapes = {name.removeprefix(first): tuple(value.shape) for name, value in built.items() if first in name}
            wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
            if not wrong:
                return candidate
            different = f"{wrong[0]} of {wanted[wrong[0]]} where the config makes {shapes.get(wrong[0])}"
            for name in pruned:
                if name not in described and not any(each.startswith(f"{name}.") for each in wrong):
                    described.append(name)
        cure = f"prune only {', '.join(described)}" if described else "prune other layers only"
        raise ConfigError(
            f"from_pretrained must be able to build the model by its config, got {different}; {cure} (layers), or use "
            f"nni_topo.shrink and nni_topo.save in memory ({type(self._skeleton.model).__name__})"
        )

    def _advance(self, number: int, work: _BlockWork, dense: nn.Module) -> tuple[float, float]:
        """Write the states after a block; return their distances on the calibration data and on held-out samples."""
        journal = self._journal
        held_out = self._samples.held_out(HELD_OUT) if self._is_held_out else None
        sums = [_Distance(), _Distance()]
        first = 0
        journal.begin_states()
        for place, batch in enumerate(work.batches):
            (call,) = calls(work.entered, Calibration([batch]))
            with evaluation_mode(dense), torch.no_grad():
                wanted = work.wanted(*call[0], **call[1])
                reached = states_of(dense(*call[0], **call[1]))
            real = real_positions_of(work.entered, call)
            own = torch.zeros(len(wanted), dtype=torch.bool)
            if held_out is not None:
                own = held_out[first : first + len(wanted)]
            first += len(wanted)
            for part, chosen in zip(sums, (~own, own), strict=True):
                part.add(wanted[chosen], reached[chosen], None if real is None else real[chosen])
            kind = batch[STATES].dtype
            states = {STATES: reached.to(kind), UNPRUNED: wanted.to(kind)}
            for name, value in states.items():
                if not bool(torch.isfinite(value).all()):
                    whose = "pruned" if name == STATES else "unpruned"
                    raise DataError(
                        f"states must be finite in the model's precision, {kind}, got NaN or infinity after the "
                        f"{whose} block ({work.name}, batch {place})"
                    )
            journal.add_states(place, states)
        journal.end_states(number + 1)
        if self._samples.processes is not None:
            for part in sums:
                part.pool(self._samples.processes)
        learned = sums[0].share
        return learned, (sums[1].share if self._is_held_out else learned)

    def report(self) -> StreamingReport:
        """Measure how much the model's outputs change, and return the report."""
        skeleton, journal = self._skeleton, self._journal
        states = journal.states(len(self._calls))
        batches = []
        for own, call in zip(states, self._calls, strict=True):
            named = {name: value for name, value in bind_arguments(skeleton.model, call).items() if value is not None}
            batches.append({**named, **own})
        learned, held_out = self._data(batches).split()
        judged = learned if held_out is None else held_out
        answers = Answers(_Tail(skeleton, UNPRUNED), judged)
        (likeness,) = answers.likenesses(_Tail(skeleton, STATES))
        rows = tuple(as_row(row) for row in journal.rows)
        # Whether the budget is met. All blocks cost the same before.
        cost_before = journal.rows[0]["cost_before"] * len(skeleton)
        cost = sum(row["cost"] for row in journal.rows)
        if self._budget.kind == "params":
            rest = float(_parameters(skeleton.model) - cost_before)
        else:
            rest = self._macs_of_rest()
        # Blocks that lost nothing: those that were removed have saved enough.
        is_narrower = any(row["cost"] < row["cost_before"] for row in journal.rows)
        why = "blocks are equally wide" if is_narrower else "the removed blocks save more"
        left = (rest + cost) / (rest + cost_before)
        budget = budget_outcome(self._budget.kind, self._budget.share, left, why)
        before = _parameters(skeleton.model)
        removed = [skeleton.name_of(index) for index in range(len(skeleton)) if index not in journal.kept]
        after = before - sum(row.params_before - row.params for row in rows) - len(removed) * rows[0].params_before
        # By layer of the pruned blocks, the number of channels before and after.
        widths: Any = read_json(journal.folder / FOLDER / "widths.json") if self._is_first else None
        if self._samples.processes is not None:
            widths = self._samples.processes.first(widths, "the widths")
        return StreamingReport(
            blocks=rows,
            params_before=before,
            params=after,
            widths={name: (old, new) for name, (old, new) in widths.items()},
            budget=budget,
            likeness=likeness,
            samples=learned.samples_of_all,
            held_out=0 if held_out is None else held_out.samples_of_all,
            pruner=self._settings.pruner_name,
            recovery=self._settings.recovery_name,
            removed=tuple(removed),
            warnings=(
                *_warnings(rows, held_out, likeness),
                *(each for row in journal.rows for each in row.get("warnings", ())),
            ),
        )

    def finish(self, report: StreamingReport, source: Path, *, card: bool) -> None:
        """Write the index of the weights and the card, copy other files, write the report and delete the states."""
        journal, folder = self._journal, self._journal.folder
        if not self._is_first:
            journal.finish(asdict(report))
            return
        names = {file: content["names"] for file, content in journal.files.items()}
        write_index(folder, names, sum(content["nbytes"] for content in journal.files.values()))
        for path in sorted(source.iterdir()):
            is_own = path.name.endswith(_WEIGHTS) or path.name in (SINGLE, INDEX, CONFIG, CARD, REPORT)
            if path.is_file() and not is_own and not path.name.startswith("."):
                with disk_errors(folder):
                    shutil.copyfile(path, folder / path.name)
        if card and may_write_card(folder / CARD):
            model = self._skeleton.model
            own = model.config
            model.config = type(model).config_class.from_pretrained(folder)
            try:
                write_text(folder / CARD, model_card(model, report))
            finally:
                model.config = own
        journal.finish(asdict(report))


class _Tail(nn.Module):
    """What a model makes of the states after its last block."""

    def __init__(self, skeleton: Skeleton, reads: str) -> None:
        super().__init__()
        self.model = skeleton.model
        self._output: Callable[[Call, Tensor], Any] = skeleton.outputs
        self._reads = reads

    def forward(self, hidden_states: Tensor, unpruned_states: Tensor, **inputs: Any) -> Any:
        """Return the model's output."""
        states = hidden_states if self._reads == STATES else unpruned_states
        return self._output(((), inputs), states)


def _check_finite(states: Tensor, name: str, batch: int) -> None:
    """Raise DataError for an unpruned block whose outputs aren't finite."""
    if not bool(torch.isfinite(states).all()):
        raise DataError(
            f"what a block of the unpruned model puts out must be finite, got NaN or infinity ({name}, batch {batch})"
        )


class _Distance:
    """Sums of the squared distance between states, and of the variance of the wanted ones."""

    def __init__(self) -> None:
        self._squares, self._total, self._sum, self._count = 0.0, 0.0, 0.0, 0

    def add(self, wanted: Tensor, reached: Tensor, real: Tensor | None) -> None:
        """Add the states of some samples, (samples, places, width), of the places that aren't padding."""
        if real is not None and real.shape == wanted.shape[:2]:
            wanted, reached = wanted[real], reached[real]
        wanted, reached = wanted.double(), reached.double()
        self._squares += float((wanted - reached).square().sum())
        self._total += float(wanted.square().sum())
        self._sum += float(wanted.sum())
        self._count += wanted.numel()

    def pool(self, processes: Processes) -> None:
        """Take in the states of all processes."""
        sums = torch.tensor([self._squares, self._total, self._sum, self._count], dtype=torch.float64, device="cpu")
        processes.add([sums], "the states after a block")
        self._squares, self._total, self._sum = sums[:3].tolist()
        self._count = int(sums[3])

    @property
    def share(self) -> float:
        """The squared distance over the variance; NaN without samples."""
        if not self._count:
            return math.nan
        variance = self._total - self._sum**2 / self._count
        return self._squares / variance if variance > 0.0 else math.nan


def _warnings(rows: Sequence[BlockRow], held_out: Calibration | None, likeness: Likeness) -> tuple[str, ...]:
    """Return what makes the figures doubtful."""
    if math.isinf(likeness.distance.value):
        return (NO_SCALE,)
    if held_out is None:
        return (f"no sample could be held out: the figures are those of the calibration data; pass {HELD_OUT} or more",)
    last = rows[-1]
    if last.distance > 2.0 * last.calibration_distance:
        return (
            f"the samples are too few for this model (distance after the last block {last.distance:.3g} on held-out "
            f"samples, {last.calibration_distance:.3g} on calibration data): pass more, or keep a larger share",
        )
    return ()


def _parameters(module: nn.Module) -> int:
    return sum(each.numel() for each in module.parameters())
