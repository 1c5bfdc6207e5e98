"""A model of Transformers whose blocks are loaded from the disk one by one, and which records their inputs."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from nni_topo.disk import read_json, reading
from nni_topo.errors import ConfigError, DataError, listed, raised
from nni_topo.network.layers.kinds import with_linear_layers
from nni_topo.network.runtime.copies import evaluating
from nni_topo.network.runtime.inputs import Call, on_device, take_samples, tensors_of

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
STATES = "hidden_states"  # the keyword argument of a block with the states, if it isn't the first argument
_PACKAGES = ("transformers", "accelerate")


class _Reached(Exception):  # noqa: N818 - it is no error
    """Ends the model's forward when a block is reached."""


class Skeleton:
    """A model without the weights of its blocks: embeddings, norms and head are loaded, blocks on demand.

    The blocks are the ``nn.ModuleList`` with the most parameters; all have one class and the same shapes. They must be
    called in order, each with the output of the one before. Weights are loaded to ``device``, where the model and its
    blocks run.

    ConfigError if the ``folder`` doesn't hold a model of Transformers with such a list of blocks. DataError if weights
    are missing, aren't finite, or don't have the shapes of the config.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self.files = _weight_files(folder)
        missing = [name for name in _PACKAGES if find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"a folder of Transformers needs the packages {' and '.join(_PACKAGES)}, got none of "
                f"{listed(missing)} (shrink_pretrained)"
            )
        model = _without_weights(folder)
        self.config = copy.deepcopy(model.config)
        self.blocks_name = _blocks_of(model, folder)
        # Transformers loads everything outside of the blocks, and accelerate records where the blocks are in the files.
        # A device applies to all children of a module, so the modules that contain the blocks get none.
        parts = self.blocks_name.split(".")
        holders = {".".join(parts[:count]) for count in range(len(parts))}
        places = {self.blocks_name: "disk"}
        for name, _ in [*model.named_modules(), *model.named_parameters(), *model.named_buffers()]:
            if name.rpartition(".")[0] in holders and name not in (*holders, self.blocks_name):
                places[name] = "cpu"
        kind = type(model)
        try:
            with _quietly():
                loaded, found = kind.from_pretrained(
                    folder,
                    config=copy.deepcopy(model.config),
                    dtype=_precision_of(self.files),
                    device_map=places,
                    offload_buffers=True,
                    ignore_mismatched_sizes=True,  # reported below
                    use_safetensors=True,
                    output_loading_info=True,
                )
        except (OSError, RuntimeError, ValueError, LookupError, SafetensorError) as error:
            raise DataError(
                f"Transformers must be able to load {kind.__name__} with its blocks on the disk, got {raised(error)}; "
                f"nni_topo.shrink takes a model in memory ({folder})"
            ) from error
        # Transformers 5 lists mismatched tensors with their shapes.
        wrong = [each if isinstance(each, str) else each[0] for each in found["mismatched_keys"]]
        if wrong := sorted([*wrong, *found["missing_keys"]]):
            raise DataError(
                f"the files must hold every tensor that {kind.__name__} has by its {CONFIG}, in its shape, got none "
                f"for {listed(wrong)} ({folder})"
            )
        self._on_disk: Any = loaded.get_submodule(self.blocks_name)
        inside = f"{self.blocks_name}."
        rest = {name: tensor for name, tensor in loaded.state_dict().items() if not name.startswith(inside)}
        self._take(model, self._here(rest))

    def _here(self, tensors: Mapping[str, Tensor], place: str = "") -> dict[str, Tensor]:
        """Return copies on the device; DataError unless they are finite."""
        for name, tensor in tensors.items():
            if not bool(torch.isfinite(tensor).all()):
                raise DataError(f"weights must be finite, got NaN or infinity ({place}{name}, {self.folder})")
        # Copies, because memory-mapped tensors change with their file.
        return {name: tensor.to(self.device, copy=True) for name, tensor in tensors.items()}

    def _take(self, model: Any, rest: Mapping[str, Tensor]) -> None:
        """Take a model without weights and the tensors outside of its blocks; the blocks record their inputs."""
        self.model = model
        self.blocks: list[Any] = list(model.get_submodule(self.blocks_name))
        self.output_length = 0  # length of the tuple that a block returns; 0: it returns a tensor
        # During a pass: the block at which it stops, the inputs of that block, the output of the block before, and a
        # replacement of the last block's output.
        self._stop: int | None = None
        self._entering: list[Call] = []
        self._passed: Tensor | None = None
        self._injected: Tensor | None = None
        for index, block in enumerate(self.blocks):
            block.forward = self._recorder(index)
        model.load_state_dict(rest, strict=False, assign=True)
        for module in model.modules():
            # Only buffers, because the weights of the blocks are on the meta device and can't be moved.
            for name, buffer in list(module.named_buffers(recurse=False)):
                module._buffers[name] = buffer.to(self.device)
        model.tie_weights()
        model.eval()
        model.requires_grad_(False)
        if getattr(model.config, "use_cache", None) is not None:
            model.config.use_cache = False  # a cache would be a further argument of each block

    def described(self, config: Any) -> Skeleton:
        """Return a skeleton for another config that shares the tensors outside of the blocks."""
        other = copy.copy(self)
        other._take(empty_model(type(self.model), config), self.rest())
        other.output_length = self.output_length
        return other

    def rest(self) -> dict[str, Tensor]:
        """Return the tensors outside of the blocks by name."""
        inside = f"{self.blocks_name}."
        found = self.model.state_dict(keep_vars=True).items()
        return {name: tensor for name, tensor in found if not name.startswith(inside)}

    def __len__(self) -> int:
        return len(self.blocks)

    def name_of(self, index: int) -> str:
        """Return the name of a block."""
        return f"{self.blocks_name}.{index}"

    def block(self, index: int) -> Any:
        """Return a copy of a block with its weights, in evaluation mode, with linear layers instead of ``Conv1D``."""
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        try:
            # In a container, because accelerate doesn't return tensors of the given module itself.
            tensors = get_state_dict_offloaded_model(nn.ModuleDict({"block": self._on_disk[index]}))
        except ValueError as error:  # Transformers 5 doesn't check the shapes of weights on the disk
            raise DataError(
                f"the files must hold every tensor that {type(self.model).__name__} has by its {CONFIG}, in its "
                f"shape, got {raised(error)} ({self.name_of(index)}, {self.folder})"
            ) from error
        values = {name.removeprefix("block."): tensor for name, tensor in tensors.items()}
        built = with_linear_layers(self.filled(index, self._here(values, f"{self.name_of(index)}.")))
        return evaluating(built.requires_grad_(True))

    def filled(self, index: int, tensors: Mapping[str, Tensor]) -> Any:
        """Return a copy of a block with the given tensors, in evaluation mode."""
        built = copy.deepcopy(self.blocks[index])
        vars(built).pop("forward", None)
        built.load_state_dict(tensors, assign=True)
        return evaluating(built)

    def _recorder(self, index: int) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            states = args[0] if args else kwargs.get(STATES)
            if not isinstance(states, Tensor):
                raise ConfigError(
                    f"blocks must get the states as their first argument, got {type(states).__name__} "
                    f"({self.name_of(index)})"
                )
            if self._passed is not None and states is not self._passed:
                raise ConfigError(
                    "blocks must be called one after the other, each with what the one before returned, got "
                    f"something else ({self.name_of(index)})"
                )
            if index == self._stop:
                self._entering.append((args, kwargs))
                raise _Reached
            is_last = index == len(self.blocks) - 1
            self._passed = self._injected if is_last and self._injected is not None else states
            return (self._passed, *[None] * (self.output_length - 1)) if self.output_length else self._passed

        return forward

    def learn_output(self, call: Call) -> None:
        """Run the first block on one sample to find whether blocks return a tensor or a tuple."""
        args, kwargs = self.entering(take_samples(call, torch.arange(1)), 0)
        with torch.no_grad():
            output = self.block(0)(*args, **kwargs)
        if not isinstance(output, (Tensor, tuple)):
            raise ConfigError(
                f"a block must return a tensor, or a tuple that begins with one, got {type(output).__name__} "
                f"({self.name_of(0)})"
            )
        self.output_length = len(output) if isinstance(output, tuple) else 0

    def entering(self, call: Call, index: int) -> Call:
        """Return the arguments of a block in a call of the model; the states are correct only for the first block."""
        call = on_device(call, self.device)
        self._stop, self._passed, self._injected = index, None, None
        with torch.no_grad(), suppress(_Reached):
            self.model(*call[0], **call[1])
        if not self._entering:
            raise ConfigError(f"the model must call all its blocks, got none of this one ({self.name_of(index)})")
        return self._entering.pop()

    def outputs(self, call: Call, states: Tensor) -> Any:
        """Return the model's output for these outputs of the last block."""
        call, states = on_device((call, states), self.device)
        self._stop, self._passed, self._injected = None, None, states
        with torch.no_grad():
            return self.model(*call[0], **call[1])


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a folder; DataError if one is missing or damaged."""
    if not folder.is_dir():
        raise DataError(
            f"the source must be a folder on this machine, got none of that name; of a model on the hub, "
            f"huggingface_hub.snapshot_download returns it ({folder})"
        )
    index = read_json(folder / INDEX, "an index of weights")
    if index is None and not (folder / SINGLE).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        raise DataError(
            f"a folder of weights must hold {SINGLE} or {INDEX}, got {others[0] if others else 'neither'}; "
            f"from_pretrained and then save_pretrained of Transformers write them ({folder})"
        )
    with reading(folder / (SINGLE if index is None else INDEX), "an index of weights", "with a weight_map"):
        names = {SINGLE} if index is None else {*index["weight_map"].values()}
    files = [folder / name for name in sorted(names)]
    for path in files:
        with reading(path, "a file of weights", "of safetensors"), safe_open(str(path), "pt"):
            pass
    return files


def _precision_of(files: Sequence[Path]) -> torch.dtype | str:
    """Return the type of the first floating-point tensor in the files; the config may name another one."""
    for path in files:
        with safe_open(str(path), "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                dtype: torch.dtype = opened.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype
    return "auto"


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide the progress bars of Transformers and the warnings of accelerate about weights on the disk."""
    from transformers.utils import logging as shown

    shows, least = shown.is_progress_bar_enabled(), logging.root.manager.disable
    shown.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(least)
        if shows:
            shown.enable_progress_bar()


def empty_model(kind: Any, config: Any) -> Any:
    """Build a model from a config, with parameters on the meta device."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return kind._from_config(copy.deepcopy(config))


def _without_weights(folder: Path) -> Any:
    """Build the model by a folder's config, without weights."""
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
    except Exception as error:  # Transformers 5 raises errors of its own classes
        told = " ".join(str(error).split())
        raise ConfigError(
            f"a config must be one that Transformers builds {names[0]} by, got: {told} ({path})"
        ) from error
    model.tie_weights()
    return model


def _blocks_of(model: Any, folder: Path) -> str:
    """Return the name of the list of blocks with the most parameters."""
    cure, place = "nni_topo.shrink takes it in memory", f"{type(model).__name__}, {folder}"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(f"a model must have one list of blocks, got an encoder and a decoder; {cure} ({place})")
    found: dict[str, tuple[int, nn.ModuleList]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1:
            found[name] = sum(each.numel() for each in module.parameters()), module
    rule = "a model must have a list of at least two blocks of one class with the same tensors (nn.ModuleList)"
    if not found:
        raise ConfigError(f"{rule}, got none; {cure} ({place})")
    name = max(found, key=lambda each: found[each][0])
    first, *others = found[name][1]
    shapes = {key: value.shape for key, value in first.state_dict().items()}
    for index, other in enumerate(others, 1):
        own = {key: value.shape for key, value in other.state_dict().items()}
        if type(other) is not type(first) or own != shapes:
            got = f"{type(first).__name__} and another {type(other).__name__} as {name}.0 and {name}.{index}"
            raise ConfigError(f"{rule}, got {got}; {cure} ({place})")
    return name


def states_in(call: Call) -> Tensor:
    """Return the states among the arguments of a block."""
    states: Tensor = call[0][0] if call[0] else call[1][STATES]
    return states


def with_states(call: Call, states: Any) -> Call:
    """Return arguments of a block with other states."""
    args, kwargs = call
    return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, STATES: states})


def states_of(output: Any) -> Tensor:
    """Return the states in the output of a block."""
    return tensors_of(output)[0]
