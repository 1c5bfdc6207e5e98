"""Loaders that give other batches in each pass: every function that takes batches sees those of one pass alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import nni_topo
from nni_topo.analysis import Quality, retraining_bound, study_selection
from nni_topo.maths.search.subsets import GeneticSearch
from nni_topo.testing import toy_images, toy_model


class Loader:
    """A loader that shuffles and augments, or gives one pass alone; ``given`` holds each pass that was read."""

    def __init__(self, kind: str) -> None:
        self.kind, self.given = kind, []
        generator = torch.Generator().manual_seed(5)
        images, labels = toy_images(96, seed=1), torch.randint(0, 4, (96,), generator=generator)
        self._generator = generator
        self._loader = DataLoader(TensorDataset(images, labels), 16, shuffle=kind == "random", generator=generator)
        self._once = iter(self._loader)

    def __iter__(self):
        self.given.append([])
        for images, labels in self._once if self.kind == "one-shot" else self._loader:
            if self.kind == "random":
                images = images + 0.5 * torch.randn(images.shape, generator=self._generator)
            self.given[-1].append((images, labels))
            yield images, labels


def net() -> nn.Module:
    model = toy_model().eval()
    with torch.no_grad():
        model.head.weight.mul_(30.0)  # answers that differ by more than rounding
    return model


def masks() -> dict[str, dict[str, torch.Tensor]]:
    mask = torch.ones(16, *[1] * (net().hidden.weight.dim() - 1))
    mask[::2] = 0.0
    return {"hidden": {"weight": mask.expand_as(net().hidden.weight).clone(), "bias": mask.flatten()}}


def dense() -> nn.Module:
    return nni_topo.to_dense(net(), toy_images(2), masks())


def chosen(name: str, **knobs):
    def work(batches):
        model = net()
        config_list = nni_topo.dependency_groups(
            model, toy_images(2), [{"op_names": ["stem", "inner", "hidden"], "sparse_ratio": 0.5}]
        )
        if "budget" in knobs:
            config_list = [{k: v for k, v in entry.items() if k != "sparse_ratio"} for entry in config_list]
        pruner = nni_topo.create_pruner(name, model, config_list, calibration=batches, **knobs)
        found = pruner.compress()[1]
        pruner.unwrap_model()
        return found

    return work


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def shrunk(batches, **knobs):
    small = nni_topo.shrink(net(), batches, **{"budget": {"flops": 0.5}, "distill": {"steps": 3}, **knobs})
    stages = [(stage.distance, stage.calibration_distance) for stage in small.report.stages]
    return weights_of(small), stages


def searched(batches):
    model = net()
    search = nni_topo.WeightSearch(population_size=6, generations=2)
    config_list = [{"op_names": ["hidden"], "sparse_ratio": 0.5}]
    pruner = nni_topo.GeneticWeightPruner(model, config_list, validation=batches, search=search)
    found = pruner.compress()[1]
    pruner.unwrap_model()
    return found


def exported(batches, folder):
    done = nni_topo.export(net(), folder / "net.onnx", toy_images(2), int8=batches)
    return {"int8_distance": done.int8_distance, "size": done.size}


def bounded(batches):
    models = [net() for _ in range(3)]
    with torch.no_grad():
        models[0].head.weight.mul_(0.1)
        models[2].hidden.weight[::2] = 0.0
    return float(retraining_bound(*models, cross_entropy, batches, 3.0))


def selected(batches):
    found = study_selection(
        net(), "stem", toy_images(2), batches, lambda _: Quality(0.0, 0.0), keep=4, evolution=GeneticSearch(4, 2)
    )
    return {name: list(map(int, each.kept)) for name, each in found.items()}


class Attending(nn.Module):
    """Attention over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        side = toy_images(1)[0, 0].numel()
        self.enter = nn.Linear(side, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        tokens = self.enter(images.flatten(2))
        for block in self.blocks:
            tokens = tokens + block(torch.relu(tokens))
        return self.head(self.attention(tokens, tokens, tokens, need_weights=False)[0].mean(1))


def attending() -> nn.Module:
    torch.manual_seed(0)
    return Attending().eval()


WORK = {
    "shrink": shrunk,
    "shrink, auto": lambda batches: shrunk(batches, budget={"flops": 0.5, "allocation": "auto"}, distill=False),
    "shrink, tolerance": lambda batches: shrunk(batches, budget="flops", tolerance=0.6, distill=False),
    "frontier": lambda batches: weights_of(nni_topo.frontier(net(), batches, (0.7, 0.4), distill=False)[0.4]),
    "distill": lambda batches: weights_of(nni_topo.distill(dense(), net(), batches, steps=3)),
    "recalibrate_batch_norm": lambda batches: weights_of(nni_topo.recalibrate_batch_norm(net(), batches)),
    "remove_blocks": lambda batches: weights_of(nni_topo.remove_blocks(attending(), ["blocks.1"], batches)),
    "export": None,
    "retraining_bound": bounded,
    "study_selection": selected,
    "GeneticWeightPruner": searched,
    "TopologicalPruner": chosen("topological"),
    "ReconstructionPruner": chosen("reconstruction"),
    "ReconstructionPruner, sequential": chosen("reconstruction", sequential=True),
    "ReconstructionPruner, budget": chosen("reconstruction", budget={"flops": 0.5, "allocation": "error"}),
    "ClusterPruner": chosen("cluster"),
    "SubclusterPruner": chosen("subcluster", energy=0.5),
}
WORK |= {
    f"compensate, {method}": lambda batches, method=method: weights_of(
        nni_topo.compensate(net(), masks(), batches, method=method, cache_bytes=1000)
    )
    for method in ("reconstruct", "recalibrate")
}


LONG = ("export", "shrink, auto", "shrink, tolerance")
# Both kinds show what reads a loader twice.
BOTH = ("compensate, reconstruct", "shrink")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] * (name in LONG))
        for name in WORK
        for kind in ("random", "one-shot")
        if kind == "random" or name in BOTH
    ],
)
@pytest.mark.quick_every(9)
def test_a_loader_is_read_once_and_does_what_the_same_batches_in_a_list_do(name, kind, tmp_path):
    work = WORK[name] or (lambda batches: exported(batches, tmp_path))
    if name == "export":
        pytest.importorskip("onnxruntime")
    loader = Loader(kind)
    found = work(loader)
    assert [len(each) for each in loader.given] == [6], "read once"
    given = copy.deepcopy(loader.given[0])
    torch.testing.assert_close(found, work(loader.given[0]), equal_nan=True)
    torch.testing.assert_close(loader.given[0], given, rtol=0.0, atol=0.0)
