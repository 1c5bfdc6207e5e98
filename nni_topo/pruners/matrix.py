"""Matrix pruning: whole rows and columns of the weight matrices, by their norm.

A channel is a row of its own layer's matrix and a column (of a convolution, a stretch of columns) of each matrix that
reads it. Both go together, so the matrices stay dense and get smaller.

References
----------
.. [1] "Network Structure Pruning", AVLSI final project report, section VI (matrix-based pruning).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from nni.compression.base.wrapper import ModuleWrapper
from nni.compression.utils import Evaluator
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.hooks.matrix import JointNorm, RowColumnCollector
from nni_topo.pruners.base import StructuredPruner
from nni_topo.recovery.compensation import Method


class MatrixPruner(StructuredPruner):
    """Prune the neurons and filters whose rows and columns have the smallest norm.

    Parameters
    ----------
    model : torch.nn.Module
        Model to prune.
    config_list : list of dict
        NNI's config_list. A ratio of 0.8 in every layer leaves a fifth of the rows *and* of the columns of an inner
        matrix, so about a twenty-fifth of its weights.
    evaluator : nni.compression.utils.Evaluator or None, default=None
        Needed for scheduled pruning only.
    existed_wrappers : dict or None, default=None
        Used by ``from_compressor``.
    norm : {1, 2}, default=2
        Order of the norm.
    example_inputs : Any, default=None
        Inputs of the model, which tell who reads a channel. None: rows count alone, as for NNI's norm pruners.
    compensate, calibration, round_to
        See :class:`~nni_topo.pruners.base.StructuredPruner`.

    Raises
    ------
    ConfigError, DataError
        If a knob or the request is bad, before the model is wrapped.

    Notes
    -----
    Directly: ``compress()``. Iteratively, with training in between: as the inner pruner of NNI's ``LinearPruner`` or
    ``AGPPruner``, or by :func:`nni_topo.pruners.rounds.prune_in_rounds`; norms are then measured again each time.

    The norm is over all weights that go with a channel: its rows in all members of its dependency group, and the
    columns in all layers that read it. Batch norms don't count.

    Examples
    --------
    >>> import torch
    >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> model[0].weight.data = torch.tensor([[3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    >>> model[2].weight.data = torch.tensor([[0.0, 0.0, 4.0]])
    >>> config_list = [{"op_names": ["0"], "sparse_ratio": 0.4}]
    >>> pruner = MatrixPruner(model, config_list, example_inputs=torch.zeros(1, 2))
    >>> _, masks = pruner.compress()
    >>> masks["0"]["bias"].tolist()
    [1.0, 0.0, 1.0]
    """

    def __init__(
        self,
        model: nn.Module,
        config_list: list[dict[str, Any]],
        evaluator: Evaluator | None = None,
        existed_wrappers: dict[str, ModuleWrapper] | None = None,
        *,
        norm: Literal[1, 2] = 2,
        example_inputs: Any = None,
        compensate: Method | None = None,
        calibration: Iterable[Any] | None = None,
        round_to: int | None = None,
    ) -> None:
        if norm not in (1, 2) or isinstance(norm, bool):
            raise ConfigError(f"norm must be 1 or 2, got {norm!r} (MatrixPruner)")
        super().__init__(
            model,
            config_list,
            evaluator,
            existed_wrappers,
            collector=RowColumnCollector(norm, example_inputs),
            calculator=JointNorm(norm),
            compensate=compensate,
            calibration=calibration,
            round_to=round_to,
        )
