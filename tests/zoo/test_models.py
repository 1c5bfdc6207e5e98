from __future__ import annotations

import pytest
import torch

from nni_topo.errors import ConfigError
from nni_topo.zoo import count_params, create_model, list_models
from nni_topo.zoo.models import model_info

BUILT_IN = [
    "bert_small",
    "cnn12",
    "gpt_small",
    "lenet300",
    "lenet5",
    "lenet5_like",
    "mnist_cnn",
    "mnist_fcn",
    "resnet18",
    "resnet20",
    "resnet56",
    "small_cnn",
    "vgg11",
    "vgg11_unpooled",
    "vgg16",
    "vgg16_modified",
    "vit_small",
]
OF_IMAGES = [name for name in BUILT_IN if name != "gpt_small"]
OWN_FACTORIES = """
from torch import nn

def by_classes(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(4, num_classes))

def takes_all(**arguments):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, arguments["num_classes"]))
    model.arguments = arguments
    return model

def not_a_model(num_classes):
    return num_classes

class Nested:
    build = staticmethod(by_classes)

constant = 3
"""


def build(name: str, *, channels: int = 3, size: int = 32, classes: int = 10, **knobs: float):
    return create_model(name, num_classes=classes, in_channels=channels, image_size=size, **knobs)


# lenet300: 784*300+300 + 300*100+100 + 100*10+10 = 235,500 + 30,100 + 1,010.
# lenet5 on 1x32x32: (25+1)*6 + (6*25+1)*16 + (16*5*5+1)*120 + 121*84 + 85*10 = 156 + 2,416 + 48,120 + 10,164 + 850.
# lenet5_like on 1x28x28: 26*32 + 801*64 + (64*7*7+1)*1024 + 1025*10 = 832 + 51,264 + 3,212,288 + 10,250.
# mnist_cnn on 1x28x28: 10*32 + (9*32+1)*32 + (32*28*28+1)*10 = 320 + 9,248 + 250,890.
# mnist_fcn: 785*100 + 4*101*100 + 101*10 = 78,500 + 40,400 + 1,010.
# small_cnn: 9*16 + 32 + 9*16*32 + 64 + 9*32*64 + 128 + 257*64 + 65*10
#          = 144 + 32 + 4,608 + 64 + 18,432 + 128 + 16,448 + 650.
# cnn12, as published: 1,792 + 73,856 + 819,456 + 3,277,312 and 262,272 + 33,024 + 131,584 + 5,130;
#        batch norms 2*(64+128+256+512 + 128+256+512) = 3,712.
# vgg16: kernels 9*(3*64 + 64*64 + 64*128 + 128*128 + 128*256 + 2*256*256 + 256*512 + 5*512*512)
#        = 14,710,464, batch norms 2*4,224 = 8,448, head 513*10 = 5,130.
# vgg16_modified: kernels 14,710,464, their biases 4,224, batch norms 8,448 + 2*512, dense 513*512 + 513*10.
# vgg11: kernels 9*(3*64 + 64*128 + 128*256 + 256*256 + 256*512 + 3*512*512) = 9,217,728, batch norms 2*2,752 = 5,504,
#        head on 64x64 2049*1024 + 1025*1024 + 1025*10 = 3,158,026, unpooled 513*10.
# resnet20: 432+32 | 6*(2,304+32) | 4,608+64 + 5*(9,216+64) | 18,432+128 + 5*(36,864+128) | 650
#           = 269,722 (option A), shortcuts 16*32+64 + 32*64+128 = 2,752 more.
# resnet56: 12 convolutions more per stage: 269,722 + 12*(2,304+32 + 9,216+64 + 36,864+128) = 853,018,
#           shortcuts 2,752 more.
# vit_small on 1x28x28: patches 17*96, positions 49*96, 5 blocks of 4*97*96 + 97*192 + 193*96 + 4*96,
#           norm 2*96, head 970; bert_small has that norm in front.
COUNTS = [
    ("lenet300", 1, 28, 266_610),
    ("lenet5", 1, 32, 61_706),
    ("lenet5_like", 1, 28, 3_274_634),
    ("mnist_cnn", 1, 28, 260_458),
    ("mnist_fcn", 1, 28, 119_910),
    ("small_cnn", 1, 8, 40_506),
    ("small_cnn", 1, 28, 40_506),
    ("cnn12", 3, 32, 4_604_426 + 3_712),
    ("vgg16", 3, 32, 14_724_042),
    ("vgg16_modified", 3, 32, 14_991_946),
    ("vgg11", 3, 64, 9_217_728 + 5_504 + 3_158_026),
    ("vgg11_unpooled", 3, 32, 9_217_728 + 5_504 + 5_130),
    # torchvision's, below, with a stem of 3x3 instead of 7x7
    ("resnet18", 3, 64, 11_689_512 - 990 * 513 - 40 * 3 * 64),
    ("resnet20", 3, 32, 269_722 + 2_752),
    ("resnet56", 3, 32, 853_018 + 2_752),
    ("vit_small", 1, 28, 381_418),
    ("bert_small", 1, 28, 381_418),
    # Published by torchvision for 1,000 classes: 11,689,512; a 10-class head saves 990*(512+1).
    ("torchvision/resnet18", 3, 64, 11_689_512 - 990 * 513),
]


def test_list_models_is_sorted_and_complete() -> None:
    assert list_models() == BUILT_IN
    assert list_models("resnet*") == ["resnet18", "resnet20", "resnet56"]


@pytest.mark.parametrize(("name", "channels", "size", "expected"), COUNTS)
def test_parameter_count(name: str, channels: int, size: int, expected: int) -> None:
    assert count_params(build(name, channels=channels, size=size)) == expected


@pytest.mark.parametrize("name", OF_IMAGES)
def test_built_in_models_compute_and_trace_from_their_smallest_image_on(name: str) -> None:
    least = model_info(name).min_image_size
    model = build(name, channels=1, size=least, classes=7, seed=0).eval()
    images = torch.randn(3, 1, least, least, generator=torch.Generator().manual_seed(0))
    traced = torch.fx.symbolic_trace(model)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 7)
        torch.testing.assert_close(traced(images), logits)
    if least > 1:
        with pytest.raises(ConfigError, match=f"image_size must be at least {least}, got {least - 1}"):
            build(name, channels=1, size=least - 1)


def test_a_decoder_answers_every_place_from_what_stands_before_it() -> None:
    # embedding and head 256*96 each, 4 blocks of 2*96*96 + 2*96*48 + 3*96*256 + 2*96, norm 96
    model = build("gpt_small", classes=256, seed=0).eval()
    assert count_params(model) == 455_520
    rows = torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(rows)
        assert logits.shape == (2, 9, 256)
        torch.testing.assert_close(model(rows[:, :5]), logits[:, :5], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(rows.flip(1))[:, -1], logits[:, -1])


@pytest.mark.parametrize(
    "name", ["vgg11", "vgg11_unpooled", "vgg16", "vgg16_modified", "resnet18", "resnet20", "resnet56"]
)
def test_width_scales_every_layer_but_the_ends(name: str) -> None:
    full, half = build(name, width=1.0), build(name, width=0.5)
    convolutions = [
        [layer for layer in model.modules() if isinstance(layer, torch.nn.Conv2d)] for model in (full, half)
    ]
    assert [layer.out_channels for layer in convolutions[0]] == [2 * layer.out_channels for layer in convolutions[1]]
    assert half(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, again, other = (build("resnet20", seed=seed).conv1.weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", ["torchvision/resnet18", "torchvision/vit_b_32"])
def test_torchvision_models_follow_channels_and_image_size(name: str) -> None:
    channels = 1 if name == "torchvision/resnet18" else 3
    model = build(name, channels=channels, size=64, classes=4).eval()
    assert model(torch.zeros(1, channels, 64, 64)).shape == (1, 4)


@pytest.fixture
def own_module(tmp_path, monkeypatch) -> str:
    (tmp_path / "own_factories_for_tests.py").write_text(OWN_FACTORIES)
    monkeypatch.syspath_prepend(tmp_path)
    return "own_factories_for_tests"


def test_factory_gets_the_arguments_it_accepts(own_module: str) -> None:
    assert build(f"{own_module}:by_classes", classes=5)[1].out_features == 5
    assert build(f"{own_module}:Nested.build", classes=5)[1].out_features == 5
    arguments = build(f"{own_module}:takes_all", channels=2, size=9, width=0.5).arguments
    assert arguments == {"num_classes": 10, "in_channels": 2, "image_size": 9, "width": 0.5}


def test_bad_factories_are_named(own_module: str) -> None:
    for path, message in (
        ("not_a_model", "must return an nn.Module, got int"),
        ("absent", "must be a function that can be imported, got .*:absent"),
        ("constant", "must be callable, got int"),
    ):
        with pytest.raises(ConfigError, match=message):
            build(f"{own_module}:{path}")
    with pytest.raises(ConfigError, match=r"width must be 1\.0 .* got 0\.5"):
        build(f"{own_module}:by_classes", width=0.5)


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet21", "resnet20"), ("torchvision/resnet19", "torchvision/resnet18")]
)
def test_unknown_names_come_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"model must be a known name, got '{name}'; did you mean .*{nearest}"):
        build(name)


def test_models_of_timm_are_built_by_name():
    pytest.importorskip("timm")
    assert build("timm/resnet10t", channels=1, size=32, classes=4)(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    assert build("timm/vit_tiny_patch16_224", size=48, classes=4)(torch.zeros(2, 3, 48, 48)).shape == (2, 4)
    with pytest.raises(ConfigError, match=r"did you mean .*timm/resnet10t"):
        build("timm/resnet11t", size=32)
