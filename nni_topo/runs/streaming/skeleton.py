"""A model of Transformers whose blocks have no weights, and which says what enters each of them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nni_topo.disk import reading
from nni_topo.errors import ConfigError, DataError, listed
from nni_topo.network.layers.kinds import as_torch_layers, is_transposed_linear
from nni_topo.network.runtime.copies import evaluating, evaluation_mode
from nni_topo.network.runtime.inputs import Call, on_device, tensors_of
from nni_topo.runs.streaming.shards import CONFIG, Shards, check_float, key_of, keys_by_name

_PACKAGES = ("transformers", "accelerate")


class _Reached(Exception):  # noqa: N818 - it is no error
    """A block was reached; the model's forward ends here."""


@dataclass
class _Visit:
    """One pass of the model through its blocks, which compute nothing."""

    stop: int | None  # the block at which the pass ends
    injected: Tensor | None  # what leaves the last block
    entering: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    passed: Tensor | None = None  # what left the block before


class Skeleton:
    """A model without the weights of its blocks: embeddings, norms and head are loaded, a block when it is asked for.

    The blocks are the ``nn.ModuleList`` that holds most parameters; all are of one class and have the same shapes. They
    must be called one after the other, each with what the one before returned.

    Parameters
    ----------
    shards : Shards
        The weights.
    device : torch.device
        Where the loaded weights lie, and the model and its blocks compute.

    Raises
    ------
    ConfigError
        If the folder is of a model that isn't one of Transformers, or has no such list of blocks.
    DataError
        If weights are missing, have other shapes than the config says, or aren't finite.
    """

    def __init__(self, shards: Shards, device: torch.device) -> None:
        self.shards, self.device = shards, device
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"a folder of Transformers needs the packages {' and '.join(_PACKAGES)}, got none of "
                f"{listed(missing)} (shrink_pretrained)"
            )
        model = _without_weights(shards.folder)
        self.prefix = str(getattr(model, "base_model_prefix", ""))
        self.blocks_name = _blocks_of(model, shards.folder)
        self._keys_by_name = keys_by_name(model, shards)
        self.output_length = 0  # of the tuple that a block returns; 0: it returns a tensor
        self._visit: _Visit | None = None
        self._take(model)
        # Everything outside of the blocks is loaded; of tied tensors one has to be there.
        inside = f"{self.blocks_name}."
        tied: dict[int, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            if not name.startswith(inside):
                tied.setdefault(id(tensor), []).append(name)
        own: dict[str, str] = {}
        for names in tied.values():
            known = [name for name in names if key_of(name, self._keys_by_name, self.prefix) is not None]
            first = (known or names)[0]
            own[first] = first
        self._fill(model, self._keys(own))
        model.tie_weights()
        model.eval()
        model.requires_grad_(False)

    def _take(self, model: Any) -> None:
        """Let the blocks of a model without weights record what enters them, and move its buffers to the device."""
        self.model = model
        self.blocks: list[Any] = list(model.get_submodule(self.blocks_name))
        for index, block in enumerate(self.blocks):
            block.forward = self._recorder(index)
        for module in model.modules():
            # The weights of the blocks, which have no values, can't be moved with them.
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(self.device)

    def described(self, config: Any) -> Skeleton:
        """Return a skeleton of the model that another config builds; it shares the tensors outside of the blocks."""
        other = copy.copy(self)
        other._take(empty_model(type(self.model), config))
        inside = f"{self.blocks_name}."
        rest = {
            name: tensor
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if not name.startswith(inside)
        }
        other.model.load_state_dict(rest, strict=False, assign=True)
        other.model.tie_weights()
        other.model.eval()
        other.model.requires_grad_(False)
        return other

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.model.config

    def __len__(self) -> int:
        return len(self.blocks)

    def name_of(self, index: int) -> str:
        """Return the name of a block."""
        return f"{self.blocks_name}.{index}"

    def keys_of(self, index: int) -> dict[str, str]:
        """Return the names of a block's tensors in the files, by their names in the block."""
        inside = self.blocks[index].state_dict()
        return self._keys({f"{self.name_of(index)}.{name}": name for name in inside})

    def _keys(self, wanted: Mapping[str, str]) -> dict[str, str]:
        """Return names in the files by the values of a mapping from names in the model; DataError if any is missing."""
        found: dict[str, str] = {}
        missing = []
        for name, label in wanted.items():
            key = key_of(name, self._keys_by_name, self.prefix)
            if key is None:
                missing.append(name)
            else:
                found[label] = key
        if missing:
            others = [key for key in self.shards.names if key not in self._keys_by_name.values()]
            why = (
                f"; Transformers makes them of {listed(others)}, nni_topo.shrink takes the model in memory"
                if others
                else ""
            )
            raise DataError(
                f"the files must hold every tensor of {type(self.model).__name__}, got none of {listed(missing)}{why} "
                f"({self.shards.folder})"
            )
        return found

    def block(self, index: int) -> Any:
        """Return a copy of a block with its weights, in evaluation mode."""
        built = copy.deepcopy(self.blocks[index])
        vars(built).pop("forward", None)
        self._fill(built, self.keys_of(index))
        if self._transposed(index):
            built = as_torch_layers(built)
        built.requires_grad_(True)
        return evaluating(built)

    def filled(self, index: int, tensors: Mapping[str, Tensor]) -> Any:
        """Return a copy of a block with tensors as its class keeps them, in evaluation mode."""
        built = copy.deepcopy(self.blocks[index])
        vars(built).pop("forward", None)
        built.load_state_dict(tensors, assign=True)
        return evaluating(built)

    def _transposed(self, index: int) -> list[str]:
        """Return the names of a block's weights that its class keeps transposed, as GPT-2 does."""
        modules = self.blocks[index].named_modules()
        return [f"{name}.weight" for name, module in modules if is_transposed_linear(module)]

    def stored(self, block: nn.Module, index: int) -> dict[str, Tensor]:
        """Return the tensors of a block that `block` returned, pruned or not, as its class keeps them."""
        found = dict(block.state_dict())
        for name in self._transposed(index):
            found[name] = found[name].T
        return found

    def _fill(self, module: nn.Module, keys: Mapping[str, str]) -> None:
        """Give a module the tensors of the files, by their names in it."""
        tensors = self.shards.read(keys.values())
        check_float({key: value for key, value in tensors.items() if value.dim() > 0}, self.shards.folder)
        before = module.state_dict()
        values: dict[str, Tensor] = {}
        for inner, key in keys.items():
            value = tensors[key]
            if value.shape != before[inner].shape:
                raise DataError(
                    f"weights must have the shapes that {CONFIG} says, got {tuple(value.shape)} for "
                    f"{tuple(before[inner].shape)} ({key}, {self.shards.folder})"
                )
            values[inner] = value.to(self.device, copy=True)  # what is mapped from the file would change with it
        module.load_state_dict(values, strict=False, assign=True)

    def _recorder(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            visit = self._visit
            assert visit is not None  # the model runs in `_pass` alone
            states = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(states, Tensor):
                raise ConfigError(
                    f"blocks must get the states as their first argument, got {type(states).__name__} "
                    f"({self.name_of(index)})"
                )
            if visit.passed is not None and states is not visit.passed:
                raise ConfigError(
                    "blocks must be called one after the other, each with what the one before returned, got "
                    f"something else ({self.name_of(index)})"
                )
            if index == visit.stop:
                visit.entering = args, kwargs
                raise _Reached
            is_last = index == len(self.blocks) - 1
            passed = visit.injected if is_last and visit.injected is not None else states
            visit.passed = passed
            return (passed, *[None] * (self.output_length - 1)) if self.output_length else passed

        return forward

    @contextmanager
    def _pass(self, visit: _Visit) -> Iterator[None]:
        """Let the blocks take part in one pass."""
        self._visit = visit
        caching = getattr(self.config, "use_cache", None)
        if caching is not None:
            self.config.use_cache = False
        try:
            with evaluation_mode(self.model), torch.no_grad():
                yield
        finally:
            self._visit = None
            if caching is not None:
                self.config.use_cache = caching

    def entering(self, call: Call, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the arguments of a block in a call of the model; the states are right for the first block alone."""
        call = on_device(call, self.device)
        visit = _Visit(stop=index, injected=None)
        with self._pass(visit), suppress(_Reached):
            self.model(*call[0], **call[1])
        if visit.entering is None:
            raise ConfigError(f"the model must call all its blocks, got none of this one ({self.name_of(index)})")
        return visit.entering

    def outputs(self, call: Call, states: Tensor) -> Any:
        """Return the model's output where these states leave the last block."""
        call, states = on_device((call, states), self.device)
        with self._pass(_Visit(stop=None, injected=states)):
            return self.model(*call[0], **call[1])


def empty_model(kind: Any, config: Any) -> Any:
    """Build a model by a config; parameters are on the meta device, buffers aren't."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return kind._from_config(copy.deepcopy(config))


def _without_weights(folder: Path) -> Any:
    """Build the model that a folder's config describes, without weights."""
    import transformers

    path = folder / CONFIG
    with reading(path, "a model's config", "of JSON"):
        names = json.loads(path.read_text(encoding="utf-8")).get("architectures")
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    if kind is None or not hasattr(kind, "_from_config"):
        raise ConfigError(
            f"a config must name a class of Transformers (architectures), got {names!r}; nni_topo.shrink takes any "
            f"model in memory ({path})"
        )
    try:
        config = kind.config_class.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is not None:
            raise ConfigError(f"weights must be floating-point, got a quantised model ({path})")
        model = empty_model(kind, config)
    except ConfigError:
        raise
    except Exception as error:  # Transformers 5 has classes of its own for values of another kind
        told = " ".join(str(error).split())
        raise ConfigError(
            f"a config must be one that Transformers builds {names[0]} by, got: {told} ({path})"
        ) from error
    model.tie_weights()
    return model


def _blocks_of(model: Any, folder: Path) -> str:
    """Return the name of the list of blocks that holds most parameters."""
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            "a model must have one list of blocks, got an encoder and a decoder; nni_topo.shrink takes it in memory "
            f"({type(model).__name__}, {folder})"
        )
    found: dict[str, tuple[int, nn.ModuleList]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            found[name] = sum(each.numel() for each in module.parameters()), module
    rule, place = "a model must have a list of at least two blocks of one class (nn.ModuleList)", type(model).__name__
    if not found:
        raise ConfigError(f"{rule}, got none; nni_topo.shrink takes it in memory ({place}, {folder})")
    name = max(found, key=lambda each: found[each][0])
    blocks = found[name][1]
    classes = sorted({type(each).__name__ for each in blocks})
    if len(classes) > 1:
        got = f"{classes[0]} and {classes[1]} in {name}"
        raise ConfigError(f"{rule}, got {got}; nni_topo.shrink takes it in memory ({place}, {folder})")
    first, *others = [{key: tuple(value.shape) for key, value in each.state_dict().items()} for each in blocks]
    for index, shapes in enumerate(others, 1):
        different = sorted(key for key in first.keys() | shapes.keys() if first.get(key) != shapes.get(key))
        if different:
            key = different[0]
            raise ConfigError(
                "all blocks must have the same tensors, as they keep the same widths, got "
                f"{first.get(key, 'none')} and {shapes.get(key, 'none')} for {key}; nni_topo.shrink takes it in memory "
                f"({name}.0 and {name}.{index}, {folder})"
            )
    return name


def output_length(output: Any) -> int:
    """Return how many values a block returns in a tuple; 0 if it returns a tensor."""
    if isinstance(output, tuple):
        return len(output)
    if not isinstance(output, Tensor):
        raise ConfigError(f"a block must return a tensor, or a tuple that begins with one, got {type(output).__name__}")
    return 0


def states_of(output: Any) -> Tensor:
    """Return the states that a block puts out."""
    return tensors_of(output)[0]
