"""The list of ``make packages``: public classes of other people's packages, each built small with its own example call.

The rule: every class that the named modules of a package export and that the package's own tests build. Each module
beside this one names these modules and tests at its head. The list was committed before nni_topo had been run on it,
and no class is taken out: one that can't be built here, because it needs a further package or a download, has that as
its outcome. Weights are random, and nothing is downloaded.
"""

from __future__ import annotations

import importlib

from benchmarks.packages.examples import Build, Listed

PACKAGES = {
    "open_clip": ("language", "clip_classes"),
    "sentence-transformers": ("language", "sentence_classes"),
    "transformers": ("language", "transformers_classes"),
    "torchaudio": ("audio", "classes"),
    "torch_geometric": ("geometric", "classes"),
    "segmentation_models_pytorch": ("segmentation", "classes"),
    "torchvision": ("vision", "torchvision_classes"),
    "timm": ("vision", "timm_classes"),
    "diffusers": ("diffusion", "classes"),
    "speechbrain": ("speech", "classes"),
    "monai": ("monai_nets", "classes"),
    # Not in the list, and not counted in all: added when the first run had shown how much narrow MLPs decide.
    "transformers, wider MLPs": ("language", "wide_transformers_classes"),
}
"""By package the module with its list, and the function that returns it."""


def listed(package: str) -> list[Listed]:
    """Return the classes of a package in the order of its list."""
    module, function = PACKAGES[package]
    builds: dict[str, Build] = getattr(importlib.import_module(f"benchmarks.packages.{module}"), function)()
    return [Listed(package, name, build) for name, build in builds.items()]
