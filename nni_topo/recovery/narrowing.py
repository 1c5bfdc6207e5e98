"""Heads turned so that few of their channels do most: of queries and keys for the logits, of values for what they add.

A head's logits are products of queries and keys, and what it adds is its values times columns of the layer behind, so
that nothing changes where one is multiplied by a matrix and the other by its inverse. Of all matrices those are taken
with which the first channels alone come nearest: with ``S`` and ``C`` the products of two factors' channels over the
calibration, and ``S = L L'``, ``C = R R'``, the singular vectors of ``L' R`` say which directions these are. [1]_ keeps
channels as they are and solves for a matrix between those kept, one of the solutions that this is the best of.

References
----------
.. [1] "CORP: closed-form one-shot representation-preserving structured pruning", for vision transformers: ridge
   regression of the logits on the channels of queries and keys that are kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from nni.compression.utils import Evaluator
from torch import Tensor, nn

from nni_topo.errors import ConfigError, DataError, check_knobs, number, unknown_name
from nni_topo.network.attention import Attention, IntArray, projected
from nni_topo.network.capture import batches_of, by_channel, called, run, watched
from nni_topo.network.inputs import bind_arguments, first_call, structure_call, tensors_of
from nni_topo.network.layers import row_names, weight_name, weight_of
from nni_topo.network.masks import FullMasks, Masks, check_masks, check_model
from nni_topo.network.modes import detached_copy, evaluation_mode
from nni_topo.network.network import Network
from nni_topo.network.resolve import union
from nni_topo.network.transformers import mixing_called

_SAME = 1e-3  # of the largest output, in single precision
_LEAST = 1e-7  # of the largest singular value
_ROUNDING = 1e-9  # of channels: a ratio of two whole numbers means the first of them

_logger = logging.getLogger(__name__)


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
        The share of each head's channels that goes, in (0, 1), of queries, keys and values alike; at least one stays.
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
    Attention is left whole, in one warning, where keys and values are shared by several heads, where more is done to
    queries and keys than to multiply them (rotary positions, norms), and where something else than one linear layer
    reads the heads.

    Logits matter up to what is added to all of a query's alike, and values up to a constant, which `compensate` puts
    into the bias of the layer behind.

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
    batches = batches_of(calibration, model)
    flow = Network(model, structure_call(model, batches)).flow
    known = {each.name: each for each in flow.heads.values() if not each.recurrent}
    asked = given if isinstance(sparse_ratio, Mapping) else dict.fromkeys(known, sparse_ratio)
    modules = dict(model.named_modules())
    for name in asked:
        if name not in modules:
            raise unknown_name("an attention module", name, modules)
        if name not in known:
            raise ConfigError(f"a module must be attention whose heads are known, got {name!r} (sparse_ratio)")
    readers: dict[str, list[str]] = {}
    for layer, read in flow.mixers().items():
        readers.setdefault(read.name, []).append(layer)
    whole = {name: why for name in asked if (why := _why_whole(known[name], readers.get(name, [])))}
    heads = [_Heads(known[name], readers[name][0]) for name in asked if name not in whole]
    turned: nn.Module = detached_copy(model)
    _measure(turned, heads, batches)
    masks: FullMasks = {}
    wanted = _outputs(turned, batches)
    for each in heads:
        size = each.attention.size
        kept = max(1, size - int(size * asked[each.attention.name] + _ROUNDING))
        before = {name: parameter.detach().clone() for name, parameter in each.parameters(turned)}
        each.turn(turned, kept)
        if _is_same(wanted, _outputs(turned, batches)):
            each.mask(turned, kept, masks)
            continue
        whole[each.attention.name] = "more is done to queries and keys than to multiply them"
        with torch.no_grad():
            for name, parameter in each.parameters(turned):
                parameter.copy_(before[name])
    if whole:
        told = "; ".join(f"{name} ({why})" for name, why in whole.items())
        _logger.warning("attention whose heads stay as large as they are: %s", told)
    return turned, masks


def narrow_instead(model: nn.Module, calibration: Iterable[Any] | Evaluator, masks: Masks) -> tuple[nn.Module, Masks]:
    """Give heads back that masks take away, and let all of a module's be narrower instead, for the same cost.

    Where `narrow_heads` leaves attention whole the heads go; model and masks are as it returns them.
    """
    batches = batches_of(calibration, model)
    flow, full = Network(model, structure_call(model, batches)).flow, check_masks(model, masks)
    left = union(model, flow, full)
    ratios, rest = {}, 0.0
    for name in dict.fromkeys(each.name for each in flow.heads.values() if not each.recurrent):
        heads = left[flow.roots(flow.bundle_numbers(next(iter(flow.attention[name].channels))))]
        size = flow.attention[name].size
        wanted = size * heads.mean() + rest
        kept = min(max(round(wanted), 1), size)
        if not heads.all() and kept < size:
            # What is rounded in one module is made up for in the next.
            ratios[name], rest = (size - kept) / size, wanted - kept
    if not ratios:
        return model, masks
    turned, within = narrow_heads(model, batches, ratios)
    mixers = {layer: read for layer, read in flow.mixers().items() if layer in within}
    for layer in within:
        if layer not in mixers:
            full.pop(layer, None)  # rows of heads
        elif "weight" in full.get(layer, {}):
            rows = full[layer]["weight"].amax(1, keepdim=True)
            full[layer]["weight"] = rows.expand_as(full[layer]["weight"]).clone()
    for layer, targets in within.items():
        own = full.setdefault(layer, {})
        for target, mask in targets.items():
            own[target] = own[target] * mask if target in own else mask
    return turned, full


def _why_whole(attention: Attention, readers: list[str]) -> str:
    widths = {rows.shape[1] for _, rows in attention.parts}
    if len(widths) > 1:
        return "heads share keys and values"
    return "" if len(readers) == 1 else "not one linear layer alone reads its heads"


@dataclass
class _Moments:
    """Sums over samples of the channels of each head."""

    samples: int = 0
    sums: Tensor | None = None  # (heads, size)
    products: Tensor | None = None  # (heads, size, size)

    def add(self, values: Tensor) -> None:
        """Add channels ``(heads, size, samples)``."""
        values = values.double()
        self.samples += values.shape[2]
        sums, products = values.sum(2), values @ values.mT
        self.sums = sums if self.sums is None else self.sums + sums
        self.products = products if self.products is None else self.products + products

    def second(self, *, centred: bool) -> Tensor:
        """Return the mean products, of differences from the mean if so asked."""
        assert self.sums is not None
        assert self.products is not None
        means = self.sums / self.samples
        found = self.products / self.samples
        return found - means.unsqueeze(2) * means.unsqueeze(1) if centred else found


class _Heads:
    """The heads of one attention module: what they are seen to do, and how they are turned."""

    def __init__(self, attention: Attention, reader: str) -> None:
        self.attention = attention
        self.reader = reader  # the layer that mixes them
        self.queries, self.keys, self.context = _Moments(), _Moments(), _Moments()

    def see(self, moments: _Moments, rows: IntArray, channels: Tensor) -> None:
        """Add channels ``(channels, samples)`` of which each head has some rows, (heads, size)."""
        moments.add(channels[torch.from_numpy(rows).to(channels.device)])

    def looks(self, model: nn.Module) -> tuple[list[Any], list[Any]]:
        """Return what watches the layers within, when they are entered and left."""
        reader = model.get_submodule(self.reader)
        places = np.arange(len(self.attention.context[1])).reshape(self.attention.heads, -1)

        def mixed(entering: Tensor) -> None:
            self.see(self.context, places, by_channel(reader, entering))

        def made(layer: nn.Module, moments: _Moments, rows: IntArray, _: Tensor, output: Tensor) -> None:
            self.see(moments, rows, by_channel(layer, output))

        leaving = [
            (model.get_submodule(layer), partial(made, model.get_submodule(layer), moments, rows))
            for (layer, rows), moments in zip(self.attention.parts, (self.queries, self.keys), strict=False)
            if layer != self.attention.name
        ]
        return [(reader, mixed)], leaving

    def look_within(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See what ``nn.MultiheadAttention`` makes of its arguments."""
        named = bind_arguments(module, (args, kwargs))
        found = projected(module, *(named[key] for key in ("query", "key", "value")))
        rows = np.arange(found[0].shape[-1]).reshape(self.attention.heads, -1)
        for moments, values in zip((self.queries, self.keys), found, strict=False):
            self.see(moments, rows, by_channel(module.out_proj, values))

    def parameters(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """List the parameters that turning changes."""
        layers = {layer: model.get_submodule(layer) for layer in (*self.attention.channels, self.reader)}
        own = [(f"{name}.{key}", p) for name, each in layers.items() for key, p in each.named_parameters(recurse=False)]
        return list(dict(own).items())

    def turn(self, model: nn.Module, kept: int) -> None:
        """Put those directions of each head first, so many of them, with which logits and values come nearest."""
        reader: Any = model.get_submodule(self.reader)
        heads, size = self.attention.heads, self.attention.size
        ones, others = _directions(self.queries.second(centred=False), self.keys.second(centred=True), kept)
        mixing = reader.weight.detach().double().unflatten(1, (heads, size)).movedim(1, 0)  # (heads, outputs, size)
        columns, rows = _directions(mixing.mT @ mixing, self.context.second(centred=True), kept)
        with torch.no_grad():
            for (layer, places), maps in zip(self.attention.parts, (ones, others, rows), strict=True):
                _multiply(model.get_submodule(layer), torch.from_numpy(places), maps)
            reader.weight.copy_((mixing @ columns).movedim(0, 1).flatten(1))

    def mask(self, model: nn.Module, kept: int, masks: FullMasks) -> None:
        """Mask all but the first channels of each head."""
        reader: Any = model.get_submodule(self.reader)
        for layer, places in self.attention.parts:
            module = model.get_submodule(layer)
            for target in (weight_name(module), row_names(module)[-1]):
                if isinstance(parameter := getattr(module, target, None), Tensor):
                    mask = masks.setdefault(layer, {}).setdefault(target, torch.ones_like(parameter).detach())
                    mask[torch.from_numpy(places[:, kept:].ravel()).to(mask.device)] = 0
        mask = masks.setdefault(self.reader, {}).setdefault("weight", torch.ones_like(reader.weight).detach())
        mask.unflatten(1, (self.attention.heads, -1))[:, :, kept:] = 0


def _measure(model: nn.Module, heads: list[_Heads], batches: Iterable[Any]) -> None:
    """Run a model over all batches and sum up what its heads do."""
    entering, leaving = [], []
    for each in heads:
        before, behind = each.looks(model)
        entering += before
        leaving += behind
    with ExitStack() as stack:
        stack.enter_context(mixing_called(model))
        stack.enter_context(watched(entering, leaving))
        for each in heads:
            module = model.get_submodule(each.attention.name)
            if isinstance(module, nn.MultiheadAttention):
                stack.enter_context(called(module, partial(each.look_within, module)))
        run(model, batches)
    for each in heads:
        for moments in (each.queries, each.keys, each.context):
            if moments.products is None:
                raise DataError(f"calibration must reach every attention module, got none ({each.attention.name})")
            if not bool(moments.products.isfinite().all()):
                raise DataError(f"activations must be finite, got NaN or infinity ({each.attention.name})")


def _root(matrix: Tensor) -> Tensor:
    """Return ``L`` of ``L L'``, a symmetric positive semidefinite matrix (n, n)."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root


def _directions(ones: Tensor, others: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Return matrices ``A`` and ``B``, (heads, n, n), with ``A B' = 1``, of which the first columns alone come nearest.

    ``ones`` and ``others`` are the mean products of two factors' channels, ``x`` and ``y``, in each head: of all ``A``
    and ``B`` so many columns leave the least of the mean square of ``x' y - x' A B' y``.
    """
    pairs = [_of_head(_root(one), _root(other), kept) for one, other in zip(ones, others, strict=True)]
    a, b = zip(*pairs, strict=True)
    return torch.stack(a), torch.stack(b)


def _of_head(left: Tensor, right: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    u, values, v = torch.linalg.svd(left.mT @ right)
    count = min(kept, int((values > _LEAST * values[0]).sum()))
    scale = values[:count].rsqrt()
    a, b = (right @ v[:count].mT) * scale, (left @ u[:, :count]) * scale
    # The other columns do what these lack.
    u, values, v = torch.linalg.svd(torch.eye(len(left)).to(left) - a @ b.mT)
    more = values[: len(left) - count].sqrt()
    return torch.cat([a, u[:, : len(more)] * more], 1), torch.cat([b, v[: len(more)].mT * more], 1)


def _multiply(module: nn.Module, places: Tensor, maps: Tensor) -> None:
    """Put in the place of a layer's channels (heads, n) their products with the columns of maps (heads, n, n)."""
    for parameter in (weight_of(module), getattr(module, row_names(module)[-1], None)):
        if isinstance(parameter, Tensor):
            rows = parameter[places.to(parameter.device)].double()  # (heads, n, inputs), or (heads, n) of a bias
            parameter[places.to(parameter.device)] = torch.einsum("hn...,hnm->hm...", rows, maps).to(parameter)


def _outputs(model: nn.Module, batches: Iterable[Any]) -> list[Tensor]:
    args, kwargs = first_call(model, batches)
    with evaluation_mode(model), torch.no_grad():
        return [each for each in tensors_of(model(*args, **kwargs)) if each.is_floating_point()]


def _is_same(wanted: list[Tensor], got: list[Tensor]) -> bool:
    return all(bool((a - b).abs().max() <= _SAME * a.abs().max()) for a, b in zip(wanted, got, strict=True))
