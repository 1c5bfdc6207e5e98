"""The reference of `zoo`, which shares no code with what it judges: hooks zero channels of the original network."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

PRUNED = (nn.modules.conv._ConvNd, nn.Linear, nn.RNNBase)
DETECTING = {f"{each}_predictor" for each in ("roi_heads.box", "roi_heads.mask", "roi_heads.keypoint")} | {
    "head", "rpn.head"
}  # fmt: skip
READ = (nn.modules.conv._ConvNd, nn.Linear)  # of which a forward may read the weights
BY_CHANNEL = (nn.modules.batchnorm._NormBase, nn.PReLU, *PRUNED)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def width(module: nn.Module) -> int:
    """Count a layer's output channels, or the units of a recurrent one."""
    if isinstance(module, nn.RNNBase):
        return module.hidden_size
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def used_weight(module: Any) -> Tensor:
    """Return the weight that a layer convolves with, which its forward may compute, as weight standardization does."""
    seen = [module.weight]
    if isinstance(module, nn.Conv2d) and not type(module).__module__.startswith("torch."):
        plain = nn.functional.conv2d

        def look(x: Tensor, weight: Tensor, *others: Any, **named: Any) -> Tensor:
            seen.append(weight)
            return plain(x, weight, *others, **named)

        nn.functional.conv2d = look
        try:
            with torch.no_grad():
                module(torch.zeros(1, module.in_channels, 16, 16).to(module.weight))
        finally:
            nn.functional.conv2d = plain
    return seen[-1].detach()


def by_output(module: nn.Module) -> np.ndarray:
    """Return a layer's weights with one row an output channel; of a recurrent one those of a gate."""
    if isinstance(module, nn.RNNBase):
        return module.weight_ih_l0[: module.hidden_size].detach().numpy()
    weight = used_weight(module)
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        weight = weight.unflatten(0, (module.groups, -1)).transpose(1, 2).flatten(0, 1)
    return weight.flatten(1).numpy()


def rows_left(original: np.ndarray, dense: np.ndarray) -> np.ndarray:
    """Find the rows of a matrix of which another holds some entries: int, one for each row of the other."""
    # A value may occur in several rows, and each of them has a vote; but one row holds all of some entries.
    columns = np.unique(np.linspace(0, dense.shape[1] - 1, 15).astype(int))
    sought, values = dense[:, columns], original.reshape(-1)
    places = _places_of(values, sought)
    order = places[np.argsort(values[places], kind="stable")]
    ordered = values[order]
    ends = [np.searchsorted(ordered, sought, side=side) for side in ("left", "right")]
    found = []
    for firsts, lasts in zip(*ends, strict=True):
        ranks = np.concatenate([np.arange(*each) for each in zip(firsts, lasts, strict=True)])
        found.append(np.bincount(order[ranks] // original.shape[1]).argmax())
    return np.array(found)


def _places_of(values: np.ndarray, sought: np.ndarray) -> np.ndarray:
    """List where an array may hold any of some values, and surely all places that do: few are left to be sorted."""
    table = np.zeros(2**22, dtype=bool)

    def low_bits(floats: np.ndarray) -> np.ndarray:
        return (floats + 0.0).view(f"i{floats.itemsize}") & (len(table) - 1)  # of zero and minus zero the same

    table[low_bits(sought)] = True
    size = 2**20
    parts = [np.flatnonzero(table[low_bits(values[start : start + size])]) for start in range(0, len(values), size)]
    return np.concatenate([part + rank * size for rank, part in enumerate(parts)])


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """List parameters and buffers by all of their names."""
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    return [*parameters, *buffers]


def zeroing(model: nn.Module, dense: nn.Module) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Find the channels that are gone, of layers and norms: bool, by name; and zero what is gone of all else."""
    layers, norms = {}, {}
    # By all names: RT-DETR holds the layers that make boxes in two places.
    named = model.named_modules(remove_duplicate=False)
    holders = [name for name, module in named if isinstance(module, (*PRUNED, *NORMS))]
    others = dict(_tensors(dense))
    for name, tensor in _tensors(model):
        owner, _, key = name.rpartition(".")
        if owner not in holders and tensor.shape != (other := others[name]).shape:
            (d,) = (d for d, size in enumerate(tensor.shape) if size != other.shape[d])
            rows, rows_of_other = (
                each.detach().transpose(0, d).reshape(each.shape[d], -1).numpy() for each in (tensor, other)
            )
            # A frozen norm as it was made: its buffers tell no channels apart, and leave zeros as they are.
            if isinstance(tensor, nn.Parameter) or len(np.unique(rows, axis=0)) == len(rows):
                kept = torch.zeros(tensor.shape[d]).index_fill_(0, torch.from_numpy(rows_left(rows, rows_of_other)), 1)
                # What is tied to it may keep more.
                view = [-1 if each == d else 1 for each in range(tensor.dim())]
                left = tensor.detach() * kept.view(view).to(tensor.dtype)
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(model.get_submodule(owner), key, nn.Parameter(left) if is_parameter else left)
    for name, module in model.named_modules():
        other = dense.get_submodule(name)
        if isinstance(module, PRUNED) and width(other) < width(module):
            gone, left = np.ones(width(module), dtype=bool), by_output(other)
            # A channel without weights is one that is gone: it only brings the next layer what all of these do.
            gone[rows_left(by_output(module), left[left.any(1)])] = False
            layers[name] = gone
            if isinstance(module, nn.RNNBase):  # its units read one another at the next step
                for parameter in module.parameters():
                    parameter.data.unflatten(0, (-1, len(gone)))[:, torch.from_numpy(gone)] = 0
        # A convolution of another class may standardize its weight.
        is_plain = isinstance(module, nn.Linear) or type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        if is_plain and getattr(module, "groups", 1) == 1:
            # It reads nothing of channels that are gone, whatever they are by then.
            if other.weight.shape[1] < module.weight.shape[1]:
                kept = torch.from_numpy(~layers.get(name, np.zeros(len(module.weight), dtype=bool)))
                columns = (each.detach().transpose(0, 1).flatten(1) for each in (module.weight[kept], other.weight))
                gone = np.ones(module.weight.shape[1], dtype=bool)
                gone[rows_left(*(each.numpy() for each in columns))] = False
                module.weight.data[:, torch.from_numpy(gone)] = 0
        elif isinstance(module, NORMS) and isinstance(module.weight, Tensor) and len(other.weight) < len(module.weight):
            kept, whole = ([*zip(*(p.tolist() for p in each.parameters()), strict=True)] for each in (other, module))
            assert len({*whole}) == len(whole), "channels must be told apart by their parameters"
            norms[name] = np.array([pair not in {*kept} for pair in whole])
    return layers, norms


def _narrowed(narrow: Any, _: nn.Module, entered: tuple[Any, ...], output: Tensor) -> Tensor:
    """Return what a norm gives that doesn't see the channels that are gone, which are zero everywhere."""
    (x,) = entered
    whole = output.shape
    width = max((each.numel() for each in narrow.parameters()), default=0) or narrow.normalized_shape[0]
    for dim in (x.dim() - 1, 1):
        rows = x.movedim(dim, 0).flatten(1)
        kept = rows.ne(0).any(1).nonzero().flatten()
        if len(kept) == width < len(rows):
            return torch.zeros(whole).to(output).index_copy(dim, kept, narrow(x.index_select(dim, kept)))
    return output


def _along_left(layer: Any, entered: tuple[Any, ...], output: Tensor) -> Tensor:
    """Return what a convolution along channels gives on those that aren't zero everywhere."""
    (x,) = entered
    kept = x.ne(0).flatten(0, 1).any(0).nonzero().flatten()
    return torch.zeros_like(output).index_copy(2, kept, layer.forward(x.index_select(2, kept)))


def zeroed_outputs(model: nn.Module, dense: nn.Module, gone: dict[str, np.ndarray], inputs: Any) -> Any:
    """Run a network in which hooks zero channels, and what makes them where a layer of which no call is seen does.

    Norms over channels are the dense network's, on the channels that are left.
    """
    handles, seen = [], set[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d) and module.in_channels == module.out_channels == 1:
            handles.append(module.register_forward_hook(_along_left))  # ECA's
        own, other = [*module.parameters()], dense.get_submodule(name)
        if not own and getattr(module, "normalized_shape", 0) != getattr(other, "normalized_shape", 0):
            handles.append(module.register_forward_hook(partial(_narrowed, other)))  # OLMo's, which has no parameters
        is_norm = own and all(max(each.shape) == each.numel() for each in own) and not [*module.children()]
        if is_norm and own[0].shape != next(other.parameters()).shape and not isinstance(module, BY_CHANNEL):
            handles.append(module.register_forward_hook(partial(_narrowed, other)))
    for name, channels in gone.items():
        module = model.get_submodule(name)
        if isinstance(module, nn.RNNBase):
            continue
        first = type(module).__name__.endswith("2d") or getattr(module, "data_format", "") == "channels_first"
        last = isinstance(module, (nn.Linear, nn.LayerNorm)) and not first

        def hook(
            _: Any, __: Any, output: Tensor, name: str = name, channels: np.ndarray = channels, last: bool = last
        ) -> Tensor:
            seen.add(name)
            kept = torch.from_numpy(~channels).to(output)
            last = last and output.shape[-1] == len(channels)  # not where a text's layer norm has the channels first
            return output * (kept if last else kept.view(-1, *[1] * (output.dim() - 2)))

        handles.append(module.register_forward_hook(hook))
    with torch.no_grad():
        outputs = run(model, inputs)
        # Attention, and Mamba, may compute with the weights of their layers by themselves.
        unseen = [name for name in gone.keys() - seen if isinstance(model.get_submodule(name), READ)]
        for name in unseen:
            for parameter in model.get_submodule(name).parameters():
                parameter[torch.from_numpy(gone[name])] = 0
        outputs = run(model, inputs) if unseen else outputs
    for handle in handles:
        handle.remove()
    return outputs


def run(model: nn.Module, inputs: Any) -> Any:
    """Run a network; of a detector return what its parts give, of which boxes are then chosen."""
    given: list[Any] = []
    torch.manual_seed(0)  # masked autoencoders draw what they see
    if isinstance(inputs, dict):
        plain = torch.get_default_dtype()
        torch.set_default_dtype(next(p.dtype for p in model.parameters() if p.is_floating_point()))  # CLIP's masks
        try:
            return model(**inputs)
        finally:
            torch.set_default_dtype(plain)
    # A detector takes a list of images; other networks may have a part of such a name inside.
    detects = isinstance(inputs, tuple)
    parts = [module for name, module in model.named_modules() if detects and name in DETECTING]
    handles = [part.register_forward_hook(lambda _, __, output: given.append(output)) for part in parts]
    outputs = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    for handle in handles:
        handle.remove()
    return given or outputs


def difference(expected: Any, actual: Any) -> float:
    """Measure the largest difference of two outputs, relative to the largest value of the first."""
    pairs = [torch.utils._pytree.tree_flatten(each)[0] for each in (expected, actual)]
    worst = 0.0
    for one, other in zip(*pairs, strict=True):
        if isinstance(one, Tensor):
            if one.shape != other.shape:
                return float("inf")
            if not one.numel():
                continue
            scale = float(one.abs().max())
            worst = max(worst, float((one - other).abs().max()) / (scale or 1.0))
    return worst
