from __future__ import annotations

import torch
from tied_nets import LanguageModel, TiedConvolutions, TiedNorms, TwoNames
from torch import nn

from nni_topo.sharing import find_ties, tie_again, untie


def test_places_of_one_tensor_are_listed_and_modules_with_two_names_are_one_place():
    assert find_ties(TiedConvolutions()) == [["one.weight", "two.weight"], ["one.bias", "two.bias"]]
    assert find_ties(LanguageModel()) == [["e.weight", "o.weight"]]
    assert find_ties(TwoNames()) == find_ties(LanguageModel("functional")) == []
    assert ["norm1.running_var", "norm2.running_var"] in find_ties(TiedNorms())


def test_untied_tensors_are_equal_and_of_their_own():
    model = TiedNorms()
    model.norm1.weight.requires_grad_(False)
    ties = find_ties(model)
    untie(model, ties)
    assert find_ties(model) == []
    assert isinstance(model.norm2.weight, nn.Parameter)
    assert not model.norm2.weight.requires_grad
    assert torch.equal(model.norm2.running_var, model.norm1.running_var)
    assert not isinstance(model.norm2.running_var, nn.Parameter)
    tie_again(model, ties)
    assert find_ties(model) == ties


def test_only_equal_tensors_are_tied_again():
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(4)))
    for layer in model:
        layer.weight = model[0].weight
    ties = find_ties(model)
    untie(model, ties)
    with torch.no_grad():
        model[1].weight[0, 0] += 1
    model[3].weight = model[1].weight
    tie_again(model, ties)
    assert find_ties(model) == [["0.weight", "2.weight"], ["1.weight", "3.weight"]]
    model[2].weight = nn.Parameter(torch.ones(2, 3))
    tie_again(model, ties)
    assert model[2].weight.shape == (2, 3)
