"""State of the whole process: random states, PyTorch's settings, and a lock so that one call runs at a time."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors
from torch.utils._pytree import tree_map_only

from nni_topo.context import context, in_context
from nni_topo.network.runtime.precision import in_full_precision, is_within_autocast

# Random states and settings belong to the whole process, so calls of several threads run one at a time.
_turn = threading.RLock()


@contextmanager
def one_call() -> Iterator[None]:
    """Mark a call of a public function; calls of several threads run one after another."""
    if context().is_running:
        yield
        return
    with _turn, ExitStack() as at_end, in_context(is_running=True, at_end=at_end):
        yield


@contextmanager
def package_settings(as_compiled: bool) -> Iterator[None]:
    """Leave a caller's ``torch.inference_mode`` within the block; unless ``as_compiled``, autocast and device, too.

    Tensors made in inference mode can never have gradients. Autocast rounds products to three digits.
    """
    accelerator = torch.accelerator.current_accelerator()
    kinds = {"cpu", "cuda", *([] if accelerator is None else [accelerator.type])}
    with ExitStack() as settings:
        settings.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))  # an interruption may come in `no_grad`
        if torch.is_inference_mode_enabled():
            settings.enter_context(torch.inference_mode(False))
        if not as_compiled:
            for kind in sorted(kinds):
                # `cache_enabled` of one device holds for all.
                if torch.is_autocast_enabled(kind) or (kind == "cpu" and is_within_autocast()):
                    settings.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        if not as_compiled and torch.get_default_device().type != "cpu":
            settings.enter_context(_OnCpu())
        yield


class _OnCpu(TorchFunctionMode):
    """Puts tensors that the package makes without a device on the CPU; models make theirs as usual."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func in _device_constructors() and keywords.get("device") is None and _is_called_by_package():
            keywords = {**keywords, "device": torch.device("cpu")}
        return func(*args, **keywords)


def _is_called_by_package() -> bool:
    """Tell whether the package's own code called the function of PyTorch."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        # PyTorch's own code and modes only pass on the calls of others.
        if package != "torch" and frame.f_code.co_name != "__torch_function__":
            return package == __name__.partition(".")[0]
        frame = frame.f_back
    return False


@contextmanager
def as_written() -> Iterator[None]:
    """Within the block, networks compute attention step by step and products in full precision.

    Networks that are compared must differ only in what they compute. The fast paths of attention turn padded
    batches into nested tensors, on which hooks and masks can't work.
    """
    if context().is_as_written:
        yield
        return
    has_fast_paths = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with in_context(is_as_written=True), in_full_precision():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(has_fast_paths)


class DropoutOff(TorchFunctionMode):
    """Within the block, functions of PyTorch drop nothing, whatever mode they are called with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, keywords = getattr(func, "__name__", ""), kwargs or {}
        if name == "scaled_dot_product_attention":
            if len(args) > 4:  # `dropout_p` is the fifth argument
                return func(*args[:4], 0.0, *args[5:], **keywords)
            return func(*args, **keywords | {"dropout_p": 0.0})
        if name.rstrip("_").endswith(("dropout", "dropout1d", "dropout2d", "dropout3d")):
            if args:
                return args[0]
            return keywords["input"]
        return func(*args, **keywords)


class DrawnInOrder(TorchFunctionMode):
    """Draws random numbers in the order of a tensor's dimensions, in whatever order its memory holds them.

    So two networks draw the same numbers for tensors of the same values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func in (torch.randn_like, torch.rand_like):
            keywords = {**keywords, "memory_format": torch.contiguous_format}
        elif func in (torch.bernoulli, torch.normal, nn.functional.dropout):
            args = tree_map_only(Tensor, Tensor.contiguous, args)
        return func(*args, **keywords)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Restore the random states of PyTorch, NumPy and Python afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch_random_kept():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def torch_random_kept() -> AbstractContextManager[None]:
    """Restore PyTorch's random state afterwards."""
    # Generators of CUDA only if it is in use, so as not to start it.
    return torch.random.fork_rng(list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else [])


def seed_torch(seed: int) -> None:
    """Seed PyTorch's global generators within `random_state_kept`, but not a GPU's that is started later."""
    torch.default_generator.manual_seed(seed)
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or (accelerator.type == "cuda" and not torch.cuda.is_initialized()):
        return
    module: Any = torch.get_device_module(accelerator)
    # Apple's module has one device.
    seed_all = getattr(module, "manual_seed_all", None) or getattr(module, "manual_seed", None)
    if seed_all is not None:
        seed_all(seed)


def random_states() -> list[Tensor]:
    """Return the states of PyTorch's random generators."""
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda_states]


def drawn_since(states: list[Tensor]) -> bool:
    """Tell whether random numbers were drawn since PyTorch's generators had these states."""
    # CUDA may have been started since: then it has further states.
    return not all(torch.equal(before, now) for before, now in zip(states, random_states(), strict=False))
