"""The commands of docs/sources.md for the sources' own data sets run, on generated files of the same formats."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_imagenet

from nni_topo import zoo
from nni_topo.cli import main

PROJECT = Path(__file__).parent.parent
PAGE = (PROJECT / "docs" / "sources.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^nni-topo (.*(?:DIR).*)$", PAGE, re.M)


def write_mnist(folder: Path) -> None:
    """Write MNIST's four files: big-endian sizes after a magic number whose last bytes are type and dimensions."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 50)):
        images = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        header = np.array([0x00000803, count, 28, 28], dtype=">u4").tobytes()
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = (np.arange(count) % 10).astype(np.uint8)
        header = np.array([0x00000801, count], dtype=">u4").tobytes()
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split("runs/")[1])
def test_the_command_runs(command, cifar10, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(PROJECT)
    folder = tmp_path / "data"
    if "--data cifar10" in command:
        folder = cifar10(40)
    elif "mnist" in command:
        write_mnist(folder)
    else:
        write_imagenet(folder, classes=3, train=11, val=2, size=(80, 76))
    name = re.search(r"--model (\S+)", command)[1]
    weights = tmp_path / "weights.pt"
    if "WEIGHTS" in command:
        net = zoo.create_model(name, num_classes=3, in_channels=3, image_size=64, seed=0)
        torch.save(net.state_dict(), weights)
    out = tmp_path / "out"
    # The size alone is another: a convolution at 64 pixels takes an eighth of the time at 224.
    command = command.replace("--image-size 224", "--image-size 64")
    words = shlex.split(command.replace("DIR", str(folder)).replace("WEIGHTS", str(weights)))
    words[words.index("--out") + 1] = str(out)
    # sums of generated files are not CIFAR's, which only this process is told
    assert main(words) == 0, capsys.readouterr().err
    assert any(out.rglob("*.json*"))
