from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.pruners.genetic_weight.pruner import GeneticWeightPruner
from nni_topo.studies.analysis.evolution import EvolutionStudy, EvolutionTrial
from nni_topo.studies.study import save_figures


def trial(damage_rate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))
    images = torch.randn(64, 10)
    batches = [(images, model(images).argmax(1).detach())]
    search = {"damage_rate": damage_rate, "population_size": 6, "generations": 4}
    pruner = GeneticWeightPruner(model, [{"op_names": ["0"]}], validation=batches, search=search)
    with pytest.raises(ConfigError, match="a search must have run"):
        assert pruner.evolution
    _, masks = pruner.compress()
    pruner.unwrap_model()
    return EvolutionTrial.of(pruner), masks["0"]["weight"], model[0].weight


@pytest.mark.slow
def test_a_trial_holds_the_search_and_gives_the_pictures(tmp_path, drawn):
    first, mask, weight = trial(0.1)
    assert first.kept.reshape(8, 10).tolist() == mask.bool().tolist()
    assert torch.equal(torch.from_numpy(first.weights).view(8, 10), weight.detach())
    line = first.line("fitness")
    assert line.generation.tolist() == [0, 1, 2, 3, 4]
    assert line.fitness.iloc[-1] == first.history.query("generation == 4").fitness.max()
    trials = {"10 %": first, "50 %": trial(0.5)[0]}
    files = save_figures(tmp_path / "new", EvolutionStudy(trials).figures())
    assert [file.stem for file in files] == [
        "distributions", "fitness", "progress", "heatmap", "weights", "histograms", "solutions",
    ]  # fmt: skip
    assert sorted(drawn) == sorted(file.name for file in files)
    for index, (label, found) in enumerate(trials.items()):
        check_panels(drawn, index, label, found)
    solutions = drawn["solutions.png"].axes[0]
    assert [dots.get_label() for dots in solutions.collections] == list(trials)
    assert drawn.lines("solutions.png") == {"fitness 0": [(0.0, 0.0), (100.0, -100.0 * first.beta / first.alpha)]}


def check_panels(drawn, index, label, found):
    """What the pictures show of one trial."""
    history, last = found.history, found.history.query("generation == 4")
    panel = drawn["distributions.png"].axes[index]
    assert panel.get_title() == label
    spread = history.groupby("generation").fitness.std()
    assert [note.get_text() for note in panel.texts] == [str(g) for g in spread.index[spread > 0]]
    assert len(panel.get_lines()) == (spread > 0).sum()
    courses = {("fitness.png", index): "fitness"}
    courses |= {("progress.png", 2 * index): "accuracy", ("progress.png", 2 * index + 1): "compression"}
    for (name, place), column in courses.items():
        curves = drawn.lines(name, place)
        means = history.groupby("generation")[column].mean()
        assert [y for _, y in curves["mean"]] == means.tolist()
        for by in ("fitness", "accuracy"):
            assert [y for _, y in curves[f"top {by}"]] == found.line(by)[column].tolist()
    picture = drawn["heatmap.png"].axes[0].images[0].get_array()
    kept = np.where(found.kept, np.abs(found.weights), 0.0)
    np.testing.assert_allclose(picture[:, index], kept, rtol=1e-6)
    before, after = drawn["histograms.png"].axes[index].containers
    assert sum(bar.get_height() for bar in before) == len(found.weights)
    assert sum(bar.get_height() for bar in after) == found.kept.sum()
    dots = drawn["solutions.png"].axes[0].collections[index].get_offsets()
    points = np.stack([100 * last.compression, 100 * (last.accuracy - found.start_accuracy)], axis=1)
    np.testing.assert_allclose(dots, points)


def test_a_summary_holds_the_first_and_the_last_population():
    found = trial(0.5)[0]
    table = found.summary()
    for name, generation in (("initial", 0), ("final", 4)):
        for column in ("fitness", "accuracy", "compression"):
            values = found.history[found.history.generation == generation][column]
            assert table.loc[name, column].tolist() == pytest.approx([values.min(), values.mean(), values.max()])
