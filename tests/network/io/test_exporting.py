"""Networks that were pruned and exported compute the same in the runtime that they were exported for."""

from __future__ import annotations

import sys
from collections import namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from speedup_nets import l1_masks, masks_of
from torch import nn
from torch.utils import _pytree as pytree

import nni_topo
from nni_topo import zoo
from nni_topo.errors import ConfigError, ExportError
from nni_topo.network.io.exporting import _check, _outputs
from nni_topo.network.runtime.inputs import tensors_of
from nni_topo.testing import toy_images, toy_model

onnxruntime = pytest.importorskip("onnxruntime")
IMAGES = toy_images(64, seed=1)


def outputs(path, **inputs):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, inputs)


def fed(path, inputs):
    names = [
        each.name for each in onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()
    ]
    return dict(zip(names, (each.numpy() for each in pytree.tree_leaves(inputs)), strict=True))


@pytest.fixture(scope="module")
def dense():
    model = toy_model().eval()
    config = nni_topo.dependency_groups(model, IMAGES[:2], [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    masks = masks_of(nni_topo.create_pruner("l1", model, config))
    return nni_topo.to_dense(model, IMAGES[:2], masks)


def test_onnx_answers_as_the_network_does_at_any_batch_size(dense, tmp_path):
    done = nni_topo.export(dense.train(), tmp_path / "new" / "small.onnx", IMAGES[:1])
    assert dense.training
    dense.eval()
    assert done.path.stat().st_size == done.size
    assert done.error < 1e-4
    assert [path.name for path in done.path.parent.iterdir()] == ["small.onnx"]
    for count in (1, 5, 64):
        (name,) = [each.name for each in onnxruntime.InferenceSession(str(done.path)).get_inputs()]
        (found,) = outputs(done.path, **{name: IMAGES[:count].numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(found, dense(IMAGES[:count]).numpy(), atol=1e-4)


class Recurrent(nn.Module):
    """A recurrent layer that returns its states."""

    def __init__(self, kind, **knobs):
        super().__init__()
        self.layer = getattr(nn, kind)(5, 6, **knobs)

    def forward(self, x):
        """Return the outputs and the last states."""
        return self.layer(x)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("knobs", [{}, {"bidirectional": True, "num_layers": 2, "batch_first": True}, {"bias": False}])
def test_a_recurrent_layer_becomes_the_operator_of_onnx_at_any_length(kind, knobs, tmp_path):
    torch.manual_seed(0)
    network = Recurrent(kind, **knobs).eval()
    done = nni_topo.export(network, tmp_path / "r.onnx", torch.randn(4, 7, 5), dynamic_dims=(0, 1))
    assert done.error < 1e-4
    assert "forward" not in vars(network.layer)
    x = torch.randn(3, 11, 5)
    actual = outputs(done.path, **fed(done.path, x))
    for one, other in zip(tensors_of(network(x)), actual, strict=True):
        np.testing.assert_allclose(one.detach(), other, atol=1e-5)


class Logarithm(nn.Module):
    """A logarithm with a summand that keeps it finite."""

    def forward(self, x):
        """Return the logarithms."""
        return torch.log(x + 1e-10)


def test_a_tiny_summand_stays_in_the_file(tmp_path):
    done = nni_topo.export(Logarithm(), tmp_path / "log.onnx", torch.ones(2, 3))
    (logarithms,) = outputs(done.path, **fed(done.path, torch.zeros(2, 3)))
    np.testing.assert_allclose(logarithms, np.log(np.float32(1e-10)), rtol=1e-5)


def test_a_program_of_torch_answers_the_same(dense, tmp_path):
    done = nni_topo.export(dense, tmp_path / "small.pt2", IMAGES[:2], format="torch.export")
    loaded = torch.export.load(done.path).module()
    with torch.no_grad():
        torch.testing.assert_close(loaded(IMAGES[:7]), dense.eval()(IMAGES[:7]))


class Normed(nn.Module):
    """A network of images of any even size, whose norm loses channels."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 12, 2, 2), nn.GroupNorm(2, 12), nn.ConvTranspose2d(12, 3, 2, 2)

    def forward(self, images):
        return images + self.last(self.norm(self.first(images)).relu())


@pytest.fixture(scope="module")
def normed():
    torch.manual_seed(0)
    kept = torch.tensor([1, 1, 0, 0, 0, 1] * 2, dtype=torch.float32)
    masks = {"first": {"weight": kept.view(-1, 1, 1, 1).expand(12, 3, 2, 2), "bias": kept}}
    return nni_topo.to_dense(Normed().eval(), torch.randn(2, 3, 8, 8), masks)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "given", "taken", "refused"),
    [
        ((0, 2, 3), (2, 3, 8, 8), [(3, 3, 12, 20), (1, 3, 6, 14)], None),
        ([2, 3], (3, 3, 8, 8), [(3, 3, 12, 20)], (2, 3, 12, 20)),
        ((), (1, 3, 8, 8), [(1, 3, 8, 8)], (1, 3, 12, 20)),
    ],
)
@torch.no_grad()
def test_a_program_takes_any_size_in_the_dynamic_dims(normed, tmp_path, dims, given, taken, refused):
    assert normed.first.out_channels == 6
    path = tmp_path / "small.pt2"
    nni_topo.export(normed, path, torch.randn(given), dynamic_dims=dims)
    loaded = torch.export.load(path).module()
    for size in taken:
        torch.testing.assert_close(loaded(images := torch.randn(size)), normed(images))
    if refused is not None:
        with pytest.raises(AssertionError):
            loaded(torch.randn(refused))


@pytest.mark.slow
@torch.no_grad()
def test_onnx_takes_any_size_in_the_dynamic_dims(normed, tmp_path):
    path = tmp_path / "small.onnx"
    nni_topo.export(normed, path, torch.randn(2, 3, 8, 8), dynamic_dims=(0, 2, 3))
    for size in ((3, 3, 12, 20), (1, 3, 6, 14)):
        np.testing.assert_allclose(
            outputs(path, images=(given := torch.randn(size)).numpy())[0], normed(given), atol=1e-4
        )
    done = nni_topo.export(
        normed, path, torch.randn(1, 3, 8, 8), dynamic_dims=(0, 2, 3), int8=torch.randn(22, 3, 8, 8).split(5)
    )
    assert 0 < done.int8_distance < 0.01
    found = outputs(path, images=(given := torch.randn(1, 3, 12, 20)).numpy())[0]
    assert np.square(found - normed(given).numpy()).mean() < 0.01 * np.square(found).mean()


@pytest.mark.parametrize(
    ("given", "dims", "error", "message"),
    [
        (torch.zeros(2, 4), (0, 2), ConfigError, "must be dimensions of the inputs, got 2 of 2 dimensions"),
        (torch.zeros(2, 4), (-1,), ConfigError, "each value an integer of at least 0, got"),
        (torch.zeros(2, 4), (0, 1), ExportError, "must take more than one size in its dynamic_dims"),
    ],
)
def test_dims_that_cannot_be_dynamic_are_refused(given, dims, error, message, tmp_path):
    with pytest.raises(error, match=message):
        nni_topo.export(nn.Linear(4, 2), tmp_path / "small.pt2", given, dynamic_dims=dims)
    assert not list(tmp_path.iterdir())


def test_the_longest_texts_are_exported_with_shorter_ones(tmp_path):
    class Text(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = nn.Embedding(9, 4), nn.Parameter(torch.randn(6, 4))

        def forward(self, ids, mask):
            return (self.words(ids) + self.places[: ids.shape[1]]) * mask[..., None]

    texts, net = torch.arange(12).view(2, 6) % 9, Text()
    nni_topo.export(net, tmp_path / "small.pt2", (texts, torch.ones(2, 6)), dynamic_dims=(0, 1))
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    given = texts[:1, :3], torch.tensor([[1.0, 1.0, 0.0]])
    torch.testing.assert_close(loaded(*given), net(*given))


@pytest.mark.parametrize(("bits", "most"), [(7, 64), pytest.param(8, 127, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_int8_is_smaller_near_and_made_of_integers(tmp_path, bits, most):
    onnx = pytest.importorskip("onnx")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)).eval()
    images = torch.randn(128, 32)
    whole = nni_topo.export(model, tmp_path / "float.onnx", images[:2])
    path = tmp_path / "int8.onnx"
    done = nni_topo.export(model, path, images[:2], int8=iter(images.split(32)), weight_bits=bits)
    assert done.size < 0.4 * whole.size
    assert np.isnan(whole.int8_distance)
    held_out = images[7::8]  # no range was taken from them
    (found,) = outputs(done.path, input=held_out.numpy())
    with torch.no_grad():
        wanted = model(held_out).numpy()
    distance = ((found - wanted) ** 2).sum() / ((wanted - wanted.mean(0)) ** 2).sum()
    assert done.int8_distance == pytest.approx(distance, rel=0.01)
    # Without VNNI products of 8 bits overflow in the runtime.
    assert distance < 0.01 or bits == 8
    graph = onnx.load(done.path).graph
    known = {each.name: each for each in graph.initializer}
    weights = [known.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"]
    weights = [onnx.numpy_helper.to_array(w) for w in weights if w and w.data_type == onnx.TensorProto.INT8]
    # Two products of 7 bits by 8 fit into 16, where processors without VNNI add them.
    assert [np.abs(weight.astype(int)).max() for weight in weights] == [most] * 3


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"int8": [torch.zeros(4, 4)], "weight_bits": 4}, r"weight_bits must be 7 or 8, got 4 \(export\)"),
        ({"weight_bits": 8}, r"must be INT8 to use 8 bits, got no calibration data for that \(int8\)"),
        ({"int8": [torch.zeros(4, 4)], "dynamic_dims": ()}, r"dynamic_dims must hold 0 for INT8, .*got \(\) \(int8\)"),
    ],
)
def test_bits_of_weights_that_cannot_be_are_refused(tmp_path, knobs, words):
    with pytest.raises(ConfigError, match=words):
        nni_topo.export(nn.Linear(4, 2), tmp_path / "small.onnx", torch.zeros(2, 4), **knobs)
    assert not list(tmp_path.iterdir())


class TwoInputs(nn.Module):
    """A sum of two linear layers, one of an optional argument."""

    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, first, flag=None, second=None):
        return {"sum": self.left(first) + self.right(second), "first": self.left(first)}


class AnyNumber(TwoInputs):
    """Takes its inputs as one tuple."""

    def forward(self, *inputs):
        return self.left(inputs[0]) + self.right(inputs[1]) + sum(inputs[2:])


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_network_of_any_number_of_inputs_is_exported_at_any_batch_size(ending, tmp_path):
    model = AnyNumber().eval()
    inputs = torch.randn(2, 4), torch.randn(2, 5), torch.randn(2, 3)
    path = nni_topo.export(model, tmp_path / f"sum.{ending}", inputs).path
    more = tuple(torch.randn(7, each.shape[1]) for each in inputs)
    answer = outputs(path, **fed(path, more))[0] if ending == "onnx" else torch.export.load(path).module()(*more)
    np.testing.assert_allclose(torch.as_tensor(answer).detach(), model(*more).detach(), atol=1e-5)


class Noisy(nn.Module):
    """Drops values in evaluation mode, too."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 64)

    def forward(self, x):
        return nn.functional.dropout(self.layer(x))


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_network_that_is_random_in_evaluation_mode_is_refused_as_such(ending, tmp_path):
    path = tmp_path / f"noisy.{ending}"
    with pytest.raises(ExportError, match=r"got one that is random in evaluation mode \(Noisy\)"):
        nni_topo.export(Noisy().eval(), path, torch.randn(2, 4))
    assert not path.exists()


class WithNumbers(TwoInputs):
    """Returns things beside tensors, as detectors and encoders do."""

    def forward(self, first, flag=None, second=None):
        found = super().forward(first, flag, second)
        return {"rows": first.shape[0], "sum": found["sum"], "width": 3, "kind": "linear", "scale": 0.5, "no": None}


def test_what_is_no_tensor_is_left_out_of_the_outputs(tmp_path):
    model, inputs = WithNumbers().eval(), {"first": torch.randn(2, 4), "second": torch.randn(2, 5)}
    done = nni_topo.export(model, tmp_path / "numbers.onnx", inputs)
    (found,) = outputs(done.path, **{name: tensor.numpy() for name, tensor in inputs.items()})
    result = model(**inputs)
    np.testing.assert_allclose(found, result["sum"].detach().numpy(), atol=1e-5)
    assert result["width"] == 3
    done = nni_topo.export(model, tmp_path / "numbers.pt2", inputs)
    assert done.error == pytest.approx(0.0, abs=1e-6)


@dataclass
class Answer:
    scores: torch.Tensor
    width: int


class InDataClass(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.layer, self.returns = nn.Linear(4, 3), returns

    def forward(self, inputs):
        return self.returns(inputs, self.layer(inputs))


Pair = namedtuple("Pair", ["left", "right"])


RETURNS = (
    (lambda x, y: {"relu": y.relu(), "linear": y + 1, "none": None}, ["relu", "linear"]),
    # in ONNX an input and a weight have the name
    (lambda x, y: {"inputs": y.relu(), "layer.weight": y + 1}, ["inputs_", "layer.weight_"]),
    (lambda x, y: {"boxes": [y, y + 1], "more": {"of": y, "it": 2 * x}}, ["boxes.0", "boxes.1", "more.of", "more.it"]),
    (lambda x, y: {"x": x, "y": y, "again": y}, ["x", "y", "again"]),
    (lambda x, y: Answer(y, 3), ["scores"]),
    (lambda x, y: Pair(y, y + 1), ["left", "right"]),
)


@pytest.mark.parametrize(("returns", "names"), RETURNS)
@pytest.mark.quick_every(3)
def test_outputs_are_named_by_what_the_network_returns_them_under(returns, names, tmp_path):
    model, images = InDataClass(returns).eval(), torch.randn(8, 4)
    done = nni_topo.export(model, tmp_path / "named.onnx", images[:2])
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    assert [each.name for each in session.get_outputs()] == names
    found, wanted = session.run(None, fed(done.path, images)), tensors_of(model(images))
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one, other.detach().numpy(), atol=1e-5)


def test_half_precision_may_differ_by_machine_epsilons(tmp_path):
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.GELU())]
    model = nn.Sequential(*layers).half().eval()
    done = nni_topo.export(model, tmp_path / "half.pt2", torch.randn(2, 64).half())
    assert done.error <= 8 * torch.finfo(torch.float16).eps


class Inverse(nn.Module):
    """Computes what ONNX has no operator for."""

    def forward(self, images):
        return torch.linalg.matrix_exp(images[:, 0])


def test_the_error_names_what_onnx_cannot_do(tmp_path):
    with pytest.raises(ExportError, match=r"write as ONNX, got [^\x1b]*linalg_matrix_exp[^\x1b]*Inverse") as caught:
        nni_topo.export(Inverse(), tmp_path / "inverse.onnx", torch.randn(2, 1, 4, 4))
    assert "step 3/3" not in str(caught.value)


def family(name):
    """A small network of a family, with random weights, and inputs."""
    if name.startswith("torchvision/"):
        model = zoo.create_model(name, num_classes=10, in_channels=3, image_size=64, seed=0)
        return model, torch.randn(2, 3, 64, 64)
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"input_ids": torch.randint(0, 90, (2, 12))}
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    config, kind, inputs = {
        "bert": (transformers.BertConfig(vocab_size=99, **sizes), "BertForSequenceClassification", words),
        "vit": (transformers.ViTConfig(image_size=32, patch_size=8, **sizes), "ViTForImageClassification", pixels),
        "gpt2": (
            transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, use_cache=False),
            "GPT2LMHeadModel",
            words,
        ),
        "llama": (
            transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, use_cache=False, **sizes),
            "LlamaForCausalLM",
            words,
        ),
    }[name]
    return getattr(transformers, kind)(config), inputs


FAMILIES = ("mobilenet_v2", "densenet121", "swin_t")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*(f"torchvision/{name}" for name in FAMILIES), "bert", "vit", "gpt2", "llama"])
def test_one_network_of_each_family(name, tmp_path):
    torch.manual_seed(0)
    model, inputs = family(name)
    done = nni_topo.export(model, tmp_path / "model.onnx", inputs, int8=[inputs])
    assert done.error < 1e-4
    (first, *_) = outputs(done.path, **fed(done.path, inputs))
    model.eval()
    with torch.no_grad():
        wanted = pytree.tree_leaves(model(**inputs) if isinstance(inputs, dict) else model(inputs))[0]
    # Of random weights all inputs give nearly the same, of which int8_distance would be no share.
    assert ((first - wanted.numpy()) ** 2).sum() < 0.1 * wanted.square().sum()
    program = tmp_path / "model.pt2"
    if name in ("gpt2", "llama"):  # their masks are made by vmap, which PyTorch doesn't serialise
        with pytest.raises(ExportError, match="can save"):
            nni_topo.export(model, program, inputs, format="torch.export")
    else:
        assert nni_topo.export(model, program, inputs, format="torch.export").error < 1e-4


class Anchored(nn.Module):
    """A detector's head that makes its anchors anew if the sizes of the images differ from those of the last run."""

    shape = None

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)
        self.anchors = torch.empty(0)

    def forward(self, images):
        x = self.last(self.first(images).relu())
        if self.shape != x.shape:
            self.anchors = torch.arange(x.shape[2] * x.shape[3], dtype=x.dtype, device=x.device)
            self.shape = x.shape
        return x.flatten(2) + self.anchors


@pytest.mark.parametrize("ending", ["onnx", "pt2"])
def test_a_head_that_keeps_anchors_of_the_last_run_is_exported_at_any_batch_size(ending, tmp_path):
    model, images = Anchored().eval(), torch.randn(2, 3, 6, 6)
    dense = nni_topo.to_dense(model, images, l1_masks(model, [{"op_names": ["first"], "sparse_ratio": 0.5}]))
    dense(images)
    assert dense.first.out_channels == 4
    shape = dense.shape
    file = nni_topo.export(dense, tmp_path / f"small.{ending}", images)
    assert file.error < 1e-5
    assert dense.shape is shape
    more = torch.randn(5, 3, 6, 6)
    if ending == "onnx":
        (found,) = outputs(file.path, **fed(file.path, more))
    else:
        found = torch.export.load(file.path).module()(more).detach().numpy()
    np.testing.assert_allclose(found, dense(more).detach().numpy(), atol=1e-5)


class EachApart(nn.Module):
    """Treats its samples one by one."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, rows):
        return torch.stack([self.layer(rows[at]) for at in range(len(rows))])


def test_a_network_of_a_fixed_batch_is_exported_as_the_error_advises(tmp_path):
    model, rows = EachApart().eval(), torch.randn(3, 4)
    with pytest.raises(ExportError, match=r"any batch size.*dynamic_dims=\(\)"):
        nni_topo.export(model, tmp_path / "rows.onnx", rows)
    file = nni_topo.export(model, tmp_path / "rows.onnx", rows, dynamic_dims=())
    np.testing.assert_allclose(outputs(file.path, **fed(file.path, rows))[0], model(rows).detach().numpy(), atol=1e-6)


class FixedBatch(nn.Module):
    """Takes the number of images it was written for."""

    def forward(self, images):
        return images.reshape(2, -1).sum(1)


def test_what_cannot_be_exported_is_said_before_a_file_is_written(tmp_path):
    path = tmp_path / "small.onnx"
    for error, message, given in (
        (ExportError, r"at any batch size, got .*a constant \(2\)", {"model": FixedBatch()}),
        (ConfigError, "did you mean onnx", {"format": "onxn"}),
        (ConfigError, "must be an iterable of batches", {"int8": IMAGES}),
    ):
        with pytest.raises(error, match=message):
            nni_topo.export(**{"model": toy_model(), "path": path, "inputs": IMAGES[:2], **given})
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("small.pt3", {}, r"a path must end in .onnx or .pt2, or format= be given, got .pt3"),
        ("small.pt2", {"format": "onnx"}, "a path that ends in .pt2 must have the format 'torch.export', got 'onnx'"),
        ("small.pt2", {"int8": [IMAGES]}, "the format of an INT8 file must be 'onnx', got 'torch.export'"),
    ],
)
def test_the_ending_of_a_path_and_the_format_must_agree(tmp_path, name, given, message):
    with pytest.raises(ConfigError, match=message):
        nni_topo.export(toy_model(), tmp_path / name, IMAGES[:2], **given)
    assert list(tmp_path.iterdir()) == []


def test_missing_packages_are_named_with_the_extra_that_has_them(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install 'nni_topo\[export\]', got no onnxscript"):
        nni_topo.export(toy_model(), tmp_path / "small.onnx", IMAGES[:2])


def test_outputs_of_a_file_are_the_networks_at_two_sizes_of_a_batch():
    net, calls, sizes = nn.Linear(3, 2), [((torch.randn(size, 3),), {}) for size in (2, 3)], list[int]()

    def run(factor, width=2):
        def runs(call):
            sizes.append(len(call[0][0]))
            return [factor * each[:, :width] for each in _outputs(net, call)]

        return _check(net, calls, runs)

    assert run(1.0) == 0.0
    assert sizes == [2, 3]
    assert 0 < run(1 + 1e-5) < 1e-4
    for factor in (1.01, float("nan")):
        with pytest.raises(
            ExportError, match=r"must equal the network's within 0\.0001 of the largest, got a difference"
        ):
            run(factor)
    with pytest.raises(ExportError, match=r"must have the network's shapes, got \(2, 1\) in place of \(2, 2\)"):
        run(1.0, width=1)
    assert not _outputs(net, calls[0])[0].requires_grad
