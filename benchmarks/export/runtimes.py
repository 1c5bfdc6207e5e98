"""Networks in the runtimes that deploy them: for each runtime, how a file is written, and how it is loaded and run.

`docs/runtimes.md` shows the same calls. A runtime starts from the network, or from a file that `nni_topo.export` wrote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import nni_topo
from nni_topo.network.io.exporting import quietly

Run = Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class Runtime:
    """A runtime, the package that has it, and the functions that write a network's file and load it for images."""

    name: str
    package: str
    write: Callable[[nn.Module, Tensor, Path], None]
    load: Callable[[Path, Tensor], Run]


def write_pytorch(net: nn.Module, images: Tensor, folder: Path) -> None:
    """Write the network as it is."""
    torch.save(net.eval(), folder / "network.pt")


def load_pytorch(folder: Path, images: Tensor) -> Run:
    """Load the network, in channels and memory as it was written."""
    net = torch.load(folder / "network.pt", weights_only=False)

    def run() -> NDArray[np.float32]:
        with torch.no_grad():
            return net(images).numpy(force=True)

    return run


def write_onnx(net: nn.Module, images: Tensor, folder: Path) -> None:
    """Write an ONNX file, for onnxruntime and OpenVINO."""
    nni_topo.export(net, folder / "network.onnx", images)


def load_onnxruntime(folder: Path, images: Tensor) -> Run:
    """Load an ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = str(folder / "network.onnx")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.numpy(force=True)}
    return lambda: session.run(None, feed)[0]


def load_openvino(folder: Path, images: Tensor) -> Run:
    """Load an ONNX file in OpenVINO, in single precision; without the hint some processors compute in bfloat16."""
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.Core().compile_model(str(folder / "network.onnx"), "CPU", settings)
    array = images.numpy(force=True)
    return lambda: compiled(array)[0]


def write_executorch(net: nn.Module, images: Tensor, folder: Path) -> None:
    """Write a program for ExecuTorch with XNNPACK's kernels; it takes as many images as those it was made with.

    A file of `nni_topo.export` takes any number, for which ExecuTorch can't plan its memory.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with quietly():
        program = torch.export.export(net.eval(), (images,))
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    (folder / "network.pte").write_bytes(lowered.buffer)


def load_executorch(folder: Path, images: Tensor) -> Run:
    """Load a program in ExecuTorch; it computes on as many threads as there are cores that the process may use."""
    from executorch.runtime import Runtime as Programs

    loaded = Programs.get().load_program(folder / "network.pte")
    method = loaded.load_method("forward")
    given = [images.contiguous()]

    def run() -> NDArray[np.float32]:
        # The program has to outlive its methods.
        assert loaded is not None
        return method.execute(given)[0].numpy(force=True)

    return run


def write_litert(net: nn.Module, images: Tensor, folder: Path) -> None:
    """Write a TensorFlow Lite file; it takes as many images as those it was made with."""
    import litert_torch

    with quietly():
        litert_torch.convert(net.eval(), (images,)).export(str(folder / "network.tflite"))


def load_litert(folder: Path, images: Tensor) -> Run:
    """Load a TensorFlow Lite file in LiteRT."""
    from ai_edge_litert.interpreter import Interpreter

    with quietly():
        interpreter = Interpreter(str(folder / "network.tflite"), num_threads=1)
    interpreter.allocate_tensors()
    entering, leaving = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    array = images.numpy(force=True)

    def run() -> NDArray[np.float32]:
        interpreter.set_tensor(entering, array)
        interpreter.invoke()
        return interpreter.get_tensor(leaving)

    return run


def convert_for_core_ml(net: nn.Module, images: Tensor, folder: Path) -> Any:
    """Convert a program of torch.export for Core ML, which macOS alone runs; return the converted model."""
    import coremltools

    path = folder / "network.pt2"
    nni_topo.export(net, path, images)
    with quietly():
        program = torch.export.load(path).run_decompositions({})
        model = coremltools.convert(program)
    model.save(str(folder / "network.mlpackage"))
    return model


RUNTIMES = (
    Runtime("PyTorch", "torch", write_pytorch, load_pytorch),
    Runtime("onnxruntime", "onnxruntime", write_onnx, load_onnxruntime),
    Runtime("OpenVINO", "openvino", write_onnx, load_openvino),
    Runtime("ExecuTorch", "executorch", write_executorch, load_executorch),
    Runtime("LiteRT", "litert_torch", write_litert, load_litert),
)
"""Those that run here; `convert_for_core_ml` converts alone."""
