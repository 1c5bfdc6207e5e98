"""Pruned networks compute the same in the runtimes that deploy them, each where its package is installed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import nni_topo
from benchmarks.export import runtimes
from nni_topo import zoo

NETWORKS = {"resnet20": (1, 28), "torchvision/mobilenet_v2": (3, 64), "vit_small": (1, 28)}


@pytest.fixture(scope="module", params=NETWORKS)
def pruned(request):
    """A network with half of its MACs, and eight images."""
    channels, size = NETWORKS[request.param]
    images = torch.randn(32, channels, size, size, generator=torch.Generator().manual_seed(0))
    net = zoo.create_model(request.param, num_classes=10, in_channels=channels, image_size=size, seed=0).eval()
    small = nni_topo.shrink(net, [images], {"flops": 0.5}, pruner="l1", compensate=None, distill=False).eval()
    assert zoo.count_macs(small, images[:1]) < 0.6 * zoo.count_macs(net, images[:1])
    return small, images[:8]


@pytest.mark.slow
@pytest.mark.parametrize("runtime", runtimes.RUNTIMES, ids=lambda each: each.name)
def test_a_pruned_network_gives_the_same_outputs(runtime, pruned, tmp_path):
    pytest.importorskip(runtime.package)
    net, images = pruned
    with torch.no_grad():
        expected = net(images).numpy(force=True)
    runtime.write(net, images, tmp_path)
    found = runtime.load(tmp_path, images)()
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.slow
def test_a_pruned_network_is_converted_for_core_ml(pruned, tmp_path):
    pytest.importorskip("coremltools")
    net, images = pruned
    model = runtimes.convert_for_core_ml(net, images, tmp_path)
    specification = model.get_spec()
    (entering,) = specification.description.input
    assert list(entering.type.multiArrayType.shape)[1:] == list(images.shape[1:])
    weights = sum(parameter.numel() for parameter in net.parameters())
    size = sum(file.stat().st_size for file in tmp_path.rglob("weight.bin"))
    assert size < 1.1 * 2 * weights + 20_000  # half precision; nothing of the unpruned network


PAGE = (Path(__file__).parent.parent / "docs" / "runtimes.md").read_text(encoding="utf-8")
FIRST, *SNIPPETS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


@pytest.mark.slow
@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda each: re.match(r"(?:import|from) (\w+)", each)[1])
def test_the_snippets_of_the_page_run_after_its_first_one(snippet, tmp_path, monkeypatch):
    pytest.importorskip(re.match(r"(?:import|from) (\w+)", snippet)[1])
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "runtimes_page"}
    exec(FIRST, names)
    exec(snippet, names)
    assert list(tmp_path.glob("small.*"))
