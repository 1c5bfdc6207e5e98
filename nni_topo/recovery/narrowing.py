"""Narrower heads: the channels of each head are rotated so that the first ones carry most, and the others are masked.

A head's logits are products of queries and keys, and its contribution is the product of its values and columns of the
output projection. Nothing changes where one factor is multiplied by a matrix and the other by its inverse. Those
matrices are taken with which the first channels alone come nearest: with ``S`` and ``C`` the products of the two
factors' channels over the calibration data, and ``S = L L'``, ``C = R R'``, the singular vectors of ``L' R`` give the
directions. [1]_ keeps channels as they are and solves for a matrix between the kept ones, which can't come nearer.

Under rotary positions queries and keys aren't rotated. They lose pairs of channels, with the frequency of each, in all
heads that share it: the pairs without which the logits of these heads change least.

References
----------
.. [1] "CORP: closed-form one-shot representation-preserving structured pruning", for vision transformers: ridge
   regression of the logits on the channels of queries and keys that are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.maths.least_squares.normal import NormalEquations
from nni_topo.network.attention.heads import Attention, IntArray
from nni_topo.network.attention.rotary import by_table, find_frequencies
from nni_topo.network.attention.unfused.multihead import mixing_called, projected
from nni_topo.network.layers.kinds import by_channel, row_names, weight_name, weight_of
from nni_topo.network.runtime.arguments import BATCHES, MODEL, check_model
from nni_topo.network.runtime.comparison import SAME_CHANNELS, agree
from nni_topo.network.runtime.copies import detached_copy, evaluation_mode, left_alone
from nni_topo.network.runtime.fits import first_call, run, structure_call
from nni_topo.network.runtime.hooks import batches_of, called, watched
from nni_topo.network.runtime.inputs import bind_arguments, returned_tensors
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.runtime.processes import Processes, gathered
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.switches import as_written
from nni_topo.network.speedup.analysis import Analysis, Facts
from nni_topo.network.speedup.reconcile import FullMasks, MasksLike, check_masks, union
from nni_topo.recovery.pairs import PairLogits, pairs_that_stay
from nni_topo.rules import check_knobs, number

_LEAST = 1e-7  # of the largest singular value
_ROUNDING = 1e-9  # of channels: a ratio of two whole numbers means the first of them

_logger = logging.getLogger(__name__)


@public(model=MODEL, calibration=BATCHES)
@as_written()
def narrow_heads(
    model: nn.Module,
    calibration: Iterable[Any] | Evaluator,
    sparse_ratio: float | Mapping[str, float],
) -> tuple[nn.Module, FullMasks]:
    """Turn the channels of all heads of attention, and mask those that then matter least, without labels.

    Parameters
    ----------
    model : torch.nn.Module
        A trained model, not wrapped by NNI. It isn't changed.
    calibration : iterable or nni.compression.utils.Evaluator
        Batches of inputs, as for :func:`nni_topo.compensate`; what a mask says is padding doesn't count.
    sparse_ratio : float or mapping of str to float
        The share of each head's channels to prune, in (0, 1), of queries, keys and values alike; at least one stays,
        under rotary positions at least a pair. Of all attention modules, or by name of those whose heads get narrower.

    Returns
    -------
    torch.nn.Module
        A copy of ``model`` that computes the same, with other weights in its queries, keys, values and the layers that
        mix its heads.
    dict of str to dict of str to Tensor
        Masks of this copy. With them `compensate` and `to_dense` work as with those of a pruner; the dense model's
        heads are smaller, and as many as before.

    Raises
    ------
    ConfigError
        If the ratio is out of its range, or a name isn't that of a module, or one whose heads aren't known.
    DataError
        If there is no batch, a batch doesn't fit the model, or what it gives isn't finite.
    SpeedupError
        If the model is wrapped, or can't be traced.

    Notes
    -----
    The head size is unchanged, with one warning, where attention uses it in a way that can't be adapted (norms, rotary
    positions of other kinds than Transformers' decoders have), where not all that share rotary frequencies lose as many
    channels, and where something else than one linear layer reads the heads. Heads that share keys and values are
    turned alike, for the sum of their errors.

    Logits matter up to what is added to all of a query's alike, and values up to a constant, which `compensate` puts
    into the bias of the next layer.

    Cost: a pass over the batches, and one over the first for each attention module. Memory is that of the model and of
    one matrix of a head's size for each head, whatever the number of samples.

    Examples
    --------
    >>> import torch
    >>> from nni_topo import compensate, to_dense
    >>> _ = torch.manual_seed(0)
    >>> body = torch.nn.TransformerEncoderLayer(24, 4, 48, batch_first=True)
    >>> model = torch.nn.Sequential(body, torch.nn.Linear(24, 3)).eval()
    >>> batches = list(torch.randn(256, 10, 24).split(64))
    >>> turned, masks = narrow_heads(model, batches, 0.5)
    >>> dense = to_dense(compensate(turned, masks, batches), batches[0], masks)
    >>> dense[0].self_attn.num_heads, dense[0].self_attn.head_dim
    (4, 3)
    """
    given = sparse_ratio if isinstance(sparse_ratio, Mapping) else {"sparse_ratio": sparse_ratio}
    check_knobs("narrow_heads", given, dict.fromkeys(given, number(0, 1, "neither")))
    check_model(model)
    batches = batches_of(calibration, model, shared=True)
    flow = Analysis(model, structure_call(model, batches)).flow
    known = {each.name: each for each in flow.heads.values() if not each.recurrent}
    asked = given if isinstance(sparse_ratio, Mapping) else dict.fromkeys(known, sparse_ratio)
    modules = dict(model.named_modules())
    for name in asked:
        if name not in modules:
            raise unknown_name("an attention module", name, modules, "sparse_ratio")
        if name not in known:
            raise ConfigError(f"a module must be attention whose heads are known, got {name!r} (sparse_ratio)")
    readers: dict[str, list[str]] = {}
    for layer, read in flow.output_projections().items():
        readers.setdefault(read.name, []).append(layer)
    tables = find_frequencies(model, known)
    whole: dict[str, str] = {}
    for name in asked:
        if name in tables and tables[name] is None:
            whole[name] = "rotary positions of an unknown kind"
        elif known[name].also:
            whole[name] = "its queries and keys meet positions too"
        elif len(readers.get(name, [])) != 1:
            whole[name] = "its heads must be read by exactly one linear layer"
    turned: nn.Module = detached_copy(model)
    heads = [
        _Heads(turned, known[name], readers[name][0], asked[name], tables.get(name))
        for name in asked
        if name not in whole
    ]
    # One pass over the batches sums up what the heads do.
    entering, leaving = [], []
    for each in heads:
        before, after = each.looks()
        entering += before
        leaving += after
    with ExitStack() as stack:
        stack.enter_context(mixing_called(turned))
        stack.enter_context(watched(entering, leaving))
        for each in heads:
            module = turned.get_submodule(each.attention.name)
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(called(module, partial(each.look_within, module)))
        run(turned, batches)
    for each in heads:
        if batches.processes is not None:
            each.pool(batches.processes, device_of(turned))
        if not each.are_seen():
            raise DataError(f"calibration must reach every attention module, got none ({each.attention.name})")
    wanted = _outputs(turned, batches)

    def is_same() -> bool:
        found = agree(wanted, _outputs(turned, batches), SAME_CHANNELS)
        return all(gathered(batches.processes, found, "the outputs with turned heads"))

    for each in heads:
        if not each.turned(is_same, batches.processes):
            whole[each.attention.name] = "this attention uses the head size in a way that can't be adapted"
    for names in by_table(tables).values():
        users = [each for each in heads if each.attention.name in names and each.attention.name not in whole]
        if len(users) == len(names) and len({each.kept for each in users}) == 1:
            shares = [each.logits.shares() for each in users if each.logits is not None]
            stays = pairs_that_stay(np.sum(shares, axis=0), users[0].kept // 2)
            for each in users:
                each.asking = np.tile(stays, 2)
        else:
            others = "others that share its rotary frequencies keep another number of channels"
            whole |= {each.attention.name: others for each in users}
    masks: FullMasks = {}
    for each in heads:
        if each.attention.name not in whole:
            each.mask(masks)
    if whole:
        told = "; ".join(f"{name} ({why})" for name, why in whole.items())
        _logger.warning("head size unchanged: %s", told)
    return turned, masks


def narrow_instead(
    model: nn.Module,
    calibration: Iterable[Any] | Evaluator,
    masks: MasksLike,
    facts: Facts | None = None,
    *,
    round_to: int = 1,
) -> tuple[nn.Module, MasksLike]:
    """Keep the heads that masks prune, and make all heads of a module narrower instead, for the same cost.

    Heads that are wider than ``round_to`` keep a multiple of so many channels. Where `narrow_heads` leaves the heads'
    size unchanged, heads are pruned; model and masks are as it returns them.
    """
    batches = batches_of(calibration, model, shared=True)
    flow, full = Analysis(model, structure_call(model, batches), facts).flow, check_masks(model, masks)
    is_kept = union(model, flow, full)
    ratios, rest = {}, 0.0
    # Rotary heads lose whole pairs, the same number in all heads: removing heads comes nearer to the cost.
    rotary = find_frequencies(model, flow.attention)
    known = dict.fromkeys(each.name for each in flow.heads.values() if not each.recurrent)
    for name in (each for each in known if each not in rotary):
        heads = is_kept[flow.group_ids(flow.unit_channel_ids(next(iter(flow.attention[name].channels))))]
        size = flow.attention[name].head_size
        wanted = size * heads.mean() + rest
        step = round_to if size > round_to else 1
        kept = min(max(step * round(wanted / step), step), size)
        if not heads.all() and kept < size:
            # What is rounded in one module is made up for in the next.
            ratios[name], rest = (size - kept) / size, wanted - kept
    if not ratios:
        return model, masks
    turned, within = narrow_heads(model, batches, ratios)
    output_projections = {layer: read for layer, read in flow.output_projections().items() if layer in within}
    for layer in within:
        if layer not in output_projections:
            full.pop(layer, None)  # rows of heads
        elif "weight" in full.get(layer, {}):
            rows = full[layer]["weight"].amax(1, keepdim=True)
            full[layer]["weight"] = rows.expand_as(full[layer]["weight"]).clone()
    for layer, targets in within.items():
        own = full.setdefault(layer, {})
        for target, mask in targets.items():
            own[target] = own[target] * mask if target in own else mask
    return turned, full


class _Heads:
    """The heads of one attention module: what they are seen to do, and how they are turned."""

    def __init__(self, model: nn.Module, attention: Attention, reader: str, ratio: float, table: str | None) -> None:
        self.attention = attention
        self._model, self._projection = model, reader  # the layer that mixes them
        self._size = attention.head_size
        self._share = attention.query_heads // len(attention.parts[1][1])  # heads that have keys and values in common
        step = 1 if table is None else 2
        count = self._size // step
        self.kept = step * max(1, count - int(count * ratio + _ROUNDING))
        self.asking = np.arange(self._size) < self.kept
        """Which channels of a head's queries and keys are kept."""
        self.queries, self.keys, self.context = (NormalEquations() for _ in range(3))
        self.logits = None if table is None else PairLogits(model.get_buffer(table))

    def see(self, seen: NormalEquations, rows: IntArray, channels: Tensor) -> None:
        """Add channels ``(channels, samples)`` of which each head has some rows, (heads, size)."""
        own = channels[torch.from_numpy(rows).to(channels.device)].mT
        seen.add(own, own[..., :0], own[..., :0])

    def looks(self) -> tuple[list[Any], list[Any]]:
        """Return what watches the layers within, when they are entered and left."""
        projection = self._model.get_submodule(self._projection)
        places = np.arange(len(self.attention.context[1])).reshape(-1, self._size)

        def mixed(entering: Tensor) -> None:
            self.see(self.context, places, by_channel(projection, entering))

        def made(layer: nn.Module, seen: NormalEquations, rows: IntArray, _: Tensor, output: Tensor) -> None:
            self.see(seen, rows, by_channel(layer, output))

        within = self.attention.name  # ``nn.MultiheadAttention`` is such a layer itself
        asking = [(self._model.get_submodule(layer), rows) for layer, rows in self._parts[:2] if layer != within]
        if self.logits is not None:
            looks = zip(asking, (self.logits.see_queries, self.logits.see_keys), strict=True)
            return [(projection, mixed)], [(layer, partial(look, rows)) for (layer, rows), look in looks]
        pairs = zip(asking, (self.queries, self.keys), strict=False)
        leaving = [(layer, partial(made, layer, each, rows)) for (layer, rows), each in pairs]
        return [(projection, mixed)], leaving

    def look_within(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what ``nn.MultiheadAttention`` makes of its arguments."""
        named = bind_arguments(module, (args, kwargs))
        found = projected(module, *(named[key] for key in ("query", "key", "value")))
        rows = np.arange(found[0].shape[-1]).reshape(self.attention.heads, -1)
        for seen, values in zip((self.queries, self.keys), found, strict=False):
            self.see(seen, rows, by_channel(module.out_proj, values))

    def are_seen(self) -> bool:
        """Say whether calibration reached them."""
        products = None if self.logits is None else self.logits.products
        is_finite = all(each.is_finite() for each in (self.queries, self.keys, self.context))
        if not is_finite or (products is not None and not bool(products.isfinite().all())):
            raise DataError(f"activations must be finite, got NaN or infinity ({self.attention.name})")
        seen = self.queries.samples and self.keys.samples if self.logits is None else products is not None
        return bool(self.context.samples and seen)

    def pool(self, processes: Processes, device: torch.device) -> None:
        """Take in what all processes have seen."""
        place = f"the heads of {self.attention.name}"
        for seen in (self.queries, self.keys, self.context):
            seen.pool(processes, device, place)
        if self.logits is not None:
            self.logits.products = processes.total(self.logits.products, device, place)

    def turned(self, is_same: Callable[[], bool], processes: Processes | None = None) -> bool:
        """Put first the directions of each head with which logits and values come nearest.

        Where the model would compute something else, it stays as it was, and False is returned. Under rotary positions
        values alone are turned; a trial turn of pairs of queries and keys confirms which channels are pairs.
        """
        before = [(each, each.detach().clone()) for each in self._parameters()]
        # Each step, and whether what it does stays if the model computes the same.
        first = (self._turn_logits, True) if self.logits is None else (self._spin, False)
        for step, stays in (first, (self._turn_values, True)):
            with torch.no_grad():
                step()
                if processes is not None:
                    processes.agree(self._parameters(), f"the turned heads of {self.attention.name}")
            are_same = is_same()
            with torch.no_grad():
                for parameter, values in [] if are_same and stays else before:
                    parameter.copy_(values)
            if not are_same:
                return False
        return True

    def mask(self, masks: FullMasks) -> None:
        """Mask the pruned channels of each head."""
        values = np.arange(self._size) < self.kept
        for (layer, rows), stays in zip(self._parts, (self.asking, self.asking, values), strict=True):
            module = self._model.get_submodule(layer)
            for target in (weight_name(module), row_names(module)[-1]):
                if isinstance(parameter := getattr(module, target, None), Tensor):
                    mask = masks.setdefault(layer, {}).setdefault(target, torch.ones_like(parameter).detach())
                    mask[torch.from_numpy(rows[:, ~stays].ravel()).to(mask.device)] = 0
        projection: Any = self._model.get_submodule(self._projection)
        mask = masks.setdefault(self._projection, {}).setdefault("weight", torch.ones_like(projection.weight).detach())
        mask.unflatten(1, (-1, self._size))[:, :, self.kept :] = 0

    @property
    def _parts(self) -> list[tuple[str, IntArray]]:
        """The layers that make queries, keys and values, each with the channels of each of its heads: (heads, size)."""
        return [(layer, rows.reshape(-1, self._size)) for layer, rows in self.attention.parts]

    def _parameters(self) -> list[nn.Parameter]:
        layers = [self._model.get_submodule(layer) for layer in (*self.attention.layers, self._projection)]
        return list(dict.fromkeys(p for each in layers for p in each.parameters(recurse=False)))

    def _turn_logits(self) -> None:
        queries = _second_moments(self.queries, centred=False).unflatten(0, (-1, self._share)).mean(1)
        ones, others = directions(queries, _second_moments(self.keys, centred=True), self.kept)
        self._multiply(0, ones)
        self._multiply(1, others)

    def _turn_values(self) -> None:
        projection: Any = self._model.get_submodule(self._projection)
        mixing = (
            projection.weight.detach().double().unflatten(1, (-1, self._size)).movedim(1, 0)
        )  # (heads, outputs, size)
        sums = (mixing.mT @ mixing).unflatten(0, (-1, self._share)).sum(1)
        seen = _second_moments(self.context, centred=True).unflatten(0, (-1, self._share)).mean(1)
        columns, rows = directions(sums, seen, self.kept)
        self._multiply(2, rows)
        projection.weight.copy_((mixing @ columns.repeat_interleave(self._share, 0)).movedim(0, 1).flatten(1))

    def _spin(self) -> None:
        """Turn each pair of queries and keys by an angle of its own."""
        half = self._size // 2
        angles = torch.arange(1.0, half + 1.0, dtype=torch.double)
        cos, sin = angles.cos().diag(), angles.sin().diag()
        turn = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
        for part in (0, 1):
            heads = len(self._parts[part][1])
            self._multiply(part, turn.expand(heads, -1, -1).to(self._parameters()[0].device))

    def _multiply(self, part: int, maps: Tensor) -> None:
        """Put in the place of a part's channels (heads, n) their products with the columns of maps (heads, n, n)."""
        layer, rows = self._parts[part]
        module = self._model.get_submodule(layer)
        maps = maps.repeat_interleave(len(rows) // len(maps), 0)
        for parameter in (weight_of(module), getattr(module, row_names(module)[-1], None)):
            if isinstance(parameter, Tensor):
                places = torch.from_numpy(rows).to(parameter.device)
                values = parameter[places].double()  # (heads, n, inputs), or (heads, n) of a bias
                parameter[places] = torch.einsum("hn...,hnm->hm...", values, maps).to(parameter)


def _outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    args, kwargs = first_call(model, batches)
    with left_alone(model), evaluation_mode(model), torch.no_grad():
        return [each for each in returned_tensors(model(*args, **kwargs)) if each.is_floating_point()]


def _second_moments(seen: NormalEquations, *, centred: bool) -> Tensor:
    """Return the mean products of the channels of each head, (heads, n, n), of differences from the mean if asked."""
    means, found = seen.sums["x"] / seen.samples, seen.sums["xx"] / seen.samples
    return found - means.unsqueeze(2) * means.unsqueeze(1) if centred else found


def directions(ones: Tensor, others: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return matrices ``A`` and ``B``, (heads, n, n), with ``A B' = 1``, of which the first columns alone come nearest.

    ``ones`` and ``others`` are the mean products of two factors' channels, ``x`` and ``y``, in each head: of all ``A``
    and ``B`` so many columns leave the least of the mean square of ``x' y - x' A B' y``.
    """
    of_ones, of_others = [], []
    for one, other in zip(ones, others, strict=True):
        left, right = _root(one), _root(other)
        u, values, v = torch.linalg.svd(left.mT @ right)
        count = min(kept, int((values > _LEAST * values[0]).sum()))
        scale = values[:count].rsqrt()
        a, b = (right @ v[:count].mT) * scale, (left @ u[:, :count]) * scale
        # The other columns do what these lack.
        u, values, v = torch.linalg.svd(torch.eye(len(left)).to(left) - a @ b.mT)
        more = values[: len(left) - count].sqrt()
        of_ones.append(torch.cat([a, u[:, : len(more)] * more], 1))
        of_others.append(torch.cat([b, v[: len(more)].mT * more], 1))
    return torch.stack(of_ones), torch.stack(of_others)


def _root(matrix: Tensor) -> Tensor:
    """Return ``L`` of ``L L'``, a symmetric positive semidefinite matrix (n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root
