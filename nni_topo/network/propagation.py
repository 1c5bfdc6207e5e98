"""How masks travel through single operations: what they don't reach is kept, whatever its values.

NNI runs a node on random values: what comes out constant is masked, and what gets no gradient isn't needed. But the
values of a model's own can do the same to any channel: token types that are all zero, a scale that starts at zero, a
comparison, an index. So a node that no mask reaches masks nothing, and what is constant, or gets no gradient, without
any mask too, isn't taken for masked or for not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from nni.compression.speedup import ModelSpeedup
from nni.compression.speedup.mask_updater import DefaultMaskUpdater
from nni.compression.speedup.utils import tree_map_zip

from nni_topo.network.inputs import tensors_of


def masks_enter(speedup: ModelSpeedup, node: torch.fx.Node) -> bool:
    """Tell whether a mask of a node's inputs or of its module's parameters holds a zero."""
    entering = [speedup.node_infos[parent].output_masks for parent in node.all_input_nodes]
    return any(not bool(mask.all()) for mask in tensors_of([entering, speedup.node_infos[node].param_masks]))


def whole(speedup: ModelSpeedup, node: torch.fx.Node) -> Any:
    """Make masks of ones of a node's output, in its containers; None for what NNI gives no mask."""
    return tree_map_zip(lambda value: _ones(speedup, value), speedup.node_infos[node].output_origin)


def free(speedup: ModelSpeedup, node: torch.fx.Node) -> None:
    """Drop the random values that no node after this one reads."""
    for done in speedup.user_to_last_uses.get(node, []) if speedup.garbage_collect_values else []:
        del speedup.node_infos[done].output_randomize


class PlainUpdater(DefaultMaskUpdater):
    """Pass masks through functions, methods and modules without parameters."""

    def detect(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> bool:
        """Tell whether a node is one of these."""
        if node.op == "output":
            return False
        return node.op != "call_module" or not any(True for _ in model_speedup.fetch_attr(node.target).parameters())

    def direct_update_preprocess(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        """Draw random values, of parameters and constants too."""
        super().direct_update_preprocess(model_speedup, node)
        # NNI draws only what has its batch size. A scale that starts at zero would mask all that it multiplies.
        info = model_speedup.node_infos[node]
        info.output_randomize = tree_map_zip(_redraw, info.output_randomize)

    def direct_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        """Mask what the masks of the inputs make constant."""
        info = model_speedup.node_infos[node]
        before = whole(model_speedup, node)
        if masks_enter(model_speedup, node):
            with torch.no_grad():
                masks = self._constant(model_speedup, node, before, masked=True)
                # A slice that is gone may be constant by itself, as behind a comparison; a run without masks tells.
                if _lost(before, masks):
                    alike = self._constant(model_speedup, node, before, masked=False)
                    passed = _passed(model_speedup, node)
                    masks = tree_map_zip(lambda mask, plain: _restore(mask, plain, passed), masks, alike)
        else:
            masks = before
        info.output_masks = masks
        free(model_speedup, node)

    def indirect_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        """Mask what later masks leave without a use, and tell the inputs what is needed of them."""
        # Held back: a zero gradient counts only once it is known not to be zero without masks too.
        with model_speedup.collected() as given:
            super().indirect_update_process(model_speedup, node)
        info = model_speedup.node_infos[node]
        if tensors_of(info.output_origin) and any(_unneeded(model_speedup, *pair) for pair in given):
            with model_speedup.collected() as plain, _unmasked(model_speedup, node):
                super().indirect_update_process(model_speedup, node)
            # Both runs pass to the same inputs in the same order.
            for (parent, values), (_, others) in zip(given, plain, strict=True):
                masks = model_speedup.node_infos[parent].output_masks
                tree_map_zip(_add_needed, values, others, masks)
        for parent, values in given:
            model_speedup.indirect_pass_grad(parent, values)

    def _constant(self, speedup: ModelSpeedup, node: torch.fx.Node, before: Any, *, masked: bool) -> Any:
        """Run a node on its inputs' random values and mask what comes out constant."""

        def value(leaf: Any) -> Any:
            if not isinstance(leaf, torch.fx.Node):
                return leaf
            info = speedup.node_infos[leaf]
            # Same random values in both runs, so that only the masks can make a difference.
            masks = info.output_masks if masked else tree_map_zip(lambda _: None, info.output_randomize)
            return tree_map_zip(_times, info.output_randomize, masks)

        args, kwargs = tree_map_zip(value, node.args), tree_map_zip(value, node.kwargs)
        return tree_map_zip(speedup.direct_calc_mask, getattr(speedup, node.op)(node.target, args, kwargs), before)


def _ones(speedup: ModelSpeedup, value: Any) -> torch.Tensor | None:
    masked = isinstance(value, torch.Tensor) and speedup.tensor_propagate_check(value)
    return torch.ones_like(value, requires_grad=False) if masked else None


def _redraw(value: Any) -> Any:
    """Draw floats that NNI left as they are, a parameter or a constant, from its range of random values."""
    is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
    return torch.empty_like(value).uniform_(0.1, 8.0) if is_float else value


def _times(value: Any, mask: torch.Tensor | None) -> Any:
    """Mask a copy of a value, which an operation in place may change."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.clone() if mask is None else (value * mask).type_as(value)


def _slices(mask: torch.Tensor) -> list[torch.Tensor]:
    """Tell for every dimension but the batch which of its slices hold anything."""
    return [mask.ne(0).transpose(0, d).flatten(1).any(1) for d in range(1, mask.dim())]


def _at(dim: int, kept: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Spread one entry a slice over all of a tensor."""
    view = [1] * like.dim()
    view[dim] = -1
    return kept.view(view).expand(like.shape)


def _lost(before: Any, masks: Any) -> bool:
    pairs = zip(tensors_of(before), tensors_of(masks), strict=False)
    return any(bool((had & ~has).any()) for a, b in pairs for had, has in zip(_slices(a), _slices(b), strict=True))


def _passed(speedup: ModelSpeedup, node: torch.fx.Node) -> list[torch.Tensor]:
    return tensors_of([speedup.node_infos[parent].output_masks for parent in node.all_input_nodes])


def _restore(mask: torch.Tensor | None, plain: torch.Tensor | None, passed: list[torch.Tensor]) -> torch.Tensor | None:
    """Give slices that are constant without masks too the masks that enter in the same shape, or none."""
    if mask is None or plain is None:
        return mask
    entering = torch.ones_like(mask)
    for other in passed:
        # Of another shape (broadcast, joined) a mask says nothing about the places here.
        entering = entering * other.to(mask) if other.shape == mask.shape else entering
    for d, (has, varies) in enumerate(zip(_slices(mask), _slices(plain), strict=True), start=1):
        # Constant with masks and without: it isn't the masks that made it so.
        mask = torch.where(_at(d, ~has & ~varies, mask), entering, mask)
    return mask


def _unneeded(speedup: ModelSpeedup, parent: torch.fx.Node, values: Any) -> bool:
    """Tell whether something that is alive got no gradient."""
    found: list[bool] = []

    def look(value: Any, mask: Any) -> None:
        if isinstance(mask, torch.Tensor) and isinstance(value, torch.Tensor) and value.requires_grad:
            grad = torch.zeros_like(value) if value.grad is None else value.grad
            found.extend(bool((a & ~g).any()) for a, g in zip(_slices(mask), _slices(grad), strict=True))

    tree_map_zip(look, values, speedup.node_infos[parent].output_masks)
    return any(found)


def _add_needed(value: Any, other: Any, mask: torch.Tensor | None) -> None:
    """Add a gradient for slices that get none without masks either: as needed as the slices beside them."""
    if mask is None or not isinstance(value, torch.Tensor) or not value.requires_grad:
        return
    grad = torch.zeros_like(value) if value.grad is None else value.grad.clone()
    plain = torch.zeros_like(value) if other.grad is None else other.grad
    # An argmax or a comparison passes no gradient at all, though what enters decides: all that is alive is needed.
    if not bool(grad.any()) and not bool(plain.any()):
        grad = mask.to(grad).expand_as(grad).clone()
    for d, (has, has_plain) in enumerate(zip(_slices(grad), _slices(plain), strict=True), start=1):
        beside = grad.ne(0).any(d, keepdim=True).to(grad).expand_as(grad)
        grad = torch.where(_at(d, ~has & ~has_plain, grad), beside, grad)
    value.grad = grad


@contextmanager
def _unmasked(speedup: ModelSpeedup, node: torch.fx.Node) -> Iterator[None]:
    """Let a node and its inputs be without masks for a while."""
    infos = [speedup.node_infos[near] for near in (node, *node.all_input_nodes)]
    before = [(info, info.output_masks, info.output_grad) for info in infos]
    try:
        for info in infos:
            info.output_masks = tree_map_zip(
                lambda mask: torch.ones_like(mask) if isinstance(mask, torch.Tensor) else mask, info.output_masks
            )
            # Without a gradient NNI takes all of the node's output for needed.
            info.output_grad = tree_map_zip(lambda _: None, info.output_grad)
        yield
    finally:
        for info, masks, grads in before:
            info.output_masks, info.output_grad = masks, grads
