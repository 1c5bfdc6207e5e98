"""Every public function leaves every model that it is given as it was, whatever a forward does to it."""

from __future__ import annotations

import inspect
import random
from contextlib import nullcontext, suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import nni_topo
from nni_topo import analysis, network, recovery, zoo
from nni_topo.errors import ExportError
from nni_topo.maths.search.subsets import GeneticSearch
from nni_topo.testing import require_unchanged, snapshot

IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(16) % 4
BATCHES = [IMAGES[:8], IMAGES[8:]]
MASKS = {"first": {"weight": (torch.arange(8) > 2).float()[:, None, None, None].expand(8, 3, 3, 3).clone()}}
CONFIG = [{"op_names": ["first"], "sparse_ratio": 0.5}]


class Busy(nn.Module):
    """All that a forward may change, and what functions may forget to put back; half of it in training mode."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.other = nn.BatchNorm2d(8)
            self.drop = nn.Dropout(0.5)
            self.hidden = nn.Linear(8, 8)
            self.head = nn.Linear(8, 4)
        self.register_buffer("counter", torch.zeros(()))
        self.codes = nn.Parameter(torch.zeros(4), requires_grad=False)  # a moving average, as a codebook's
        self.calls = 0
        self.log = []
        self.by_size = {}
        self.generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.first.bias.requires_grad_(False)
        self.hook = self.second.register_forward_hook(lambda module, args, output: output * 1.5)
        self.train()
        self.norm.eval()
        self.second.eval()
        self.drop.eval()

    def forward(self, images):
        """Map images ``(n, 3, 8, 8)`` to ``(n, 4)``."""
        self.counter += 1
        self.calls += 1
        self.log.append(self.calls)
        self.by_size[self.calls % 2] = self.calls
        if not hasattr(self, "cache"):
            self.cache = torch.full((8,), 2.0)
            self.second.made = torch.zeros(3)
        torch.rand(2, generator=self.generator)
        if not torch.compiler.is_compiling():  # PyTorch's export follows no writes to `data`
            self.codes.data.mul_(0.9).add_(0.1)
            self.hidden.weight.data = self.hidden.weight.data.clamp(-0.3, 0.3)  # as EEGNet bounds its weights
        features = torch.relu(self.other(self.second(torch.relu(self.norm(self.first(images))))))
        return self.head(torch.relu(self.hidden(self.drop(features.mean((2, 3))))))


class Blocks(Busy):
    """The same with blocks that can be taken out."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(*[nn.Sequential(nn.Conv2d(8, 8, 3, padding=1)) for _ in range(3)])

    def forward(self, images):
        """Map images ``(n, 3, 8, 8)`` to ``(n, 4)``."""
        self.calls += 1
        self.counter += 1
        self.codes.data.mul_(0.9).add_(0.1)
        features = self.first(images)
        for block in self.body:
            features = features + block(features)
        return self.head(features.mean((2, 3)))


def busy(kind=Busy):
    model = kind()
    with torch.no_grad():  # nothing of what a pass makes is new
        model.counter += 3
    return model


def quality(model):
    with torch.no_grad():
        answers = model(IMAGES)
    random.random(), np.random.rand(), torch.rand(1)
    return analysis.Quality(float(nn.functional.cross_entropy(answers, LABELS)), float(answers.mean()))


def accuracy(model):
    return quality(model).accuracy


def bundle():
    data = TensorDataset(IMAGES, LABELS)
    return zoo.DataBundle(data, data, data, 3, 8, 4, (0.0,) * 3, (1.0,) * 3, "random", ("a", "b", "c", "d"))


def changed(factor):
    other = busy()
    with torch.no_grad():
        other.first.weight.mul_(factor)
    return other


def with_file(function, folder, model):
    nni_topo.save(nni_topo.to_dense(busy(), IMAGES[:2], MASKS), folder / "dense.pt")
    return function(folder / "dense.pt", model)


# By name of a function: what to call with two models, a folder; those of other functions are the same objects.
CALLS = {
    "as_torch_layers": lambda m, _, __: nni_topo.as_torch_layers(m),
    "compensate": lambda m, _, __: nni_topo.compensate(m, MASKS, BATCHES),
    "compensation": lambda m, _, __: recovery.compensation(m, MASKS, BATCHES, method="recalibrate"),
    "dependency_groups": lambda m, _, __: nni_topo.dependency_groups(m, IMAGES[:2], CONFIG),
    "distill": lambda m, other, _: nni_topo.distill(m, other, BATCHES, steps=2, batch_size=4),
    "distillation": lambda m, other, _: recovery.distillation(m, other, BATCHES, steps=2, objective="squares"),
    "explain": lambda m, _, __: nni_topo.explain(m, IMAGES[:2], next(iter(MASKS))),
    "export": lambda m, _, folder: nni_topo.export(m, folder / "net.pt2", IMAGES[:2], "torch.export"),
    "load": lambda m, _, folder: with_file(nni_topo.load, folder, m),
    "masked_model": lambda m, _, __: nni_topo.masked_model(m, IMAGES[:2], MASKS),
    "recalibrate_batch_norm": lambda m, _, __: nni_topo.recalibrate_batch_norm(m, BATCHES),
    "remove_blocks": lambda m, _, __: nni_topo.remove_blocks(m, ["body.1"], BATCHES),
    "save": lambda m, _, folder: nni_topo.save(m, folder / "net.pt"),
    "shrink": lambda m, _, __: nni_topo.shrink(
        m, BATCHES, {"flops": 0.7}, evaluate=accuracy, distill={"steps": 2, "batch_size": 4}
    ),
    "shrink within a tolerance": lambda m, _, __: nni_topo.shrink(
        m,
        [*BATCHES, *(-batch for batch in BATCHES)],
        tolerance=0.5,
        measure="distance",
        distill={"steps": 2, "batch_size": 4},
    ),
    "frontier": lambda m, _, __: nni_topo.frontier(
        m, BATCHES, (0.8, 0.6), evaluate=accuracy, distill={"steps": 2, "batch_size": 4}
    ),
    "synthetic_images": lambda m, _, __: nni_topo.synthetic_images(m, IMAGES[:2], count=2, steps=2),
    "to_dense": lambda m, _, __: nni_topo.to_dense(m, IMAGES[:2], MASKS, constants="keep"),
    "measure_latency": lambda m, _, __: network.measure_latency(m, IMAGES[:2]),
    "profile": lambda m, other, _: network.profile({"one": m, "two": other}, IMAGES[:2], runs=1),
    "count_macs": lambda m, _, __: zoo.count_macs(m, IMAGES[:2]),
    "count_params": lambda m, _, __: zoo.count_params(m),
    "check_model": lambda m, _, __: zoo.check_model(m, bundle()),
    "evaluate": lambda m, _, __: zoo.evaluate(m, bundle().test),
    "loss_and_accuracy": lambda m, _, __: zoo.loss_and_accuracy(m, bundle().test, device="cpu"),
    "latencies": lambda m, other, _: zoo.latencies({"one": m, "two": other}, IMAGES[:2], runs=1),
    "save_checkpoint": lambda m, _, folder: zoo.save_checkpoint(folder / "net.pt", m, {}),
    "accumulate_energy": lambda m, _, __: analysis.accumulate_energy(m, [("first",)], IMAGES[:2], quality),
    "connectivity": lambda m, _, __: analysis.connectivity(m, IMAGES[:2], MASKS),
    "critical_compression_ratio": lambda m, _, __: analysis.critical_compression_ratio(m, IMAGES[:2]),
    "critical_config_list": lambda m, _, __: analysis.critical_config_list(m, 0.5),
    "error_bound": lambda m, other, _: analysis.error_bound(m, other, IMAGES, iterations=2),
    "net_deviation": lambda m, other, _: analysis.net_deviation(m, other, IMAGES, iterations=2),
    "neural_persistence": lambda m, _, __: analysis.neural_persistence(m, IMAGES[:2], conv_graph="toeplitz"),
    "retraining_bound": lambda m, other, _: analysis.retraining_bound(
        m, changed(1.01), changed(0.5), nn.functional.cross_entropy, [(IMAGES, LABELS)], 1.0
    ),
    "sensitivity": lambda m, _, __: analysis.sensitivity(m, IMAGES[:2], accuracy, (0.5,), layers=["first"]),
    "study_dropout": lambda m, _, __: analysis.study_dropout({"one": lambda: m}, quality, rates=(0.5,)),
    "study_energy": lambda m, _, __: analysis.study_energy(m, ["first"], IMAGES[:2], quality, thresholds=(0.1,)),
    "study_replacement": lambda m, _, __: analysis.study_replacement(m, "first", IMAGES[:2], quality),
    "study_selection": lambda m, _, __: analysis.study_selection(
        m, "first", IMAGES[:2], [(IMAGES, LABELS)], quality, keep=4, evolution=GeneticSearch(4, 2)
    ),
    "study_topology": lambda m, _, __: analysis.study_topology(m, CONFIG),
}
KINDS = {"remove_blocks": Blocks}
CHANGING = {
    "train": "it trains the model",
    "load_checkpoint": "it puts a file's values into the model",
    "zeros_held": "it holds zeros of a model that is trained",
    "create_pruner": "wraps the model, see tests/pruners/test_model_unchanged.py",
    "save_pretrained": "for models of Transformers, see there",
    "trim_vocabulary": "for models of Transformers, see tests/network/io/test_vocabulary.py",
    "register_module": "it takes a class",
    "register_width_attribute": "it takes a class",
}


def takes_a_model(function):
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    words = ("nn.Module", "dense: 'Any'")
    return any(word in str(each) for each in parameters for word in words)


def public():
    """Return all public functions and classes that take a model, by name; pruners have tests of their own."""
    found = {}
    for place in (nni_topo, network, recovery, zoo, analysis):
        for name in place.__all__:
            thing = getattr(place, name)
            is_record = isinstance(thing, type)
            if callable(thing) and not is_record and takes_a_model(thing):
                found[name] = thing
    return found


def test_every_public_function_is_tried():
    assert public().keys() == {name.partition(" ")[0] for name in CALLS} | CHANGING.keys()


def called(name, model, other, folder):
    """Call a public function, which may fail where PyTorch 2.11 exports no forward that draws by a generator."""
    with suppress(ExportError) if name == "export" and torch.__version__ < "2.13" else nullcontext():
        CALLS[name](model, other, folder)


@pytest.mark.parametrize("name", sorted(CALLS))
@pytest.mark.quick_every(9)
def test_a_model_is_as_it_was(name, tmp_path):
    kind = KINDS.get(name, Busy)
    model, other = busy(kind), busy(kind)
    before, others = snapshot(model), snapshot(other)
    called(name, model, other, tmp_path)
    require_unchanged(before, model)
    require_unchanged(others, other)


@pytest.mark.parametrize("name", ["shrink", "compensate", "to_dense"])
@pytest.mark.quick_every(4)
def test_a_model_is_as_it_was_after_interruptions(name, tmp_path):
    kind, draw, count, last = KINDS.get(name, Busy), random.Random(name), 0, None

    def interrupt(module, args):
        nonlocal count
        count += 1
        if count == last:
            raise KeyboardInterrupt

    with nn.modules.module.register_module_forward_pre_hook(interrupt):
        called(name, busy(kind), busy(kind), tmp_path)
        forwards = count
        for _ in range(4):
            model, other = busy(kind), busy(kind)
            before, others = snapshot(model), snapshot(other)
            count, last = 0, draw.randint(1, forwards)
            with suppress(KeyboardInterrupt):
                called(name, model, other, tmp_path)
            last = None
            require_unchanged(before, model)
            require_unchanged(others, other)


MADE = ["as_torch_layers", "compensate", "load", "masked_model", "recalibrate_batch_norm"]
MADE += ["remove_blocks", "shrink", "to_dense"]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.quick_every(2)
def test_what_is_made_of_a_model_has_not_counted_the_passes(name, tmp_path):
    model = busy(KINDS.get(name, Busy))
    found = CALLS[name](model, model, tmp_path)
    made = found[0] if isinstance(found, tuple) else found
    assert (made.calls, made.log, float(made.counter)) == (0, [], 3.0)
    assert not hasattr(made, "cache")


class _PartCompiled(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 16, 3)
        if how == "whole":
            self.compile(backend="eager")
        elif how == "child":
            self.body = torch.compile(self.body, backend="eager")

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("how", ["whole", "child"])
@pytest.mark.slow
def test_what_is_compiled_in_a_model_changes_nothing_but_runs_as_it_is_written(how):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(64, 1, 8, 8, generator=generator).split(16)
    plain, model = _PartCompiled("no").eval(), _PartCompiled(how).eval()
    with torch.no_grad():
        model(images[0])  # compiled by now
    compiled = model._compiled_call_impl
    expected, small = (nni_topo.shrink(net, images, {"flops": 0.5}, distill=False) for net in (plain, model))
    assert [stage.macs for stage in small.report.stages] == [stage.macs for stage in expected.report.stages]
    assert zoo.count_macs(model, images[0]) == expected.report.stages[0].macs
    torch.testing.assert_close(small(images[0]), expected(images[0]))
    assert model._compiled_call_impl is compiled
    assert torch._dynamo.eval_frame._stance.stance == "default"
    (profiled,) = network.profile({"small": model}, images[0], runs=1)
    assert profiled.macs == expected.report.stages[0].macs


def _recovered(how):
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).split(16)
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten()
    model = nn.Sequential(*layers, nn.Linear(8 * 16, 3)).eval()
    if how == "synthetic_images":
        return torch.cat([*nni_topo.synthetic_images(model, images[0][:1], count=4, steps=2)])
    small = nni_topo.shrink(model, images, {"flops": 0.5}, compensate=how, distill={"steps": 4})
    assert small.report.distillation.steps > 0
    assert not any(each.is_inference() for each in (*small.parameters(), *small.buffers()))
    return small(images[0]).detach()


@pytest.mark.parametrize(
    ("mode", "how"),
    [
        (torch.inference_mode, "synthetic_images"),
        (torch.no_grad, "reconstruct"),
    ],
)
@pytest.mark.quick_every(2)
def test_what_takes_gradients_takes_them_under_a_callers_mode_without_any(mode, how):
    expected = _recovered(how)
    with mode():
        found = _recovered(how)
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    torch.testing.assert_close(found, expected)


def test_a_callers_autocast_changes_nothing():
    images = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)).split(16)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    found = []
    for is_on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            found.append(nni_topo.shrink(model, images, {"flops": 0.5}, distill={"steps": 4}))
            assert torch.is_autocast_enabled("cpu") == is_on
    plain, mixed = (list(each.parameters()) for each in found)
    assert all(torch.equal(*pair) for pair in zip(plain, mixed, strict=True))
    distances = [[stage.distance for stage in each.report.stages] for each in found]
    assert distances[0] == distances[1]
