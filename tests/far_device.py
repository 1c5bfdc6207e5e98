"""A second device for machines that have none: ``far``, on which every operation runs on the CPU, behind a wall.

PyTorch keeps a place for other people's devices, PrivateUse1. What lies on ``far`` is a tensor subclass that holds a
CPU tensor and says it lies elsewhere. As on a GPU, tensors of the two places don't mix, except for CPU scalars and
CPU indices, nothing on it turns into an array, and the CPU's generators don't draw on it. Since the same kernels
work behind the wall, results are those of the CPU to the last bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing

NAME = "far"
_PLACE = "PrivateUse1"
# What takes tensors of both places on a GPU too; the second pair only where the indexed tensor is the far one.
_CROSSING = {torch.ops.aten.copy_.default, torch.ops.aten._copy_from.default}
_INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default}
# What makes tensors from no tensor. All other factories are made of these.
_FACTORIES = (
    "_efficientzerotensor arange arange.start arange.start_step empty.memory_format empty_strided eye eye.m full "
    "linspace ones rand rand.generator randint randint.generator randint.low randint.low_generator randn "
    "randn.generator randperm randperm.generator scalar_tensor tril_indices triu_indices zeros"
)
# Made once, and only by a PyTorch that takes a device written in Python.
_SETUP = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
_GUARD = None if _SETUP is None else backend_registration._DummyDeviceGuard()
# Registrations last as long as this list.
_LIBRARIES: list[torch.library.Library] = []


# The most bytes that an operation may put out, while some are set.
_ROOM: list[int] = []


@contextmanager
def memory(room: int) -> Iterator[None]:
    """Let no operation on the device put out more than so many bytes: more is what a GPU's full memory raises."""
    _ROOM.append(room)
    try:
        yield
    finally:
        _ROOM.pop()


class FarTensor(torch.Tensor):
    """A tensor on ``far``; ``held`` is the CPU tensor behind it."""

    held: Tensor
    # Results are of the class that the dispatch below gives them.
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> FarTensor:
        far = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )
        far.held = held
        return far

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        _refuse_mixing(func, args, kwargs)
        device = kwargs.get("device")
        done = func(*_each(_near, args), **{name: _each(_near, value) for name, value in kwargs.items()})
        _refuse_much(func, done)
        if device is not None and device.type != NAME:
            return done
        if not _shares(func):
            return _each(_far, done)
        _check_sizes(func, (*args, *kwargs.values()))
        return return_and_correct_aliasing(func, args, kwargs, _each(_far, done))

    @property
    def data(self) -> Tensor:
        return FarTensor(self.held)

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, FarTensor):
            raise RuntimeError(
                f"data must stay on its device, got data on {value.device} for a tensor on {self.device}"
            )
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.held.numpy()
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        return self.held.tolist()

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec) if self.dim() == 0 else object.__format__(self, spec)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"FarTensor({self.held!r}, device={str(self.device)!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        values = (self.held, self.dtype, str(self.device), self.requires_grad)
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, values


def reserve() -> None:
    """Tell PyTorch that the device will come: autograd makes its threads, one a device, at the first backward pass."""
    if is_possible():
        torch._C._acc.register_python_privateuseone_device_guard(_GUARD)


def is_possible() -> bool:
    """Whether this PyTorch takes a device written in Python."""
    return _SETUP is not None


def start() -> torch.device:
    """Make the device known to PyTorch, until the process ends, and return it."""
    if not _LIBRARIES:
        _SETUP(NAME, _Module(), device_guard=_GUARD)
        library = torch.library.Library("aten", "IMPL")
        for name in _FACTORIES.split():
            library.impl(name, _factory(name), _PLACE)
        library.impl("_copy_from", _copy_from, _PLACE)
        _LIBRARIES.append(library)
    return torch.device(NAME, 0)


def _factory(name: str) -> Callable[..., Tensor]:
    # A zero tensor of PyTorch's own kind can't be held: it has no values.
    base, _, overload = name.replace("_efficientzerotensor", "zeros").partition(".")
    operation = getattr(getattr(torch.ops.aten, base), overload or "default")

    def make(*args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> Tensor:
        _refuse_generator(kwargs)
        return FarTensor(operation(*args, device="cpu", **kwargs))

    return make


def _copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _near(target).copy_(_near(source))
    return target


def _each(work: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to a value, or to those of a list or tuple; operations take and give nothing else."""
    return type(value)([_each(work, item) for item in value]) if isinstance(value, (list, tuple)) else work(value)


def _leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _leaves(value)
        else:
            yield value


@functools.cache
def _shares(func: Any) -> bool:
    """Whether an operation writes into its arguments, or gives back a view of one."""
    return any(argument.alias_info is not None for argument in (*func._schema.arguments, *func._schema.returns))


def _near(leaf: Any) -> Any:
    if isinstance(leaf, FarTensor):
        return leaf.held
    return torch.device("cpu") if isinstance(leaf, torch.device) and leaf.type == NAME else leaf


def _far(leaf: Any) -> Any:
    return FarTensor(leaf) if isinstance(leaf, Tensor) and not isinstance(leaf, FarTensor) else leaf


def _refuse_mixing(func: Any, args: Any, kwargs: Any) -> None:
    _refuse_generator(kwargs)
    if func in _CROSSING or (func in _INDEXING and isinstance(args[0], FarTensor)):
        return
    for leaf in _leaves((*args, *kwargs.values())):
        if isinstance(leaf, Tensor) and not isinstance(leaf, FarTensor) and leaf.dim() > 0:
            raise RuntimeError(
                f"expected all tensors to be on the same device, got {NAME} and a {leaf.device.type} tensor of shape "
                f"{tuple(leaf.shape)} ({func})"
            )


def _refuse_much(func: Any, done: Any) -> None:
    most = max((each.nbytes for each in _leaves([done]) if isinstance(each, Tensor)), default=0)
    if _ROOM and most > _ROOM[-1]:
        raise torch.OutOfMemoryError(f"{NAME} out of memory. Tried to allocate {most} bytes. ({func})")


def _refuse_generator(kwargs: Any) -> None:
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"expected a {NAME!r} device type for generator, got {kwargs['generator'].device.type!r}")


def _check_sizes(func: Any, given: Any) -> None:
    """Raise where an operation has resized what a tensor holds: the tensor itself can't follow."""
    turned = torch.Tag.inplace_view in func.tags
    for leaf in _leaves(given):
        if isinstance(leaf, FarTensor) and not _fits(leaf, turned):
            raise NotImplementedError(f"no operation on {NAME} can resize its arguments, got {func}")


class _Module:
    """What PyTorch asks a device's module: there is one ``far``, and it draws by the CPU's generator."""

    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed_all = staticmethod(lambda seed: None)
    is_initialized = is_available = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16])
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)


def _fits(far: FarTensor, turned: bool) -> bool:
    """Whether a tensor has the size of what it holds; one whose dimensions an operation turns is to get its shape."""
    return far.numel() == far.held.numel() if turned else far.shape == far.held.shape
