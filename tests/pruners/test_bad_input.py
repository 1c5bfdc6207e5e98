"""Input that a pruner can't work with: named errors, the model as it was, and errors on the way."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import distributed, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh

import nni_topo
from nni_topo.errors import ConfigError, NniTopoError
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.testing import toy_knobs, toy_model

HALF = [{"op_names": ["stem", "hidden"], "sparse_ratio": 0.5}]
OWN = [name for name in list_pruners() if pruner_info(name).origin == "nni_topo"]


def knobs_of(name, model):
    """What a pruner needs to run on the toy network."""
    info = pruner_info(name)
    if name == "genetic_weight":
        return {"evaluate": lambda model: 1.0, "search": {"generations": 1, "population_size": 2}}
    return toy_knobs(info.knobs(), info.needs)


def is_wrapped(model):
    return any(hasattr(module, "_nni_wrapper") for module in model.modules())


def refused(name, model, config_list, words, **knobs):
    """Create a pruner, and compress; the error leaves the model with its names, values and classes as they were."""
    before, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    config = copy.deepcopy(config_list)
    with pytest.raises(NniTopoError, match=words):
        nni_topo.create_pruner(name, model, config_list, **{**knobs_of(name, model), **knobs}).compress()
    assert not is_wrapped(model)
    assert [type(module) for module in model.modules()] == kinds
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert config_list == config


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"op_names_re": ["("]}, r"op_names_re must be .*a regular expression, got \['\('\] \(config_list\[0\]\)"),
        ({"op_names": "stem"}, "op_names must be a list, each value a str, got 'stem'"),
        ({"target_names": ["bias"]}, r"a rule of its own, got bias without stem.weight \(stem.bias\)"),
        ({"target_names": ["weigth"]}, "target of stem .*did you mean weight"),
        ({"target_settings": {"stride": {"apply_method": "mul"}}}, "must be a tensor of its layer, got a tuple"),
        ({"target_settings": {"weight": {"sparse_ratio": 2.0}}}, r"got 2.0 \(config_list\[0\].target_settings.weight"),
        ({"granularity": [5, 5]}, "granularity must divide the target's shape"),
        ({"granularity": "per_channel"}, "granularity of parameters must be another one, got 'per_channel'"),
        ({"granularity": "out"}, "granularity must be a known name, got 'out'; did you mean out_channel?"),
        ({"sparse_ratio": float("nan")}, r"sparse_ratio must be in \[0, 1\), got nan"),
        ({"min_sparse_ratio": 0.6, "max_sparse_ratio": 0.4}, "min_sparse_ratio must"),
        ({"internal_metric_block": 0}, "internal_metric_block must be an integer of at least 1"),
        ({"dependency_group_id": ["a"]}, "dependency_group_id must be a str or an int"),
        ({"apply_method": "divide"}, "apply_method must be a known name"),
    ],
)
def test_a_config_list_is_checked_key_by_key(changes, words):
    refused("random", toy_model(), [{"op_names": ["stem"], "sparse_ratio": 0.5, **changes}], words)


@pytest.mark.parametrize("name", OWN)
def test_a_target_has_one_entry(name):
    entries = [{"op_names": ["stem"], "sparse_ratio": 0.5}, {"op_types": ["Conv2d"], "sparse_ratio": 0.25}]
    words = r"one config_list entry, got config_list\[0\] and config_list\[1\] \(stem.weight\)"
    refused(name, toy_model(), entries, words)


@pytest.mark.parametrize("name", [name for name in OWN if pruner_info(name).structured])
def test_groups_of_unequal_widths_and_layers_of_no_size_are_refused_before_anything_runs(name):
    group = [{"op_names": ["stem", "hidden"], "sparse_ratio": 0.5, "dependency_group_id": 1}]
    refused(name, toy_model(), group, "one number of blocks, got 16, 8")
    with pytest.warns(UserWarning, match="zero-element"):
        model = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 4))
    refused(name, model, [{"op_names": ["0"], "sparse_ratio": 0.5}], r"must have weights, got none \(0\)")


@pytest.mark.parametrize("name", OWN)
def test_a_batch_norm_is_pruned_or_refused_by_name(name):
    model = toy_model()
    config = [{"op_types": ["BatchNorm2d"], "sparse_ratio": 0.5}]
    if name in ("random", "matrix", "perera2022", "topological"):
        _, masks = nni_topo.create_pruner(name, model, config, **knobs_of(name, model)).compress()
        assert float(masks["norm"]["weight"].mean()) == 0.5
    else:
        refused(name, model, config, r"BatchNorm2d.*norm|\(norm.weight\)")


BAD_KNOBS = {
    "seed": (-1, 1.5, True),
    "round_to": (0, 2.5),
    "progress": ("yes", 1),
    "n_jobs": (0, 1.5, "all"),
    "example_inputs": ("image", 3, []),
    "calibration": ("abc", 5),
    "budget": (0.5, {"flops": 2.0}, {"flop": 0.5}),
    "algorithm": ("kmean", None),
    "survivor": ("weigth", []),
    "graph": ("knm", None),
    "bias": ("no", 1),
    "energy": (1.0, "half", {"hidden": 2.0}, None),
    "growth": (3, {"bins": 0}, {"recursive": "no"}, {"initial_ratio": "few"}),
    "cloud": ("functionals", 3, ["weight"], {"origin": 1}, {"preprocess": "scale"}),
    "criterion": ("hausdorf", 3, ["cover"]),
    "homology_dimensions": ((), 3, (-1,), ("0",)),
    "solver": (3, {"mutation_probability": "often"}, {"generation": 5}, {"population_size": 1}),
    "search": (7, {"weakest_rate": "much"}, {"greedy_start": 1}),
    "combine": ("mean", 1),
    "preprocess": ("scale", 1),
    "sequential": ("no", 1),
    "norm": (3, True, "2"),
    "signal": ("noise", {"sweep": []}),
    "on_subcritical": ("warn", 1),
    "conv_graph": ("matrix", []),
    "validation": (3,),
    "evaluate": (2.5,),
}


@pytest.mark.parametrize(("name", "knob"), [(name, knob) for name in OWN for knob in pruner_info(name).knobs()])
def test_every_knob_of_every_pruner_has_its_rule(name, knob):
    for value in BAD_KNOBS[knob]:
        inner = isinstance(value, dict) and next(iter(value), knob)
        refused(name, toy_model(), HALF, f"{knob}|{inner}", **{knob: value})


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize(
    "spread",
    [torch.jit.script, lambda model: torch.compile(model, backend="eager"), nn.DataParallel, lambda _: "model"],
)
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_models_that_hide_their_layers_are_refused_with_what_to_pass(name, spread):
    model = toy_model()
    with pytest.raises(ConfigError, match="pass the inner module"):
        nni_topo.create_pruner(name, spread(model), HALF, **knobs_of(name, model))


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone, over which models can be spread."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize(
    "spread",
    [
        nn.parallel.DistributedDataParallel,
        lambda model: fsdp.FullyShardedDataParallel(model, device_id=torch.device("cpu")),
        lambda model: fsdp.fully_shard(model, mesh=init_device_mesh("cpu", (1,))),
    ],
    ids=["DDP", "FSDP", "FSDP2"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.usefixtures("process_group")
def test_models_that_processes_share_are_refused_with_what_to_pass(spread):
    model = spread(toy_model())
    before = [type(module) for module in model.modules()]
    for name in OWN:
        with pytest.raises(ConfigError, match="pass the inner module"):
            nni_topo.create_pruner(name, model, HALF, **knobs_of(name, toy_model()))
    assert [type(module) for module in model.modules()] == before


class Broken(nni_topo.RandomPruner):
    """Fails while it is at work."""

    def _calculate_metrics(self, data):
        raise RuntimeError("out of paper")


def test_an_error_on_the_way_leaves_the_model_as_unwrapping_does():
    model = toy_model()
    before = copy.deepcopy(model.state_dict())
    pruner = Broken(model, HALF)
    with pytest.raises(RuntimeError, match="out of paper"):
        pruner.compress()
    assert not is_wrapped(model)
    assert list(model.state_dict()) == list(before)
    pruner.unwrap_model()
    nni_topo.RandomPruner(model, HALF).compress()


@pytest.mark.parametrize("name", ["random", "l1"])
def test_a_model_may_be_unwrapped_twice(name):
    model = toy_model()
    pruner = nni_topo.create_pruner(name, model, HALF)
    pruner.compress()
    pruner.unwrap_model()
    before = list(model.parameters())
    pruner.unwrap_model()
    assert all(ours is theirs for ours, theirs in zip(before, model.parameters(), strict=True))
