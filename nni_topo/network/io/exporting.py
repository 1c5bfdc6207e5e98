"""Export a dense network as ONNX, also in INT8, or by ``torch.export``, and check what the file computes."""

from __future__ import annotations

import functools
import importlib
import inspect
import io
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from nni_topo.disk import check_output_file, output_folder, path_of, whole_file
from nni_topo.errors import ConfigError, DataError, ExportError
from nni_topo.network.io.importing.facts import FileFacts, batches_as_in_file, file_facts, of_other_sizes
from nni_topo.network.io.onnx_recurrent import recurrent_operators
from nni_topo.network.runtime.arguments import check_model
from nni_topo.network.runtime.comparison import agree, difference, same_program
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.fits import call_arguments, check_fits, failure_on, first_call, with_whole_batches
from nni_topo.network.runtime.hooks import batches_of
from nni_topo.network.runtime.inputs import (
    Call,
    batch_size,
    calls,
    returned_by_name,
    returned_tensors,
    take_samples,
    tensors_of,
)
from nni_topo.network.runtime.precision import in_full_precision
from nni_topo.network.runtime.public import public
from nni_topo.network.runtime.switches import as_written
from nni_topo.rules import ANYTHING, all_of, whole

Format = Literal["onnx", "torch.export"]
FORMATS: dict[str, Format] = {".onnx": "onnx", ".pt2": "torch.export"}
"""File formats by ending of the path."""
_BATCH = 2  # batch size of the export if the file takes any
_OTHER_BATCH = 3  # second batch size with which the file is checked
_MULTIPLES = (1, 8, 16, 32)  # a network may take only sizes that are multiples of one of these
_LARGEST = 2**31 - 2**20  # bytes of weights: a file of 2 GB can't be read, so larger weights go to one of their own
_TINY = 1e-8  # the rewrite rules of onnxscript remove summands up to here
_OPSET = 18  # the oldest that PyTorch writes
_DIMS = all_of(whole(0), Sequence)
_COLOURS = re.compile(r"\x1b\[[\d;]*m")  # of a terminal
_MOST_OF_A_REASON = 300  # most characters quoted from PyTorch's errors


@dataclass(frozen=True)
class Exported:
    """The file that a network was exported to.

    Attributes
    ----------
    path : Path
        The file.
    size : int
        Its size in bytes, with that of the weights beside it.
    error : float
        Largest difference between the outputs of the file, before it is converted to INT8, and those of the network,
        as a share of the largest output; at two sizes if a dimension is dynamic.
    int8_distance : float, default=NaN
        Mean squared distance between the outputs of the INT8 file and those of the network, as a share of their
        variance. It is measured on every eighth sample, which isn't used to choose the ranges of the integers, or on
        all samples if there are fewer than eight. NaN without INT8.
    """

    path: Path
    size: int
    error: float
    int8_distance: float = math.nan


# PyTorch's exporters fail if convolutions and recurrent layers have different precision settings.
@public(path=ANYTHING, inputs=ANYTHING, dynamic_dims=_DIMS)
@in_full_precision()
def export(
    model: nn.Module,
    path: str | Path,
    inputs: Any = None,
    format: Format | None = None,  # noqa: A002
    *,
    int8: Iterable[Any] | None = None,
    weight_bits: Literal[7, 8] = 7,
    dynamic_dims: Sequence[int] = (0,),
) -> Exported:
    """Export a network to a file that runs without this package, and check that the file computes the same.

    Parameters
    ----------
    model : torch.nn.Module
        The network, such as `to_dense` returns. It isn't changed.
    path : str or Path
        The file to write, e.g. ``"small.onnx"`` or ``"small.pt2"``; without a ``format`` its ending must be one of
        these two.
    inputs : Tensor, tuple, list or mapping of str to Any, optional
        None: for a network of :func:`nni_topo.from_file`; the new file has the inputs, outputs, free axes and metadata
        of the old one, and its opset or the oldest newer one that PyTorch writes. For any other network example
        inputs, batch first: one tensor, positional or keyword arguments, or a batch whose first entry holds the
        arguments. The file takes only these sizes, except in the ``dynamic_dims``.
    format : {"onnx", "torch.export"}, optional
        ONNX for onnxruntime, or a program for :func:`torch.export.load`. None: ``"onnx"`` for a path that ends in
        ``.onnx``, ``"torch.export"`` for one in ``.pt2``. Outputs of an ONNX file are named by the keys or fields
        of the network's output (``boxes.0`` for one in a list).
    int8 : iterable, optional
        Calibration data: batches of inputs. Weights and activations become 8-bit integers, with the ranges of the
        values on these batches. ONNX only.
    weight_bits : {7, 8}, default=7
        How many of the 8 bits INT8 weights use. 8 bits are more exact; the notes say where they are safe.
    dynamic_dims : sequence of int, default=(0,)
        Dimensions of the inputs that the file takes at any size: ``(0,)`` is any batch, ``(0, 2, 3)`` any batch, height
        and width of images, ``(2, 3)`` only height and width, ``()`` none. They apply to each input that has the
        samples in its first dimension, and that has these dimensions.

    Returns
    -------
    Exported
        The file, its size, and how much its outputs differ from the network's.

    Raises
    ------
    ConfigError
        If the format is unknown, or differs from the path's ending; if INT8 is requested in another format than ONNX
        or for a fixed batch size;
        if ``weight_bits`` is neither 7 nor 8, or given without ``int8``; if the inputs lack one of the
        ``dynamic_dims``; or if a package is missing.
    DataError
        If the inputs or the calibration data don't fit the network.
    ExportError
        If the network returns no tensor or takes no other size in the ``dynamic_dims``, if PyTorch can't export it for
        every size there, or if the file's outputs differ by more than 1e-4 of the largest output; of a network in half
        precision by more than eight machine epsilons, 0.0078 (float16) or 0.062 (bfloat16).

    Notes
    -----
    Weights of 2 GB and more are written beside an ONNX file, as ``small.onnx.data``, and belong to it.

    ONNX needs ``pip install 'nni_topo[export]'``. onnxruntime can be slow if the channels of a convolution
    aren't a multiple of 4: prune with ``round_to=8``.

    INT8 is onnxruntime's static quantisation: signed weights with a scale per channel, unsigned activations. Weights
    use 7 of the 8 bits by default, because x86 processors without VNNI add two products in 16 bits: products of 8-bit
    numbers overflow there, and the file would compute something else. With ``weight_bits=8`` the file is for processors
    with VNNI (``avx512_vnni`` or ``avx_vnni`` among the flags in ``/proc/cpuinfo``) and for ARM. Recurrent layers are
    written as ONNX's operators, which stay in single precision.

    Examples
    --------
    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     done = export(model, f"{folder}/small.pt2", torch.randn(2, 4))
    >>> done.path.name, done.error < 1e-4
    ('small.pt2', True)
    """
    path = path_of(path)
    named = FORMATS.get(path.suffix.lower())
    if format is None and named is None:
        known = " or ".join(FORMATS)
        raise ConfigError(f"a path must end in {known}, or format= be given, got {path.suffix or 'no ending'} ({path})")
    if format is not None and named not in (None, format):
        raise ConfigError(f"a path that ends in {path.suffix} must have the format {named!r}, got {format!r} ({path})")
    format = named if format is None else format  # noqa: A001
    if int8 is not None and format != "onnx":
        raise ConfigError(f"the format of an INT8 file must be 'onnx', got {format!r} (int8)")
    if weight_bits != 7 and int8 is None:
        raise ConfigError(f"weights must be INT8 to use {weight_bits} bits, got no calibration data for that (int8)")
    if int8 is not None and 0 not in dynamic_dims:
        raise ConfigError(
            f"dynamic_dims must hold 0 for INT8, whose file takes any batch size, got {dynamic_dims} (int8)"
        )
    imported = file_facts(model) if isinstance(model, nn.Module) else None
    if imported is not None and int8 is not None:
        int8 = batches_as_in_file(imported.inputs, int8, "int8")[1]
    images = None if int8 is None else batches_of(int8, model, "int8")
    if format == "onnx":
        for name in ("onnx", "onnxscript", "onnxruntime"):
            _import(name)
    check_output_file(path, makes_folder=True)
    check_model(model)
    net = evaluating(detached_copy(model))
    net.cpu()
    facts = imported if inputs is None else None
    is_large = sum(tensor.nbytes for tensor in (*net.parameters(), *net.buffers())) >= _LARGEST
    if is_large and int8 is not None:
        raise ConfigError(f"an INT8 file must be made of less than {_LARGEST} bytes of weights, got more (int8)")
    if inputs is None:
        if facts is None:
            raise ConfigError("inputs must be given for a network that wasn't imported from a file, got none (export)")
        inputs = facts.example
        dynamic_dims = sorted({axis for each in facts.inputs for axis in each.free})
        if int8 is not None and 0 not in dynamic_dims:
            raise ConfigError("an INT8 file must take any batch size, got a network of a file with a fixed one (int8)")
    given = call = call_arguments(inputs, net)
    most = max(each.dim() for each in tensors_of(given))
    if missing := [dim for dim in dynamic_dims if dim >= most]:
        raise ConfigError(
            f"dynamic_dims must be dimensions of the inputs, got {missing[0]} of {most} dimensions (export)"
        )
    if 0 in dynamic_dims and facts is None:
        call = take_samples(given, torch.arange(_BATCH) % batch_size(given))
    try:
        check_fits(net, call, "inputs")
    except DataError:
        check_fits(net, given, "inputs")  # its error describes the inputs as they were given
        raise
    with torch.no_grad():
        returned = net(*call[0], **call[1])
    if not tensors_of(returned):
        kind = type(returned).__name__
        raise ExportError(f"a network that is exported must return tensors, got {kind} ({type(net).__name__})")
    if images is not None:
        first_call(net, images)
    calls_to_check = [call]
    if facts is not None:
        other = of_other_sizes(facts.inputs, call[0], lambda tensors: _outputs(net, (tuple(tensors), {})))
        calls_to_check += [] if other is None else [(tuple(other), {})]
    elif dynamic_dims:
        calls_to_check.append(_other_sizes(net, call, dynamic_dims))
    names = list[str]()
    if not isinstance(returned, (Tensor, list)) and type(returned) is not tuple:
        names = [name.replace("[", ".").replace("]", "") for name, _ in returned_by_name(returned)]
    _return_tensors_alone(net, returned, and_numbers=format != "onnx")
    with quietly(), recurrent_operators(net) if format == "onnx" else nullcontext():
        try:
            program = _program(net, call, dynamic_dims, facts)
        except ExportError:
            if not dynamic_dims or not (kept := _kept_by_runs(net, calls_to_check)):
                raise
            # The forward compares sizes with those of the last run (YOLO's anchors): export a network that hasn't run.
            fresh = detached_copy(net)
            for name, key in kept:
                vars(fresh.get_submodule(name)).pop(key)
            program = _program(fresh, call, dynamic_dims, facts)
    output_folder(path.parent)
    # The file gets its name only after all checks, so that no wrong file is left behind.
    with whole_file(path) as part:
        distance = math.nan
        if format == "torch.export":
            with quietly(), _export_errors("that torch.export can save (ONNX may)", net):
                # In memory first: PyTorch's writer ends the process when it can't write to the disk.
                written = io.BytesIO()
                torch.export.save(program, written)
                with part.open("wb") as stream:
                    stream.write(written.getbuffer())
                # A stream, because torch.export refuses a path that doesn't end in .pt2.
                with part.open("rb") as read:
                    loaded = torch.export.load(read).module()
            error = _check(net, calls_to_check, lambda one: tensors_of(loaded(*one[0], **one[1])))
        else:
            with quietly(), _export_errors("that PyTorch can write as ONNX", net):
                opset = facts.opset if facts is not None and facts.opset > _OPSET else None
                is_optimized = not _adds_tiny_numbers(program)
                written_as_onnx: Any = torch.onnx.export(
                    program, dynamo=True, verbose=False, opset_version=opset, optimize=is_optimized
                )
                # Which lines of code each node comes from: it is longer than the graph, and has this machine's paths.
                for node in written_as_onnx.model.graph.all_nodes():
                    node.metadata_props.clear()
                if facts is None or facts.kind != "onnx":
                    _name_outputs(written_as_onnx.model.graph, names)
                if facts is not None:
                    _name_as_in_file(written_as_onnx.model, facts)
                written_as_onnx.save(str(part), external_data=is_large)
            with _export_errors("that onnxruntime can run; most of its operators take single precision only", net):
                session = _session(part)
            error = _check(net, calls_to_check, lambda one: _run(session, one))
            if images is not None:
                learned, held_out = with_whole_batches(net, images).split()
                # onnxruntime's symbolic shape inference can't handle a dynamic height or width, nor constants that
                # aren't tensors, which the optimiser replaces.
                symbolic = is_optimized and not set(dynamic_dims) - {0}
                _quantize(part, session, calls(net, learned), weight_bits, symbolic)
                distance = _distance(net, _session(part), calls(net, held_out or learned))
        weights = part.with_name(f"{part.name}.data")
        size = part.stat().st_size
        if weights.exists():
            size += weights.stat().st_size
            weights.replace(path.resolve().parent / weights.name)
    return Exported(path, size, error, distance)


def _import(name: str) -> Any:
    """Import a package that ONNX needs; ConfigError if it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"the packages for ONNX must be installed: pip install 'nni_topo[export]', got no {name} (export)"
        ) from error


class OnnxNetwork(nn.Module):
    """Runs a network in onnxruntime on one thread of the CPU, to time it; takes the network's inputs."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            with quietly():
                export(model, path, inputs)
            self._session = _session(path, threads=1)

    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the arrays that the file returns."""
        arrays: list[Any] = self._session.run(None, _feed(self._session, (args, kwargs)))
        return arrays


def as_run_by(runtime: str, networks: Sequence[nn.Module], inputs: Any) -> list[nn.Module]:
    """Return networks to be timed in a runtime; for PyTorch, the networks themselves."""
    return [OnnxNetwork(each, inputs) if runtime == "onnxruntime" else each for each in networks]


@contextmanager
def quietly() -> Iterator[None]:
    """Hide warnings, log messages and graphs of the exporters, which aren't about the user's network."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # PyTorch prints the graph of a network that it can't export.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def _other_sizes(net: nn.Module, call: Call, dims: Sequence[int]) -> Call:
    """Return a call with other sizes in the dimensions, on which a network runs; ExportError if none is found."""
    if 0 in dims:
        call = take_samples(call, torch.arange(_OTHER_BATCH) % batch_size(call))
    places, samples = [dim for dim in dims if dim], batch_size(call)
    if not places:
        return call

    def resize(tensor: Tensor, multiple: int | None) -> Tensor:
        """Enlarge a tensor of samples to multiples of a number; None: make it smaller by a few."""
        if not tensor.dim() or len(tensor) != samples:
            return tensor
        for step, dim in enumerate(places, 1):  # different steps, to detect a file that confuses height and width
            if dim < tensor.dim():
                size = tensor.shape[dim]
                other = max(size - step, 1) if multiple is None else (size // multiple + step) * multiple
                tensor = tensor.index_select(dim, torch.arange(other) % size)
        return tensor

    for multiple in (*_MULTIPLES, None):
        resized: Call = tree_map_only(Tensor, functools.partial(resize, multiple=multiple), call)
        if failure_on(net, resized) is None:
            return resized
    raise ExportError(
        f"a network must take more than one size in its dynamic_dims, got one that takes no other than the inputs' in "
        f"{', '.join(map(str, places))} ({type(net).__name__})"
    )


def _kept_by_runs(net: nn.Module, calls: Sequence[Call]) -> list[tuple[str, str]]:
    """Run a network, and list the attributes that its forward sets anew and that have an initial value in their class.

    Each is listed with its module's name.
    """
    before = dict[tuple[str, str], Any]()
    for call in calls:
        before = {(name, key): value for name, module in net.named_modules() for key, value in vars(module).items()}
        with torch.no_grad():
            net(*call[0], **call[1])
    modules = dict(net.named_modules())
    changed = [(name, key) for (name, key), value in before.items() if vars(modules[name]).get(key) is not value]
    return [(name, key) for name, key in changed if hasattr(type(modules[name]), key)]


def _return_tensors_alone(net: nn.Module, returned: Any, *, and_numbers: bool) -> None:
    """Let ``net`` return a list of its output's tensors if the output holds values that a file can't.

    An output of ONNX can't be a number, such as a width, and one of ``torch.export`` can't be a text. Tensors in a data
    class are listed, too: PyTorch's exporter doesn't take it apart.
    """
    leaves = tree_flatten(returned)[0]
    numbers = (bool, int, float) if and_numbers else ()
    if all(leaf is None or isinstance(leaf, (Tensor, *numbers)) for leaf in leaves):
        return
    forward = net.forward

    @functools.wraps(forward)
    def tensors_alone(*args: Any, **kwargs: Any) -> list[Tensor]:
        return returned_tensors(forward(*args, **kwargs))

    net.forward = tensors_alone


def _adds_tiny_numbers(program: Any) -> bool:
    """Tell whether a program adds numbers that onnxscript's optimiser takes for zero, as in ``log(x + 1e-10)``."""
    signature = program.graph_signature
    names = {
        **signature.inputs_to_lifted_tensor_constants,
        **signature.inputs_to_buffers,
        **signature.inputs_to_parameters,
    }
    tensors = {**program.constants, **program.state_dict}
    for node in program.graph.nodes:
        if not str(node.target).startswith(("aten.add", "aten.sub", "aten.rsub")):
            continue
        for summand in node.args:
            value = tensors.get(names.get(getattr(summand, "name", ""), ""), summand)
            if isinstance(value, Tensor) and value.numel() == 1:
                value = float(value)
            if isinstance(value, float) and 0 < abs(value) <= _TINY:
                return True
    return False


def _name_outputs(graph: Any, names: list[str]) -> None:
    """Give the outputs of an ONNX graph the network's names, if their numbers are equal.

    Names in ONNX are unique: an output gets an underscore if an input or a weight has its name, and values in between
    are renamed.
    """
    outputs = list(graph.outputs)
    if len(names) != len(outputs):
        return
    between = [each for node in graph for each in node.outputs if not any(each is output for output in outputs)]
    taken = {each.name for each in graph.inputs} | set(graph.initializers)
    for value, name in zip([*outputs, *between], [*names, *(each.name for each in between)], strict=True):
        while name in taken:
            name += "_"
        value.name = name
        taken.add(name)


def _name_as_in_file(model: Any, facts: FileFacts) -> None:
    """Give an ONNX model the names of inputs, outputs and free axes, and the metadata, of the file it came from."""
    graph = model.graph
    axes = dict[str, str]()
    for value, each in zip(graph.inputs, facts.inputs, strict=True):
        sizes = {axis: getattr(value.shape[axis], "value", None) for axis in each.free}
        axes |= {str(size): each.free[axis] for axis, size in sizes.items() if size is not None}
    ends = [*zip(graph.inputs, (each.name for each in facts.inputs), strict=True)]
    if facts.kind == "onnx":
        ends += zip(graph.outputs, facts.outputs, strict=True)
    wanted = {name for _, name in ends}
    others = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    for value in others:
        while value.name in wanted and not any(value is end for end, _ in ends):
            value.name += "_"
    for value, _ in ends:  # first to names that no value has, because two may change places
        value.name = f"{value.name}.renamed"
    for value, name in ends:
        value.name = name
        for axis, size in enumerate(value.shape or ()):
            if str(getattr(size, "value", size)) in axes:
                value.shape[axis] = axes[str(getattr(size, "value", size))]
    model.metadata_props.update(facts.metadata)


def _program(net: nn.Module, call: Call, dims: Sequence[int], facts: FileFacts | None) -> Any:
    """Export a network as a program that takes any size in these dimensions of inputs that hold samples.

    A network that was imported from a file has the free axes of the file.
    """
    batch = torch.export.Dim("batch")
    size = batch_size(call)

    def free_dimensions(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor) or not leaf.dim() or len(leaf) != size:
            return None
        # All inputs have the same batch size; a height may have to be a multiple of 32, or equal another input's.
        free = {dim: torch.export.Dim.DYNAMIC if dim else batch for dim in dims if dim < leaf.dim()}
        return free or None

    args, kwargs = call
    dynamic_shapes: Any
    if facts is None:
        dynamic_shapes = tree_map(free_dimensions, inspect.signature(net.forward).bind(*args, **kwargs).arguments)
    else:
        # A free axis that is one in all of the inputs may only have that size, as the batch of a file with a state.
        hints = torch.export.Dim
        dynamic_shapes = tuple(
            {axis: hints.STATIC if tensor.shape[axis] == 1 else hints.DYNAMIC for axis in each.free} or None
            for each, tensor in zip(facts.inputs, args, strict=True)
        )
    sizes = "any batch size" if tuple(dims) == (0,) else f"any size in the dimensions {tuple(dims)}"
    rule = f"that torch.export can follow at {sizes if dims else 'the sizes of the inputs'}"
    advice = "; dynamic_dims=() makes a file for the sizes of the inputs alone" if dims else ""
    with _export_errors(rule, net, advice), torch.no_grad():
        return torch.export.export(net, *call, dynamic_shapes=dynamic_shapes)


@contextmanager
def _export_errors(rule: str, net: nn.Module, advice: str = "") -> Iterator[None]:
    """Turn any error of PyTorch's exporters within the block into an ExportError.

    ``rule``: what a network must be; ``advice``: what else can be done, after a semicolon. Disk errors are raised
    unchanged.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause: BaseException = error  # the innermost says what is wrong, the others name steps of PyTorch
        while cause.__cause__ is not None:
            cause = cause.__cause__
        paragraph = _COLOURS.sub("", str(cause)).strip().partition("\n\n")[0]
        reason = shorten(paragraph, _MOST_OF_A_REASON, placeholder=" ...")
        raise ExportError(
            f"a network must be one {rule}, got {type(cause).__name__}: {reason} ({type(net).__name__}){advice}; "
            "see docs/export.md"
        ) from error


def _session(path: Path, threads: int = 0) -> Any:
    """Load an ONNX file in onnxruntime; 0 threads: onnxruntime's default."""
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = threads
    options.log_severity_level = 3  # errors only
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _feed(session: Any, call: Call) -> dict[str, Any]:
    """Return the arrays of a call by the names of the session's inputs."""
    names = [each.name for each in session.get_inputs()]
    arrays = [tensor.detach().cpu().numpy() for tensor in tensors_of(call)]
    return dict(zip(names, arrays, strict=True))


def _run(session: Any, call: Call) -> list[Tensor]:
    """Return the outputs of an ONNX file."""
    return [torch.from_numpy(np.asarray(each)) for each in session.run(None, _feed(session, call))]


def _outputs(net: nn.Module, call: Call) -> list[Tensor]:
    """Return the outputs of a network."""
    with torch.no_grad():
        return tensors_of(net(*call[0], **call[1]))


@as_written()
def _check(net: nn.Module, calls: Sequence[Call], run: Any) -> float:
    """Return the largest relative difference between the outputs of a file and of the network in some calls.

    ``run``: returns the file's outputs for a call. ExportError if they differ by too much.
    """
    errors = []
    for each in calls:
        with torch.no_grad():
            outputs = run(each)
        for expected, actual in zip(_outputs(net, each), outputs, strict=True):
            if expected.shape != actual.shape:
                shapes = f"{tuple(actual.shape)} in place of {tuple(expected.shape)}"
                raise ExportError(f"outputs of the file must have the network's shapes, got {shapes} (export)")
            errors.append(difference(expected, actual))
    largest = max(errors)
    most = same_program(net.parameters())
    if not largest <= most:  # NaN too
        one, other = (_outputs(net, calls[0]) for _ in range(2))
        if not agree(one, other, most):
            raise ExportError(
                "a network must answer the same each time, so that its file can be compared with it, got one that is "
                f"random in evaluation mode ({type(net).__name__})"
            )
        raise ExportError(
            f"outputs of the file must equal the network's within {most:.2g} of the largest, "
            f"got a difference of {largest:.3g} (export)"
        )
    return largest


def _quantize(path: Path, session: Any, batches: Iterable[Call], weight_bits: int, symbolic: bool) -> None:
    """Replace an ONNX file of floats by its INT8 version, whose weights use ``weight_bits`` bits.

    ``symbolic``: whether onnxruntime infers shapes with symbols for the sizes.
    """
    quantization = _import("onnxruntime.quantization")
    preparation = _import("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self._remaining = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            call = next(self._remaining, None)
            return None if call is None else _feed(session, call)

    kinds = quantization.QuantType
    with tempfile.TemporaryDirectory() as folder, quietly():
        source = Path(folder) / "prepared.onnx"
        preparation.quant_pre_process(str(path), str(source), skip_symbolic_shape=not symbolic)
        quantization.quantize_static(
            str(source),
            str(path),
            Reader(),
            per_channel=True,
            reduce_range=weight_bits == 7,  # see the notes of `export`
            activation_type=kinds.QUInt8,
            weight_type=kinds.QInt8,
        )


def _distance(net: nn.Module, session: Any, batches: Iterable[Call]) -> float:
    """Return the mean squared distance between first outputs of a file and the network, as a share of the variance."""
    of_network, of_file = [], []
    for call in batches:
        of_network.append(_outputs(net, call)[0].double())
        of_file.append(_run(session, call)[0].double())
    expected, actual = torch.cat(of_network), torch.cat(of_file)
    return float((actual - expected).square().sum() / (expected - expected.mean(0)).square().sum())
