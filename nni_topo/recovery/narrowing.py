"""Narrower heads: the channels of each head are rotated so that the first ones carry most, and the others are masked.

A head's logits are products of queries and keys, and its contribution is the product of its values and columns of the
output projection. Nothing changes where one factor is multiplied by a matrix and the other by its inverse. Those
matrices are taken with which the first channels alone come nearest: with ``S`` and ``C`` the products of the two
factors' channels over the calibration data, and ``S = L L'``, ``C = R R'``, the singular vectors of ``L' R`` give the
directions. [1]_ keeps channels as they are and solves for a matrix between the kept ones, which can't come nearer.

References
----------
.. [1] "CORP: closed-form one-shot representation-preserving structured pruning", for vision transformers: ridge
   regression of the logits on the channels of queries and keys that are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, unknown_name
from nni_topo.maths.least_squares.normal import NormalEquations
from nni_topo.network.attention.heads import Attention, IntArray, under_rotary_positions
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
        The share of each head's channels to prune, in (0, 1), of queries, keys and values alike; at least one stays.
        Of all attention modules, or by name of those whose heads get narrower.

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
    The head size is unchanged, with one warning, where queries and keys have rotary positions or meet positions in
    another way, where attention uses the head size in a way that can't be adapted, such as norms, and where something
    else than one linear layer reads the heads. Heads that share keys and values are turned alike, for the sum of their
    errors.

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
    rotary = under_rotary_positions(model, known)
    turned: nn.Module = detached_copy(model)
    whole: dict[str, str] = {}
    heads: list[_Heads] = []
    for name, ratio in asked.items():
        if name in rotary:
            whole[name] = "its queries and keys have rotary positions"
        elif known[name].also:
            whole[name] = "its queries and keys meet positions too"
        elif len(readers.get(name, [])) != 1:
            whole[name] = "its heads must be read by exactly one linear layer"
        else:
            heads.append(_Heads(turned, known[name], readers[name][0], ratio))
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
            module = turned.get_submodule(each.name)
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(called(module, partial(each.look_within, module)))
        run(turned, batches)
    for each in heads:
        each.finish(batches.processes, device_of(turned))
    wanted = _outputs(turned, batches)
    masks: FullMasks = {}
    for each in heads:
        before = [(parameter, parameter.detach().clone()) for parameter in each.parameters()]
        with torch.no_grad():
            each.turn()
            if batches.processes is not None:
                batches.processes.agree(each.parameters(), f"the turned heads of {each.name}")
        is_same = agree(wanted, _outputs(turned, batches), SAME_CHANNELS)
        if all(gathered(batches.processes, is_same, "the outputs with turned heads")):
            each.mask(masks)
            continue
        with torch.no_grad():
            for parameter, values in before:
                parameter.copy_(values)
        whole[each.name] = "this attention uses the head size in a way that can't be adapted"
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
    rotary = under_rotary_positions(model, flow.attention)
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

    def __init__(self, model: nn.Module, attention: Attention, reader: str, ratio: float) -> None:
        self.name = attention.name
        self._attention = attention
        self._model = model
        self._projection: Any = model.get_submodule(reader)  # the layer that mixes them
        self._reader = reader
        self._size = attention.head_size
        # The layers that make queries, keys and values, each with the channels of each of its heads: (heads, size).
        self._parts = [(layer, rows.reshape(-1, self._size)) for layer, rows in attention.parts]
        self._share = attention.query_heads // len(attention.parts[1][1])  # heads that have keys and values in common
        self._kept = max(1, self._size - int(self._size * ratio + _ROUNDING))
        self._queries, self._keys, self._context = (NormalEquations() for _ in range(3))

    def see(self, seen: NormalEquations, rows: IntArray, channels: Tensor) -> None:
        """Add channels ``(channels, samples)`` of which each head has some rows, (heads, size)."""
        own = channels[torch.from_numpy(rows).to(channels.device)].mT
        seen.add(own, own[..., :0], own[..., :0])

    def looks(self) -> tuple[list[Any], list[Any]]:
        """Return what watches the layers within, when they are entered and left."""
        places = np.arange(len(self._attention.context[1])).reshape(-1, self._size)

        def mixed(entering: Tensor) -> None:
            self.see(self._context, places, by_channel(self._projection, entering))

        def made(layer: nn.Module, seen: NormalEquations, rows: IntArray, _: Tensor, output: Tensor) -> None:
            self.see(seen, rows, by_channel(layer, output))

        leaving = []
        asking = [part for part in self._parts[:2] if part[0] != self.name]  # ``nn.MultiheadAttention`` is one itself
        for (name, rows), seen in zip(asking, (self._queries, self._keys), strict=False):
            layer = self._model.get_submodule(name)
            leaving.append((layer, partial(made, layer, seen, rows)))
        return [(self._projection, mixed)], leaving

    def look_within(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what ``nn.MultiheadAttention`` makes of its arguments."""
        named = bind_arguments(module, (args, kwargs))
        found = projected(module, *(named[key] for key in ("query", "key", "value")))
        rows = np.arange(found[0].shape[-1]).reshape(self._attention.heads, -1)
        for seen, values in zip((self._queries, self._keys), found, strict=False):
            self.see(seen, rows, by_channel(module.out_proj, values))

    def finish(self, processes: Processes | None, device: torch.device) -> None:
        """Take in what all processes have seen; DataError where it can't be used."""
        for seen in (self._queries, self._keys, self._context):
            if processes is not None:
                seen.pool(processes, device, f"the heads of {self.name}")
            if not seen.is_finite():
                raise DataError(f"activations must be finite, got NaN or infinity ({self.name})")
            if not seen.samples:
                raise DataError(f"calibration must reach every attention module, got none ({self.name})")

    def parameters(self) -> list[nn.Parameter]:
        """Return what turning the heads changes."""
        layers = [*(self._model.get_submodule(layer) for layer in self._attention.layers), self._projection]
        return list(dict.fromkeys(p for each in layers for p in each.parameters(recurse=False)))

    def turn(self) -> None:
        """Put first the directions of each head with which logits and values come nearest."""
        queries = _second_moments(self._queries, centred=False).unflatten(0, (-1, self._share)).mean(1)
        ones, others = directions(queries, _second_moments(self._keys, centred=True), self._kept)
        self._multiply(0, ones)
        self._multiply(1, others)
        weight = self._projection.weight
        mixing = weight.detach().double().unflatten(1, (-1, self._size)).movedim(1, 0)  # (heads, outputs, size)
        sums = (mixing.mT @ mixing).unflatten(0, (-1, self._share)).sum(1)
        seen = _second_moments(self._context, centred=True).unflatten(0, (-1, self._share)).mean(1)
        columns, rows = directions(sums, seen, self._kept)
        self._multiply(2, rows)
        weight.copy_((mixing @ columns.repeat_interleave(self._share, 0)).movedim(0, 1).flatten(1))

    def mask(self, masks: FullMasks) -> None:
        """Mask the last channels of each head."""
        for layer, rows in self._parts:
            module = self._model.get_submodule(layer)
            for target in (weight_name(module), row_names(module)[-1]):
                if isinstance(parameter := getattr(module, target, None), Tensor):
                    mask = masks.setdefault(layer, {}).setdefault(target, torch.ones_like(parameter).detach())
                    mask[torch.from_numpy(rows[:, self._kept :].ravel()).to(mask.device)] = 0
        whole = torch.ones_like(self._projection.weight).detach()
        mask = masks.setdefault(self._reader, {}).setdefault("weight", whole)
        mask.unflatten(1, (-1, self._size))[:, :, self._kept :] = 0

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
