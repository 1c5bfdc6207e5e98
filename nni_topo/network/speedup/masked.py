"""The masked model, for users: what a dense one is compared with."""

from __future__ import annotations

from typing import Any

import torch

from nni_topo.errors import SpeedupError, checked
from nni_topo.network.runtime import INPUTS, MASKS, MODEL, call_arguments, check_model, leaves_models_alone
from nni_topo.network.speedup.equivalence import apply_masks
from nni_topo.network.speedup.masks import Masks, check_masks
from nni_topo.network.speedup.network import Network
from nni_topo.network.speedup.reconcile import union, with_own


@checked(model=MODEL, example_inputs=INPUTS, masks=MASKS)
@leaves_models_alone
def masked_model(model: torch.nn.Module, example_inputs: Any, masks: Masks) -> torch.nn.Module:
    """Copy a model with its masked channels at zero, through batch norms too.

    Parameters
    ----------
    model : torch.nn.Module
        The model, not wrapped by a pruner. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``.

    Returns
    -------
    torch.nn.Module
        A copy in which weights and biases are multiplied by their masks; the bias of a channel
        without weights is zero; weight and bias of a batch norm are zero for channels that arrive at it as
        zeros whatever the input, and so is the bias of a depth-wise convolution; and so are the places of a parameter
        that the model uses by itself, a position embedding say, that meet removed channels. Nothing else differs. What
        layers share, they share in the copy too unless their masks differ.

    Raises
    ------
    ConfigError
        If masks don't fit the model.
    SpeedupError
        If the model is still wrapped or a layer would be empty.
    DataError
        If the model holds NaN or infinite values.

    Notes
    -----
    The channels that arrive as zeros are found by a forward pass in which all parameters and inputs are
    positive and norms pass on what they get: there nothing cancels and no ReLU dies, so that a zero is a
    zero of the structure. It holds through concatenations, additions and shared modules alike.

    A group or layer norm takes its statistics over removed channels too, as zeros.
    """
    check_model(model)
    call = call_arguments(example_inputs, model)
    full = check_masks(model, masks)
    try:
        flow = Network(model, call).flow
    except SpeedupError:
        return apply_masks(model, call, full)
    return apply_masks(model, call, with_own(model, flow, full, union(model, flow, full)))
