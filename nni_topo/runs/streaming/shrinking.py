"""Prune a Transformers model in a folder block by block, with the weights of only one block in memory."""

from __future__ import annotations

import copy
import math
import shutil
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.disk import check_free_disk, disk_errors, only_process, path_of, read_json
from nni_topo.errors import ConfigError, DataError, listed, out_of_memory, raised
from nni_topo.network.attention.config import put_heads, put_widths
from nni_topo.network.attention.heads import find_attention
from nni_topo.network.cost.cost import cost_of
from nni_topo.network.cost.measure import count_params, counting_macs
from nni_topo.network.io.vocabulary import TEXTS, TOKENIZER, Vocabulary, VocabularyReport
from nni_topo.network.layers.kinds import output_channels, with_transposed_weights
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
    take_samples,
)
from nni_topo.network.runtime.memory import check_memory, free_memory_of
from nni_topo.network.runtime.progress import bar
from nni_topo.network.runtime.public import public
from nni_topo.pruners.budget import Budget, as_budget, budget_outcome, warn_if_missed
from nni_topo.recovery import RecoveryMethod, distillation
from nni_topo.recovery.likeness import NO_SCALE, Answers
from nni_topo.rules import ANYTHING, NONE, SEED, all_of, instance, whole
from nni_topo.runs.images import ImageParts
from nni_topo.runs.prepared import Prepared
from nni_topo.runs.run import resolve_device
from nni_topo.runs.settings import PREFERRED, Settings
from nni_topo.runs.streaming.block import PADDING_MASK, UNPRUNED, BlockNet, entering
from nni_topo.runs.streaming.heap import freed_at_once, give_back
from nni_topo.runs.streaming.journal import JOURNAL, Journal
from nni_topo.runs.streaming.report import BlockRow, StreamingReport, as_report
from nni_topo.runs.streaming.skeleton import (
    CONFIG,
    INDEX,
    SINGLE,
    STATES,
    Skeleton,
    empty_model,
    states_in,
    states_of,
    with_states,
)

_COPIES = 12  # measured memory for pruning a block, in sizes of the block
_LEARNING = 20  # memory that a block needs for gradients, in sizes of the states
_LEARNED_AT_ONCE = 64  # samples in a step of distillation
_CACHE = 2**28  # bytes for intermediate values of a block
_COMPARED = 2  # samples on which the written block is compared with the pruned one
# Largest difference between their outputs: a share of the block's change of the states, because GPUs may multiply in
# less than single precision, plus a share of its output for rounding.
_ALIKE, _ROUNDED = 1e-2, 1e-5
_IDS = "input_ids"
_GENERATION = "generation_config.json"
_TOKENIZER_FILES = ("tokenizer.json", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")
_CURE = "prune other layers only (layers), or use nni_topo.shrink and nni_topo.save in memory"
_WEIGHTS = (".safetensors", ".bin", ".index.json", ".gguf", ".h5", ".msgpack", ".pt", ".pth")


@public(
    budget=ANYTHING,
    pruner=instance(str),
    knobs=instance(Mapping) | NONE,
    layers=all_of(instance(str), Collection, 1) | NONE,
    vocabulary=TEXTS | NONE,
    compensate=instance(str, RecoveryMethod) | NONE,
    distill=instance(bool, Mapping),
    round_to=whole(1) | NONE,  # not "auto": the widths don't depend on the device
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
    layers: Collection[str] | None = None,
    vocabulary: Collection[str] | None = None,
    compensate: str | RecoveryMethod | None = "reconstruct",
    distill: Mapping[str, Any] | bool = True,
    round_to: int | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> StreamingReport:
    """Prune a Transformers model block by block from one folder into another; it needn't fit into memory.

    Parameters
    ----------
    source : str or path-like
        A folder as ``save_pretrained`` of Transformers writes it: ``config.json`` and safetensors files. It isn't
        changed.
    batches : iterable
        Batches of the model's inputs, without labels, as for :func:`nni_topo.shrink`: for a language model dicts of
        ``input_ids`` and ``attention_mask``. All samples have the same length; places that the
        ``attention_mask`` marks as padding don't count. Every eighth sample is held out.
    folder : str or path-like
        The folder for the pruned model, new or empty. ``from_pretrained`` of Transformers loads it without this
        package. If the run is stopped, the same call continues after the last finished block; after a finished run
        it returns the report, which the folder holds as ``shrink_pretrained.json``. All arguments except ``device`` and
        ``progress`` must be the same.
    budget : Budget or mapping
        The share of the whole model's ``flops`` or ``params`` to keep, e.g. ``{"params": 0.5}``. Embeddings and head
        aren't pruned, so the blocks lose more. All blocks keep the same widths.
    pruner : str, default="reconstruction"
        Name of a structured pruner that accepts a budget.
    knobs : mapping, optional
        The pruner's own arguments.
    layers : collection of str, optional
        Names of the layers to prune within a block, such as ``["mlp.gate_proj", "mlp.up_proj"]``. By default all layers
        that can lose channels.
    vocabulary : collection of str, optional
        Texts whose tokens stay, with those of the batches, as :func:`nni_topo.trim_vocabulary` chooses them with the
        tokenizer in ``source``. Embeddings and head lose the rows of all other tokens before the blocks are pruned,
        and ``folder`` gets the new tokenizer. The budget must be one of ``params``, which is a share of the model with
        all tokens, so that the blocks lose less. The batches have the ids of ``source``.
    compensate : str, RecoveryMethod or None, default="reconstruct"
        Method of :func:`nni_topo.compensate`; None: the weights are not reconstructed.
    distill : mapping or bool, default=True
        Whether each pruned block learns the unpruned block's outputs after reconstruction; or knobs of
        :func:`nni_topo.distill`, e.g. ``{"steps": 200}``. The learned weights are kept only if the loss on the held-out
        samples falls.
    round_to : int, optional
        Pruned layers keep a multiple of this number of channels.
    seed : int, default=0
        Seed of all steps.
    device : str, torch.device or None, default=None
        Where everything is computed: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or another device of PyTorch; ``"auto"``: CUDA
        if available, else the CPU. None: the CPU, as ``from_pretrained`` of Transformers loads a model. Inputs may be
        on any device. A stopped run can be continued on another one.
    progress : bool or None, default=None
        Show on standard error how far it is: in a terminal a bar, elsewhere a line every half minute. None: after
        five seconds.

    Returns
    -------
    StreamingReport
        The result for each block, and the change of the whole model's outputs on held-out samples.

    Raises
    ------
    ConfigError
        If the folders, the device or a knob can't be used, ``folder`` holds a run with other arguments or other files,
        the budget is smaller than the share of the embeddings and the head, the model isn't one of Transformers with
        one list of blocks, or its config can't describe the pruned blocks: ``from_pretrained`` would build blocks with
        other shapes or, as checked on a few samples, with other outputs. Or if the vocabulary can't be trimmed.
    DataError
        If files of weights are missing or damaged, weights or states are NaN or infinite (the block is named), samples
        differ in length, the vocabulary's texts need all tokens, or the disk or the memory isn't enough. Finished
        blocks stay on the disk.

    See Also
    --------
    nni_topo.shrink : A model in memory, with all its choices.
    nni_topo.save_pretrained : Writes a model that was pruned in memory.
    nni_topo.trim_vocabulary : Removes tokens of a model in memory.

    Notes
    -----
    Blocks are the entries of the largest ``nn.ModuleList``. Each is loaded alone and written in the precision of
    ``source``, or of its first weights if there are several; distillation uses single precision. The inputs of a pruned
    block are the states after the pruned blocks before it, and its targets are the states after the same block of the
    unpruned model, so that it makes up for errors of the blocks before it.

    Memory: the embeddings and the head, about twelve times one block, and the states of all samples three times in
    single precision; if ``device`` isn't the CPU, this is the device's memory. States lie in files of
    ``folder``. Other files of ``source``, such as the tokenizer's, are copied.
    """
    place, target = path_of(source, "source").expanduser(), path_of(folder, "folder").expanduser()
    calibration = Calibration.of(batches, "batches")
    settings = Settings(
        pruner=pruner,
        knobs={} if knobs is None else knobs,
        layers=None if layers is None else list(layers),
        compensate=compensate,
        distill=distill,
        round_to=round_to or PREFERRED,  # the widths don't depend on the device
        seed=seed,
        progress=False,
        place="shrink_pretrained",
    )
    wanted = as_budget(budget)
    if wanted.kind not in ("flops", "params"):
        raise ConfigError(
            f"a model that is pruned block by block needs a budget of flops or params, got {wanted.kind} (budget)"
        )
    if wanted.allocation != "uniform":
        raise ConfigError(
            f"all blocks keep the same widths, by the allocation 'uniform', got {wanted.allocation!r} (budget)"
        )
    if vocabulary is not None and wanted.kind != "params":
        raise ConfigError(
            "with vocabulary=texts the budget must be one of params, because fewer tokens save no "
            f"multiply-accumulates, got {wanted.kind} (budget)"
        )
    settings.check_together(wanted, "shrink_pretrained")
    if target.resolve() == place.resolve():
        raise ConfigError(f"the pruned model needs a folder of its own, got that of the source ({target})")
    where = torch.device("cpu") if device is None else resolve_device(device)
    skeleton = Skeleton(place, where)
    settings.check_two_samples(calibration)
    given = [on_device(call, torch.device("cpu")) for call in calls(skeleton.model, calibration)]
    inputs = [[f"{len(args)} without a name", *sorted(kwargs)] for args, kwargs in given]
    other = next((each for each in inputs if each != inputs[0]), None)
    if other is not None:
        raise DataError(
            f"all batches must have the same inputs, got {listed(inputs[0])}, and {listed(other)}; give each in all or "
            "in none: an attention_mask of ones says that nothing is padding (batches)"
        )
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in skeleton.files]
    identity = {
        "source": [str(place.resolve()), files],
        "budget": [wanted.kind, wanted.share],
        "batches": (calibration.sizes, calibration.digests),
        "pruner": [pruner, sorted(settings.knobs.items())],
        "layers": settings.layers,
        "compensate": [compensate, sorted(vars(compensate).items())]
        if isinstance(compensate, RecoveryMethod)
        else compensate,
        "distill": sorted(distill.items()) if isinstance(distill, Mapping) else distill,
        "round_to": round_to,
        "seed": seed,
    }
    if vocabulary is not None:
        identity["vocabulary"] = list(vocabulary)
    found = read_json(target / JOURNAL)
    if isinstance(found, dict) and "report" in found:  # nothing is written, so a full disk doesn't matter
        journal = Journal(target, identity, len(skeleton))
        journal.delete_states()  # if a run was killed at its end
        return as_report(found["report"])
    trimmed = None
    if vocabulary is not None:
        trimmed = _Trimmed.of(skeleton, given, vocabulary)
        given = trimmed.calls
    with only_process(target, wait=False):
        journal = Journal(target, identity, len(skeleton))
        run = _Run(skeleton, calibration, given, journal, wanted, settings, trimmed)
        journal.begin()
        run.begin()
        done = len(journal.rows)
        for index in bar("shrink_pretrained", progress, range(done, len(skeleton)), done=done):
            run.prune(index)
            give_back()  # the memory of the block
        report = run.report()
        run.finish()
        journal.finish(asdict(report))
    return report


@dataclass(frozen=True)
class _Trimmed:
    """A vocabulary that was trimmed before the blocks are pruned."""

    calls: list[Call]  # with new ids
    tokenizer: Any
    generation: Any  # the new config for generation; None if the source has none
    report: VocabularyReport

    @classmethod
    def of(cls, skeleton: Skeleton, given: Sequence[Call], texts: Collection[str]) -> _Trimmed:
        """Trim the vocabulary of a skeleton in place; the tokens of texts and of calls stay."""
        import transformers

        model, place = skeleton.model, f"{type(skeleton.model).__name__}, vocabulary"
        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(skeleton.folder)
        except Exception as error:  # each tokenizer has errors of its own
            raise ConfigError(
                "with vocabulary=texts the source must hold the model's tokenizer, got none that AutoTokenizer reads: "
                f"{raised(error)} ({skeleton.folder})"
            ) from error
        TOKENIZER.check("tokenizer", tokenizer, place)
        batches = [bind_arguments(model, call) for call in given]
        if not all(isinstance(batch.get(_IDS), Tensor) for batch in batches):
            raise ConfigError(f"batches must hold {_IDS} where a vocabulary is trimmed, got others (batches)")
        has_generation = (skeleton.folder / _GENERATION).is_file()
        if has_generation:
            model.generation_config = transformers.GenerationConfig.from_pretrained(skeleton.folder)
        needed = {number for batch in batches for number in batch[_IDS].unique().tolist()}
        vocabulary = Vocabulary(model, tokenizer, texts, needed=needed)
        params_before, states = count_params(model), states_in(skeleton.entering(given[0], 0))
        vocabulary.put_into(model)
        vocabulary.put_into_config(skeleton.config)
        renumbered: list[Call] = [((), {**batch, _IDS: vocabulary.renumbered(batch[_IDS])}) for batch in batches]
        if not torch.equal(states, states_in(skeleton.entering(renumbered[0], 0))):
            raise ConfigError(
                "the states before the first block must be the same on the rows that stay, got others: the model reads "
                f"more from ids than an embedding of each ({place})"
            )
        return cls(
            calls=renumbered,
            tokenizer=vocabulary.tokenizer,
            generation=model.generation_config if has_generation else None,
            report=vocabulary.report(params_before, count_params(model)),
        )


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
        trimmed: _Trimmed | None,
    ) -> None:
        self._skeleton, self._calls, self._journal = skeleton, given, journal
        self._trimmed = trimmed
        self._trimmed_params = 0 if trimmed is None else trimmed.report.params_before - trimmed.report.params
        self._samples = calibration
        self._budget, self._settings = budget, settings
        self._is_held_out = calibration.split()[1] is not None
        self._described_skeleton: Skeleton | None = None  # the model of the written config
        masks = [call[1].get(PADDING_MASK) for call in given]
        self._is_padded = any(isinstance(mask, Tensor) and not bool(mask.all()) for mask in masks)

    def begin(self) -> None:
        """Find what blocks return. A new run writes the states before the first block, and the other weights."""
        skeleton, journal = self._skeleton, self._journal
        with fitting(0, "batches"):
            if not journal.rows:
                self._check_room()
            skeleton.learn_output(self._calls[0])
        if journal.rows:
            return
        journal.begin_states(0)
        for number, call in enumerate(self._calls):
            with fitting(number, "batches"):
                states = states_in(skeleton.entering(call, 0))
            # A model that draws random masks changes the states.
            if number == 0 and not torch.equal(states, states_in(skeleton.entering(call, 0))):
                raise ConfigError(
                    "the states before the first block must depend on the inputs only, got others in a second pass, as "
                    "from a model that draws random numbers; pass these as an input, such as the noise of a masked "
                    f"autoencoder (batches, {type(skeleton.model).__name__})"
                )
            journal.add_states(0, number, {STATES: states, UNPRUNED: states.clone()})
        # A shared tensor is written once, under its first name.
        rest: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in skeleton.rest().items():
            rest.setdefault(id(tensor), (name, tensor))
        journal.write_weights(0, dict(rest.values()))
        journal.note()

    def _check_room(self) -> None:
        """Raise DataError unless the memory is enough to prune a block, and the disk for the model and the states."""
        skeleton = self._skeleton
        widest = 0
        for module in skeleton.blocks[0].modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.dim() > 1:
                widest = max(widest, weight.shape[0], weight[0].numel())
        states = states_in(skeleton.entering(self._calls[0], 0))
        of_states = 3 * 4 * states[0].numel() * self._samples.samples
        block = sum(each.nbytes for each in skeleton.blocks[0].parameters())
        needed = _COPIES * block + 8 * widest**2 + of_states + _CACHE
        if self._settings.distill is not False:
            needed += 4 * _LEARNING * states[0].numel() * min(self._samples.samples, _LEARNED_AT_ONCE)
        what = f"a block with its statistics and states (on {skeleton.device})"
        check_memory(needed, what, "pass fewer or shorter samples", "batches", free=free_memory_of(skeleton.device))
        # States of the unpruned and the pruned network, before and after a block.
        weights = sum(path.stat().st_size for path in skeleton.files)
        check_free_disk(self._journal.folder, weights + 2 * 2 * states[0].nbytes * self._samples.samples)

    def _data(self, batches: list[dict[str, Any]]) -> Calibration:
        """Return states as calibration data, with the groups of the model's inputs."""
        found = Calibration(batches, groups=self._samples.groups)
        found.name = "batches"
        return found

    def prune(self, index: int) -> None:
        """Prune one block, and write its weights and the states after it."""
        began = time.perf_counter()
        skeleton = self._skeleton
        name = skeleton.name_of(index)
        frame, others = entering(skeleton, self._calls, index, adds_padding=self._is_padded)
        states = self._journal.states(len(self._calls))
        batches = [{**own, **other} for own, other in zip(states, others, strict=True)]
        block = skeleton.block(index)
        unpruned: BlockNet = evaluating(BlockNet(block, frame, reads_unpruned=True))
        entered: BlockNet = evaluating(BlockNet(block, frame))
        calibration = self._data(batches)
        if index:
            calibration.instead = {STATES: UNPRUNED}
        for number, call in enumerate(calls(unpruned, calibration)):
            with torch.no_grad():
                after = unpruned(*call[0], **call[1])
            if not bool(torch.isfinite(after).all()):
                raise DataError(
                    f"outputs of the unpruned model's blocks must be finite, got NaN or infinity ({name}, batch "
                    f"{number})"
                )

        self._settings.check_layers(block)
        images = ImageParts.of(calibration, entered)
        # Share of each block's cost to keep, so that the whole model keeps the requested share.
        cost_before, rest = cost_of(self._budget.kind, entered, images.example), self._cost_of_rest()
        total = rest + cost_before * len(skeleton) + self._trimmed_params
        share = (self._budget.share * total - rest) / (total - rest)
        if share <= 0.0:
            raise ConfigError(
                f"a budget must leave something for the blocks, got {self._budget.share:g} of the {self._budget.kind} "
                f"where {rest / total:.3g} lie outside of the blocks (budget)"
            )
        of_block: Any = {self._budget.kind: min(share, 1.0)}
        budget = Budget(**of_block, equal_blocks=True)
        inner: Any = self._settings.layers
        settings = replace(self._settings, layers=None if inner is None else [f"block.{each}" for each in inner])
        made = Prepared.of(entered, images, settings, budget).recover(budget.share)
        dense: Any = made.dense
        layers = sorted(made.layers.rows, key=lambda row: row.name)
        widths = {row.name.removeprefix("block."): [row.before, row.after] for row in layers}
        del made
        give_back()
        is_distilled = False
        if self._settings.distill is not False:
            offered = {
                "objective": "squares",
                "held_out": images.judges,
                "seed": self._settings.seed,
                "progress": False,
            }
            knobs = offered | dict(self._settings.distillation_knobs)
            done = distillation(dense, unpruned, images.learned, **knobs)
            dense, is_distilled = done.model, done.is_kept

        self._write(index, unpruned, dense)
        distances = self._advance(name, entered, unpruned, dense, batches)
        row = BlockRow(
            block=name,
            params_before=count_params(entered),
            params=count_params(dense),
            distance=distances[-1],
            calibration_distance=distances[0],
            is_distilled=is_distilled,
            seconds=time.perf_counter() - began,
        )
        costs = {"cost_before": cost_before, "cost": cost_of(self._budget.kind, dense, images.example)}
        self._journal.note({"block": asdict(row), "widths": widths, **costs})

    def _cost_of_rest(self) -> float:
        """Return the cost outside of the blocks, in multiply-accumulates counted by PyTorch, or in parameters."""
        skeleton = self._skeleton
        if self._budget.kind == "params":
            return float(count_params(skeleton.model) - sum(count_params(block) for block in skeleton.blocks))
        states = states_in(skeleton.entering(self._calls[0], 0))
        with counting_macs(skeleton.model) as counted:
            skeleton.outputs(self._calls[0], states)
        return counted.all / len(states)

    def _write(self, index: int, unpruned: BlockNet, dense: Any) -> None:
        """Write the weights of a pruned block, and with the first block also the config."""
        skeleton, journal = self._skeleton, self._journal
        tensors = with_transposed_weights(detached_copy(dense.block)).state_dict()
        if index == 0:
            config = self._described(unpruned, dense, tensors)
            config.architectures = [type(skeleton.model).__name__]
            with disk_errors(journal.folder / CONFIG):
                config.save_pretrained(journal.folder)
        if self._described_skeleton is None:
            config = type(skeleton.model).config_class.from_pretrained(journal.folder)
            self._described_skeleton = skeleton.described(config)
        self._check_computes(index, self._described_skeleton, dense, tensors)
        types = {name: tensor.dtype for name, tensor in unpruned.block.state_dict().items()}  # precisions of the files
        place = skeleton.name_of(index)
        values = {f"{place}.{name}": tensor.to(types[name]) for name, tensor in tensors.items()}
        journal.write_weights(index + 1, values)

    def _described(self, unpruned: BlockNet, dense: Any, tensors: Mapping[str, Tensor]) -> Any:
        """Return a config that describes blocks like the first pruned one; ConfigError if no config can."""
        skeleton = self._skeleton
        config, kind, first = copy.deepcopy(skeleton.config), type(skeleton.model), skeleton.name_of(0)
        before, after = find_attention(unpruned.block), find_attention(dense.block)
        shares = {each.query_heads / before[name].query_heads for name, each in after.items()}
        if len(shares) == 1:
            put_heads(config, dense.block, {name: before[name] for name in after}, shares.pop())
        modules = dense.block.named_modules()
        put_widths(config, skeleton.model, {f"{first}.{name}": output_channels(each) or 0 for name, each in modules})
        # Transformers 4 needs the removed heads of BERT and similar models in the config.
        heads = copy.deepcopy(config)
        removed = {each.heads - after[name].heads for name, each in before.items()}
        if len(removed) == 1:
            count = removed.pop()
            heads.pruned_heads = {index: list(range(count)) for index in range(len(skeleton))}
        wanted = {name: tuple(value.shape) for name, value in tensors.items()}
        different = ""
        for candidate in (config, heads):
            try:
                validate = getattr(candidate, "validate", None)  # of Transformers 5
                if callable(validate):
                    validate()
                built = empty_model(kind, candidate).state_dict()
            except Exception as error:  # constructors may raise any error for sizes that they don't support
                different = different or " ".join(str(error).split())
                continue
            shapes = {name.removeprefix(f"{first}."): tuple(value.shape) for name, value in built.items()}
            wrong = [name for name, shape in wanted.items() if shapes.get(name) != shape]
            if not wrong:
                return candidate
            different = f"{wrong[0]} of {wanted[wrong[0]]} where the config makes {shapes.get(wrong[0])}"
        raise ConfigError(
            f"from_pretrained must be able to build the model by its config, got {different}; {_CURE} ({kind.__name__})"
        )

    def _check_computes(self, index: int, described: Skeleton, dense: Any, tensors: Mapping[str, Tensor]) -> None:
        """Raise ConfigError unless a block built from the written config has the outputs of the pruned block.

        Shapes don't show values that a class computes from its config, such as a scale from the number of heads.
        """
        states = self._journal.states(1)[0]
        few = torch.arange(min(_COMPARED, len(states[STATES])))
        call, entered = take_samples(self._calls[0], few), states[STATES][few].to(self._skeleton.device)
        wide = torch.promote_types(entered.dtype, torch.float32)
        entered = entered.to(wide)
        place = f"{self._skeleton.name_of(index)}, {type(self._skeleton.model).__name__}"
        rule = "the block that from_pretrained builds by the config must have the outputs of the pruned block"
        outputs = []
        try:
            for skeleton in (self._skeleton, described):
                is_own = skeleton is self._skeleton
                block = detached_copy(dense.block) if is_own else described.filled(index, tensors)
                args, kwargs = cast_floats(with_states(skeleton.entering(call, index), entered), wide)
                with evaluation_mode(block), torch.no_grad():
                    outputs.append(states_of(block.to(wide)(*args, **kwargs)).double())
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            if out_of_memory(error) or not outputs:
                raise
            raise ConfigError(f"{rule}, got {raised(error)}; {_CURE} ({place})") from error
        wanted, found = outputs
        apart, added = float((wanted - found).norm()), float((wanted - entered).norm())
        if not apart <= _ALIKE * added + _ROUNDED * float(wanted.norm()):
            share = f"{apart / added:.2g} times what the block adds to the states" if added else f"{apart:.2g}"
            raise ConfigError(f"{rule}, got outputs that differ by {share}; {_CURE} ({place})")

    def _advance(
        self,
        name: str,
        entered: BlockNet,
        unpruned: BlockNet,
        dense: nn.Module,
        batches: Sequence[Mapping[str, Any]],
    ) -> tuple[float, float]:
        """Write the states after a block; return their distances on the calibration data and on held-out samples.

        A distance is the mean squared distance from the wanted states over their variance, on places that aren't
        padding; NaN without samples.
        """
        journal, done = self._journal, len(self._journal.rows) + 1
        held_out = self._samples.held_out(HELD_OUT) if self._is_held_out else torch.zeros(self._samples.samples).bool()
        # For calibration data and held-out samples: squared distances, squares, values, number of values.
        sums = torch.zeros(2, 4, dtype=torch.float64, device="cpu")
        first = 0
        journal.begin_states(done)
        for place, batch in enumerate(batches):
            (call,) = calls(entered, Calibration([batch]))
            with evaluation_mode(dense), torch.no_grad():
                wanted = unpruned(*call[0], **call[1])
                reached = states_of(dense(*call[0], **call[1]))
            kind = batch[STATES].dtype
            states = {STATES: reached.to(kind), UNPRUNED: wanted.to(kind)}
            for which, value in states.items():
                if not bool(torch.isfinite(value).all()):
                    whose = "pruned" if which == STATES else "unpruned"
                    raise DataError(
                        f"states must be finite in the model's precision, {kind}, got NaN or infinity after the "
                        f"{whose} block ({name}, batch {place})"
                    )
            journal.add_states(done, place, states)
            real = real_positions_of(entered, call)
            own = held_out[first : first + len(wanted)]
            first += len(wanted)
            for part, chosen in zip(sums, (~own, own), strict=True):
                one, other = wanted[chosen], reached[chosen]
                if real is not None and real.shape == wanted.shape[:2]:
                    one, other = one[real[chosen]], other[real[chosen]]
                one, other = one.double(), other.double()
                part[0] += float((one - other).square().sum())
                part[1] += float(one.square().sum())
                part[2] += float(one.sum())
                part[3] += one.numel()
        shares = []
        for squares, total, value, count in sums.tolist():
            variance = total - value**2 / count if count else 0.0
            shares.append(squares / variance if variance > 0.0 else math.nan)
        return shares[0], shares[1] if self._is_held_out else shares[0]

    def report(self) -> StreamingReport:
        """Measure how much the model's outputs change, and return the report."""
        skeleton, journal = self._skeleton, self._journal
        batches = []
        for own, call in zip(journal.states(len(self._calls)), self._calls, strict=True):
            named = {name: value for name, value in bind_arguments(skeleton.model, call).items() if value is not None}
            batches.append({**named, **own})
        learned, held_out = self._data(batches).split()
        answers = Answers(_Tail(skeleton, UNPRUNED), learned if held_out is None else held_out)
        (likeness,) = answers.likenesses(_Tail(skeleton, STATES))
        rows = tuple(BlockRow(**row["block"]) for row in journal.rows)
        # All unpruned blocks have the same cost.
        rest, costs = self._cost_of_rest(), [row["cost"] for row in journal.rows]
        cost_before = journal.rows[0]["cost_before"]
        left = (rest + sum(costs)) / (rest + cost_before * len(skeleton) + self._trimmed_params)
        outcome = budget_outcome(self._budget.kind, self._budget.share, left, "blocks are equally wide")
        warn_if_missed(outcome)
        before = count_params(skeleton.model) + self._trimmed_params
        after = before - self._trimmed_params - sum(row.params_before - row.params for row in rows)
        last, doubts = rows[-1], []
        if math.isinf(likeness.distance.value):
            doubts.append(NO_SCALE)
        elif held_out is None:
            doubts.append(
                f"no sample could be held out: the figures are those of the calibration data; pass {HELD_OUT} or more"
            )
        elif last.distance > 2.0 * last.calibration_distance:
            doubts.append(
                f"the samples are too few for this model (distance after the last block {last.distance:.3g} on "
                f"held-out samples, {last.calibration_distance:.3g} on calibration data): pass more, or keep a larger "
                "share"
            )
        return StreamingReport(
            blocks=rows,
            params_before=before,
            params=after,
            widths={name: (old, new) for name, (old, new) in journal.rows[0]["widths"].items()},
            budget=outcome,
            likeness=likeness,
            samples=learned.samples,
            held_out=0 if held_out is None else held_out.samples,
            pruner=self._settings.pruner,
            recovery=self._settings.recovery_name,
            warnings=tuple(doubts),
            vocabulary=None if self._trimmed is None else self._trimmed.report,
            read_as=answers.read_as,
        )

    def finish(self) -> None:
        """Write the index of the weights and a trimmed tokenizer, and copy the other files of the source."""
        folder, trimmed = self._journal.folder, self._trimmed
        self._journal.write_index()
        replaced = set[str]()
        if trimmed is not None:
            # Files of the source that aren't written anew have the old ids, such as a model of sentencepiece.
            replaced = {*trimmed.tokenizer.vocab_files_names.values(), *_TOKENIZER_FILES}
            with disk_errors(folder):
                trimmed.tokenizer.save_pretrained(folder)
                if trimmed.generation is not None:
                    replaced.add(_GENERATION)
                    trimmed.generation.save_pretrained(folder)
        for path in sorted(self._skeleton.folder.iterdir()):
            is_own = path.name.endswith(_WEIGHTS) or path.name in (SINGLE, INDEX, CONFIG, "README.md", JOURNAL)
            is_own = is_own or path.name in replaced
            if path.is_file() and not is_own and not path.name.startswith("."):
                with disk_errors(folder):
                    shutil.copyfile(path, folder / path.name)


class _Tail(nn.Module):
    """The part of a model after its last block."""

    def __init__(self, skeleton: Skeleton, reads: str) -> None:
        super().__init__()
        self.model = skeleton.model
        self._skeleton, self._reads = skeleton, reads

    def forward(self, hidden_states: Tensor, unpruned_states: Tensor, **inputs: Any) -> Any:
        """Return the model's output."""
        states = hidden_states if self._reads == STATES else unpruned_states
        return self._skeleton.outputs(((), inputs), states)
