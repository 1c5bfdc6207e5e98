"""A dense network as a file for other programs: ONNX, also in INT8, or ``torch.export``; checked in its own runtime."""

from __future__ import annotations

import importlib
import inspect
import logging
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from nni_topo.disk import check_output_file, output_folder, path_of, whole_file
from nni_topo.errors import ConfigError, ExportError, unknown_name
from nni_topo.network.runtime import (
    SAME_PROGRAM,
    Calibration,
    Call,
    batch_size,
    call_arguments,
    calls,
    check_fits,
    check_model,
    detached_copy,
    difference,
    leaves_models_alone,
    tensors_of,
)

Format = Literal["onnx", "torch.export"]
_OTHER_BATCH = 3


@dataclass(frozen=True)
class Exported:
    """A file that a network was exported to.

    Attributes
    ----------
    path : Path
        The file.
    size : int
        Its bytes.
    error : float
        Largest difference of the float file's outputs from the network's, at two batch sizes, as a share of the
        largest output.
    int8_distance : float
        Mean squared distance of the INT8 file's outputs from the network's, as a share of their variance, on every
        eighth sample, from which no range was taken; on all where there are fewer than eight. NaN without INT8.
    """

    path: Path
    size: int
    error: float
    int8_distance: float = math.nan


@leaves_models_alone
def export(
    model: nn.Module,
    path: str | Path,
    inputs: Any,
    format: Format = "onnx",  # noqa: A002
    *,
    int8: Iterable[Any] | None = None,
) -> Exported:
    """Write a network to a file that runs without this package, and check that the file computes the same.

    Parameters
    ----------
    model : torch.nn.Module
        The network, such as `to_dense` returns. It isn't changed.
    path : str or Path
        The file to write, e.g. ``"small.onnx"`` or ``"small.pt2"``.
    inputs : Tensor, tuple, list or mapping of str to Any
        Example inputs, batch first: one tensor, positional or keyword arguments. The file takes any batch size.
    format : {"onnx", "torch.export"}, default="onnx"
        ONNX for onnxruntime, or a program for :func:`torch.export.load`.
    int8 : iterable, optional
        Unlabelled batches of inputs; weights and activations become 8-bit integers, their ranges those that were seen
        on the batches. ONNX only.

    Returns
    -------
    Exported
        The file, its size, and how far its outputs lie from the network's.

    Raises
    ------
    ConfigError
        If the format is unknown, INT8 isn't ONNX, inputs don't fit, or packages are missing.
    ExportError
        If PyTorch can't export the network for any batch size, or outputs differ by more than 1e-4 of the largest.

    Notes
    -----
    ONNX needs ``pip install 'nni_topo[export]'``. INT8 is onnxruntime's static quantisation: signed weights with a
    scale per channel, unsigned activations. Weights take 7 of the 8 bits: processors without VNNI add two products in
    16 bits, which those of 8 overflow, so that the file would compute something else there.

    Examples
    --------
    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export(model, f"{folder}/small.pt2", torch.randn(2, 4), format="torch.export")
    >>> done.path.name, done.error < 1e-4
    ('small.pt2', True)
    """
    path = path_of(path)
    if format not in get_args(Format):
        raise unknown_name("format", str(format), get_args(Format))
    if int8 is not None and format != "onnx":
        raise ConfigError(f"INT8 must be exported as onnx, got format {format!r} (int8)")
    images = None if int8 is None else Calibration.of(int8, "int8")
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _package(name)
    check_output_file(path, makes_folder=True)
    check_model(model)
    net = detached_copy(model).cpu().eval()
    call = _resized(call_arguments(inputs, net), 2)
    check_fits(net, call)
    if images is not None:
        check_fits(net, next(calls(net, images)))
    program = _program(net, call)
    output_folder(path.parent)
    # What doesn't compute the same isn't left behind, for the file is moved to its place at the end.
    with whole_file(path) as part:
        distance = math.nan
        if format == "torch.export":
            with _quietly(), _export_errors("that torch.export can save (ONNX may)", net):
                # Streams, for a file must have a name of its kind.
                with part.open("wb") as written:
                    torch.export.save(program, written)
                with part.open("rb") as read:
                    loaded = torch.export.load(read).module()
            error = _check(net, call, lambda one: tensors_of(loaded(*one[0], **one[1])))
        else:
            with _quietly(), _export_errors("that PyTorch can write as ONNX", net):
                torch.onnx.export(program, f=str(part), dynamo=True, external_data=False, verbose=False)
            session = _session(part)
            error = _check(net, call, lambda one: _run(session, one))
            if images is not None:
                learned, held_out = images.split()
                _quantize(part, session, list(calls(net, learned)))
                distance = _distance(net, _session(part), calls(net, held_out or learned))
    return Exported(path, path.stat().st_size, error, distance)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"ONNX must have its packages: pip install 'nni_topo[export]', got no {name} (export)"
        ) from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the exporters' notes, which aren't about the user's network, to themselves; errors come through."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _resized(call: Call, size: int) -> Call:
    """Return a call of so many samples, the first ones over and over."""
    batch = batch_size(call)

    def take(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != batch:
            return tensor
        return tensor[torch.arange(size, device=tensor.device) % batch].detach()

    resized: Call = tree_map_only(Tensor, take, call)
    return resized


def _program(net: nn.Module, call: Call) -> Any:
    """Export a network such that the batch size is free."""
    batch = torch.export.Dim("batch")
    size = batch_size(call)

    def shape(leaf: Any) -> Any:
        return {0: batch} if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == size else None

    shapes = (*tree_map(shape, call[0]), *tree_map(shape, call[1]).values())
    names = [*_names(net, call)]
    with _export_errors("that torch.export can follow at any batch size", net), torch.no_grad():
        return torch.export.export(net, *call, dynamic_shapes=dict(zip(names, shapes, strict=True)))


@contextmanager
def _export_errors(rule: str, net: nn.Module) -> Iterator[None]:
    """Turn whatever PyTorch's exporters raise into an ExportError."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"a network must be one {rule}, got {type(error).__name__}: {reason} ({type(net).__name__}); "
            "see docs/export.md"
        ) from error


def _names(net: nn.Module, call: Call) -> Iterator[str]:
    yield from list(inspect.signature(net.forward).parameters)[: len(call[0])]
    yield from call[1]


def _session(path: Path) -> Any:
    runtime = _package("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(session: Any, call: Call) -> dict[str, Any]:
    names = [each.name for each in session.get_inputs()]
    return dict(zip(names, (tensor.detach().cpu().numpy() for tensor in tensors_of(call)), strict=True))


def _run(session: Any, call: Call) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(each)) for each in session.run(None, _feed(session, call))]


def _answers(net: nn.Module, call: Call) -> list[Tensor]:
    with torch.no_grad():
        return tensors_of(net(*call[0], **call[1]))


def _check(net: nn.Module, call: Call, run: Any) -> float:
    """Return the largest relative difference of a file's outputs from the network's, at two batch sizes."""
    errors = []
    for each in (call, _resized(call, _OTHER_BATCH)):
        with torch.no_grad():
            outputs = run(each)
        for wanted, got in zip(_answers(net, each), outputs, strict=True):
            if wanted.shape != got.shape:
                shapes = f"{tuple(got.shape)} for {tuple(wanted.shape)}"
                raise ExportError(f"an output must keep its shape, got {shapes} (export)")
            errors.append(difference(wanted, got))
    if not max(errors) <= SAME_PROGRAM:
        raise ExportError(
            f"outputs must be equal within {SAME_PROGRAM:g} of the largest, got {max(errors):.3g} (export)"
        )
    return max(errors)


def _quantize(path: Path, session: Any, batches: list[Call]) -> None:
    """Replace a float file by its INT8 version."""
    quantization = _package("onnxruntime.quantization")
    prepared = _package("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self._left = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            call = next(self._left, None)
            return None if call is None else _feed(session, call)

    kinds = quantization.QuantType
    with tempfile.TemporaryDirectory() as folder, _quietly():
        source = Path(folder) / "prepared.onnx"
        prepared.quant_pre_process(str(path), str(source))
        quantization.quantize_static(
            str(source),
            str(path),
            Reader(),
            per_channel=True,
            reduce_range=True,  # 7 bits
            activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
        )


def _distance(net: nn.Module, session: Any, batches: Iterable[Call]) -> float:
    wanted, got = [], []
    for call in batches:
        wanted.append(_answers(net, call)[0].double())
        got.append(_run(session, call)[0].double())
    whole, near = torch.cat(wanted), torch.cat(got)
    return float((near - whole).square().sum() / (whole - whole.mean(0)).square().sum())
