"""Patches of NNI's ``ModelSpeedup``: sizes, a misspelt attribute, shared weights, the caller's masks, many outputs."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

import torch
from nni.compression.speedup import container, mask_updater, model_speedup, utils

from nni_topo.sharing import find_aliases, find_ties, share_modules, tie_again, untie


def keep_size_whole() -> bool:
    """Treat ``torch.Size`` as one value when masks are mapped over a node's arguments.

    Place: ``nni/compression/speedup/utils.py``, ``tree_map_zip``. Cause: PyTorch's pytree flattens a ``torch.Size`` to
    integers and rebuilds it as a tuple, so that ``x.size().numel()`` failed and sizes didn't pair with their masks.
    """
    size = torch.Size((2, 3))
    if utils.tree_map_zip(lambda value: value, size) is size:
        return False
    utils.tree_map = partial(utils.tree_map, is_leaf=_is_size)
    utils.tree_flatten = partial(utils.tree_flatten, is_leaf=_is_size)
    return True


def restore_randomized_output() -> bool:
    """Let a node without masks delete the random values of its inputs.

    Place: ``nni/compression/speedup/mask_updater.py``, ``NoMaskUpdater.direct_update_process``. Cause: it deletes
    ``_output_randomize``, but the attribute of ``NodeInfo`` is ``output_randomize``: an AttributeError if a ``len``,
    ``dim`` or ``is None`` is the last user of a value.
    """
    names = mask_updater.NoMaskUpdater.direct_update_process.__code__.co_names
    if "_output_randomize" not in names or hasattr(container.NodeInfo, "_output_randomize"):
        return False
    container.NodeInfo._output_randomize = property(fdel=lambda info: delattr(info, "output_randomize"))
    return True


def untie_layers() -> bool:
    """Give layers that share a tensor a copy each while they are cut; keep all names and modes of modules.

    Place: ``nni/compression/speedup/model_speedup.py``, ``ModelSpeedup.speedup_model``. Cause: masks are propagated on
    random values that are written into each layer in turn, so layers with a shared weight all got the masks of the last
    one: wrong channels were removed, without an error. A module was replaced under the first of its names only, and
    layers of a model in evaluation mode ended in training mode.
    """
    original = model_speedup.ModelSpeedup.speedup_model

    @wraps(original)
    def speedup_model(self: model_speedup.ModelSpeedup) -> torch.nn.Module:
        model: torch.nn.Module = self.bound_model
        ties, aliases = find_ties(model), find_aliases(model)
        modes = _modes(model)
        untie(model, ties)
        untie(self.graph_module, find_ties(self.graph_module))
        try:
            original(self)
        finally:
            share_modules(model, aliases)
            tie_again(model, ties)
            _put_modes(model, modes)
        return model

    model_speedup.ModelSpeedup.speedup_model = speedup_model
    return True


def _modes(model: torch.nn.Module) -> dict[str, bool]:
    """Return, by each name of a module, whether it is in training mode."""
    return {name: module.training for name, module in model.named_modules(remove_duplicate=False)}


def _put_modes(model: torch.nn.Module, modes: dict[str, bool]) -> None:
    for name, module in model.named_modules(remove_duplicate=False):
        module.training = modes.get(name, module.training)


def keep_given_masks() -> bool:
    """Leave the caller's masks and the modes of the model's modules as they are.

    Place: ``nni/compression/speedup/model_speedup.py``, ``ModelSpeedup.__init__``. Cause: it changes the caller's
    masks, so that a second speedup with them went wrong. With the patch ``speedup.masks`` is a copy.
    """
    init = model_speedup.ModelSpeedup.__init__

    @wraps(init)
    def init_with_copies(self: Any, *args: Any, **kwargs: Any) -> None:
        model = args[0] if args else kwargs.get("model")
        modes = _modes(model) if isinstance(model, torch.nn.Module) else {}
        init(self, *args, **kwargs)
        _put_modes(self.bound_model, modes)  # tracing gives all modules the model's mode
        self.masks = {name: dict(given) for name, given in self.masks.items()}
        for given in self.masks.values():
            for target, mask in given.items():
                given[target] = mask.detach().clone() if isinstance(mask, torch.Tensor) else mask

    model_speedup.ModelSpeedup.__init__ = init_with_copies
    return True


def keep_graph_for_all_outputs() -> bool:
    """Let a module return several tensors, as recurrent layers and attention do.

    Place: ``nni/compression/speedup/model_speedup.py``, ``ModelSpeedup.indirect_backward``. Cause: it calls
    ``backward`` on each output, and the first call frees the autograd graph: a RuntimeError at the second.
    """

    def indirect_backward(self: Any, output: Any, output_mask: Any) -> None:
        if isinstance(output, torch.Tensor) and self.tensor_propagate_check(output):
            assert isinstance(output_mask, torch.Tensor)  # NNI's assert
            if output.grad_fn is not None:
                output.backward(output_mask.expand_as(output), retain_graph=True)
        else:
            assert output_mask is None  # NNI's assert

    model_speedup.ModelSpeedup.indirect_backward = indirect_backward
    return True


def _is_size(value: object) -> bool:
    return isinstance(value, torch.Size)
