"""Pruned networks of images with norms over channels and places, exported and run at another size and batch.

By PyTorch's older exporter with dynamic axes, and by `nni_topo.export` with free height and width. The files have to
compute what the unpruned network does whose channels are masked by hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from reliability.cases import Case, call
from reliability.networks import ConvNeXtBlock, LayerNorm2d
from reliability.oracle import WrongError, kept_of, masked_by_hand
from reliability.roads import Road
from reliability.serving import pruned
from torch import Tensor, nn

import nni_topo

SIZES = (16, 24)  # of the example and of the images that the files get


class ResidualBlocks(nn.Module):
    """Two blocks of a ResNet v2 with group norms, as BiT's, and a head over all places."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Linear(16, 5)
        self.norms = nn.ModuleList(nn.GroupNorm(groups, 16) for _ in range(4))
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for at in (0, 2):
            y = self.convs[at](self.norms[at](x).relu())
            x = x + self.convs[at + 1](self.norms[at + 1](y).relu())
        found: Tensor = self.head(x.relu().mean((2, 3)))
        return found


def style_network() -> nn.Module:
    """Return Johnson's style transfer: instance norms between convolutions of stride 2 and transposed ones."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, 2, 1),
        nn.InstanceNorm2d(12, affine=True),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, 1, 1),
        nn.InstanceNorm2d(16, affine=True),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, 2, 1),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        nn.Conv2d(8, 3, 3, 1, 1),
        nn.Tanh(),
    )


class ResponseNorm(nn.Module):
    """The global response norm of ConvNeXt v2, channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        return self.gamma * (x * (lengths / (lengths.mean(-1, keepdim=True) + 1e-6))) + self.beta + x


def convnext(*, responds: bool = False) -> nn.Module:
    """Return a block of ConvNeXt, or of ConvNeXt v2, between a stem and a head."""
    block = ConvNeXtBlock(16)
    if responds:
        respond = ResponseNorm(48)
        nn.init.uniform_(respond.gamma, 0.5, 1.5)
        nn.init.normal_(respond.beta)
        block.pwconv2 = nn.Sequential(respond, block.pwconv2)
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), LayerNorm2d(16), block, LayerNorm2d(16), nn.Conv2d(16, 4, 1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a residual network with groups": lambda: ResidualBlocks(4),
    "style transfer with instance norms": style_network,
    "ConvNeXt": convnext,
    "ConvNeXt v2": lambda: convnext(responds=True),
}


def by_older_exporter(dense: nn.Module, inputs: Tensor, path: str) -> None:
    """Write an ONNX file by tracing, with a free batch, height and width."""
    axes = {"images": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(dense, (inputs,), path, dynamo=False, input_names=["images"], dynamic_axes=axes)


def by_export(dense: nn.Module, inputs: Tensor, path: str) -> None:
    """Write an ONNX file by this package, with a free batch, height and width."""
    nni_topo.export(dense, path, inputs, dynamic_dims=(0, 2, 3))


def exported(make: Callable[[], nn.Module], write: Callable[[nn.Module, Tensor, str], None]) -> None:
    """Prune a network by half, export it, and compare the file with a network masked by hand at other sizes."""
    import onnxruntime

    case = Case("files", make, lambda batch, size: torch.randn(batch, 3, size, size + 4 * (batch == 3)), SIZES)
    model = case.network()
    masks = pruned(case, model, "random", seed=1)
    dense = nni_topo.to_dense(model, case.example(), masks)
    kept = kept_of(model, dense)
    if not kept.removed:
        raise WrongError("no channels were removed")
    oracle = masked_by_hand(model, kept, masks)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "net.onnx")
        write(dense, case.example(), path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for batch, size in ((2, SIZES[0]), (1, SIZES[1]), (3, SIZES[1])):  # the last is wider than high
            inputs = case.example(batch, size, seed=5)
            with torch.no_grad():
                (wanted,) = call(oracle.model, inputs.double())
            found = torch.from_numpy(session.run(None, {name: inputs.numpy()})[0]).double()
            if found.shape != wanted.shape:
                raise WrongError(f"shape {tuple(found.shape)} instead of {tuple(wanted.shape)}")
            gap = float((found - wanted).abs().max() / wanted.abs().max())
            if not gap <= 1e-4:
                raise WrongError(f"{tuple(inputs.shape)}: {gap:.2g} of the largest output")


WRITERS = {"older exporter": by_older_exporter, "export": by_export}
ROADS = [
    Road("files", f"{name}, {how}", lambda make=make, write=write: exported(make, write))  # type: ignore[misc]
    for name, make in NETWORKS.items()
    for how, write in WRITERS.items()
]
