"""A network from a file whose source is missing: ONNX, or a program of ``torch.export``."""

from __future__ import annotations

import functools
import inspect
import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from nni_topo.disk import path_of
from nni_topo.errors import ConfigError, DataError, ExportError, NniTopoError, raised, shown
from nni_topo.network.io.exporting import quietly
from nni_topo.network.io.importing import aten
from nni_topo.network.io.importing.building import Building
from nni_topo.network.io.importing.facts import (
    NAMELESS,
    OWN_BATCHES,
    FileFacts,
    FileInput,
    as_call,
    batches_as_in_file,
    few_samples,
    file_facts,
    of_other_sizes,
    set_file_facts,
)
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.comparison import difference, same_program
from nni_topo.network.runtime.inputs import tensors_of

_logger = logging.getLogger(__name__)
_Given = ParamSpec("_Given")
_Made = TypeVar("_Made")

TORCHSCRIPT = (
    "a network must be a module, an .onnx, or a program of torch.export, got TorchScript, which doesn't show its "
    "layers: write it as ONNX by torch.onnx.export(scripted, inputs, 'model.onnx', dynamo=False) and pass that file"
)
_GUESSES = (64, 224, 32, 16, 128, 7, 256, 640)  # sizes of other free axes that a file may take, most likely first
_ONE_BATCH = "its file takes one batch size, and it computes something else for samples together"
_HALF = (torch.float16, torch.bfloat16)
_CLOSE_IN_HALF = 1e-2  # of the largest output


def is_file(model: Any) -> bool:
    """Tell whether a value is what `from_file` takes, or TorchScript, which it refuses."""
    names = {kind.__name__ for kind in type(model).__mro__}
    return (
        isinstance(model, (str, Path))
        or bool(names & {"ModelProto", "ExportedProgram", "ScriptModule", "ScriptFunction"})
        or aten.is_program(model)
    )


class Source:
    """What a network is imported from: its inputs, how it runs, and how it is converted."""

    name = "the file"
    kind = ""
    inputs: tuple[FileInput, ...]
    outputs: tuple[str, ...] = ()
    opset = 0
    metadata: Mapping[str, str] = {}

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        raise NotImplementedError

    def convert(self, building: Building, inputs: list[list[Tensor]]) -> Any:
        """Add all operators to a graph; return the network's outputs."""
        raise NotImplementedError

    def values(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return what each operator computes, in the order in which they run."""
        raise NotImplementedError

    converted: Mapping[str, Any] = {}
    """By the same names, what became of the operators."""


class Program(Source):
    """A program of ``torch.export``."""

    name = "the program"
    kind = "torch.export"

    def __init__(self, module: GraphModule, example: Any = None) -> None:
        self._module, self.example = module, example
        nodes = aten.inputs_of(module)
        if not nodes:
            raise DataError("a program must have an input that is a tensor, got none (from_file)")
        self.inputs = tuple(
            FileInput(
                node.name,
                node.name,
                node.meta["val"].dtype,
                tuple(size if isinstance(size, int) else str(size) for size in node.meta["val"].shape),
            )
            for node in nodes
        )
        for node in _all_nodes(module):
            if node.op == "call_function" and not aten.has_row(node):
                kind = aten.name_of(node.target)
                raise ConfigError(
                    f"operators of a file must be ones that can be converted, got {kind} (node {node.name!r}, "
                    "from_file)"
                )

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        with torch.no_grad():
            returned = _Bare(self._module).boxed_run(self._arguments(tensors))
        return [each for each in torch.utils._pytree.tree_leaves(returned) if isinstance(each, Tensor)]

    def convert(self, building: Building, inputs: list[list[Tensor]]) -> Any:
        """Add all operators to a graph; return the network's outputs."""
        returned, self.converted = aten.convert(building, self._module, inputs)
        return returned

    def values(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return what each operator computes, in the order in which they run."""
        interpreter = _Bare(self._module, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.boxed_run(self._arguments(tensors))
        return {node.name: value for node, value in interpreter.env.items()}

    def _arguments(self, tensors: Sequence[Tensor]) -> list[Any]:
        by_name = dict(zip((each.name for each in self.inputs), (each.clone() for each in tensors), strict=True))
        return [by_name.get(node.name) for node in self._module.graph.nodes if node.op == "placeholder"]


class _Bare(Interpreter):
    """Runs a program with its inputs in a list, without its checks of them."""

    def run(self, *args: Any, **_: Any) -> Any:
        """Run without converting the inputs."""
        return super().run(*args, enable_io_processing=False)

    def boxed_run(self, args_list: list[Any]) -> Any:
        """Run it."""
        return self.run(*args_list)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Leave the checks out."""
        return None


def _all_nodes(module: GraphModule) -> list[Node]:
    inner = [each for each in module.modules() if isinstance(each, GraphModule)]
    return [node for each in inner for node in each.graph.nodes if not str(each._get_name()).startswith("Guards")]


class OnnxFile(Source):
    """An ONNX file."""

    kind = "onnx"

    def __init__(self, model: Any, path: Path | None = None) -> None:
        import onnx
        import onnx.inliner

        from nni_topo.network.io.importing import operators

        opset = next((each.version for each in model.opset_import if each.domain in ("", "ai.onnx")), 0)
        try:
            if model.functions:
                model = onnx.inliner.inline_local_functions(model)
            # By its path a file may be larger than 2 GB.
            onnx.checker.check_model(model if path is None else str(path))
        except Exception as error:
            raise DataError(f"a file must hold a valid ONNX network, got {raised(error)} (from_file)") from error
        self.model, self._path, self.opset = model, path, opset
        operators.check_operators(model.graph, {"", "ai.onnx"})
        held = {each.name for each in model.graph.initializer}
        inputs = [each for each in model.graph.input if each.name not in held]
        if not inputs:
            raise DataError("a file must have an input, got none (from_file)")
        self.inputs = tuple(self._input(each, operators, place, len(inputs)) for place, each in enumerate(inputs))
        self.outputs = tuple(each.name for each in model.graph.output)
        self.metadata = {each.key: each.value for each in model.metadata_props}
        self._session: Any = None

    def _input(self, value: Any, operators: Any, place: int, count: int) -> FileInput:
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type"):
            raise ConfigError(f"inputs of a file must be tensors, got another type (input {value.name!r}, from_file)")
        shape = list[int | str]()
        for axis, size in enumerate(kind.shape.dim):
            is_fixed = size.HasField("dim_value") and size.dim_value > 0
            shape.append(size.dim_value if is_fixed else size.dim_param or f"{NAMELESS}{place}_{axis}")
        argument = "".join(letter if letter.isalnum() else "_" for letter in value.name)
        argument = argument if argument.isidentifier() and argument != "self" else f"input_{argument}"
        dtype = operators.dtype_of(kind.elem_type, value.name)
        return FileInput(value.name, argument, dtype, tuple(shape))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the outputs."""
        if self._session is None:
            self._session = self._open(self.model if self._path is None else self._path)
        return self._run(self._session, tensors, None)

    def convert(self, building: Building, inputs: list[list[Tensor]]) -> Any:
        """Add all operators to a graph; return the network's outputs."""
        from nni_topo.network.io.importing import operators

        values = {
            each.name: building.input(each.argument, examples)
            for each, examples in zip(self.inputs, inputs, strict=True)
        }
        self.converted = values
        outputs = operators.convert(building, self.model.graph, values, self.opset)
        outputs = [operators.tensor_of(building, each) for each in outputs]
        return outputs[0] if len(outputs) == 1 else dict(zip(self.outputs, outputs, strict=True))

    def values(self, tensors: Sequence[Tensor]) -> dict[str, Any]:
        """Return what each operator computes, in the order in which they run."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        known = {each.name for each in model.graph.output}
        names = [name for node in model.graph.node for name in node.output if name]
        model.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names if name not in known)
        return dict(zip(names, self._run(self._open(model), tensors, names), strict=True))

    def _open(self, model: Any) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised, and some sizes are tried that a file may refuse
        options.intra_op_num_threads = options.inter_op_num_threads = torch.get_num_threads()
        try:
            file = str(model) if isinstance(model, Path) else model.SerializeToString()
            return onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise DataError(f"a file must be one that onnxruntime runs, got {raised(error)} (from_file)") from error

    def _run(self, session: Any, tensors: Sequence[Tensor], names: Any) -> list[Tensor]:
        feed = {each.name: tensor.detach().cpu().numpy() for each, tensor in zip(self.inputs, tensors, strict=True)}
        return [torch.from_numpy(np.array(each)) for each in session.run(names, feed)]


def source_of(model: Any) -> Source:
    """Read a file or take what is in memory; an error in words for anything else."""
    names = {kind.__name__ for kind in type(model).__mro__}
    if names & {"ScriptModule", "ScriptFunction"}:
        raise ConfigError(f"{TORCHSCRIPT} (from_file)")
    if "ExportedProgram" in names:
        return Program(model.module(), model.example_inputs)
    if aten.is_program(model):
        return Program(model)
    if "ModelProto" in names:
        _check_onnx()
        return OnnxFile(model)
    if not isinstance(model, (str, Path)):
        raise ConfigError(
            "model must be a path of an .onnx or .pt2, an onnx.ModelProto, or a program of torch.export, got "
            f"{shown(model)} (from_file)"
        )
    path = path_of(model)
    if not path.is_file():
        raise DataError(f"a file must exist, got none ({path}, from_file)")
    if path.suffix.lower() == ".onnx":
        _check_onnx()
        import onnx

        try:
            return OnnxFile(onnx.load(str(path)), path)
        except (NniTopoError, OSError):
            raise
        except Exception as error:
            raise DataError(f"a file must hold an ONNX network, got {raised(error)} ({path}, from_file)") from error
    if _is_torchscript(path):
        raise ConfigError(f"{TORCHSCRIPT} ({path}, from_file)")
    if path.suffix.lower() == ".pt2":
        try:
            with path.open("rb") as stream, quietly():
                program = torch.export.load(stream)
        except OSError:
            raise
        except Exception as error:
            raise DataError(
                f"a file must hold a program of torch.export, got {raised(error)} ({path}, from_file)"
            ) from error
        return Program(program.module(), program.example_inputs)
    raise ConfigError(
        f"a path must end in .onnx or .pt2, got {path.suffix or 'no ending'}; a state_dict has no network, so build "
        f"the network and load it by load_state_dict ({path}, from_file)"
    )


def _check_onnx() -> None:
    from nni_topo.network.io.exporting import _import

    for name in ("onnx", "onnxruntime"):
        _import(name)


def _is_torchscript(path: Path) -> bool:
    """Tell whether a file holds TorchScript, whose archive has code."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return False
    return any("/code/" in name or name.endswith("constants.pkl") for name in names) and not any(
        "exported_program" in name or name.endswith("models/model.json") for name in names
    )


def from_file(model: Any, inputs: Any = None) -> GraphModule:
    """Return the network of a file, to be pruned like any other, though its source is missing.

    Parameters
    ----------
    model : str, Path, onnx.ModelProto, torch.export.ExportedProgram or its module
        The path of an ``.onnx`` or of a ``.pt2`` of :func:`torch.export.save`, or what is loaded from it. It isn't
        changed.
    inputs : Tensor, array, tuple or mapping of str to Tensor, optional
        Inputs of the file, batch first, on which the network is compared with it: one, several in the file's order, or
        by their names in it. None: random ones of the file's shapes.

    Returns
    -------
    torch.fx.GraphModule
        Convolutions, linear and recurrent layers, norms and embeddings are PyTorch's modules, named after the file's
        tensors or nodes; all else is PyTorch's functions. It is in evaluation mode: a file has no dropout. Its
        inputs are called as in the file, and several outputs of ONNX are a dict by their names. Of a file with branches
        it has those that the inputs choose.

    Raises
    ------
    ConfigError
        If the file has an operator that can't be converted, which the message names, holds integers in place of
        floats, or is TorchScript; if inputs aren't the file's, or are missing where the value of one chooses a branch;
        if the packages for ONNX are missing.
    DataError
        If the file is damaged, or the inputs have another type or shape than the file's.
    ExportError
        If the network computes something else than the file, by more than 1e-4 of the largest output, or 1e-2 in half
        precision; the message names the first operator that differs. They are compared on the inputs, on another batch
        size and on another size of other free axes.

    See Also
    --------
    nni_topo.shrink : Takes a file, too.
    nni_topo.export : Writes the smaller network with the file's names, types and free axes.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
    >>> program = torch.export.export(model, (torch.randn(2, 4),))
    >>> from_file(program)
    Imported(
      (0): Linear(in_features=4, out_features=8, bias=True)
      (2): Linear(in_features=8, out_features=2, bias=True)
    )
    """
    return _imported(source_of(model), inputs)


def _imported(source: Source, inputs: Any) -> GraphModule:
    """Convert a file, and compare the network with it."""
    calls = _example_calls(source, inputs)
    network, settings = _converted(source, calls)
    _check_settings(settings, source, inputs, calls[0])
    _prove(source, network, calls)
    for node in network.graph.nodes:
        node.meta.clear()
    example = tuple(tensor.clone() for tensor in few_samples(source.inputs, calls[0]))
    facts = FileFacts(
        source.kind, source.inputs, source.outputs, source.opset, dict(source.metadata), example, settings
    )
    set_file_facts(network, facts)
    return network


def _check_settings(settings: Sequence[str], source: Source, inputs: Any, call: Sequence[Tensor]) -> None:
    """Tell which branches of a file a network has; a ConfigError if no input of the user's chose them."""
    values = dict(zip((each.name for each in source.inputs), call, strict=True))
    for name in settings:
        if inputs is None:
            raise ConfigError(
                "the value of an input that chooses a branch of the file must be given as inputs=, got none "
                f"({name!r}, from_file)"
            )
        _logger.warning(
            "The network is that of %s = %s: this input chooses a branch of the file, and the others are left out.",
            name, values[name].item(),
        )  # fmt: skip


def _example_calls(source: Source, inputs: Any) -> list[list[Tensor]]:
    """Return the inputs, or random ones, and others of another size if the file takes them."""
    generator = torch.Generator().manual_seed(0)
    if inputs is None and isinstance(source, Program) and source.example is not None:
        leaves = torch.utils._pytree.tree_leaves(source.example)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        inputs = tensors if len(tensors) == len(source.inputs) else None
    failure: Exception | None = None
    if inputs is not None:
        first = as_call(source.inputs, inputs, "from_file")
        # The file runs on batches of its own size.
        for place, (tensor, each) in enumerate(zip(first, source.inputs, strict=True)):
            if each.shape and isinstance(each.shape[0], int) and len(tensor) > each.shape[0]:
                first[place] = tensor[: each.shape[0]]
        tries = [first]
    else:
        tries = []
        batches = {each.free[0]: OWN_BATCHES[0] for each in source.inputs if 0 in each.free}
        for guess in _GUESSES:
            tries.append([_random(each, batches, guess, generator) for each in source.inputs])
            if not any(set(each.free) - {0} for each in source.inputs):
                break
    for first in tries:
        try:
            source.run(first)
        except NniTopoError:  # onnxruntime doesn't load it
            raise
        except Exception as error:  # of onnxruntime or of the program
            failure = error
            continue
        other = of_other_sizes(source.inputs, first, source.run)
        return [first] if other is None else [first, other]
    assert failure is not None
    advice = "" if inputs is not None else "; pass inputs= that it runs on"
    raise DataError(f"a file must run on the inputs, got {raised(failure)}{advice} (from_file)") from failure


def _random(each: FileInput, batches: Mapping[str, int], guess: int, generator: torch.Generator) -> Tensor:
    shape = [size if isinstance(size, int) else batches.get(size, guess) for size in each.shape]
    if each.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(each.dtype)
    return torch.randint(0, 2, shape, generator=generator).to(each.dtype)


def _converted(source: Source, calls: list[list[Tensor]]) -> tuple[GraphModule, tuple[str, ...]]:
    """Convert a file, operator by operator, running it on a few samples; also return the inputs that chose a branch."""
    few = [few_samples(source.inputs, calls[0]), *calls[1:]]
    building = Building(len(few))
    examples = [[call[place].cpu() for call in few] for place in range(len(source.inputs))]
    try:
        with quietly():
            network = building.finish(source.convert(building, examples))
    except NniTopoError:
        raise
    except Exception as error:
        raise ExportError(
            f"a file must be one that PyTorch's operators compute, got {raised(error)} (operator {building.where!r}, "
            "from_file)"
        ) from error
    chosen = {node.name for node in building.settings}
    return network, tuple(each.name for each in source.inputs if each.argument in chosen)


def _prove(source: Source, network: GraphModule, calls: list[list[Tensor]]) -> None:
    """Raise an ExportError unless the network equals the file on the calls."""
    most = same_program([])
    dtypes = [each.dtype for each in source.inputs] + [each.dtype for each in network.parameters()]
    if any(dtype in _HALF for dtype in dtypes):
        most = _CLOSE_IN_HALF
    for place, call in enumerate(calls):
        expected = source.run(call)
        with torch.no_grad():
            returned = network(*(tensor.clone() for tensor in call))
        actual = [leaf for leaf in torch.utils._pytree.tree_leaves(returned) if isinstance(leaf, Tensor)]
        error = largest_difference(expected, actual)
        if not error <= most:
            few = few_samples(source.inputs, call) if place == 0 else call
            node = _first_difference(source, few, place, most)
            raise ExportError(
                f"the network must equal {source.name} within {most:.2g} of the largest output, got a difference of "
                f"{error:.3g}; the first operator that differs is {node} (from_file)"
            )


def largest_difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """Return the largest relative difference between outputs; infinite for other shapes."""
    if [each.shape for each in expected] != [each.shape for each in actual]:
        return float("inf")
    return max((difference(one, other) for one, other in zip(expected, actual, strict=True)), default=0.0)


def _first_difference(source: Source, call: list[Tensor], place: int, most: float) -> str:
    """Return the name of the first operator whose value differs from the network's."""
    try:
        expected = source.values(call)
    except Exception:
        return "unknown"
    for name, value in expected.items():
        node = source.converted.get(name)
        if not isinstance(node, Node) or not isinstance(value, Tensor):
            continue
        actual = node.meta["examples"][place]
        if isinstance(actual, Tensor) and not largest_difference([value], [actual]) <= most:
            return repr(name)
    return "none on these few samples"


def taking_files(function: Callable[_Given, _Made]) -> Callable[_Given, _Made]:
    """Decorate a function of a model and batches, so that it takes what `from_file` takes, and batches of arrays."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: _Given.args, **kwargs: _Given.kwargs) -> _Made:
        bound = signature.bind_partial(*args, **kwargs)
        model, images = (bound.arguments.get(name) for name in ("model", "images"))
        if is_file(model):
            source = source_of(model)
            calls, data = batches_as_in_file(source.inputs, images, "images")
            network = _imported(source, calls[0] if calls else None)
            _check_same_settings(network, calls)
            if not _takes_any_batch(network, calls):
                _check_batch_sizes(source.inputs, calls)
                data = Calibration.of(data, "images").as_whole_batches(_ONE_BATCH)
            bound.arguments |= {"model": network} | ({"images": data} if "images" in bound.arguments else {})
        return function(*bound.args, **bound.kwargs)

    return run


def _check_same_settings(network: GraphModule, calls: Sequence[Sequence[Tensor]]) -> None:
    """Raise a ConfigError if a batch would run another branch of the file than the network has."""
    facts = file_facts(network)
    assert facts is not None
    for place, call in enumerate(calls):
        for each, tensor, of_first in zip(facts.inputs, call, calls[0], strict=True):
            if each.name in facts.settings and not torch.equal(tensor, of_first):
                raise ConfigError(
                    f"an input that chooses a branch of the file must have one value, got {of_first.item()} and "
                    f"{tensor.item()} (input {each.name!r}, batch {place} of images)"
                )


def _takes_any_batch(network: GraphModule, calls: Sequence[Sequence[Tensor]]) -> bool:
    """Tell whether a network computes the same for samples one by one and together; its file may take one alone."""
    facts = file_facts(network)
    assert facts is not None
    if not calls or any(0 in each.free for each in facts.inputs):
        return True
    sizes = [each.shape[0] if each.shape else 0 for each in facts.inputs]
    batch = next((size for size in sizes if size), 0)
    fixed = [place for place, size in enumerate(sizes) if size == batch]  # others hold states or settings
    if not batch:
        return True
    samples = len(calls[0][fixed[0]])
    if samples > 1:
        parts = [[tensor[[n]] if place in fixed else tensor for place, tensor in enumerate(calls[0])] for n in (0, 1)]
    else:
        parts = [list(call) for call in calls[:2]]
    with torch.no_grad():
        try:
            joined = [
                torch.cat(pair) if place in fixed else pair[0] for place, pair in enumerate(zip(*parts, strict=True))
            ]
            together = tensors_of(network(*joined))
            one_by_one = [torch.cat(pair) for pair in zip(*(tensors_of(network(*part)) for part in parts), strict=True)]
        except Exception:  # the network, or joining its outputs, may raise anything
            return False
    return largest_difference(one_by_one, together) <= same_program(network.parameters())


def _check_batch_sizes(inputs: Sequence[FileInput], calls: Sequence[Sequence[Tensor]]) -> None:
    for place, call in enumerate(calls):
        for each, tensor in zip(inputs, call, strict=True):
            if each.shape and len(tensor) != each.shape[0]:
                raise DataError(
                    f"batches must have the size of the file's, {each.shape[0]}, because it computes something else "
                    f"for samples together, got {len(tensor)} (input {each.name!r}, batch {place} of images)"
                )
