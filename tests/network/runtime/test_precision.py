"""Networks are compared in full precision, whatever the process allows for speed."""

import functools
import os
import traceback

import pytest
import torch
import torchvision
from torch import nn

import nni_topo
from nni_topo.network.runtime.precision import in_full_precision

BACKENDS = torch.backends
OPERATIONS = {
    "matmul": BACKENDS.cuda.matmul,
    "conv": BACKENDS.cudnn.conv,
    "rnn": BACKENDS.cudnn.rnn,
    "mkldnn matmul": BACKENDS.mkldnn.matmul,
    "mkldnn conv": BACKENDS.mkldnn.conv,
    "mkldnn rnn": BACKENDS.mkldnn.rnn,
}


def _allow(value):
    BACKENDS.cudnn.allow_tf32 = value


def _set_all(value):
    BACKENDS.fp32_precision = value


def _set_convolutions(value):
    BACKENDS.cudnn.conv.fp32_precision = value


SETTINGS = {
    "as PyTorch sets it": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "no TF32": lambda: _allow(False),
    "all tf32": lambda: _set_all("tf32"),
    "all ieee": lambda: _set_all("ieee"),
    "convolutions ieee": lambda: _set_convolutions("ieee"),
}


@pytest.fixture
def _highest_afterwards():
    yield
    torch.set_float32_matmul_precision("highest")


def in_own_process(test):
    """Run a test in a fork: switches that were set never are again as they were when PyTorch was imported."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if not hasattr(os, "fork"):
            test(*args, **kwargs)
            return
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            status = 0
            try:
                test(*args, **kwargs)
            except BaseException:
                status = 1
                os.write(writing, traceback.format_exc().encode()[-4096:])
            os._exit(status)
        os.close(writing)
        with os.fdopen(reading, errors="replace") as pipe:
            told = pipe.read()
        assert os.waitpid(child, 0)[1] == 0, told

    return run


def asked(switch):
    """What a switch says; the older ones complain where they disagree with the newer ones."""
    try:
        return switch()
    except RuntimeError:
        return "disagrees"


def settings():
    found = {name: each.fp32_precision for name, each in OPERATIONS.items()}
    found["all"] = BACKENDS.fp32_precision
    found["older, matrices"] = asked(torch.get_float32_matmul_precision)
    found["older, convolutions"] = asked(lambda: BACKENDS.cudnn.allow_tf32)
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@in_own_process
def test_settings_are_put_back(setting):
    SETTINGS[setting]()
    before = settings()
    with in_full_precision(), in_full_precision():
        within = settings()
    assert {within[name] for name in OPERATIONS} == {"ieee"}
    assert (within["older, matrices"], within["older, convolutions"]) == ("highest", False)
    assert settings() == before


@in_own_process
def test_an_operation_goes_on_following_the_setting_of_all():
    _set_all("ieee")
    with in_full_precision():
        pass
    _set_all("tf32")
    assert {each.fp32_precision for each in OPERATIONS.values()} == {"tf32"}


@pytest.mark.parametrize(("library", "names"), [("cudnn", ["matmul", "conv", "rnn"]), ("mkldnn", ["mkldnn conv"])])
@in_own_process
def test_an_operation_goes_on_following_the_setting_of_its_library(library, names):
    switch = getattr(BACKENDS, library)
    for name in names:
        OPERATIONS[name].fp32_precision = "none"
    switch.fp32_precision = "ieee"
    try:
        with in_full_precision():
            pass
        assert {OPERATIONS[name].fp32_precision for name in names} == {"ieee"}
        switch.fp32_precision = "tf32"
        assert {OPERATIONS[name].fp32_precision for name in names} == {"tf32"}
    finally:
        switch.fp32_precision = "none"


@pytest.mark.parametrize("older", [True, False])
@in_own_process
def test_the_older_switch_is_put_back_where_it_disagrees(older):
    _allow(older)
    _set_all("ieee")
    for name in ("conv", "rnn"):
        OPERATIONS[name].fp32_precision = "none" if older else "tf32"
    assert asked(lambda: BACKENDS.cudnn.allow_tf32) == "disagrees"
    with in_full_precision():
        pass
    for name in ("conv", "rnn"):
        OPERATIONS[name].fp32_precision = "tf32" if older else "ieee"
    assert asked(lambda: BACKENDS.cudnn.allow_tf32) is older


class _Telling(nn.Module):
    """Notes with which precision it is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten())
        self.head = nn.Linear(8 * 16, 5)

    def forward(self, x):
        SEEN.append(torch.get_float32_matmul_precision())
        return self.head(self.body(x))


SEEN: list[str] = []
EXAMPLE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASKS = {"body.0": {"weight": torch.tensor([1.0, 0.0] * 4)[:, None, None, None].expand(8, 3, 3, 3)}}
ANALYSES = {
    "groups": lambda model, path: nni_topo.dependency_groups(
        model, EXAMPLE, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    ),
    "dense": lambda model, path: nni_topo.to_dense(model, EXAMPLE, MASKS),
    "masked": lambda model, path: nni_topo.masked_model(model, EXAMPLE, MASKS),
}


@pytest.mark.parametrize("name", ANALYSES)
@in_own_process
def test_networks_are_compared_in_full_precision(name, tmp_path):
    torch.set_float32_matmul_precision("high")
    SEEN.clear()
    ANALYSES[name](_Telling(), tmp_path)
    assert set(SEEN) == {"highest"}
    assert torch.get_float32_matmul_precision() == "high"


@pytest.mark.usefixtures("_highest_afterwards")  # a fork can't take gradients
def test_training_steps_keep_the_precision_that_is_set():
    torch.set_float32_matmul_precision("high")
    model = _Telling()
    dense = nni_topo.to_dense(model, EXAMPLE, MASKS)
    SEEN.clear()
    nni_topo.distill(dense, model, [EXAMPLE] * 4, steps=2, lr=1e-3, progress=False)
    assert set(SEEN) == {"high"}


@pytest.mark.cuda  # not in a fork, where a GPU can't be used
@pytest.mark.usefixtures("_highest_afterwards")
@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", ["mobilenet_v2", "mnasnet1_0", "resnet18"])
def test_groups_on_a_gpu_are_those_on_the_cpu(name, precision):
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    image = torch.zeros(1, 3, 96, 96)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    wanted = nni_topo.dependency_groups(model, image, config)
    found = nni_topo.dependency_groups(model.cuda(), image.cuda(), config)
    assert [entry["op_names"] for entry in found] == [entry["op_names"] for entry in wanted]


@pytest.mark.parametrize("setting", SETTINGS)
@in_own_process
def test_a_network_is_exported_whatever_is_set(setting, tmp_path):
    SETTINGS[setting]()
    before = settings(), BACKENDS.mkldnn.enabled
    exported = nni_topo.export(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), tmp_path / "net.pt2", EXAMPLE)
    assert exported.path.exists()
    assert (settings(), BACKENDS.mkldnn.enabled) == before
