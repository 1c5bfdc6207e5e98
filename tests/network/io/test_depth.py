"""Models without parts of their blocks, in files."""

from __future__ import annotations

import pytest
import torch

from nni_topo import load, save
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.io.depth import RemovedPart, removed_parts, take_out_part
from nni_topo.zoo.transformers import vit_small


def make():
    torch.manual_seed(0)
    return vit_small(3, 1, 8).eval()


def test_a_removed_part_adds_nothing_in_the_form_of_what_it_stands_for():
    states = torch.randn(2, 4, 6)
    assert torch.equal(RemovedPart()(states), torch.zeros(2, 4, 6))
    zeros, *others = RemovedPart(3)(attention_mask=None, hidden_states=states)
    assert torch.equal(zeros, torch.zeros(2, 4, 6))
    assert others == [None, None]


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_a_model_without_parts_is_read_again(ending, tmp_path):
    model, images = make(), torch.randn(3, 1, 8, 8)
    take_out_part(model, "blocks.1.attention", 0)
    take_out_part(model, "blocks.3.mlp", 0)
    assert removed_parts(model) == {"blocks.1.attention": 0, "blocks.3.mlp": 0}
    assert not model.blocks[1].attention.training
    save(model, tmp_path / f"small.{ending}")
    # The unpruned model will do, and the one without the parts.
    for base in (make(), model):
        assert torch.equal(load(tmp_path / f"small.{ending}", base)(images), model(images))


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ({"blocks.1.attention": -1}, DataError, r"how many outputs a part had, got -1 \(blocks\.1\.attention"),
        ({"blocks.9.attention": 0}, ConfigError, r"without a part that is to be taken out \(blocks\.9\.attention"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(parts, error, message, tmp_path):
    save(make(), tmp_path / "small.pt")
    document = torch.load(tmp_path / "small.pt", weights_only=True)
    torch.save({**document, "parts": parts}, tmp_path / "small.pt")
    with pytest.raises(error, match=message):
        load(tmp_path / "small.pt", make())
