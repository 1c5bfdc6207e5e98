"""Shared fixtures: one thread, and small models."""

from __future__ import annotations

from collections.abc import Iterator

import far_device
import pytest
import torch
from torch import nn

# Before any test runs a backward pass. Nothing else shows of the device until a test asks for it.
far_device.reserve()


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def convnet() -> nn.Sequential:
    """Two convolutions and a linear head on 3x8x8 inputs."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 5),
    )


@pytest.fixture(params=["far", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Devices that are not the CPU: one that every machine has, and a GPU, which has to round as the CPU does."""
    if request.param == "far":
        if not far_device.is_possible():
            pytest.skip(f"torch {torch.__version__} takes no device written in Python")
        yield far_device.start()
        return
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield torch.device("cuda", 0)
