"""The safetensors files of a folder of Transformers: read tensor by tensor, and written file by file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nni_topo.disk import disk_errors, read_json, reading, whole_file, write_json
from nni_topo.errors import ConfigError, DataError, listed

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
_WHAT = "a file of weights"


class Shards:
    """The tensors of a folder, by name. Each is read when it is asked for; no file is held in memory as a whole.

    Parameters
    ----------
    folder : Path
        A folder as ``save_pretrained`` of Transformers writes it: ``model.safetensors``, or several files with
        ``model.safetensors.index.json``.

    Raises
    ------
    DataError
        If there are no such files, one that the index names is missing, or one is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
        self._files: dict[str, str] = {}  # by tensor
        if index is None:
            self._files = dict.fromkeys(self._names_in(SINGLE), SINGLE)
        else:
            files = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(files, dict) or not files or not all(isinstance(each, str) for each in files.values()):
                raise DataError(f"an index of weights must have a weight_map, got none ({folder / INDEX})")
            for file in sorted(set(files.values())):
                names = set(self._names_in(file))
                missing = [name for name, other in files.items() if other == file and name not in names]
                if missing:
                    raise DataError(
                        f"{_WHAT} must hold the tensors that {INDEX} names, got none of {listed(missing)} "
                        f"({folder / file})"
                    )
            self._files = files

    def _names_in(self, file: str) -> list[str]:
        path = self.folder / file
        with reading(path, _WHAT, "of safetensors"), safe_open(str(path), "pt") as opened:
            return list(opened.keys())

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._files)

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum((self.folder / file).stat().st_size for file in set(self._files.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by name; each file is opened once."""
        by_file: dict[str, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        found: dict[str, Tensor] = {}
        for file, own in by_file.items():
            path = self.folder / file
            with reading(path, _WHAT, "of safetensors"), safe_open(str(path), "pt") as opened:
                for name in own:
                    found[name] = opened.get_tensor(name)
        return found

    def identity(self) -> list[list[Any]]:
        """Return what tells these files from others: name, size and time of the last change of each."""
        found = []
        for file in sorted(set(self._files.values())):
            stat = (self.folder / file).stat()
            found.append([file, stat.st_size, stat.st_mtime_ns])
        return found


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write a file of tensors, whole or not at all, and return their bytes; DataError where the disk is full."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as part, disk_errors(path):
        try:
            # Transformers reads files that say they are PyTorch's.
            save_file(plain, str(part), {"format": "pt"})
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            raise (error if number is None else OSError(int(number[1]), str(error))) from error
    return sum(tensor.nbytes for tensor in plain.values())


def write_index(folder: Path, files: Mapping[str, Iterable[str]], nbytes: int) -> None:
    """Write the index of a folder: its files with the names of their tensors, and the bytes of all tensors."""
    where: dict[str, str] = {}
    for file, names in files.items():
        where |= dict.fromkeys(names, file)
    write_json(folder / INDEX, {"metadata": {"total_size": nbytes}, "weight_map": where})


def keys_by_name(model: Any, shards: Shards) -> dict[str, str]:
    """Return the names that tensors have in the files, by the names that Transformers gives them in a model.

    Transformers 5 renames tensors where a class has changed since its files were written. Tensors that it joins or
    splits are left out: no file holds them as the model does.
    """
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming
    except ImportError:  # Transformers 4 reads the names as they are
        return {key: key for key in shards.names}
    changes = get_model_conversion_mapping(model)
    found: dict[str, str] = {}
    for key in sorted(shards.names):
        name, is_whole = key, True
        for change in changes:
            name, matched = change.rename_source_key(name)
            is_whole &= matched is None or isinstance(change, WeightRenaming)
        if is_whole:
            found[name] = key
    return found


def key_of(name: str, keys: Mapping[str, str], prefix: str) -> str | None:
    """Return the name that a model's tensor has in the files: with or without the prefix of the base model."""
    # BERT's first files call the weights and biases of norms gamma and beta; Transformers reads them as well.
    older = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    for each in (name, older):
        for candidate in (each, f"{prefix}.{each}", each.removeprefix(f"{prefix}.")):
            if candidate in keys:
                return keys[candidate]
    return None


def check_float(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raise ConfigError for weights that are quantised: they have no channels that could be removed."""
    wrong = [name for name, tensor in tensors.items() if not tensor.is_floating_point()]
    if wrong:
        raise ConfigError(f"weights must be floating-point, got {tensors[wrong[0]].dtype} ({wrong[0]}, {folder})")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"weights must be finite, got NaN or infinity ({name}, {folder})")
