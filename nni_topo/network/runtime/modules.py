"""Checks of kinds of modules, tensors and functions, and the device of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; of a model without any, the CPU."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def is_plain(model: Any) -> bool:
    """Tell whether a model is a module whose layers can be seen: not scripted, compiled, or spread over processes."""
    # By name: importing these classes takes longer than all other checks of a model.
    opaque = {"ScriptModule", "OptimizedModule", "DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"}
    kinds = {kind.__name__ for kind in type(model).__mro__}
    return isinstance(model, nn.Module) and not kinds & {*opaque, "FSDPModule"}


def is_transformed(tensor: Tensor) -> bool:
    """Tell whether a tensor belongs to a running ``torch.vmap`` or ``torch.func.grad`` and is unusable afterwards."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_compiled_module(module: nn.Module) -> bool:
    """Tell whether ``torch.compile`` returned a module."""
    return type(module).__name__ == "OptimizedModule"  # by name: importing the class takes long


def is_compiled_function(value: Any) -> bool:
    """Tell whether ``torch.compile`` returned a function."""
    return hasattr(value, "_torchdynamo_orig_callable") and not getattr(value, "_torchdynamo_disable", False)


def has_compiled(model: nn.Module) -> bool:
    """Tell whether ``torch.compile`` or ``Module.compile`` has compiled a model, a part of it or a forward."""
    return any(
        module._compiled_call_impl is not None
        or is_compiled_module(module)
        or is_compiled_function(vars(module).get("forward"))
        for module in model.modules()
    )


def put_attribute(module: nn.Module, name: str, value: Any) -> None:
    """Set an attribute of a module, even if the ``__setattr__`` of its class refuses, as in frozen classes."""
    try:
        setattr(module, name, value)
    except Exception:
        nn.Module.__setattr__(module, name, value)


def cast_tensor(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor of floats, or of complex numbers, to single or double precision; return any other unchanged."""
    if tensor.is_complex():
        return tensor.to(dtype.to_complex())
    if tensor.is_floating_point():
        return tensor.to(dtype)
    return tensor
