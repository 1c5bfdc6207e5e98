"""From masks to a smaller dense model that computes the same."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from nni_topo.errors import NniTopoError, SpeedupError
from nni_topo.speedup.advice import way_forward
from nni_topo.speedup.channels import ChannelFlow
from nni_topo.speedup.compare import check_equal
from nni_topo.speedup.engine import DenseSpeedup
from nni_topo.speedup.inputs import Call, call_arguments, cast_floats
from nni_topo.speedup.masks import FullMasks, Masks, check_masks, check_model
from nni_topo.speedup.reference import apply_masks
from nni_topo.speedup.resolve import resolve_masks
from nni_topo.speedup.tracing import trace


def to_dense(
    model: torch.nn.Module,
    example_inputs: Any,
    masks: Masks,
    *,
    round_to: int | None = None,
    check: bool = True,
    rtol: float = 1e-4,
) -> torch.nn.Module:
    """Build the dense model that computes what the masked model does.

    Parameters
    ----------
    model : torch.nn.Module
        The trained model after ``pruner.unwrap_model()``. It isn't changed.
    example_inputs : Tensor, tuple, list or mapping of str to Any
        Inputs of the model: one tensor, positional or keyword arguments; the first dimension is the batch.
    masks : mapping of str to mapping of str to Tensor or None
        NNI's masks, ``{module: {parameter: mask}}``, of any pruner. They aren't changed.
    round_to : int, optional
        If given, every pruned layer keeps a multiple of this many channels, or all of them.
        Those with the largest weights (L1 norm over all tied layers) come back.
    check : bool, default=True
        Compare the dense model with the masked one, in evaluation mode.
    rtol : float, default=1e-4
        The largest difference allowed, relative to the largest absolute value of the masked model's output.

    Returns
    -------
    torch.nn.Module
        A new model of the same class with fewer channels, in the mode of ``model``, module by module.

    Raises
    ------
    ConfigError
        If masks, inputs or ``round_to`` can't be used.
    DataError
        If the model holds NaN or infinite values.
    SpeedupError
        If the model is still wrapped, a layer would be emptied, the output's shape would change, or
        the dense model doesn't compute what the masked one does.

    See Also
    --------
    dependency_groups : Makes pruners choose the same channels where layers meet.
    masked_model : The masked model of the comparison.

    Notes
    -----
    A channel goes as a whole: with its bias, its batch norm and the depth-wise convolution after it. This
    is why the result may differ from NNI's wrapped model, in which the batch norm's bias survives.

    Where masks of layers that share channels differ, all channels that any of them keeps are kept, with the
    weights of ``model``; a layer without a mask keeps all. A warning names them.

    Single masked weights in channels that are kept stay as zeros.

    Where a removed channel isn't zero in the masked model, the two can't be equal: behind an activation
    that isn't zero at zero (sigmoid, softplus), or in a group or layer norm, which takes its statistics
    over removed channels too. The error says which layers to leave out, or whose bias can take a constant over;
    ``check=False`` gives the dense model all the same, without the constants, to be fine-tuned.

    Cost: about one forward and one backward pass of every node on a batch of five.
    """
    check_model(model)
    call = call_arguments(example_inputs)
    full = check_masks(model, masks)
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    # NNI's speedup works by gradients, which the caller may have switched off.
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(0)
        dense, reference, kept = _build(model, call, full, round_to)
        if check:
            check_equal(reference, dense, call, kept, rtol, advise=partial(way_forward, reference, call, kept))
    return dense


def _build(
    model: torch.nn.Module, call: Call, masks: FullMasks, round_to: int | None
) -> tuple[torch.nn.Module, torch.nn.Module, dict[str, list[torch.Tensor]]]:
    """Make the dense model, its reference, and the list of what is kept of each module's output."""
    original = copy.deepcopy(model).eval()
    graph_module, args = trace(original, call)
    masks = resolve_masks(original, ChannelFlow(graph_module, args), masks, round_to)
    reference = apply_masks(original, call, masks)
    dense = copy.deepcopy(reference)
    kept = _shrink(dense, call, masks)
    for name, module in model.named_modules():
        dense.get_submodule(name).training = module.training
    return dense, reference, kept


def _shrink(dense: torch.nn.Module, call: Call, masks: FullMasks) -> dict[str, list[torch.Tensor]]:
    """Run ModelSpeedup on a model in place, in single precision where it is less: NNI knows no bfloat16."""
    tensors = [*dense.named_parameters(), *dense.named_buffers()]
    dtypes = {name: tensor.dtype for name, tensor in tensors}
    if {torch.bfloat16, torch.float16} & set(dtypes.values()):
        dense, call = dense.float(), cast_floats(call, torch.float32)
    graph_module, args = trace(dense, call)
    speedup = DenseSpeedup(dense, graph_module, args, masks)
    try:
        speedup.speedup_model()
    except NniTopoError:
        raise
    except Exception as error:
        raise SpeedupError(
            "masks must be such that NNI's ModelSpeedup can follow them, "
            f"got {type(error).__name__}: {error} ({type(dense).__name__})"
        ) from error
    for name, tensor in [*dense.named_parameters(), *dense.named_buffers()]:
        tensor.data = tensor.data.to(dtypes[name])
    return speedup.kept
