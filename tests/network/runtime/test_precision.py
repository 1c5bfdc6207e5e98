"""Networks are compared in full precision, whatever the process allows for speed."""

import functools
import os
import traceback

import pytest
import torch
import torchvision
from torch import nn

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.precision import check_precision, computing_in, in_full_precision

BACKENDS = torch.backends
OPERATIONS = {
    "matmul": BACKENDS.cuda.matmul,
    "conv": BACKENDS.cudnn.conv,
    "rnn": BACKENDS.cudnn.rnn,
    "mkldnn matmul": BACKENDS.mkldnn.matmul,
    "mkldnn conv": BACKENDS.mkldnn.conv,
    "mkldnn rnn": BACKENDS.mkldnn.rnn,
}


def _set_all(value):
    BACKENDS.fp32_precision = value


SETTINGS = {
    "as PyTorch sets it": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "all tf32": lambda: _set_all("tf32"),
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
@pytest.mark.parametrize("name", ["mobilenet_v2", "resnet18"])
def test_groups_on_a_gpu_are_those_on_the_cpu(name):
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(weights=None).eval()
    image = torch.zeros(1, 3, 96, 96)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    wanted = nni_topo.dependency_groups(model, image, config)
    found = nni_topo.dependency_groups(model.cuda(), image.cuda(), config)
    assert [entry["op_names"] for entry in found] == [entry["op_names"] for entry in wanted]


CONVOLUTIONS = [
    (nn.Conv1d(8, 8, 64, padding=32), (4, 8, 64)),  # processors with AMX compute it wrong in bfloat16
    (nn.ConvTranspose2d(16, 8, 4, stride=2), (4, 16, 8, 8)),
]


@pytest.mark.parametrize(("layer", "shape"), CONVOLUTIONS, ids=[str(layer) for layer, _ in CONVOLUTIONS])
def test_convolutions_stay_in_single_precision_on_a_cpu(layer, shape):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(shape, generator=generator).requires_grad_()
    learning = [images, *layer.parameters()]
    wanted = layer(images)
    towards = torch.randn(wanted.shape, generator=generator)
    answers = [wanted.detach(), *torch.autograd.grad(wanted, learning, towards)]
    with computing_in("bfloat16", torch.device("cpu")):
        found = layer(images)
    others = [found.detach(), *torch.autograd.grad(found, learning, towards)]
    for other, answer in zip(others, answers, strict=True):
        torch.testing.assert_close(other, answer)  # of the same type, too


@pytest.mark.parametrize("is_half", [False, True])
def test_a_convolution_of_bfloat16_gives_its_rounded_numbers(is_half):
    """After a linear layer, or with weights in half precision where the forward has turned autocast off."""
    layer, images = nn.Conv1d(8, 8, 64, padding=32), torch.randn(4, 8, 64).bfloat16()
    if is_half:
        layer.bfloat16()
    with computing_in("bfloat16", torch.device("cpu")), torch.autocast("cpu", torch.bfloat16, enabled=not is_half):
        found = layer(images)
    assert torch.equal(found, layer.float()(images.float()).bfloat16())


def test_linear_layers_between_convolutions_compute_in_bfloat16():
    net = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Linear(6, 6), nn.Conv1d(8, 2, 3), nn.Linear(4, 3))
    seen = []
    for layer in net:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
    images = torch.randn(2, 4, 8)
    with computing_in("bfloat16", torch.device("cpu")):
        found = net(images)
    assert seen == [torch.float32, *[torch.bfloat16] * 3]
    torch.testing.assert_close(found.float(), net(images), rtol=0.05, atol=0.02)


def test_a_device_without_autocast_computes_in_single_precision_alone():
    device = torch.device("meta")
    assert not torch.amp.is_autocast_available(device.type)
    check_precision("float32", device, "here")
    with pytest.raises(ConfigError, match=r"without autocast, got 'bfloat16' on meta \(here\)"):
        check_precision("bfloat16", device, "here")
    check_precision("bfloat16", torch.device("cpu"), "here")
