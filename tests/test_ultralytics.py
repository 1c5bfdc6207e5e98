"""A pruned detector goes on in ultralytics: its own validation, files and training, as the page shows them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import nni_topo
from tools import transcript

PROJECT = Path(__file__).parent.parent


@pytest.fixture
def yolo(tmp_path, monkeypatch):
    monkeypatch.setenv("YOLO_CONFIG_DIR", str(tmp_path / "config"))  # read when it is imported
    monkeypatch.setenv("YOLO_VERBOSE", "false")
    (tmp_path / "config").mkdir()
    monkeypatch.chdir(tmp_path)
    return pytest.importorskip("ultralytics")


def draw(folder: Path) -> None:
    """Draw images with a square, as a data set of ultralytics."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 16), ("val", 4)):
        images, labels = folder / "shapes/images" / part, folder / "shapes/labels" / part
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        for at in range(count):
            pixels, (x, y) = generator.integers(0, 80, (64, 64, 3), dtype=np.uint8), generator.integers(4, 36, 2)
            pixels[y : y + 24, x : x + 24] = 200, 40, 220
            Image.fromarray(pixels).save(images / f"{at}.png")
            (labels / f"{at}.txt").write_text(f"0 {(x + 12) / 64} {(y + 12) / 64} 0.375 0.375\n")
    text = f"path: {folder / 'shapes'}\ntrain: images/train\nval: images/val\nnames: {{0: square}}\n"
    (folder / "shapes.yaml").write_text(text)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_small_yolo_is_validated_exported_and_trained_by_ultralytics(yolo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    draw(tmp_path)
    text = (PROJECT / "docs" / "ultralytics.md").read_text(encoding="utf-8")
    names = {"__name__": "page"}
    said = [
        (transcript.tidy(transcript.python(code, names)), wanted)
        for code, wanted in re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.S)
    ]
    assert [re.sub(r"0\.\d+", "#", found) for found, _ in said] == [re.sub(r"0\.\d+", "#", want) for _, want in said]
    small, images = names["small"].eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        wanted = small(images)[0]
        traced = torch.jit.load(tmp_path / names["files"][0])(images)
    torch.testing.assert_close(traced, wanted, rtol=1e-4, atol=1e-4)
    session = onnxruntime.InferenceSession(tmp_path / names["files"][1])
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    # Two steps have changed the weights and no shape.
    before, after = small.state_dict(), names["tuned"].model.float().state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert before.keys() == after.keys()
    assert len(moved) > 0.9 * len([value for value in before.values() if value.is_floating_point()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "given"), [("C2f", (16, 24, 2)), ("C3k2", (16, 24, 1)), ("RepNCSPELAN4", (16, 24, 16, 8))]
)
@torch.no_grad()
def test_blocks_split_by_the_channels_that_are_left(yolo, name, given):
    block = importlib.import_module("ultralytics.nn.modules.block")
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 1), getattr(block, name)(*given), torch.nn.Conv2d(24, 2, 1))
    images = torch.randn(2, 3, 12, 12)
    groups = nni_topo.dependency_groups(model.eval(), images, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}])
    pruner = nni_topo.RandomPruner(model, groups, seed=0)
    _, masks = pruner.compress()
    pruner.unwrap_model()
    dense = nni_topo.to_dense(model, images, masks)
    assert dense[1].c == dense[1].cv1.conv.out_channels // 2 < model[1].c
    entered = dense[0](images)
    torch.testing.assert_close(dense[1].forward_split(entered), dense[1](entered))
