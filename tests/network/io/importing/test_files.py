"""A file in, a smaller file out; what is refused, and with which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import nni_topo
from nni_topo.cli import main
from nni_topo.errors import ConfigError, DataError, ExportError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

IMAGES = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Convolutions, heads with their sizes in numbers, and a linear layer."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 16, 3, padding=1)
            self.norm = nn.BatchNorm2d(16)
            self.second = nn.Conv2d(16, 24, 3, padding=1)
            self.head = nn.Linear(24 * 16, 4)

    def forward(self, image):
        """Map images ``(n, 1, 8, 8)`` to ``(n, 4)``."""
        x = torch.relu(self.norm(self.first(image)))
        x = torch.max_pool2d(torch.relu(self.second(x)), 2)
        return self.head(x.reshape(x.shape[0], 24 * 16))


def program(dtype=torch.float32):
    """Export the network with a free batch."""
    free = ({0: torch.export.Dim("batch")},)
    return torch.export.export(Net().to(dtype).eval(), (IMAGES[:2].to(dtype),), dynamic_shapes=free)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return the same network as files of three exporters."""
    folder = tmp_path_factory.mktemp("files")
    torch.export.save(program(), folder / "new.pt2")
    torch.onnx.export(program(), dynamo=True, verbose=False).save(folder / "new.onnx", external_data=False)
    names = {"input_names": ["image.1"], "output_names": ["scores"]}
    free = {"image.1": {0: "samples"}, "scores": {0: "samples"}}
    with pytest.warns(DeprecationWarning, match="legacy"):
        torch.onnx.export(Net().eval(), (IMAGES[:2],), folder / "old.onnx", dynamo=False, dynamic_axes=free, **names)
    model = onnx.load(folder / "old.onnx")
    onnx.helper.set_model_props(model, {"author": "someone"})
    onnx.save(model, folder / "old.onnx")
    return folder


@pytest.mark.parametrize("name", ["new.pt2", "new.onnx", "old.onnx"])
def test_a_smaller_network_of_a_file_is_the_masked_one(files, name):
    network = nni_topo.from_file(files / name)
    np.testing.assert_allclose(network(IMAGES).detach(), Net().eval()(IMAGES).detach(), rtol=1e-4, atol=1e-5)
    groups = nni_topo.dependency_groups(network, IMAGES[:2], [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    assert sorted(network.get_submodule(entry["op_names"][0]).out_channels for entry in groups) == [16, 24]
    pruner = nni_topo.RandomPruner(network, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(network, IMAGES[:2], masks)
    assert sorted(layer.out_channels for layer in dense.modules() if isinstance(layer, nn.Conv2d)) == [8, 12]
    masked = nni_topo.masked_model(network, IMAGES[:2], masks)
    for images in (IMAGES[:2], IMAGES[:5]):
        np.testing.assert_allclose(dense(images).detach(), masked(images).detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "batches",
    [
        IMAGES.split(32),
        [each.numpy() for each in IMAGES.split(32)],
        [{"image.1": each.numpy()} for each in IMAGES.split(32)],
    ],
    ids=["tensors", "arrays", "by name"],
)
def test_the_smaller_file_has_the_interface_of_the_file(files, tmp_path, batches):
    small = nni_topo.shrink(files / "old.onnx", batches, {"flops": 0.5}, distill=False, progress=False)
    done = nni_topo.export(small, tmp_path / "small.onnx")
    assert done.error < 1e-4
    before, after = onnx.load(files / "old.onnx"), onnx.load(tmp_path / "small.onnx")
    for ends in ("input", "output"):
        one, other = (getattr(each.graph, ends)[0] for each in (before, after))
        assert (one.name, one.type.tensor_type.elem_type) == (other.name, other.type.tensor_type.elem_type)
        axis = other.type.tensor_type.shape.dim[0]
        assert axis.dim_param == "samples"
    assert {"author": "someone"}.items() <= {each.key: each.value for each in after.metadata_props}.items()
    assert after.opset_import[0].version >= before.opset_import[0].version
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (scores,) = session.run(None, {"image.1": IMAGES[:7].numpy()})
    np.testing.assert_allclose(scores, small(IMAGES[:7]).detach(), rtol=1e-3, atol=1e-5)


def test_programs_and_their_modules_are_taken(tmp_path):
    for given in (program(), program().module()):
        small = nni_topo.shrink(given, IMAGES.split(32), {"flops": 0.5}, distill=False, progress=False)
        assert small.report.stages[-1].macs < 0.6 * small.report.stages[0].macs
    nni_topo.export(small, tmp_path / "small.pt2")
    loaded = torch.export.load(tmp_path / "small.pt2").module()
    np.testing.assert_allclose(loaded(IMAGES[:3]).detach(), small(IMAGES[:3]).detach(), rtol=1e-4, atol=1e-6)


def test_a_file_of_one_sample_gives_a_file_of_one_sample(tmp_path):
    fixed = torch.export.export(Net().eval(), (IMAGES[:1],))
    torch.onnx.export(fixed, dynamo=True, verbose=False).save(tmp_path / "one.onnx", external_data=False)
    small = nni_topo.shrink(tmp_path / "one.onnx", IMAGES.split(32), {"flops": 0.5}, distill=False, progress=False)
    assert small(IMAGES[:5]).shape == (5, 4)
    nni_topo.export(small, tmp_path / "small.onnx")
    axes = onnx.load(tmp_path / "small.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_value for axis in axes] == [1, 1, 8, 8]


def test_a_file_in_half_precision_comes_back_in_it(tmp_path):
    torch.onnx.export(program(torch.float16), dynamo=True, verbose=False).save(tmp_path / "half.onnx")
    network = nni_topo.from_file(tmp_path / "half.onnx", IMAGES.half())
    nni_topo.export(network, tmp_path / "again.onnx")
    graph = onnx.load(tmp_path / "again.onnx").graph
    assert graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    floats = {each.data_type for each in graph.initializer} - {onnx.TensorProto.INT64}
    assert floats == {onnx.TensorProto.FLOAT16}


def test_weights_may_lie_beside_the_file(files, tmp_path, monkeypatch):
    path = tmp_path / "split.onnx"
    onnx.save(onnx.load(files / "old.onnx"), path, save_as_external_data=True, location="weights", size_threshold=0)
    network = nni_topo.from_file(path)
    np.testing.assert_allclose(network(IMAGES).detach(), Net().eval()(IMAGES).detach(), rtol=1e-4, atol=1e-5)
    monkeypatch.setattr("nni_topo.network.io.exporting._LARGEST", 1000)
    done = nni_topo.export(network, tmp_path / "large" / "small.onnx")
    assert {each.name for each in done.path.parent.iterdir()} == {"small.onnx", "small.onnx.data"}
    assert done.size == sum(each.stat().st_size for each in done.path.parent.iterdir())
    again = nni_topo.from_file(done.path)
    np.testing.assert_allclose(again(IMAGES).detach(), network(IMAGES).detach(), rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="less than 1000 bytes of weights"):
        nni_topo.export(network, tmp_path / "int8.onnx", int8=[IMAGES])
    (tmp_path / "weights").unlink()
    with pytest.raises(DataError, match="a file must hold"):
        nni_topo.from_file(path)


def test_a_network_of_a_file_becomes_int8(files, tmp_path):
    network = nni_topo.from_file(files / "old.onnx")
    batches = [{"image.1": each.numpy()} for each in IMAGES.split(16)]
    done = nni_topo.export(network, tmp_path / "int8.onnx", int8=batches)
    assert done.int8_distance < 0.05
    kinds = {node.op_type for node in onnx.load(done.path).graph.node}
    assert "DequantizeLinear" in kinds
    with pytest.raises(ConfigError, match="int8"):
        nni_topo.export(network, tmp_path / "other.onnx", int8=True)
    with pytest.raises(DataError, match=r"float32, got float64 \(input 'image.1', batch 0 of int8\)"):
        nni_topo.export(network, tmp_path / "other.onnx", int8=[IMAGES.double()])
    fixed = torch.export.export(Net().eval(), (IMAGES[:1],))
    with pytest.raises(ConfigError, match="must take any batch size"):
        nni_topo.export(nni_topo.from_file(fixed), tmp_path / "other.onnx", int8=[IMAGES])
    assert not (tmp_path / "other.onnx").exists()


def test_the_command_writes_a_file_and_a_report(files, tmp_path, capsys):
    np.savez(tmp_path / "data.npz", **{"image.1": IMAGES.numpy()})
    flags = ["--model", str(files / "old.onnx"), "--flops", "0.5", "--distill-seconds", "0.1", "--seed", "0"]
    out = tmp_path / "small"
    assert main(["shrink", *flags, "--data", str(tmp_path / "data.npz"), "--out", str(out)]) == 0
    assert {"small.onnx", "report.html"} <= {each.name for each in out.iterdir()}
    missing = tmp_path / "missing.npz"
    assert main(["shrink", *flags, "--data", str(missing), "--out", str(tmp_path / "other")]) == 2
    assert "must be a file that exists" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "other").exists()


class Shuffled(nn.Module):
    """A block of ShuffleNet: half of the channels pass a layer, and two groups exchange channels."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 16, 3)
            self.branch = nn.Conv2d(8, 8, 1)
            self.last = nn.Conv2d(8, 4, 1)

    def forward(self, image):
        """Map images ``(n, 1, 8, 8)`` to ``(n, 4, 6, 6)``."""
        left, right = self.first(image).chunk(2, 1)
        x = torch.cat([left, torch.relu(self.branch(right))], 1)
        n, channels, height, width = x.shape
        x = x.view(n, 2, channels // 2, height, width).transpose(1, 2).reshape(n, channels, height, width)
        left, right = x.chunk(2, 1)
        return self.last(left * right)


@pytest.mark.parametrize("road", ["export", "dynamo", "older"])
def test_channels_that_are_shuffled_and_halved_have_the_groups_of_the_source(road, tmp_path):
    free, path = {"image": {0: torch.export.Dim("batch")}}, tmp_path / "shuffled.onnx"
    if road == "older":
        with pytest.warns(DeprecationWarning, match="legacy"):
            torch.onnx.export(
                Shuffled().eval(), (IMAGES[:2],), path, dynamo=False, input_names=["image"],
                dynamic_axes={"image": {0: "batch"}},
            )  # fmt: skip
        network = nni_topo.from_file(path)
    else:
        file = torch.export.export(Shuffled().eval(), (IMAGES[:2],), dynamic_shapes=free)
        if road == "dynamo":
            torch.onnx.export(file, dynamo=True, verbose=False).save(path, external_data=False)
        network = nni_topo.from_file(path if road == "dynamo" else file)
    config = [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]
    of_source, of_file = (nni_topo.dependency_groups(net, IMAGES[:2], config) for net in (Shuffled().eval(), network))
    assert [[entry["op_names"] for entry in groups] for groups in (of_source, of_file)] == [[["first"], ["branch"]]] * 2


def changed(files, change):
    """Return a file's model after a change."""
    model = onnx.load(files / "old.onnx")
    change(model.graph)
    return model


def test_bad_files_are_errors_in_words(files, tmp_path):
    whole = (files / "old.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.pt2").write_bytes((files / "new.pt2").read_bytes()[:500])
    (tmp_path / "weights.pth").write_bytes(b"")
    for name in ("cut.onnx", "cut.pt2"):
        with pytest.raises(DataError, match="a file must hold"):
            nni_topo.from_file(tmp_path / name)
    newer = onnx.load(files / "old.onnx")
    newer.opset_import[0].version = 99
    with pytest.raises(DataError, match="must be one that onnxruntime runs"):
        nni_topo.from_file(newer)
    with pytest.raises(ConfigError, match=r"must end in .onnx or .pt2, got .pth"):
        nni_topo.from_file(tmp_path / "weights.pth")
    with pytest.raises(DataError, match="a file must exist"):
        nni_topo.from_file(tmp_path / "none.onnx")
    with (
        pytest.raises(ConfigError, match=r"got TorchScript.*torch.onnx.export"),
        pytest.warns(FutureWarning, match="jit"),
    ):
        nni_topo.shrink(torch.jit.trace(Net().eval(), IMAGES[:2]), [IMAGES], {"flops": 0.5})


def test_an_operator_without_a_row_is_named_before_any_work(files):
    def change(graph):
        graph.node[0].op_type, graph.node[0].name = "Loop", "a loop"

    with pytest.raises((ConfigError, DataError), match="Loop"):
        nni_topo.from_file(changed(files, change))

    def quantise(graph):
        relu = next(node for node in graph.node if node.op_type == "Relu")
        scale = onnx.numpy_helper.from_array(np.float32(0.1), "scale")
        zero = onnx.numpy_helper.from_array(np.uint8(0), "zero")
        graph.initializer.extend([scale, zero])
        place = list(graph.node).index(relu)
        end = relu.output[0]
        relu.output[0] = "exact"
        pair = [
            onnx.helper.make_node("QuantizeLinear", ["exact", "scale", "zero"], ["steps"], name="into"),
            onnx.helper.make_node("DequantizeLinear", ["steps", "scale", "zero"], [end], name="back"),
        ]
        for offset, node in enumerate(pair, 1):
            graph.node.insert(place + offset, node)

    with pytest.raises(ConfigError, match=r"float network.*QuantizeLinear \(node 'into'"):
        nni_topo.from_file(changed(files, quantise))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({"picture": IMAGES}, r"got 'picture'; known: image.1"),
        (IMAGES.double(), r"type float32, got float64 \(input 'image.1', batch 0 of images\)"),
        (IMAGES[:, :, :4], r"shape \(samples, 1, 8, 8\), got \(64, 1, 4, 8\)"),
        ("image", r"must be tensors or arrays, got str"),
    ],
)
def test_inputs_that_are_not_the_files_are_told(files, batch, words):
    with pytest.raises((ConfigError, DataError), match=words):
        nni_topo.shrink(files / "old.onnx", [batch], {"flops": 0.5})


def branching(samples=None):
    """Make a file whose input ``rate`` chooses one of two convolutions, with a state that holds the samples second."""
    make = onnx.helper

    def branch(name, channels):
        weight = torch.randn(channels, 1, 3, generator=torch.Generator().manual_seed(channels)).numpy()
        last = torch.randn(4, channels, 1, generator=torch.Generator().manual_seed(channels)).numpy()
        held = [onnx.numpy_helper.from_array(each, f"{name}.{place}") for place, each in enumerate((weight, last))]
        nodes = [
            make.make_node("Conv", ["x", f"{name}.0"], [f"{name}_y"], name=f"{name}_conv"),
            make.make_node("Relu", [f"{name}_y"], [f"{name}_z"]),
            make.make_node("Conv", [f"{name}_z", f"{name}.1"], [f"{name}_out"], name=f"{name}_last"),
        ]
        return make.make_graph(nodes, name, [], [make.make_empty_tensor_value_info(f"{name}_out")], held)

    nodes = [
        make.make_node("Equal", ["rate", "one"], ["is_one"]),
        make.make_node("If", ["is_one"], ["y"], "by rate", then_branch=branch("a", 16), else_branch=branch("b", 8)),
        make.make_node("ReduceSum", ["state", "axis"], ["sum"], keepdims=0),
        make.make_node("Unsqueeze", ["sum", "ends"], ["column"]),
        make.make_node("Add", ["y", "column"], ["scores"]),
    ]
    held = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in
            (("one", 1), ("axis", [0, 2]), ("ends", [1, 2]))]  # fmt: skip
    inputs = [make.make_tensor_value_info("x", 1, [samples, 1, 9]), make.make_tensor_value_info("rate", 7, []),
              make.make_tensor_value_info("state", 1, [2, samples, 3])]  # fmt: skip
    graph = make.make_graph(nodes, "g", inputs, [make.make_tensor_value_info("scores", 1, [samples, 4, 7])], held)
    return make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=10)


def calls_of_branching(rate, count=4):
    """Return batches of its inputs."""
    random = np.random.default_rng(0)
    return [
        {
            "x": random.standard_normal((16, 1, 9)).astype(np.float32),
            "rate": np.array(rate),
            "state": random.standard_normal((2, 16, 3)).astype(np.float32),
        }
        for _ in range(count)
    ]


@pytest.mark.parametrize(("rate", "channels"), [(1, 16), (5, 8)])
def test_an_input_of_one_number_chooses_a_branch(rate, channels, tmp_path, caplog):
    batches = calls_of_branching(rate)
    network = nni_topo.from_file(branching(), batches[0])
    assert f"rate = {rate}" in caplog.text
    assert [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv1d)] == [channels, 4]
    small = nni_topo.shrink(branching(), batches, {"flops": 0.5}, distill=False, progress=False)
    nni_topo.export(small, tmp_path / "small.onnx")
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    one = {name: value[:, :5] if name == "state" else value[:5] if value.ndim else value
           for name, value in batches[0].items()}  # fmt: skip
    (scores,) = session.run(None, one)
    expected = small(*(torch.from_numpy(np.array(value)) for value in one.values()))
    np.testing.assert_allclose(scores, expected.detach(), rtol=1e-3, atol=1e-5)


def test_a_branch_needs_one_choice():
    with pytest.raises(ConfigError, match=r"chooses a branch of the file must be given.*'rate'"):
        nni_topo.from_file(branching("samples"))
    batches = [*calls_of_branching(1, 2), *calls_of_branching(5, 2)]
    with pytest.raises(ConfigError, match=r"got 1 and 5 \(input 'rate', batch 2 of images\)"):
        nni_topo.shrink(branching(), batches, {"flops": 0.5})
    model = branching()
    model.graph.node[0].CopyFrom(onnx.helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0))
    model.graph.node.insert(1, onnx.helper.make_node("Cast", ["most"], ["is_one"], to=onnx.TensorProto.BOOL))
    with pytest.raises(ConfigError, match=r"must not depend on the inputs' values \(by rate"):
        nni_topo.from_file(model, calls_of_branching(1)[0])


class First(nn.Module):
    """The classes of the first sample alone, whatever comes with it."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, image):
        """Map images ``(n, 1, 8, 8)`` to ``(1, 4)``."""
        return self.net(image[:1])


def test_a_file_of_one_sample_that_reads_one_alone_is_shrunk_sample_by_sample(tmp_path):
    fixed = torch.export.export(First().eval(), (IMAGES[:1],))
    small = nni_topo.shrink(fixed, IMAGES.split(1), {"flops": 0.5}, distill={"steps": 2}, progress=False)
    assert small.report.stages[-1].macs < 0.6 * small.report.stages[0].macs
    with pytest.raises(DataError, match=r"the size of the file's, 1, .*got 32 \(input 'image', batch 0 of images\)"):
        nni_topo.shrink(fixed, IMAGES.split(32), {"flops": 0.5})


def test_a_network_that_differs_is_refused_with_the_first_operator(files, monkeypatch):
    from nni_topo.network.io.importing import operators

    def wrong(b, one):
        return b.call(torch.nn.functional.relu6, one.inputs[0])

    monkeypatch.setitem(operators._ROWS, "Relu", wrong)
    first = next(node.output[0] for node in onnx.load(files / "old.onnx").graph.node if node.op_type == "Relu")
    with pytest.raises(ExportError, match=f"first operator that differs is '{first}'"):
        nni_topo.from_file(files / "old.onnx", IMAGES * 30)


def test_export_without_inputs_needs_a_file(tmp_path):
    with pytest.raises(ConfigError, match="inputs must be given"):
        nni_topo.export(Net().eval(), tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
