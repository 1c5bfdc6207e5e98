"""What a case is: a network that somebody could have written, inputs for it, and numbers that hide nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

LAYERS = [
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Linear",
    "LSTM",
    "GRU",
]


@dataclass(frozen=True)
class Case:
    """A network to prune.

    ``make`` builds it, ``inputs`` draws inputs of a batch and an image size; ``sizes`` are sizes that it takes, the
    first that of the example inputs, and ``whole`` are layers that nobody selects.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    sizes: tuple[int, ...] = (8, 11, 16)
    whole: tuple[str, ...] = ()
    noisy: bool = False  # draws numbers in training, which a narrower network draws others of

    def network(self) -> nn.Module:
        """Build the network, in evaluation mode, with numbers of its own everywhere."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return lively(self.make()).eval()

    def example(self, batch: int = 2, size: int = 0, seed: int = 0) -> Any:
        """Draw inputs."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.inputs(batch, size or self.sizes[0])


def images(batch: int, size: int) -> torch.Tensor:
    """Draw images of three channels, a little wider than high."""
    return torch.randn(batch, 3, size, size)


def lively(model: nn.Module) -> nn.Module:
    """Give norms statistics, and all layers biases, that aren't trivial; no two numbers of a tensor are equal."""
    with torch.no_grad():
        for module in model.modules():
            for name, value in module.named_buffers(recurse=False):
                if name == "running_mean":
                    value.normal_(0, 0.3)
                elif name == "running_var":
                    value.uniform_(0.5, 2)
            for name, value in module.named_parameters(recurse=False):
                if name.startswith("bias"):
                    value.normal_(0, 1)
                elif value.numel() == max(value.shape, default=1):
                    value.uniform_(0.5, 1.5)
            if hasattr(module, "p") and isinstance(module, (nn.Dropout, nn.Dropout2d, nn.AlphaDropout)):
                module.p = 0.0  # two networks of different widths draw different numbers
    return model


def scaled(inputs: Any, scale: float, shift: float) -> Any:
    """Scale and shift floating inputs, and leave others as they are."""
    return tree_map_only(torch.Tensor, lambda t: t * scale + shift if t.is_floating_point() else t, inputs)


def doubled(inputs: Any) -> Any:
    """Make floating inputs double precision."""
    return tree_map_only(torch.Tensor, lambda t: t.double() if t.is_floating_point() else t, inputs)


def call(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    """Run a model on a tensor, positional or keyword arguments; return all floating tensors that it gives."""
    args: Any = () if isinstance(inputs, dict) else inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    with torch.random.fork_rng(devices=[]):  # a forward may draw numbers
        found = model(*args, **(inputs if isinstance(inputs, dict) else {}))
    tensors: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, tensors.append, found)
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
