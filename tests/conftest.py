"""Shared fixtures: one thread, and small models."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread, unless the tests are run as on another processor; see processors.py."""
    torch.set_num_threads(int(os.environ.get("NNI_TOPO_TEST_THREADS", "1")))


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
