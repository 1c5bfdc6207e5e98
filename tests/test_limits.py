"""Jobs that are larger than what there is: memory estimated beforehand, and a device that is full."""

from __future__ import annotations

import resource
from contextlib import contextmanager

import far_device
import psutil
import pytest
import torch
from PIL import Image
from torch import nn

import nni_topo
from nni_topo import zoo
from nni_topo.errors import DataError
from nni_topo.network.runtime.memory import free_memory
from nni_topo.testing import require_unchanged, snapshot, toy_images, toy_model


@contextmanager
def room(size):
    """Let this process take no more than so many bytes on top of what it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


WIDE = 4096
FEW, *MANY = torch.randn(9 * 512, 16, generator=torch.Generator().manual_seed(0)).split(512)
FEW = [FEW[:8]]
WHOLE = {"op_names": ["0"], "sparse_ratio": 0.5}


def wide():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, WIDE), nn.ReLU(), nn.Linear(WIDE, 4))


def pruned(name, config, **knobs):
    return nni_topo.create_pruner(name, wide(), config, **knobs).compress()[1]


def compensated(images):
    mask = torch.ones(WIDE, 16)
    mask[::64] = 0.0
    return nni_topo.compensate(wide(), {"0": {"weight": mask}}, images)


PAIRS = r"4096 (blocks with each other|channels) must fit into memory, got 0\.\d+ GiB for 0\.[01]\d GiB that are free: "
JOBS = {
    "distances": (lambda _: pruned("topological", [WHOLE]), PAIRS + r".*solver='greedy'.*\(0\.weight\)"),
    "outputs": (lambda _: pruned("topological", [WHOLE], calibration=FEW), PAIRS + r".*cloud='weight'.*\(0\.weight\)"),
    "affinities": (
        lambda _: pruned("cluster", [WHOLE], calibration=FEW, algorithm="spectral"),
        PAIRS + r".*algorithm='kmeans' \(0\.weight\)",
    ),
    "clusters": (lambda _: pruned("subcluster", [WHOLE], calibration=FEW), PAIRS + ".*ClusterPruner"),
    "least squares": (
        lambda _: pruned("reconstruction", [WHOLE], calibration=MANY),
        r"of 4096 columns from 4096 samples .*\(calibration\) take less",
    ),
    "recovery": (lambda _: compensated(MANY), r"least squares of 4032 unknowns .*method='recalibrate'.*\(2\)"),
    "population": (
        lambda _: pruned("genetic_weight", [WHOLE], evaluate=lambda model: 1.0, search={"population_size": 10_000}),
        r"a population on 65536 weights .*population_size \(search\).*\(0\)",
    ),
    "images": (lambda folder: zoo.load_data(str(folder)).train[:], "22 images must fit into memory, .*image_size"),
    "distillation": (
        lambda _: nni_topo.distill(toy_model(), toy_model(1), 15 * [torch.zeros(1, 3, 8, 8).expand(4096, 3, 8, 8)]),
        "images and a view of them must fit into memory, .*fewer images",
    ),
}


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.quick_every(2)
def test_memory_is_estimated_beforehand_with_the_figure_and_the_knob(job, tmp_path):
    work, words = JOBS[job]
    if job == "images":
        (tmp_path / "cat").mkdir()
        for number in range(30):
            Image.new("RGB", (1000, 1000)).save(tmp_path / "cat" / f"{number}.png")
    with room(2**27), pytest.raises(DataError, match=words):
        work(tmp_path)


def test_few_samples_of_a_wide_layer_are_no_large_job_and_a_refused_one_leaves_the_model():
    with room(2**28):
        compensated(FEW)
        masks = pruned("reconstruction", [WHOLE], calibration=FEW)
    assert float(masks["0"]["weight"].mean()) == 0.5
    model = wide()
    before = snapshot(model)
    with room(2**27), pytest.raises(DataError, match="must fit into memory"):
        nni_topo.create_pruner("topological", model, [WHOLE]).compress()
    require_unchanged(before, model)


def test_what_is_free_is_what_the_process_may_still_take():
    with room(2**28):
        assert 0 < free_memory() <= 2**28
    assert free_memory() > 2**28


@pytest.mark.parametrize("device", ["far"], indirect=True)
def test_a_device_whose_memory_is_full_raises_pytorchs_error_and_the_model_is_as_it_was(device):
    images, net = toy_images(16, seed=1).to(device), toy_model().to(device)
    before = snapshot(net)
    entries = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"], "sparse_ratio": 0.5}]
    jobs = [
        lambda: nni_topo.shrink(net, [images], {"params": 0.5}, progress=False),
        lambda: nni_topo.recalibrate_batch_norm(net, [images]),
        lambda: nni_topo.create_pruner("topological", net, entries, calibration=[images]).compress(),
    ]
    for work in jobs:
        with far_device.memory(1000), pytest.raises(torch.OutOfMemoryError, match=r"^far out of memory"):
            work()
        require_unchanged(before, net)
