from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError, DataError
from nni_topo.zoo import Recipe, load_data, train

DATA = load_data("digits", limit=120)
RECIPE = Recipe(epochs=4, batch_size=32, lr=0.02, augmentation="crop")


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Linear(16, 10))


class StopError(Exception):
    """Ends a training from outside."""


def stop_after(epoch: int):
    def callback(log):
        if log.epoch == epoch:
            raise StopError

    return callback


def test_a_training_that_was_ended_goes_on_to_the_same_weights(tmp_path):
    whole, broken, again = net(), net(), net()
    log = train(whole, DATA, RECIPE, seed=5)
    with pytest.raises(StopError):
        train(broken, DATA, RECIPE, seed=5, state=tmp_path / "state.pt", callback=stop_after(2))
    epochs = []
    rest = train(
        again, DATA, RECIPE, seed=5, state=tmp_path / "state.pt", callback=lambda log: epochs.append(log.epoch)
    )
    assert epochs == [3, 4]
    assert [entry.loss for entry in rest.epochs] == [entry.loss for entry in log.epochs]
    for key, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)
    # a training that is done isn't done again
    done = net()
    train(done, DATA, RECIPE, seed=5, state=tmp_path / "state.pt", callback=stop_after(1))
    assert torch.equal(done[1].weight, whole[1].weight)


def test_a_training_that_reached_its_accuracy_is_not_continued(tmp_path):
    log = train(net(), DATA, RECIPE, seed=5, state=tmp_path / "state.pt", until=0.05)
    again = train(net(), DATA, RECIPE, seed=5, state=tmp_path / "state.pt", until=0.05, callback=stop_after(2))
    assert again == log
    assert len(log.epochs) == 1


@pytest.mark.parametrize(
    ("recipe", "seed", "message"),
    [(replace(RECIPE, lr=0.03), 5, "must go on with recipe"), (RECIPE, 6, "must go on with seed 5, got 6")],
)
def test_another_training_is_refused(recipe, seed, message, tmp_path):
    train(net(), DATA, replace(RECIPE, epochs=4), seed=5, state=tmp_path / "state.pt")
    with pytest.raises(ConfigError, match=message):
        train(net(), DATA, recipe, seed=seed, state=tmp_path / "state.pt")


def test_files_that_are_no_state_of_the_model_are_refused(tmp_path):
    path = tmp_path / "state.pt"
    train(net(), DATA, RECIPE, seed=5, state=path)
    with pytest.raises(DataError, match="whole file of this training"):
        train(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), DATA, RECIPE, seed=5, state=path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(DataError, match="whole file of this training"):
        train(net(), DATA, RECIPE, seed=5, state=path)
    torch.save({"weights": torch.zeros(2)}, path)
    with pytest.raises(DataError, match="whole file of this training"):
        train(net(), DATA, RECIPE, seed=5, state=path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.pt"]
