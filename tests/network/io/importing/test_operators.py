"""Each operator of ONNX: a file of that operator alone computes in PyTorch what it computes in onnxruntime."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import nni_topo
from nni_topo.errors import ConfigError
from nni_topo.network.io.importing import operators

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")

RANDOM = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    """Return random floats."""
    return RANDOM.standard_normal(shape).astype(np.float32)


def ints(*numbers: int) -> np.ndarray:
    """Return 64-bit integers."""
    return np.array(numbers, dtype=np.int64)


X = values(2, 4, 6, 8)
ROWS = values(2, 5, 6)
# By name: the inputs of the file, its constants in the operator's order ("x", "y" stand for inputs), its attributes,
# the number of outputs.
CASES: dict[str, list[tuple[dict[str, np.ndarray], list[object], dict[str, object], int]]] = {
    **{name: [({"x": X}, ["x"], {}, 1)] for name in (
        "Abs", "Atan", "Ceil", "Cos", "Elu", "Erf", "Exp", "Floor", "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid",
        "HardSwish", "Identity", "LeakyRelu", "Mish", "Neg", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin", "Sinh",
        "Softplus", "Softsign", "Tanh", "ThresholdedRelu", "Celu", "Gelu", "Cosh", "Asinh", "Flatten", "Shape", "Size",
        "IsNaN", "IsInf", "NonZero", "LpNormalization")},
    **{name: [({"x": np.abs(X) + 1.5}, ["x"], {}, 1)] for name in ("Acosh", "Log", "Reciprocal", "Sqrt")},
    **{name: [({"x": np.tanh(X)}, ["x"], {}, 1)] for name in ("Acos", "Asin", "Atanh", "Tan")},
    **{name: [({"x": X, "y": values(4, 1, 8)}, ["x", "y"], {}, 1), ({"x": X}, ["x", values(4, 1, 1)], {}, 1),
              ({"x": X}, [values(1), "x"], {}, 1)] for name in ("Add", "Sub", "Mul", "Max", "Min", "Sum", "Mean")},
    "Div": [({"x": X}, ["x", np.float32(3)], {}, 1), ({"x": np.abs(X) + 1}, [np.float32(3), "x"], {}, 1),
            ({"x": ints(-7, 7, 9)}, ["x", ints(2)], {}, 1)],
    "Pow": [({"x": X}, ["x", np.float32(2)], {}, 1)],
    "Mod": [({"x": ints(-7, 7, 9)}, ["x", ints(4)], {}, 1), ({"x": X}, ["x", np.float32(1.5)], {"fmod": 1}, 1)],
    **{name: [({"x": X, "y": values(2, 4, 6, 8)}, ["x", "y"], {}, 1)] for name in (
        "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")},
    **{name: [({"x": X > 0, "y": X > 1}, ["x", "y"], {}, 1)] for name in ("And", "Or", "Xor")},
    "Not": [({"x": X > 0}, ["x"], {}, 1)],
    **{name: [({"x": ints(3, 6), "y": ints(5, 2)}, ["x", "y"], {}, 1)] for name in (
        "BitwiseAnd", "BitwiseOr", "BitwiseXor")},
    "BitwiseNot": [({"x": ints(3, 6)}, ["x"], {}, 1)],
    "Where": [({"x": X, "y": X > 0}, ["y", "x", np.float32(0)], {}, 1)],
    "Cast": [({"x": X}, ["x"], {"to": 7}, 1), ({"x": ints(1, 2)}, ["x"], {"to": 1}, 1)],
    "CastLike": [({"x": X}, ["x", ints(1)], {}, 1)],
    "Dropout": [({"x": X}, ["x"], {}, 1)],
    "Conv": [({"x": X}, ["x", values(6, 2, 3, 3), values(6)], {"group": 2, "pads": [1, 0, 1, 0], "strides": [2, 1]}, 1),
             ({"x": X}, ["x", values(6, 4, 3, 3)], {"pads": [0, 0, 1, 1], "dilations": [2, 1]}, 1),
             ({"x": X}, ["x", values(6, 4, 3, 3)], {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 1),
             ({"x": X}, ["x", values(6, 4, 2, 2)], {"auto_pad": "SAME_LOWER"}, 1),
             ({"x": ROWS}, ["x", values(3, 5, 3)], {}, 1)],
    "ConvTranspose": [({"x": X}, ["x", values(4, 3, 2, 2), values(3)], {"strides": [2, 2]}, 1),
                      ({"x": X}, ["x", values(4, 3, 3, 3)], {"strides": [2, 2], "pads": [1, 0, 1, 1],
                                                             "output_padding": [1, 0]}, 1),
                      ({"x": X}, ["x", values(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, 1)],
    "MaxPool": [({"x": X}, ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "ceil_mode": 1}, 1),
                ({"x": X}, ["x"], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1]}, 1)],
    "AveragePool": [({"x": X}, ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 1),
                    ({"x": X}, ["x"], {"kernel_shape": [3, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 1),
                    ({"x": X}, ["x"], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 1)],
    "BatchNormalization": [({"x": X}, ["x", values(4), values(4), values(4), np.abs(values(4))], {"epsilon": 1e-3}, 1)],
    "InstanceNormalization": [({"x": X}, ["x", values(4), values(4)], {}, 1)],
    "LayerNormalization": [({"x": X}, ["x", values(8), values(8)], {}, 1),
                           ({"x": X}, ["x", values(8)], {"axis": 3}, 1)],
    "RMSNormalization": [({"x": X}, ["x", values(8)], {}, 1)],
    "GroupNormalization": [({"x": X}, ["x", values(4), values(4)], {"num_groups": 2}, 1)],
    "LRN": [({"x": X}, ["x"], {"size": 3, "alpha": 0.1}, 1)],
    "Gemm": [({"x": values(2, 5)}, ["x", values(5, 3), values(3)], {}, 1),
             ({"x": values(2, 5)}, ["x", values(3, 5)], {"transB": 1, "alpha": 0.5}, 1),
             ({"x": values(5, 2)}, ["x", values(5, 3), values(1)], {"transA": 1, "beta": 2.0}, 1)],
    "MatMul": [({"x": ROWS}, ["x", values(6, 3)], {}, 1), ({"x": ROWS, "y": values(2, 6, 3)}, ["x", "y"], {}, 1),
               ({"x": ROWS}, [values(3, 5), "x"], {}, 1)],
    "Softmax": [({"x": X}, ["x"], {"axis": 1}, 1)], "LogSoftmax": [({"x": X}, ["x"], {}, 1)],
    "PRelu": [({"x": X}, ["x", values(4, 1, 1)], {}, 1), ({"x": X}, ["x", values(1)], {}, 1),
              ({"x": X}, ["x", values(6, 8)], {}, 1)],
    "Clip": [({"x": X}, ["x", np.float32(0), np.float32(6)], {}, 1), ({"x": X}, ["x", None, np.float32(0.5)], {}, 1)],
    "Reshape": [({"x": X}, ["x", ints(0, 4, -1)], {}, 1), ({"x": X}, ["x", ints(-1, 2, 2, 48)], {}, 1),
                ({"x": X}, ["x", ints(2, 24, 8)], {}, 1)],
    "Transpose": [({"x": X}, ["x"], {"perm": [0, 2, 3, 1]}, 1), ({"x": X}, ["x"], {}, 1)],
    "Squeeze": [({"x": X[:, :1]}, ["x", ints(1)], {}, 1), ({"x": X[:, :1]}, ["x"], {}, 1)],
    "Unsqueeze": [({"x": X}, ["x", ints(1, -1)], {}, 1)],
    "Concat": [({"x": X, "y": values(2, 3, 6, 8)}, ["x", "y"], {"axis": 1}, 1)],
    "Split": [({"x": X}, ["x", ints(1, 3)], {"axis": 1}, 2), ({"x": X}, ["x"], {"axis": 3, "num_outputs": 3}, 3)],
    "Slice": [({"x": X}, ["x", ints(1, 2), ints(3, 2**62), ints(1, 3), ints(1, 2)], {}, 1),
              ({"x": X}, ["x", ints(-1), ints(-(2**62)), ints(3), ints(-1)], {}, 1),
              ({"x": X}, ["x", ints(-3), ints(-1), ints(2)], {}, 1)],
    "Gather": [({"x": X}, ["x", np.int64(1)], {"axis": 1}, 1), ({"x": X}, ["x", ints(2, -1)], {"axis": 2}, 1),
               ({"x": ints(1, 0, 2)}, [values(3, 4), "x"], {}, 1),
               ({"x": X}, ["x", ints(0, 1, 2, 3).reshape(2, 2)], {"axis": 1}, 1)],
    "GatherElements": [({"x": X, "y": np.zeros((2, 1, 6, 8), dtype=np.int64)}, ["x", "y"], {"axis": 1}, 1)],
    "GatherND": [({"x": X}, ["x", ints(0, 1, 1, 2).reshape(2, 2)], {}, 1)],
    "ScatterND": [({"x": X}, ["x", ints(0, 1).reshape(2, 1), values(2, 4, 6, 8)], {}, 1)],
    "ScatterElements": [({"x": ROWS}, ["x", ints(0, 1, 2).reshape(1, 1, 3), values(1, 1, 3)], {"axis": 2}, 1)],
    "Expand": [({"x": X[:, :, :1]}, ["x", ints(2, 1, 3, 1)], {}, 1), ({"x": ROWS}, ["x", ints(2, 2, 5, 6)], {}, 1)],
    "Tile": [({"x": ROWS}, ["x", ints(1, 2, 1)], {}, 1)],
    "Trilu": [({"x": ROWS}, ["x"], {"upper": 0}, 1), ({"x": ROWS}, ["x", np.int64(1)], {}, 1)],
    "OneHot": [({"x": ints(1, 0, 2)}, ["x", np.int64(4), np.array([0, 1], dtype=np.float32)], {}, 1)],
    "CumSum": [({"x": ROWS}, ["x", np.int64(1)], {}, 1)],
    "Einsum": [({"x": ROWS, "y": values(2, 7, 6)}, ["x", "y"], {"equation": "bqc,bkc->bqk"}, 1)],
    "TopK": [({"x": ROWS}, ["x", ints(2)], {}, 2)],
    "ArgMax": [({"x": ROWS}, ["x"], {"axis": 1}, 1)], "ArgMin": [({"x": ROWS}, ["x"], {"axis": 2, "keepdims": 0}, 1)],
    **{name: [({"x": ROWS}, ["x", ints(1)], {}, 1), ({"x": ROWS}, ["x", ints(-1, 1)], {"keepdims": 0}, 1)] for name in (
        "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp",
        "ReduceSumSquare")},
    "ReduceLogSum": [({"x": np.abs(ROWS)}, ["x", ints(1)], {}, 1)],
    "Pad": [({"x": X}, ["x", ints(0, 0, 1, 2, 0, 0, 0, 1), np.float32(3)], {}, 1),
            ({"x": X}, ["x", ints(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "reflect"}, 1),
            ({"x": X}, ["x", ints(0, 0, 1, 1, 0, 0, 1, 1)], {"mode": "edge"}, 1)],
    "Resize": [({"x": X}, ["x", None, np.array([1, 1, 2, 2], dtype=np.float32)],
                {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}, 1),
               ({"x": X}, ["x", None, None, ints(2, 4, 9, 5)], {"mode": "linear"}, 1),
               ({"x": X}, ["x", None, None, ints(2, 4, 12, 16)],
                {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 1),
               ({"x": X}, ["x", None, None, ints(2, 4, 12, 16)], {"mode": "cubic", "cubic_coeff_a": -0.75}, 1)],
    "DepthToSpace": [({"x": X}, ["x"], {"blocksize": 2}, 1), ({"x": X}, ["x"], {"blocksize": 2, "mode": "CRD"}, 1)],
    "SpaceToDepth": [({"x": X}, ["x"], {"blocksize": 2}, 1)],
    "LSTM": [({"x": values(5, 2, 3)}, ["x", values(1, 16, 3), values(1, 16, 4), values(1, 32)], {"hidden_size": 4}, 3),
             ({"x": values(5, 2, 3)}, ["x", values(2, 16, 3), values(2, 16, 4), values(2, 32), None, values(2, 2, 4),
                                       values(2, 2, 4)], {"hidden_size": 4, "direction": "bidirectional"}, 3)],
    "GRU": [({"x": values(5, 2, 3)}, ["x", values(1, 12, 3), values(1, 12, 4), values(1, 24)],
             {"hidden_size": 4, "linear_before_reset": 1, "direction": direction}, 2)
            for direction in ("forward", "reverse")],
    "RNN": [({"x": values(5, 2, 3)}, ["x", values(1, 4, 3), values(1, 4, 4)], {"hidden_size": 4}, 2)],
    "Range": [({"x": X}, [np.int64(0), np.int64(5), np.int64(2)], {}, 1)],
    "ConstantOfShape": [({"x": X}, [ints(2, 3)], {}, 1)],
}  # fmt: skip
OPSET = {"RMSNormalization": 23}
# Written by no case: they need a graph around them, or an older opset.
ELSEWHERE = {"Constant", "If", "LpPool", "Swish", "Upsample", "SimplifiedLayerNormalization"}


def file_of(kind, inputs, constants, attributes, outputs):
    """Make a file of one operator."""
    proto, names, held = onnx.helper, [], []
    for place, each in enumerate(constants):
        if isinstance(each, str) or each is None:
            names.append(each or "")
            continue
        names.append(f"layer.{place}")
        held.append(onnx.numpy_helper.from_array(np.asarray(each), names[-1]))
    results = [f"out{place}" for place in range(outputs)]
    nodes = [proto.make_node(kind, names, results, name="one", **attributes)]
    ends = results
    used = {name for name in names if name}
    if not used & inputs.keys():  # the operator has constants alone
        nodes += [proto.make_node("Cast", [results[0]], ["cast"], to=1), proto.make_node("ReduceSum", ["x"], ["sum"]),
                  proto.make_node("Add", ["cast", "sum"], ["end"])]  # fmt: skip
        ends = ["end"]
    graph = proto.make_graph(
        nodes,
        "one",
        [
            proto.make_tensor_value_info(name, proto.np_dtype_to_tensor_dtype(array.dtype), array.shape)
            for name, array in inputs.items()
        ],
        [],
        held,
    )
    opset = OPSET.get(kind, 21)
    model = proto.make_model(graph, opset_imports=[proto.make_opsetid("", opset)], ir_version=10)
    if kind == "GroupNormalization":  # its types aren't inferred
        model.graph.output.append(proto.make_tensor_value_info("out0", 1, inputs["x"].shape))
        return model
    known = {each.name: each for each in onnx.shape_inference.infer_shapes(model).graph.value_info}
    model.graph.output.extend(known[name] for name in ends)
    return model


def test_every_row_has_a_case():
    assert set(operators._ROWS) == CASES.keys() | ELSEWHERE


@pytest.mark.parametrize("kind", sorted(CASES))
@pytest.mark.quick_every(9)
def test_an_operator_computes_what_onnxruntime_computes(kind):
    for inputs, constants, attributes, outputs in CASES[kind]:
        model = file_of(kind, inputs, constants, attributes, outputs)
        returned = nni_topo.from_file(model, inputs)(*map(torch.from_numpy, inputs.values()))
        actual = list(returned.values()) if isinstance(returned, dict) else [returned]
        session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        for one, other in zip(session.run(None, inputs), actual, strict=True):
            np.testing.assert_allclose(one, other.detach().numpy(), rtol=1e-3, atol=1e-4)


def test_a_recurrent_layer_that_pytorch_lacks_is_refused_by_name():
    inputs, constants = {"x": values(5, 2, 3)}, ["x", values(1, 12, 3), values(1, 12, 4)]
    with pytest.raises(ConfigError, match=r"got linear_before_reset=0 \(one, from_file\)"):
        nni_topo.from_file(file_of("GRU", inputs, constants, {"hidden_size": 4}, 2), inputs)


def test_a_product_and_a_sum_are_one_linear_layer():
    proto = onnx.helper
    nodes = [
        proto.make_node("MatMul", ["x", "fc.weight"], ["product"]),
        proto.make_node("Add", ["fc.bias", "product"], ["y"]),
    ]
    weights = [
        onnx.numpy_helper.from_array(values(6, 3), "fc.weight"),
        onnx.numpy_helper.from_array(values(3), "fc.bias"),
    ]
    ends = [proto.make_tensor_value_info("x", 1, ["batch", 6])], [proto.make_tensor_value_info("y", 1, ["batch", 3])]
    model = proto.make_model(proto.make_graph(nodes, "g", *ends, weights), opset_imports=[proto.make_opsetid("", 17)])
    network = nni_topo.from_file(model)
    assert [(name, type(part).__name__) for name, part in network.named_children()] == [("fc", "Linear")]
    assert network.fc.bias is not None
