"""The networks of the energy benchmarks: trained once, kept as checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from nni_topo import zoo
from nni_topo.runs.choices import DataChoice, ModelChoice
from nni_topo.runs.run import build_model, load_model_data

TEST_IMAGES = 2000


@dataclass(frozen=True)
class Net:
    """What is trained, on how many images of Fashion-MNIST, and how."""

    model: ModelChoice
    images: int
    recipe: zoo.Recipe


NETS = {
    "vgg16": Net(ModelChoice("vgg16_modified", 0.25), 10_000, zoo.Recipe(12, lr=0.1, precision="bfloat16")),
    "resnet20": Net(ModelChoice("resnet20"), 5_000, zoo.Recipe(10, lr=0.2)),
    "lenet5_like": Net(ModelChoice("lenet5_like"), 10_000, zoo.Recipe(4)),
    "resnet29": Net(
        ModelChoice("networks.bottleneck_resnet:resnet29"), 5_000, zoo.Recipe(10, lr=0.2, precision="bfloat16")
    ),
}


def trained(label: str, data_dir: Path, folder: Path, seed: int = 0) -> tuple[nn.Module, zoo.DataBundle]:
    """Return a net with its data; it is trained if the folder has no checkpoint of it."""
    net = NETS[label]
    data = load_model_data(net.model, DataChoice("fashion-mnist", str(data_dir), net.images, TEST_IMAGES))
    model = build_model(net.model, data, seed)
    path = folder / (f"{label}-{seed}.pt" if seed else f"{label}.pt")
    if path.exists():
        zoo.load_checkpoint(path, model)
    else:
        log = zoo.train(model, data, net.recipe, seed=seed)
        accuracy = zoo.evaluate(model, data.test)
        zoo.save_checkpoint(path, model, {"accuracy": accuracy, "seconds": log.seconds})
        print(f"{label}: {100 * accuracy:.1f} % after {log.seconds:.0f} s", flush=True)
    return model.eval(), data
