"""Networks are compared in full precision, whatever the process allows for speed."""

import functools
import os
import traceback

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.precision import (
    backward_in,
    call_of,
    check_precision,
    computing_in,
    in_full_precision,
    is_right_in_bfloat16,
)

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
@pytest.mark.quick_every(3)
def test_a_network_is_exported_whatever_is_set(setting, tmp_path):
    SETTINGS[setting]()
    before = settings(), BACKENDS.mkldnn.enabled
    exported = nni_topo.export(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval(), tmp_path / "net.pt2", EXAMPLE)
    assert exported.path.exists()
    assert (settings(), BACKENDS.mkldnn.enabled) == before


CONVOLUTIONS = [
    # what processors with AMX compute wrong in bfloat16: 2, 4, ..., 12 input channels and long kernels
    (nn.Conv1d(8, 8, 64, padding=32), (4, 8, 64)),
    (nn.Conv1d(4, 16, 16), (4, 4, 64)),
    (nn.Conv1d(2, 8, 32), (4, 2, 64)),
    (nn.Conv1d(8, 16, 64, padding="same", bias=False), (8, 8, 16)),
    # others
    (nn.Conv1d(1, 64, 512, stride=4, padding=256), (4, 1, 1024)),
    (nn.Conv1d(64, 8, 64), (4, 64, 128)),
    (nn.Conv2d(3, 16, 3, stride=3), (4, 3, 32, 32)),
    (nn.Conv2d(32, 32, 3, padding=1, groups=32), (4, 32, 8, 8)),
    (nn.Conv3d(4, 8, 3), (2, 4, 6, 6, 6)),
    (nn.ConvTranspose1d(8, 16, 64, stride=2), (4, 8, 32)),
    (nn.ConvTranspose2d(16, 8, 4, stride=2), (4, 16, 8, 8)),
    (nn.ConvTranspose3d(4, 8, 3), (2, 4, 6, 6, 6)),
]


def most_off(found, wanted):
    off = (found.detach().float() - wanted.detach()).abs()
    return float(off.max() / wanted.detach().square().mean().sqrt())


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=[str(layer) for layer, _ in CONVOLUTIONS])
def test_convolutions_are_right_in_bfloat16_on_any_processor(layer, shape):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(shape, generator=generator).requires_grad_()
    wanted = layer(images)
    towards = torch.randn(wanted.shape, generator=generator)
    learning = [images, *layer.parameters()]
    answers = [wanted.detach(), *torch.autograd.grad(wanted, learning, towards)]
    with computing_in("bfloat16", torch.device("cpu")):
        found = layer(images)
    assert found.dtype == torch.bfloat16
    others = [found.detach(), *torch.autograd.grad(found, learning, towards.bfloat16())]
    for other, answer in zip(others, answers, strict=True):
        assert other.dtype in (torch.float32, torch.bfloat16)
        assert most_off(other, answer) < 0.1


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_runs_again_is_right_in_bfloat16(use_reentrant):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 64, padding=32), nn.ReLU(), nn.Conv1d(8, 8, 64, padding=32))
    images = torch.randn(4, 8, 64).requires_grad_()
    learning = [images, *net.parameters()]
    wanted = net(images)
    towards = torch.randn(wanted.shape)
    answers = [wanted.detach(), *torch.autograd.grad(wanted, learning, towards)]
    with computing_in("bfloat16", torch.device("cpu")):
        found = checkpoint(net, images, use_reentrant=use_reentrant)
    backward_in("bfloat16", torch.device("cpu"), (found.float() * towards).sum())
    others = [found.detach(), *(each.grad for each in learning)]
    assert all(most_off(other, answer) < 0.1 for other, answer in zip(others, answers, strict=True))


@pytest.mark.parametrize("layout", ["expanded", "frames"])
def test_tensors_whose_places_share_memory_are_tried_in_bfloat16(layout):
    values = torch.randn(4, 176)
    images = values[:, None, :].expand(-1, 8, -1) if layout == "expanded" else values.unfold(-1, 64, 16)
    layer = nn.Conv1d(8, 8, 32)
    with computing_in("bfloat16", torch.device("cpu")):
        found = layer(images)
    assert most_off(found, layer(images)) < 0.1


@pytest.mark.parametrize("other", [None, torch.float16])
def test_a_forward_that_turns_autocast_off_or_to_another_precision_has_its_way(other):
    # Autocast keeps the weights of a layer that has run in the precision that they had then.
    before, *layers = nn.Conv1d(8, 8, 64, padding=32), nn.Conv1d(8, 8, 64, padding=32), nn.Conv1d(8, 8, 5)
    images = torch.randn(4, 8, 64)
    with computing_in("bfloat16", torch.device("cpu")):
        assert before(images).dtype == torch.bfloat16
        with torch.autocast("cpu", other, enabled=other is not None):
            found = layers[1](layers[0](images))
    assert found.dtype == (other or torch.float32)
    assert most_off(found, layers[1](layers[0](images))) < 0.1


def test_convolutions_of_bfloat16_without_autocast_are_right():
    layer, images = nn.Conv1d(8, 8, 64, padding=32), torch.randn(4, 8, 64)
    wanted = layer(images)
    layer.bfloat16()
    with computing_in("bfloat16", torch.device("cpu")), torch.autocast("cpu", enabled=False):
        found = layer(images.bfloat16())
    assert found.dtype == torch.bfloat16
    assert most_off(found, wanted) < 0.1


def test_batches_of_other_sizes_are_not_tried_anew(caplog):
    layer = nn.Conv1d(3, 5, 7)
    with computing_in("bfloat16", torch.device("cpu")):
        layer(torch.randn(8, 3, 40))
        tried = is_right_in_bfloat16.cache_info().misses
        for size in (64, 9, 8):
            assert layer(torch.randn(size, 3, 40)).dtype == torch.bfloat16
        assert is_right_in_bfloat16.cache_info().misses == tried
        layer(torch.randn(3, 40))
        layer(torch.randn(7, 3, 40))
    assert is_right_in_bfloat16.cache_info().misses == tried + 2
    assert not caplog.records


@pytest.mark.slow
def test_rounding_of_a_biass_gradient_is_no_error():
    """That of a single output is one sum over all places, which may almost vanish; others grow with the places."""
    calls = [
        call_of(nn.functional.conv1d, (torch.randn(size, 1, 9), torch.randn(1, 1, 3), torch.zeros(1)), {})
        for size in range(1, 200)
    ]
    calls += [
        call_of(nn.functional.conv2d, (torch.randn(8, 3, size, size), torch.randn(6, 3, 2, 2), torch.zeros(6)), {})
        for size in (16, 48, 96)
    ]
    assert all(map(is_right_in_bfloat16, calls))


def product(inputs, weights, scale=1.0):
    return scale * (inputs @ weights)


def wrong_in_one_number(inputs, weights):
    found = inputs @ weights
    off = torch.zeros_like(found)
    off[0, 0] = 3.0 if torch.is_autocast_enabled("cpu") else 0.0
    return found + off


def wrong_gradient(inputs, weights):
    added = 2.0 if torch.is_autocast_enabled("cpu") else 0.0
    return inputs @ weights + added * (weights.sum() - weights.sum().detach())


def nothing_finite(inputs, weights):
    return inputs @ weights + (torch.nan if torch.is_autocast_enabled("cpu") else 0.0)


@pytest.mark.parametrize(
    ("function", "is_right"),
    [(product, True), (wrong_in_one_number, False), (wrong_gradient, False), (nothing_finite, False)],
)
def test_what_is_wrong_in_bfloat16_is_noticed_and_told_once(function, is_right, caplog):
    tensors = torch.randn(40, 20), torch.randn(20, 30).T.contiguous().T  # laid out column by column
    call = call_of(function, tensors, {})
    with torch.inference_mode():
        assert [is_right_in_bfloat16(call) for _ in range(2)] == [is_right, is_right]
    told = f"{function.__name__} of tensors (40, 20), (20, 30) stays in single precision: in bfloat16 this processor"
    assert [record.getMessage().startswith(told) for record in caplog.records] == ([] if is_right else [True])


def test_what_is_tried_has_its_own_type_and_device_whatever_the_defaults_are():
    call = call_of(wrong_gradient, (torch.randn(7, 5), torch.randn(5, 3)), {})
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    try:
        assert not is_right_in_bfloat16(call)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def test_calls_are_told_apart_by_shapes_layouts_and_settings():
    wide, tall = torch.randn(4, 8), torch.randn(8, 4)
    calls = [
        call_of(product, (wide, tall), {}),
        call_of(product, (tall, wide), {}),
        call_of(product, (tall.T, wide.T), {}),
        call_of(product, (wide, tall), {"scale": 2.0}),
        call_of(product, (wide, tall), {"scale": [2.0]}),
        call_of(product, (wide,), {"weights": tall}),
    ]
    assert len(set(calls)) == len(calls)
    assert call_of(product, (torch.ones(4, 8), torch.ones(8, 4)), {}) == calls[0]
    assert call_of(product, (wide.double(), tall.double()), {}) is None  # autocast leaves them as they are
    assert call_of(product, (wide[:0], tall), {}) is None


def test_a_device_without_autocast_computes_in_single_precision_alone():
    device = torch.device("meta")
    assert not torch.amp.is_autocast_available(device.type)
    check_precision("float32", device, "here")
    with pytest.raises(ConfigError, match=r"without autocast, got 'bfloat16' on meta \(here\)"):
        check_precision("bfloat16", device, "here")
    check_precision("bfloat16", torch.device("cpu"), "here")
