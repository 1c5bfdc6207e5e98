"""NNI's ModelSpeedup, told what it gets wrong by itself.

NNI's propagation finds which channels are constant and which nothing depends on, by running every node on
random values. The classes below keep this and change, by NNI's own seams, what goes wrong around it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.fx
from nni.compression.speedup import ModelSpeedup
from nni.compression.speedup.mask_updater import (
    DefaultMaskUpdater,
    LeafModuleMaskUpdater,
    NoChangeMaskUpdater,
    NoMaskUpdater,
)
from nni.compression.speedup.replacement import replace_module
from nni.compression.speedup.replacer import Replacer
from torch.nn import functional
from torch.utils._pytree import tree_map

from nni_topo.errors import SpeedupError
from nni_topo.network.cutting import cut
from nni_topo.network.inputs import tensors_of
from nni_topo.network.layers import can_be_cut, output_channels
from nni_topo.network.masks import FullMasks
from nni_topo.network.propagation import PlainUpdater, free, masks_enter, whole

# A batch of which few sizes are multiples, so that NNI takes no parameter for an activation.
_BATCH = 5

_NORM_FUNCTIONS = (
    functional.layer_norm,
    functional.batch_norm,
    functional.group_norm,
    functional.instance_norm,
    functional.normalize,
)

_quiet = logging.getLogger(f"{__name__}.nni")
_quiet.setLevel(logging.WARNING)

Kept = dict[str, list[torch.Tensor]]


class DenseSpeedup(ModelSpeedup):
    """Make a model in evaluation mode dense in place, given its graph and the masks, which agree and are applied."""

    def __init__(
        self, model: torch.nn.Module, graph_module: torch.fx.GraphModule, args: tuple[Any, ...], masks: FullMasks
    ) -> None:
        names = {str(node.target) for node in graph_module.graph.nodes if node.op == "call_module"}
        super().__init__(
            model,
            args,
            {name: dict(targets) for name, targets in masks.items() if name in names},
            batch_size=_BATCH,
            # The first that takes a node has it: NNI's own for len and dim before PlainUpdater, which takes every
            # function.
            customized_mask_updaters=[
                _InputUpdater(),
                _UnchangedUpdater(),
                NoMaskUpdater(),
                PlainUpdater(),
                _WholeUpdater(),
                _LayerUpdater(),
            ],
            graph_module=graph_module,
            logger=_quiet,
        )
        # By module that was called, the indices kept of each dimension of its output.
        self.kept: Kept = {}
        self._passing: list[tuple[torch.fx.Node, Any]] | None = None
        self.replacers = [_Cutter()]

    # NNI's own goes by layers, and takes a convolution of one output channel for depth-wise; `resolve` went by
    # channels.
    def fix_mask_conflict(self) -> None:
        """Do nothing: masks agree already."""

    def tensor_propagate_check(self, obj: torch.Tensor) -> bool:
        """Take a tensor with one value a sample for an activation too."""
        # NNI asks for more than one value a sample; a layer of one output has just that, and what enters it is cut too.
        alone = obj.dim() > 1 and obj.shape[self.batch_dim] == obj.numel() == self.batch_size
        return alone or bool(super().tensor_propagate_check(obj))

    def update_direct_sparsity(self) -> None:
        """Find the channels that are constant, from the inputs on."""
        self._update("direct", list(self.graph_module.graph.nodes))

    def update_indirect_sparsity(self) -> None:
        """Find the channels that nothing depends on, from the outputs on."""
        self._update("indirect", list(reversed(self.graph_module.graph.nodes)))

    def indirect_pass_grad(self, node: torch.fx.Node, outputs: Any) -> None:
        """Pass gradients on to a node, or collect them."""
        if self._passing is None:
            super().indirect_pass_grad(node, outputs)
        else:
            self._passing.append((node, outputs))

    @contextmanager
    def collected(self) -> Iterator[list[tuple[torch.fx.Node, Any]]]:
        """Collect the values whose gradients would be passed on, instead of passing these."""
        passing: list[tuple[torch.fx.Node, Any]] = []
        self._passing = passing
        try:
            yield passing
        finally:
            self._passing = None

    def _update(self, way: str, nodes: list[torch.fx.Node]) -> None:
        # NNI's own loop, without the statistics for its log, which take about half of its time.
        for stage in ("preprocess", "process", "postprocess"):
            for node in nodes:
                getattr(self.node_infos[node].mask_updater, f"{way}_update_{stage}")(self, node)


class _InputUpdater(DefaultMaskUpdater):
    """Keep the model's inputs whole: NNI cuts input channels that nothing depends on."""

    def detect(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> bool:
        return bool(node.op == "placeholder")

    def direct_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        pass

    def indirect_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        pass


class _UnchangedUpdater(NoChangeMaskUpdater):
    """Pass masks through functional norms, and gradients back through the choice of one of several outputs."""

    # NNI takes the gradient of a functional norm, which is zero but for rounding, for a channel that nothing depends
    # on; and it loses the gradient of an item on its way to the tuple.
    def __init__(self) -> None:
        super().__init__(customized_no_change_act_func=_NORM_FUNCTIONS)

    def indirect_getitem(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        info, parent = model_speedup.node_infos[node], model_speedup.node_infos[node.args[0]]
        index, grads = node.args[1], parent.output_grad
        if not isinstance(index, int) or not isinstance(grads, (tuple, list)):
            super().indirect_getitem(model_speedup, node)
        elif isinstance(info.output_grad, torch.Tensor):
            gained = info.output_grad * info.output_masks
            own = grads[index]
            total = gained if own is None else own + gained
            # The tuple's other items keep what they have: each choice adds to its own.
            parent.output_grad = type(grads)(total if i == index else grad for i, grad in enumerate(grads))


class _WholeUpdater(LeafModuleMaskUpdater):
    """Keep what goes into and comes out of modules that can't be cut: recurrent layers, attention."""

    def detect(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> bool:
        is_module = node.op == "call_module" and bool(super().detect(model_speedup, node))
        return is_module and not can_be_cut(model_speedup.node_infos[node].module)

    def direct_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        # Nothing can be cut off what comes out, whatever enters: there is no need to run the module.
        model_speedup.node_infos[node].output_masks = whole(model_speedup, node)
        free(model_speedup, node)

    def indirect_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        for parent in node.all_input_nodes:
            info = model_speedup.node_infos[parent]
            needed = tree_map(lambda mask: mask.clone() if isinstance(mask, torch.Tensor) else mask, info.output_masks)
            # A gradient of ones tells the nodes before that every entry they give is needed.
            for value in tensors_of(needed):
                value.grad = torch.ones_like(value) if value.is_floating_point() else None
            model_speedup.indirect_pass_grad(parent, needed)


class _LayerUpdater(LeafModuleMaskUpdater):
    """Run layers on positive random parameters, and keep constant channels that aren't zero."""

    def detect(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> bool:
        return node.op == "call_module" and bool(super().detect(model_speedup, node))

    def direct_update_preprocess(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        DefaultMaskUpdater.direct_update_preprocess(self, model_speedup, node)
        info = model_speedup.node_infos[node]
        # Read before random values take its place: the real bias says which channels are alive. From the second call of
        # a module on, its mask does.
        bias = getattr(info.module, "bias", None)
        if not hasattr(info, "alive"):
            info.alive = bias.detach() != 0 if isinstance(bias, torch.Tensor) else None
        with torch.no_grad():
            for name, parameter in info.module.named_parameters():
                # NNI draws from the range of the values: where this is narrow a whole layer counts as constant. And
                # where all are positive no sum cancels, so that a channel is constant only by masks.
                parameter.uniform_(0.5, 1.5).mul_(info.param_masks[name])

    def direct_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        info = model_speedup.node_infos[node]
        if isinstance(info.module, torch.nn.Embedding):
            # indices say nothing about channels, and those of a position have no batch
            info.output_masks = torch.ones_like(info.output_origin) * info.param_masks["weight"].ne(0).any(0)
        elif not masks_enter(model_speedup, node):
            info.output_masks = whole(model_speedup, node)
        else:
            super().direct_update_process(model_speedup, node)
            # NNI drops a channel whose inputs are all masked although its bias is alive.
            self._keep_alive(info)
            return
        free(model_speedup, node)

    def _keep_alive(self, info: Any) -> None:
        if info.alive is not None and isinstance(info.output_masks, torch.Tensor) and output_channels(info.module):
            dim = -1 if isinstance(info.module, torch.nn.Linear) else 1
            info.output_masks.transpose(0, dim)[info.alive] = 1

    def indirect_update_process(self, model_speedup: ModelSpeedup, node: torch.fx.Node) -> None:
        info = model_speedup.node_infos[node]
        if isinstance(info.module, torch.nn.Embedding):
            info.output_masks = model_speedup.indirect_calc_mask(info.output_grad, info.output_masks)
        else:
            # Masks of parameters play no part any more: skip their update.
            DefaultMaskUpdater.indirect_update_process(self, model_speedup, node)


class _Cutter(Replacer):
    """Cut modules in place where this package knows how, else leave them to NNI's replacement table."""

    def replace_modules(self, speedup: DenseSpeedup) -> None:
        for node, info in speedup.node_infos.items():
            if node.op != "call_module":
                continue
            # Else NNI logs an error: a module that no replacer took.
            info.replaced = True
            name = str(node.target)
            module = speedup.bound_model.get_submodule(name)
            in_masks = [speedup.node_infos[parent].output_masks for parent in node.all_input_nodes]
            kept_in = [_kept(mask) for mask in in_masks if isinstance(mask, torch.Tensor)]
            kept_out = _kept(info.output_masks) if isinstance(info.output_masks, torch.Tensor) else []
            if name in speedup.kept:
                _check_calls(name, module, speedup.kept[name], kept_out)
                continue
            speedup.kept[name] = kept_out
            # Indices enter, whose masks say nothing about the weight.
            if isinstance(module, torch.nn.Embedding):
                kept_in = [kept_out]
            if kept_in and kept_out and not cut(name, module, kept_in[0], kept_out):
                self._replace(speedup, name, module, node)

    def _replace(self, speedup: DenseSpeedup, name: str, module: torch.nn.Module, node: torch.fx.Node) -> None:
        info = speedup.node_infos[node]
        # What has no parameters fits any width, but PixelShuffle has a factor that follows from the channels left.
        if not any(True for _ in module.parameters()) and type(module).__name__ != "PixelShuffle":
            return
        function = replace_module.get(type(module).__name__)
        if function is None:
            self._refuse(speedup, name, module, node)
            return
        in_masks = tree_map(
            lambda leaf: speedup.node_infos[leaf].output_masks if isinstance(leaf, torch.fx.Node) else None, node.args
        )
        new = function(module, (in_masks, info.output_masks, info.param_masks)).train(module.training)
        speedup.bound_model.set_submodule(name, new)

    def _refuse(self, speedup: DenseSpeedup, name: str, module: torch.nn.Module, node: torch.fx.Node) -> None:
        """Raise if channels go into or out of a module that nobody can cut."""
        around = [speedup.node_infos[near].output_masks for near in [node, *node.all_input_nodes]]
        masks = tensors_of(around)
        if any(len(kept) < mask.shape[d] for mask in masks for d, kept in enumerate(_kept(mask))):
            raise SpeedupError(
                "a module whose channels are pruned must be of a type that can be made smaller, "
                f"got {type(module).__name__} ({name})"
            )


def _kept(mask: torch.Tensor) -> list[torch.Tensor]:
    """List the indices of each dimension at which anything is kept; masks are alike for all samples."""
    one = (mask[:1] if mask.shape[0] == _BATCH else mask).ne(0)
    rest = [one.transpose(0, d).flatten(1).any(1).nonzero().flatten() for d in range(1, mask.dim())]
    return [torch.arange(mask.shape[0], device=mask.device), *rest]


def _check_calls(name: str, module: torch.nn.Module, first: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    if not any(True for _ in module.parameters()):
        return
    same = len(first) == len(other) and all(torch.equal(a, b) for a, b in zip(first[1:], other[1:], strict=True))
    if not same:
        raise SpeedupError(f"a module that is called several times must keep the same channels each time ({name})")
