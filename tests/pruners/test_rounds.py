from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from nni.compression.pruning import LevelPruner
from torch import nn

from nni_topo.errors import ConfigError
from nni_topo.pruners.rounds import Round, even_steps, prune_in_rounds
from nni_topo.testing import toy_images, toy_model

LAYERS = [{"op_names": ["inner"], "sparse_ratio": 0.9}, {"op_names": ["head"], "sparse_ratio": 0.5}]


def shake(model: nn.Module, generator: torch.Generator) -> None:
    """Move every parameter, as a training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_nnis_magnitude_pruner_in_rounds_is_iterative_magnitude_pruning():
    model = toy_model()
    pruner = LevelPruner(model, LAYERS)
    generator = torch.Generator().manual_seed(0)
    kept: list[torch.Tensor] = []

    def train() -> None:
        mask = pruner.get_masks()["inner"]["weight"].bool()
        weight = model.inner._nni_wrapper.weight
        assert bool((weight[~mask] == 0).all())
        kept.append(mask)
        with torch.no_grad():  # only what is kept learns: masked weights have no gradient
            before = weight.clone()
            shake(model, generator)
            weight[~mask] = before[~mask]

    rounds = prune_in_rounds(pruner, even_steps(4), train)
    assert [int(mask.sum()) for mask in kept] == [576 - int(576 * (1 - 0.1 ** (i / 4))) for i in range(1, 5)]
    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(kept))
    assert rounds[-1] == Round(4, {"inner.weight": pytest.approx(58 / 576), "head.weight": 0.5})
    assert pruner._target_spaces["inner"]["weight"].sparse_ratio == 0.9


def test_steps_may_be_uneven_and_reported():
    found: list[Round] = []
    pruner = LevelPruner(toy_model(), LAYERS)
    rounds = prune_in_rounds(pruner, [0.2, 1.0], lambda: None, on_round=found.append)
    assert found == rounds
    assert rounds[0].kept["head.weight"] == pytest.approx(0.5**0.2, abs=1 / 64)


@pytest.mark.parametrize("steps", [[], [0.0, 1.0], [0.5, 0.5], [1.0, 0.5], [1.5], [float("nan")]])
def test_bad_steps_are_refused(steps):
    with pytest.raises(ConfigError, match="rising numbers"):
        prune_in_rounds(LevelPruner(toy_model(), LAYERS), steps, lambda: None)


def test_a_pruner_without_ratios_is_refused():
    pruner = LevelPruner(toy_model(), [{"op_names": ["inner"], "sparse_threshold": 0.1}])
    with pytest.raises(ConfigError, match="a target with a sparse_ratio, got none"):
        prune_in_rounds(pruner, even_steps(2), lambda: None)


def test_a_training_that_fails_leaves_the_final_ratios():
    pruner = LevelPruner(toy_model(), LAYERS)

    def train() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        prune_in_rounds(pruner, even_steps(3), train)
    assert pruner._target_spaces["inner"]["weight"].sparse_ratio == 0.9


class Tied(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.b.weight = self.a.weight
        self.d = self.c
        self.e = nn.Linear(8, 8)

    def forward(self, inputs):
        return self.e(self.d(self.c(self.b(self.a(inputs)))))


@pytest.mark.parametrize("names", [["e"], ["a"], ["a", "b"], ["c", "e"], ["d"]])
def test_shared_weights_are_rewound(names):
    torch.manual_seed(0)
    model = Tied()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    pruner = LevelPruner(model, [{"op_names": names, "sparse_ratio": 0.5}])
    generator = torch.Generator().manual_seed(0)
    seen = []

    def train() -> None:
        for name in start:
            module, _, tensor = name.rpartition(".")
            layer = model.get_submodule(module)
            holder = getattr(layer, "_nni_wrapper", layer)
            value = getattr(holder, tensor, None)
            value = getattr(layer, tensor) if value is None else value
            kept = value != 0
            seen.append(torch.equal(value[kept], start[name][kept]))
        shake(model, generator)

    prune_in_rounds(pruner, even_steps(2), train, rewind=start)
    assert seen == [True] * 2 * len(start)


@pytest.mark.parametrize("state", [{"head.wait": torch.ones(1)}, {"head.bias": torch.ones(1)}, {"head.bias": 3}])
def test_states_that_do_not_fit_are_refused_before_anything_is_pruned(state):
    model = toy_model().eval()
    pruner = LevelPruner(model, LAYERS)
    before = model(toy_images(4))
    with pytest.raises(ConfigError, match=r"rewind must hold tensors of the model's names and shapes.*\(head\."):
        prune_in_rounds(pruner, even_steps(2), lambda: None, rewind=state)
    assert torch.equal(model(toy_images(4)), before)


def test_threshold_targets_are_silenced_and_recorded_too():
    model = toy_model()
    pruner = LevelPruner(model, [LAYERS[0], {"op_names": ["head"], "sparse_threshold": 0.05}])
    rounds = prune_in_rounds(pruner, even_steps(2), lambda: None)
    mask = pruner.get_masks()["head"]["weight"]
    assert 0 < mask.mean() < 1
    assert rounds[-1].kept["head.weight"] == pytest.approx(float(mask.mean()))
    assert bool((model.head._nni_wrapper.weight[mask == 0] == 0).all())
