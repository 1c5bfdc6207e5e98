"""Pruning in rounds: prune a little, train, repeat, as in iterative magnitude pruning.

References
----------
.. [1] J. Frankle and M. Carbin, "The Lottery Ticket Hypothesis", https://arxiv.org/abs/1803.03635
.. [2] A. Renda et al., "Comparing Rewinding and Fine-tuning in Neural Network Pruning",
   https://arxiv.org/abs/2003.02389
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from nni.compression.base.compressor import Pruner
from nni.compression.base.target_space import PruningTargetSpace
from torch import Tensor, nn

from nni_topo.errors import ConfigError
from nni_topo.network.runtime.progress import bar
from nni_topo.pruners.units import is_active
from nni_topo.sharing import parameter_holders


@dataclass(frozen=True)
class Round:
    """The state after round ``index``, from 1; ``kept``: by ``"module.target"``, the remaining share of elements."""

    index: int
    kept: dict[str, float]


def even_steps(rounds: int) -> list[float]:
    """Return steps for :func:`prune_in_rounds` by which every round prunes the same share of the remaining elements."""
    return [(index + 1) / rounds for index in range(rounds)]


def prune_in_rounds(
    pruner: Pruner,
    steps: Sequence[float],
    train: Callable[[], None],
    *,
    rewind: Mapping[str, Tensor] | None = None,
    on_round: Callable[[Round], None] | None = None,
) -> list[Round]:
    """Prune with any of NNI's one-shot pruners in rounds, with training in between.

    Parameters
    ----------
    pruner : nni.compression.base.compressor.Pruner
        A pruner of NNI or of this package with ``sparse_ratio`` targets and a wrapped model.
    steps : sequence of float
        One per round, rising, in (0, 1]. A round brings every target with a final ratio ``s`` to
        ``1 - (1 - s) ** step``; at step 1 this is the final ratio.
    train : callable
        Trains the wrapped model; called once per round, after its masks are set. Optimizers must be made inside.
    rewind : mapping of str to Tensor or None, default=None
        State dict of the unwrapped model; before each training the kept weights are reset to it.
    on_round : callable or None, default=None
        Called with the :class:`Round` after its training.

    Returns
    -------
    list of Round

    Notes
    -----
    Masked weights are set to 0 before each training, so that a pruner that ranks magnitudes doesn't take them back. Of
    weights that several layers share, only those that all of these layers mask.
    """
    if not steps or not all(0.0 < a <= 1.0 for a in steps) or sorted(set(steps)) != list(steps):
        raise ConfigError(f"steps must be one or more rising numbers in (0, 1], got {list(steps)} (prune_in_rounds)")
    active: dict[str, PruningTargetSpace] = {}
    for module, spaces in pruner._target_spaces.items():
        for target, space in spaces.items():
            if is_active(space):
                active[f"{module}.{target}"] = space
    goals = [(space, float(space.sparse_ratio)) for space in active.values() if space.sparse_ratio is not None]
    if not goals:
        raise ConfigError("pruning in rounds needs a target with a sparse_ratio, got none (prune_in_rounds)")
    if rewind is not None:
        matched_state(pruner.bound_model, rewind)
    rounds = []
    try:
        for index, step in enumerate(bar("rounds", getattr(pruner, "progress", None), steps), start=1):
            for space, goal in goals:
                space.sparse_ratio = 1.0 - (1.0 - goal) ** step if step < 1.0 else goal
            pruner.update_masks(pruner.generate_masks())
            if rewind is not None:
                restore(pruner.bound_model, rewind)
            _silence(pruner.bound_model, list(active.values()))
            kept_shares = {}
            for name, space in active.items():
                is_masked = space.mask is not None and space.target is not None
                kept_shares[name] = float(space.mask.ne(0).double().mean()) if is_masked else 1.0
            train()
            rounds.append(Round(index, kept_shares))
            if on_round is not None:
                on_round(rounds[-1])
    finally:
        for space, goal in goals:
            space.sparse_ratio = goal
    return rounds


def matched_state(model: nn.Module, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors of a model, wrapped or not, with their values in the unwrapped model's state; all must fit."""
    tensors = dict(model.named_buffers(remove_duplicate=False)) | dict(model.named_parameters(remove_duplicate=False))
    matched = []
    for name, value in state.items():
        module, _, tensor = str(name).rpartition(".")
        names = (".".join(filter(None, (module, "_nni_wrapper", tensor))), name)
        current = next((tensors[candidate] for candidate in names if candidate in tensors), None)
        if current is None or not isinstance(value, Tensor) or current.shape != value.shape:
            got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            expected = "none" if current is None else f"shape {tuple(current.shape)}"
            raise ConfigError(
                f"rewind must hold tensors of the model's names and shapes, got {got}, the model's is {expected} "
                f"({name})"
            )
        matched.append((current, value))
    return matched


@torch.no_grad()
def restore(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy an unwrapped model's state into the wrapped one, under every name that a shared tensor has."""
    for tensor, value in matched_state(model, state):
        tensor.copy_(value)


@torch.no_grad()
def _silence(model: nn.Module, spaces: list[PruningTargetSpace]) -> None:
    """Set to 0 the elements that every layer with this weight masks."""
    holders = parameter_holders(model)
    masked: dict[int, list[PruningTargetSpace]] = {}
    for space in spaces:
        if space.mask is not None and space.target is not None:
            masked.setdefault(id(space.target), []).append(space)
    for key, sharing in masked.items():
        if len(sharing) >= holders[key]:
            is_kept = torch.stack([space.mask.ne(0) for space in sharing]).any(0)
            sharing[0].target.mul_(is_kept)
