"""Opt-in patches of NNI's own pruners and speedup that can change a result, or raise where NNI went on silently.

Nothing here is in force until :func:`enable_strict` is called, so that a comparison with plain NNI stays one. The
package's own pruners behave like this without it. All places are NNI 3.0's, on every PyTorch and Python.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from nni.compression import speedup
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.target_space import TargetType
from nni.compression.pruning import basic_pruner, movement_pruner, scheduled_pruner, slim_pruner, taylor_pruner, tools
from nni.compression.pruning.tools import sparse_gen
from nni.compression.speedup import dependency, mask_conflict
from nni.compression.utils import Evaluator

from nni_topo.errors import ConfigError
from nni_topo.pruners.allocators import ConfigAllocator
from nni_topo.pruners.base import StructuredPruner, known_masks
from nni_topo.pruners.checks import check_request
from nni_topo.pruners.hooks import Masks, Metrics, PruningContext
from nni_topo.pruners.planner import Planner
from nni_topo.pruners.units import TargetSpaces, in_network_order
from nni_topo.rules import checked

_originals: dict[tuple[Any, str], Any] = {}


@checked()
def enable_strict(*, normalization: Literal["none", "mean"] = "none") -> None:
    """Make NNI's own pruners and ``ModelSpeedup`` refuse what can't be right and do what their pages promise.

    Parameters
    ----------
    normalization : {"none", "mean"}, default="none"
        Scale of the metrics that a ``global_group_id`` ranks, see :class:`~nni_topo.hooks.Planner`.

    Raises
    ------
    ConfigError
        If ``normalization`` is neither.

    See Also
    --------
    disable_strict : NNI as it was.

    Notes
    -----
    What changes, for pruners and speedups made from now on:

    * A config_list that is empty (but for ``from_compressor`` and the schedules), matches nothing or has an entry
      without ratio and threshold is refused, keys of NNI 2 are accepted in any entry, and weights must be finite
      (``base/compressor.py``, ``Pruner.__init__``).
    * Global sparsity no longer depends on PYTHONHASHSEED: layers are ranked in network order (``base/config.py``
      iterates over a set).
    * Metrics must be finite; no layer is emptied; ``sparse_threshold``, ``global_group_id`` and the minimum and
      maximum ratio also work in a dependency group; they hold per layer in a global group
      (``pruning/tools/sparse_gen.py``, ``generate_sparsity``; pruned inputs and outputs stay NNI's).
    * ``update_masks`` leaves out modules it doesn't know (``base/compressor.py``).
    * The caller's ``customized_replacers`` list isn't changed (``speedup/model_speedup.py``).
    * A convolution to one channel isn't taken for depth-wise (``speedup/dependency.py``).
    * ``LinearPruner`` and ``AGPPruner`` say what they need of their pruner (``pruning/scheduled_pruner.py``).

    Examples
    --------
    >>> enable_strict()
    >>> disable_strict()
    """
    planner = Planner(normalization=normalization)

    def allocate(metrics: Metrics, target_spaces: TargetSpaces) -> Masks:
        # The package's units hold parameters: where inputs or outputs are pruned, NNI's own function stays.
        if any(space.type is not TargetType.PARAMETER for each in target_spaces.values() for space in each.values()):
            return dict(sparse_gen.generate_sparsity(metrics, target_spaces))
        return ConfigAllocator().allocate(metrics, PruningContext(torch.nn.Module(), target_spaces, planner=planner))

    for module in (basic_pruner, movement_pruner, slim_pruner, taylor_pruner, tools):
        _replace(module, "generate_sparsity", allocate)
    _replace(Pruner, "__init__", _checked_init)
    _replace(Pruner, "update_masks", _update_known_masks)
    _replace(scheduled_pruner._ComboPruner, "__init__", _checked_combination)
    _replace(speedup.ModelSpeedup, "__init__", _init_with_copied_replacers)
    for module in (dependency, mask_conflict):
        _replace(module, "build_channel_dependency", _build_channel_dependency)


def disable_strict() -> None:
    """Put back everything that :func:`enable_strict` replaced."""
    for (owner, name), original in _originals.items():
        setattr(owner, name, original)
    _originals.clear()


def _replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    _originals.setdefault((owner, name), getattr(owner, name))
    setattr(owner, name, replacement)


def _original(owner: Any, name: str) -> Callable[..., Any]:
    return _originals[owner, name]  # type: ignore[no-any-return]


def _checked_init(
    self: Pruner,
    model: torch.nn.Module,
    config_list: list[dict[str, Any]],
    evaluator: Evaluator | None = None,
    existed_wrappers: dict[str, Any] | None = None,
) -> None:
    if not isinstance(self, StructuredPruner):
        config_list = check_request(model, config_list, existed_wrappers)
    _original(Pruner, "__init__")(self, model, config_list, evaluator, existed_wrappers)
    self._target_spaces = in_network_order(model, self._target_spaces)


def _update_known_masks(self: Pruner, masks: Masks) -> None:
    _original(Pruner, "update_masks")(self, known_masks(self, masks))


def _checked_combination(
    self: Pruner, pruner: Pruner, interval_steps: int, total_times: int, evaluator: Evaluator | None = None
) -> None:
    place = f"{type(self).__name__}({type(pruner).__name__})"
    missing = [name for name in ("interval_steps", "total_times") if not hasattr(pruner, name)]
    hooks = ("_fuse_preprocess", "_fuse_postprocess")
    missing += [hook for hook in hooks if getattr(type(pruner), hook, None) in (None, getattr(Compressor, hook))]
    if missing:
        raise ConfigError(f"a scheduled pruner must have {', '.join(missing)}, got none ({place})")
    if not isinstance(pruner.evaluator or evaluator, Evaluator):
        raise ConfigError(f"a schedule needs an evaluator, its own or its pruner's, got neither ({place})")
    _original(scheduled_pruner._ComboPruner, "__init__")(self, pruner, interval_steps, total_times, evaluator)


def _init_with_copied_replacers(self: speedup.ModelSpeedup, *args: Any, **kwargs: Any) -> None:
    original = _original(speedup.ModelSpeedup, "__init__")
    call = inspect.signature(original).bind(self, *args, **kwargs)
    if call.arguments.get("customized_replacers") is not None:
        call.arguments["customized_replacers"] = list(call.arguments["customized_replacers"])
    original(*call.args, **call.kwargs)


def _build_channel_dependency(graph_module: torch.fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
    """Hide the groups of dense convolutions to one channel: NNI compares them with the output channels."""
    kinds = (torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    dense = [
        module
        for module in graph_module.modules()
        if isinstance(module, kinds) and module.groups == module.out_channels == 1 and module.in_channels > 1
    ]
    try:
        for module in dense:
            module.groups = 0
        return _original(dependency, "build_channel_dependency")(graph_module, *args, **kwargs)
    finally:
        for module in dense:
            module.groups = 1
