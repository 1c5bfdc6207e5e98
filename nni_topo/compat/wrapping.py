"""Patches of how NNI wraps models: shared weights, modules with two names, failed constructors, and others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from nni.compression.base import compressor
from nni.compression.base.compressor import Compressor, Pruner
from nni.compression.base.config import select_modules_by_config
from nni.compression.base.setting import PruningSetting
from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.pruning.slim_pruner import SLIM_SCALING_FACTOR_PNAME

from nni_topo.sharing import parameter_holders

_TIED = "_nni_topo_tied"
_BEGUN = "_nni_topo_begun"
_MARK = "_nni_topo_patch"
_CALLING = "_nni_topo_calling"
_MIXER = torch.nn.modules.linear.NonDynamicallyQuantizableLinear

scaling: list[Callable[[torch.nn.Module, Any], None]] = []
"""Functions that get a pruner's model and target spaces after NNI has set the scalers, and may change the scalers."""


calling: list[tuple[Callable[[torch.nn.Module], bool], Callable[..., None]]] = []
"""Pairs of functions. The first says whether a module computes with weights of layers that it doesn't call; the second
lets the module call these layers if its second argument is true, and undoes that if it is false."""


target_settings: list[Callable[[Any], dict[str, Any] | None]] = []
"""Functions that get a module and return NNI's settings of its parameters, by name; None: its class's settings."""


agreeing: list[Callable[[Pruner, Any, Any], Any]] = []
"""Functions that get a pruner of NNI, its metrics and its masks, and return the masks that it uses."""


def keep_shared_parameters() -> bool:
    """Keep parameters shared between layers while the layers are wrapped and afterwards.

    Place: ``nni/compression/base/wrapper.py``, ``TargetSpace._register_target`` and ``ModuleWrapper.unwrap``. Cause:
    each layer gets a copy, so that ``unwrap_model`` returned a model without tied weights, and an optimizer, which
    holds a shared parameter once, didn't train the other layers. An unwrapped module also kept its class's ``forward``
    as an instance attribute.
    """
    if "register_parameter" not in ModuleWrapper.unwrap.__code__.co_names:
        return False
    wrap_model, unwrap = Compressor.wrap_model, ModuleWrapper.unwrap

    @functools.wraps(wrap_model)
    def wrap_all(self: Compressor) -> None:
        # Wrappers hold shared parameters themselves instead of copies.
        holders = parameter_holders(self.bound_model)
        for wrapper in self._module_wrappers.values():
            own = {name: value for name, value in wrapper.module._parameters.items() if holders[id(value)] > 1}
            shared = [name for name in wrapper.pruning_target_spaces if name in own]
            wrapper._parameters.update({name: own[name] for name in shared})
            setattr(wrapper, _TIED, tuple(shared))
        wrap_model(self)

    @functools.wraps(unwrap)
    def unwrap_one(self: ModuleWrapper) -> None:
        unwrap(self)
        if getattr(self.module_forward, "__func__", None) is type(self.module).forward:
            vars(self.module).pop("forward", None)
        for name in getattr(self, _TIED, ()):
            self.module._parameters[name] = self._parameters[name]

    Compressor.wrap_model, ModuleWrapper.unwrap = wrap_all, unwrap_one
    return True


def keep_trained_factors() -> bool:
    """Multiply weights by the factors that ``SlimPruner`` has trained for them when the model is unwrapped.

    Place: ``nni/compression/base/wrapper.py``, ``ModuleWrapper.unwrap``. Cause: the factors were dropped with the
    wrapper, so that the unwrapped model computed something else than the trained one, with the statistics that batch
    norms have for the trained one.
    """
    if "slim" in inspect.getsource(ModuleWrapper):
        return False
    unwrap = ModuleWrapper.unwrap

    @functools.wraps(unwrap)
    def unwrap_trained(self: ModuleWrapper) -> None:
        unwrap(self)
        for name, space in self.pruning_target_spaces.items():
            factors = getattr(self, SLIM_SCALING_FACTOR_PNAME.format(name), None)
            if isinstance(factors, torch.Tensor):
                if space._scaler is not None:
                    factors = space._scaler.expand(factors, space.shape, keepdim=True, full_expand=False)
                weight = getattr(self.module, name)
                # a parameter of its own, because a layer that shares the weight has no such factors
                trained = torch.nn.Parameter((weight * factors).detach(), requires_grad=weight.requires_grad)
                self.module.register_parameter(name, trained)

    ModuleWrapper.unwrap = unwrap_trained
    return True


def derived_types(model: torch.nn.Module, types: Iterable[str]) -> set[str]:
    """Register in NNI a model's classes that derive from PyTorch's classes of names ``types``; return their names.

    NNI looks up settings by class name, so that layers of a derived class can't be pruned unless they are registered.
    """
    found = set[str]()
    for kind in {type(module) for module in model.modules()}:
        bases = [base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch.nn.modules")]
        base = next((base for base in bases if base in types and base in PruningSetting.registry), None)
        # PyTorch's own classes are skipped, except the class of the output projection of ``nn.MultiheadAttention``.
        if base and (kind is _MIXER or not kind.__module__.startswith("torch.")):
            found.add(kind.__name__)
            if kind.__name__ not in PruningSetting.registry:
                PruningSetting.register(kind.__name__, PruningSetting.registry[base])
    return found


class ListedModules:
    """The modules of a model, listed once instead of for each entry that NNI's ``select_modules_by_config`` gets."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._found = list(model.named_modules(remove_duplicate=False))

    def named_modules(self, remove_duplicate: bool = False) -> list[tuple[str, torch.nn.Module]]:
        """Return the modules with their names; a module with several names appears under each."""
        return self._found


def wrap_modules_once() -> bool:
    """Wrap a module with two names once, under the first of its names that the config_list selects.

    Place: ``nni/compression/base/compressor.py``, ``register_wrappers``. Cause: ``op_types`` selects all names, so that
    a wrapped module was wrapped again: an AssertionError without a message.
    """
    register = compressor.register_wrappers

    @functools.wraps(register)
    def register_once(model: Any, config_list: Any, mode: Any, existed_wrappers: Any = None) -> Any:
        chosen = {id(wrapper.module): name for name, wrapper in (existed_wrappers or {}).items()}
        listed: Any = ListedModules(model)
        order = {name: index for index, (name, _) in enumerate(listed.named_modules())}
        single = []  # a config_list that selects no module under two names
        for config in config_list:
            modules, settings, fused = select_modules_by_config(listed, config)
            for name in sorted(modules, key=order.__getitem__):
                chosen.setdefault(id(modules[name]), name)
            names = {chosen[id(module)] for module in modules.values()}
            fusion = {"fuse_names": fused} if fused else {}
            single.append(config if names == modules.keys() else {**settings, **fusion, "op_names": sorted(names)})
        return register(model, single, mode, existed_wrappers)

    compressor.register_wrappers = register_once
    return True


def unwrap_models_once() -> bool:
    """Let ``unwrap_model`` do nothing for a model that isn't wrapped.

    Place: ``nni/compression/base/compressor.py``, ``Compressor.unwrap_model``. Cause: it warns, then raises an
    AttributeError.
    """
    unwrap_model = Compressor.unwrap_model

    @functools.wraps(unwrap_model)
    def unwrap_once(self: Compressor) -> None:
        if self._is_wrapped:
            unwrap_model(self)

    Compressor.unwrap_model = unwrap_once
    return True


def call_layers_of_attention() -> bool:
    """Let attention call its wrapped layers instead of only reading their weights.

    Place: ``nni/compression/base/compressor.py``, ``Compressor.wrap_model`` and ``unwrap_model``. Cause: PyTorch's
    ``nn.MultiheadAttention`` and torchvision's window attention never call these layers, so that masks on them have no
    effect.
    """
    wrap_model, unwrap_model = Compressor.wrap_model, Compressor.unwrap_model

    @functools.wraps(wrap_model)
    def wrap_calling(self: Compressor) -> None:
        wrappers = {id(wrapper.module): wrapper for wrapper in self._module_wrappers.values()}
        found = []
        for module in self.bound_model.modules():
            for asks, change in calling:
                if asks(module) and any(id(part) in wrappers for part in module.children()):
                    found.append((module, change))
        if found:
            vars(self)[_CALLING] = found
        for module, change in found:
            change(module, True)
            if id(module) in wrappers:
                wrappers[id(module)].module_forward = type(module).forward.__get__(module)
        wrap_model(self)

    @functools.wraps(unwrap_model)
    def unwrap_calling(self: Compressor) -> None:
        unwrap_model(self)
        for module, change in vars(self).pop(_CALLING, ()):
            change(module, False)

    Compressor.wrap_model, Compressor.unwrap_model = wrap_calling, unwrap_calling
    return True


def ask_for_targets() -> bool:
    """Let `target_settings` say which parameters of a module are pruned.

    Place: ``nni/compression/base/setting.py``, ``PruningSetting.get``. Cause: settings depend on the class name only,
    but the parameters of a recurrent layer depend on its number of levels; a missing parameter is an AssertionError
    without a message.
    """
    get = PruningSetting.get

    def get_of_module(
        cls: type[PruningSetting], module_cls_or_name: Any, config: dict[str, Any]
    ) -> dict[str, dict[str, Any]]:
        for settings_of in target_settings:
            own = settings_of(module_cls_or_name)
            if own is not None:
                # Call NNI's function on a new subclass whose registry holds these settings only.
                alone = type(cls.__name__, (cls,), {"registry": {type(module_cls_or_name).__name__: own}})
                return dict(get.__func__(alone, module_cls_or_name, config))
        return dict(get(module_cls_or_name, config))

    PruningSetting.get = classmethod(get_of_module)
    return True


def ask_for_blocks() -> bool:
    """Let `scaling` say what the blocks of a pruner's targets are.

    Place: ``nni/compression/base/compressor.py``, ``Pruner._register_scalers``. Cause: NNI's blocks are neighbouring
    rows, but the rows of a head aren't neighbours if one weight holds queries, keys and values.
    """
    register = Pruner._register_scalers

    @functools.wraps(register)
    def register_all(self: Pruner) -> None:
        register(self)
        for change in scaling:
            change(self.bound_model, self._target_spaces)

    Pruner._register_scalers = register_all
    return True


def ask_for_agreement() -> bool:
    """Let `agreeing` change the masks that a pruner has generated.

    Place: ``nni/compression/base/compressor.py``, ``Pruner.generate_masks``. Cause: NNI's groups couple all channels of
    their layers one to one, so that its pruners mask different channels in layers that share only some of them.
    """

    def generate_agreeing(self: Pruner) -> Any:
        metrics = self._calculate_metrics(self._collect_data())
        masks = self._generate_sparsity(metrics)
        for change in agreeing:
            masks = change(self, metrics, masks)
        return masks

    Pruner.generate_masks = functools.wraps(Pruner.generate_masks)(generate_agreeing)
    return True


def undo_failed_constructors() -> bool:
    """Restore the model if a pruner's constructor raises an error.

    Place: ``nni/compression/base/compressor.py``, ``__init__`` of ``Compressor`` and all its subclasses. Cause: an
    error after the first wrapper left a wrapped model, which every pruner refuses, and no pruner to unwrap it.
    """
    for kind in _with_subclasses(Compressor):
        _guard_constructor(kind)

    def guard_subclass(kind: type, /, **keywords: Any) -> None:
        super(Compressor, kind).__init_subclass__(**keywords)
        _guard_constructor(kind)

    Compressor.__init_subclass__ = classmethod(guard_subclass)
    return True


def _with_subclasses(kind: type) -> Iterator[type]:
    yield kind
    below: type
    for below in kind.__subclasses__():
        yield from _with_subclasses(below)


def _guard_constructor(kind: type) -> None:
    original = vars(kind).get("__init__")
    if original is None or hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def guarded(self: Compressor, *args: Any, **kwargs: Any) -> None:
        if _BEGUN in vars(self):
            original(self, *args, **kwargs)
            return
        subject = args[0] if args else kwargs.get("model", kwargs.get("pruner"))
        model = subject.bound_model if isinstance(subject, Compressor) else subject
        things = [subject] if isinstance(subject, Compressor) else []
        things += list(model.modules()) if isinstance(model, torch.nn.Module) else []
        # Per object: its attributes, and the contents of its private dicts and sets, such as parameters.
        before = []
        for thing in things:
            attributes = vars(thing)
            tables = [v for name, v in attributes.items() if name.startswith("_") and isinstance(v, (dict, set))]
            before.append((attributes, dict(attributes), [(table, table.copy()) for table in tables]))
        vars(self)[_BEGUN] = True
        try:
            original(self, *args, **kwargs)
        except BaseException:
            for attributes, values, contents in before:
                attributes.clear()
                attributes.update(values)
                for table, content in contents:
                    table.clear()
                    table.update(content)
            raise
        finally:
            del vars(self)[_BEGUN]

    setattr(guarded, _MARK, True)
    kind.__init__ = guarded  # type: ignore[misc]
