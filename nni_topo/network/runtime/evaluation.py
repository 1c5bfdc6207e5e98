"""Training and evaluation mode, copies of models, and where they lie."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def evaluation_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into evaluation mode, and every module of theirs back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def fast_paths_off() -> Iterator[None]:
    """Let attention and transformer layers compute what they say, step by step, for a while."""
    # The fast paths turn padded batches into nested tensors, on which hooks and masks can't work.
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the random states of PyTorch, NumPy and Python as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch_random_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def torch_random_kept() -> AbstractContextManager[None]:
    """Leave PyTorch's random state as it was."""
    # Not to start CUDA for that, its generators are only kept if it is in use.
    return torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else [])


def random_states() -> list[Tensor]:
    """Return the states of PyTorch's random generators."""
    others = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *others]


def drawn_since(states: list[Tensor]) -> bool:
    """Tell whether random numbers were drawn since PyTorch's generators had these states."""
    # CUDA may have been started since, which has more of them.
    return not all(torch.equal(one, other) for one, other in zip(states, random_states(), strict=False))
