"""What a forward hands over: the tensors that it returns, and those that it stores in attributes of modules."""

from __future__ import annotations

import logging
import sys
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from nni_topo.network.runtime.copies import detached_copy, has_room_for
from nni_topo.network.runtime.inputs import Call, let_go, returned_by_name, run_few, tensors_of
from nni_topo.network.runtime.products import ProductsReused
from nni_topo.network.runtime.switches import DropoutOff, as_written, random_state_kept

_logger = logging.getLogger(__name__)
STORED = "nni_topo_stored"  # in a node's meta: the attribute in which the forward leaves the node's value
# In the meta of a whole module's node: shapes of tensors that the module computes and leaves in attributes, by name.
STORED_WITHIN = "nni_topo_stored_within"
_NOT_FORWARDS = (f"{__name__.partition('.')[0]}.", "torch.fx.")  # code that makes and runs graphs
_TABLES = ("_parameters", "_modules", "_buffers")  # attributes of every module
_WITHOUT_TENSORS = frozenset({bool, int, float, str, type(None)})
_CAN_BE_EMPTY = frozenset({dict, OrderedDict, list, tuple, set})
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_NOISY = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)

Results = list[tuple[str, Tensor]]
"""Tensors, with the keys in the output that lead to them, or the names of the attributes that hold them."""


def stored_tensors(model: nn.Module, buffers: Collection[str]) -> Results:
    """List the tensors that attributes of modules hold, alone or in containers.

    Parameters and the named ``buffers`` are left out: they are the model's own, and are cut with its layers.
    """
    stored = Results()
    for name, module in model.named_modules():
        for key, value in (*vars(module).items(), *module._buffers.items()):
            if key in _TABLES or type(value) in _WITHOUT_TENSORS or (type(value) in _CAN_BE_EMPTY and not value):
                continue
            tensors = tensors_of(value)
            if tensors and (place := f"{name}.{key}".lstrip(".")) not in buffers:
                stored += [(place, tensor) for tensor in tensors]
    return stored


def put_in_training(model: nn.Module, names: Collection[str] | None = None) -> None:
    """Put modules into training mode, by default all, but for PyTorch's layers, batch norms and dropout.

    These don't decide where data goes, and compute something else in training mode; batch norms also refuse a single
    sample.
    """
    for name, module in model.named_modules():
        if _takes_mode(module) and (names is None or name in names):
            module.training = True


def _takes_mode(module: nn.Module) -> bool:
    is_layer = type(module).__module__.startswith("torch.nn.modules.") and not isinstance(module, _CONTAINERS)
    return not is_layer and not isinstance(module, _NOISY)


@contextmanager
def mode_readers(model: nn.Module) -> Iterator[set[str]]:
    """Yield a set that receives the modules whose mode is read within the block, by name, but by code of graphs.

    Modules count that `put_in_training` changes. If the set is empty after a run, the forward does the same in training
    mode.
    """
    readers = set[str]()
    names = {module: name for name, module in model.named_modules() if _takes_mode(module)}
    for module, name in names.items():
        if any("training" in vars(kind) for kind in type(module).__mro__):  # a class that computes its mode
            readers.add(name)

    def read(module: nn.Module) -> bool:
        try:
            is_training: bool = vars(module)["training"]
        except KeyError:
            raise AttributeError("training") from None
        caller = str(sys._getframe(1).f_globals.get("__name__"))
        if module in names and not caller.startswith(_NOT_FORWARDS):
            readers.add(names[module])
        return is_training

    def write(module: nn.Module, is_training: bool) -> None:
        vars(module)["training"] = is_training

    def delete(module: nn.Module) -> None:
        del vars(module)["training"]

    # A property of the base class comes before the attribute of each module.
    before = vars(nn.Module).get("training")
    attributes: Any = nn.Module
    attributes.training = property(read, write, delete)
    try:
        yield readers
    finally:
        if before is None:
            del attributes.training
        else:
            attributes.training = before


def run_for_results(runner: nn.Module, call: Call) -> tuple[Results, Results]:
    """Run a model on a few samples of a call, without dropout.

    Returns the tensors that the forward returned, and those that it stored in attributes of modules. The forward may
    change the model.
    """
    buffers = dict(runner.named_buffers()).keys()
    ids_before = {id(tensor) for _, tensor in stored_tensors(runner, buffers)}
    with torch.no_grad(), random_state_kept(), as_written(), DropoutOff():
        # Clones, because a forward may change its inputs in place.
        returned = returned_by_name(run_few(runner, tree_map_only(Tensor, Tensor.clone, call)))
    stored = [(name, tensor) for name, tensor in stored_tensors(runner, buffers) if id(tensor) not in ids_before]
    return returned, stored


def in_training(model: nn.Module) -> nn.Module:
    """Return a copy of a model in training mode, see `put_in_training`.

    It has weights of its own, because a forward may write into them.
    """
    runner: nn.Module = detached_copy(model)
    put_in_training(runner)
    return runner


def results_in_training(model: nn.Module, call: Call) -> tuple[Results, Results] | None:
    """Run a copy of a model in training mode, see `run_for_results`; None if that fails or there is no room for it."""
    try:
        if not has_room_for([model]):
            return None
        return run_for_results(in_training(model), call)
    except Exception as error:  # a forward may raise anything, such as a detector's without targets
        _logger.debug("%s can't be run in training mode", type(model).__name__, exc_info=True)
        let_go(error)
        return None


def hands_over_more_in_training(model: nn.Module, call: Call, products: ProductsReused) -> bool:
    """Tell whether a forward returns or stores a tensor in training mode that it doesn't in evaluation mode.

    ``model`` is in evaluation mode, and is run; ``products``: of earlier runs with its weights. False if it can't be
    run in training mode.
    """
    trained = results_in_training(model, call)
    if trained is None:
        return False
    with products:
        evaluated = run_for_results(model, call)
    for more, fewer in zip(trained, evaluated, strict=True):
        by_name: dict[str, list[Tensor]] = {}
        for name, tensor in fewer:
            by_name.setdefault(name, []).append(tensor)
        for name, tensor in more:
            candidates = by_name.get(name)
            if not candidates:
                return True
            counterpart = candidates.pop(0)
            if (tensor.shape, tensor.dtype) != (counterpart.shape, counterpart.dtype):
                return True
            if not torch.equal(tensor.nan_to_num(), counterpart.nan_to_num()):
                return True
    return False
