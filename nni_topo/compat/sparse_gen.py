"""A patch of how NNI makes the masks of targets that follow others."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import torch
from nni.compression.pruning.tools import sparse_gen


def mask_biases_of_norms() -> bool:
    """Mask the bias of a norm with its weight.

    Place: ``nni/compression/pruning/tools/sparse_gen.py``, ``_generate_align_sparsity``. Cause: a bias gets the sums of
    its weight's mask over all dimensions but the first. A norm's weight has one dimension, and PyTorch sums over all
    dimensions if none is named, so that the bias was masked if the whole weight was, and else not at all.
    """
    if torch.ones(2).sum([]).dim():
        return False
    generate = sparse_gen._generate_align_sparsity

    @functools.wraps(generate)
    def generate_aligned(masks: Any, target_spaces: Any) -> Any:
        aligned: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
        for name, spaces in target_spaces.items():
            for target, space in spaces.items():
                of, source, dims = space.align["module_name"] or name, space.align["target_name"], space.align["dims"]
                mask, sources = masks.get(of, {}).get(source), masks
                if mask is not None and mask.dim() == len(dims) and min(dims) >= 0:
                    sources = {of: {source: mask.unsqueeze(-1)}}  # with a dimension to sum over
                aligned[name].update(generate(sources, {name: {target: space}})[name])
        return aligned

    sparse_gen._generate_align_sparsity = generate_aligned
    return True
