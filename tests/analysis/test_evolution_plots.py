from __future__ import annotations

import pytest
import torch
from torch import nn

from nni_topo.analysis.evolution import EvolutionTrial, plot_evolution
from nni_topo.errors import ConfigError
from nni_topo.pruners.genetic_weight import GeneticWeightPruner


def trial(damage_rate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    images = torch.randn(64, 10)
    batches = [(images, model(images).argmax(1).detach())]
    pruner = GeneticWeightPruner(
        model, [{"op_names": ["0"]}], validation=batches, damage_rate=damage_rate, population_size=6, generations=4
    )
    with pytest.raises(ConfigError, match="a search must have run"):
        assert pruner.search
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return EvolutionTrial.of(pruner), masks["0"]["weight"], model[0].weight


def test_a_trial_holds_the_search_and_gives_the_pictures(tmp_path):
    first, mask, weight = trial(0.1)
    assert first.kept.reshape(8, 10).tolist() == mask.bool().tolist()
    assert torch.equal(torch.from_numpy(first.weights).view(8, 10), weight.detach())
    line = first.line("fitness")
    assert line.generation.tolist() == [0, 1, 2, 3, 4]
    assert line.fitness.iloc[-1] == first.history.query("generation == 4").fitness.max()
    files = plot_evolution({"10 %": first, "50 %": trial(0.5)[0]}, tmp_path / "new")
    assert [file.stem for file in files] == [
        "distributions", "fitness", "progress", "heatmap", "histograms", "solutions"
    ]  # fmt: skip
    assert all(file.stat().st_size > 5000 for file in files)


def test_no_trial_no_picture(tmp_path):
    with pytest.raises(ConfigError, match="at least one trial"):
        plot_evolution({}, tmp_path)
