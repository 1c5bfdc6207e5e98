"""Lists of numbers in configs that modules share."""

from __future__ import annotations

import pytest
from torch import nn

from nni_topo.network.layers.integer_attributes import numbers_read


class Config:
    """Numbers as a config of Transformers holds them."""

    def __init__(self, **held):
        vars(self).update(held)

    def to_dict(self=None):
        return {}


class Holder(nn.Module):
    def __init__(self, config, **parts):
        super().__init__()
        self.config = config
        for name, part in parts.items():
            self.add_module(name, part)


INNER, OUTER = Config(sizes=[1, 2]), Config(sizes=(3,), width=8, names=["a"], depths=[4, 5])
CONFIGS = {
    "of modules within one another": (Holder(INNER, a=Holder(INNER, b=Holder(INNER))), [("", "config.sizes")]),
    "of modules beside each other": (
        nn.Sequential(Holder(INNER), Holder(INNER), Holder(OUTER)),
        [("2", "config.sizes"), ("2", "config.depths")],
    ),
    "in another one": (Holder(Config(text=INNER, dims=[6]), a=Holder(INNER)), [("", "config.dims")]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_lists_of_a_config_are_those_of_the_module_that_holds_all_the_others(name):
    model, found = CONFIGS[name]
    assert [(name, key) for _, name, key, _ in numbers_read(model)] == found
