"""The rules of models, inputs, masks and config_lists: the last value that is taken and the first that isn't."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.ao import quantization
from torch.nn.parameter import UninitializedParameter

import nni_topo
from nni_topo.errors import ConfigError, DataError, NniTopoError
from nni_topo.network.runtime import arguments
from nni_topo.network.runtime.arguments import check_entry, check_model
from nni_topo.rules import Rule

META = torch.zeros(2, 3, device="meta")
SPARSE = torch.zeros(2, 3).to_sparse()
LAZY = UninitializedParameter()

# By key of an entry, values that can be and values that can't.
KEYS: dict[str, tuple[list[Any], list[Any]]] = {
    "sparse_ratio": ([0, 0.0, 0.999], [-0.001, 1, 1.0, "0.5", None, True, float("nan")]),
    "sparse_threshold": ([-5, 0, 1e9], [float("inf"), "0", None]),
    "max_sparse_ratio": ([0.001, 1], [0, 1.001, None]),
    "min_sparse_ratio": ([0, 0.999], [-0.001, 1, None]),
    "global_group_id": (["a", 3, 0], [1.5, None, ("a",)]),
    "dependency_group_id": (["a", 3, 0], [1.5, None, ("a",)]),
    "internal_metric_block": ([1, 7], [0, -1, 1.5, True, None]),
    "granularity": (
        [
            "default", "in_channel", "out_channel", "per_channel", [1, -1], (1, -1), [[1, -1]], [[2, 2], "front"],
            [[2], "back", 4], [[2], "back", -1], [-1],
        ],
        [
            "head", "rows", [], [[]], [0], [-2], [1.5], ["front"], [[1], "middle"], [[1], "front", 0],
            [[1], "front", 1, 1], [1, "front"], 4, None, "",
        ],
    ),
    "apply_method": (["bypass", "mul", "add"], ["sub", None, 1]),
    "align": ([{}, {"target_name": "weight"}], [[], None, "weight"]),
    "op_names": ([[], ["a", "b"]], ["a", ("a",), [1], None]),
    "op_types": ([[], ["Conv2d"]], ["Conv2d", [nn.Conv2d], None]),
    "op_names_re": ([[], ["a.*", "(b)"]], ["a.*", ["("], [3], None]),
    "exclude_op_names": ([["a"]], ["a", [1], None]),
    "exclude_op_types": ([["Conv2d"]], ["Conv2d", [1], None]),
    "exclude_op_names_re": ([["a.*"]], ["a.*", ["["], [3], None]),
    "target_names": ([["weight"]], ["weight", [1], None]),
    "target_settings": ([{}, {"weight": {}}, {"bias": {"sparse_ratio": 0.5}}], [[], {"weight": 1}, None]),
}  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_an_entrys_value_is_taken_up_to_its_bounds(key: str) -> None:
    taken, refused = KEYS[key]
    for value in taken:
        check_entry({key: value}, "config_list[0]")
    for value in refused:
        with pytest.raises(ConfigError, match=rf"^{key} must be .*\(config_list\[2\]\)$|^{key} must be a known name"):
            check_entry({key: value}, "config_list[2]")


def test_an_entry_is_a_dict_and_its_place_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^a config_list entry must be a dict, got list \(config_list\[1\]\)$"):
        arguments.CONFIG_LIST.check("config_list", [{}, []], "prune")
    with pytest.raises(
        ConfigError, match=r"^sparse_ratio must be .* got 2 \(config_list\[0\]\.target_settings\.bias\)$"
    ):
        check_entry({"target_settings": {"bias": {"sparse_ratio": 2}}}, "config_list[0]")


def test_heads_may_be_asked_of_dependency_groups_alone() -> None:
    entries: list[dict[str, Any]] = [{"granularity": "head"}, {"target_settings": {"weight": {"granularity": "head"}}}]
    for entry in entries:
        arguments.UNGROUPED.check("config_list", [entry], "here")
        arguments.UNGROUPED.check("config_list", ({"granularity": "out_channel"}, {"granularity": [1, -1]}), "here")
        with pytest.raises(ConfigError, match=r"granularity must be 'default' or .*, got 'head'"):
            arguments.CONFIG_LIST.check("config_list", [entry], "here")
    with pytest.raises(ConfigError, match="granularity must be "):
        arguments.UNGROUPED.check("config_list", [{"granularity": "heads"}], "here")


class Unset(nn.Module):
    """A layer with one parameter that isn't an ordinary one."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.odd = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)


PLAIN = nn.Linear(2, 2)
SCRIPTED = torch.jit.script(nn.Linear(2, 2))
SPREAD = nn.DataParallel(nn.Linear(2, 2))
ON_META = nn.Linear(2, 2, device="meta")
LAZY_MODEL, SPARSE_MODEL = Unset(LAZY), Unset(SPARSE)
# By rule, what it takes and what it refuses, with the class of the error and words of it.
RULES: dict[str, tuple[list[Any], list[tuple[Any, type[NniTopoError], str]]]] = {
    "MODEL": (
        [PLAIN],
        [
            (None, ConfigError, "got a NoneType"),
            (nn.Linear, ConfigError, "got the class Linear"),
            (nn.Linear(2, 2).state_dict(), ConfigError, "got an OrderedDict"),
            (SCRIPTED, ConfigError, "isn't scripted, compiled or spread over devices"),
            (SPREAD, ConfigError, "got a DataParallel"),
            (ON_META, DataError, r"one on the meta device, .*; nni_topo.shrink_pretrained .*\(weight, here\)"),
            (LAZY_MODEL, DataError, r"a lazy one, which has no shape before the model has run \(odd, here\)"),
            (SPARSE_MODEL, DataError, r"one of layout torch.sparse_coo"),
        ],
    ),
    "NETWORK": (
        [PLAIN, ON_META, SCRIPTED, SPREAD],
        [
            (None, ConfigError, "must be a torch.nn.Module, got a NoneType"),
            (LAZY_MODEL, DataError, "a lazy one"),
        ],
    ),
    "INPUTS": (
        [torch.zeros(2), [torch.zeros(2), 3], {"a": torch.zeros(1)}, (torch.zeros(0), torch.zeros(1))],
        [
            ([], ConfigError, "a tuple of arguments or a dict"),
            ({"a": 3}, ConfigError, "a tuple of arguments or a dict"),
            (None, ConfigError, "a tuple of arguments or a dict"),
            ([torch.zeros(2), META], DataError, "on the meta device"),
            ((torch.zeros(0), torch.zeros(0, 4)), DataError, r"at least one sample, got shape \(0,\)"),
        ],
    ),
    "BATCHES": (
        [[], [torch.zeros(2)], iter([]), torch.zeros(2)],
        [
            (
                None,
                ConfigError,
                r"got None: without data, nni_topo.synthetic_images\(model, example_inputs\) makes some",
            ),
            (PLAIN, ConfigError, "got a Linear"),
        ],
    ),
    "MASKS": (
        [{}, {"a": {}}, {"a": {"weight": torch.ones(2), "bias": None}}],
        [
            ([], ConfigError, "a mapping of names of modules"),
            ({1: {}}, ConfigError, r"\(1, here\)"),
            ({"a": torch.ones(2)}, ConfigError, r"\(a, here\)"),
            ({"a": {"weight": [1.0]}}, ConfigError, r"a mask must be a tensor, got list \(a.weight\)"),
            ({"a": {"bias": None, "weight": META}}, DataError, r"which has no values \(a.weight\)"),
        ],
    ),
    "DEVICE": (
        ["cpu", "cuda:1", torch.device("meta")],
        [("gpu", ConfigError, "a device's name"), (0, ConfigError, "a device's name"), (None, ConfigError, "device")],
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_what_is_handed_in_is_taken_or_refused_with_the_reason(name: str) -> None:
    taken, refused = RULES[name]
    rule: Rule = getattr(arguments, name)
    for value in taken:
        rule.check("value", value, "here")
    for value, error, words in refused:
        with pytest.raises(error, match=words) as caught:
            rule.check("value", value, "here")
        assert type(caught.value) is error


def quantised(name: str) -> nn.Module:
    net = nn.Sequential(quantization.QuantStub(), nn.Linear(4, 3), quantization.DeQuantStub())
    if name == "dynamic":
        found: nn.Module = quantization.quantize_dynamic(net, {nn.Linear})
        return found
    net.qconfig = quantization.get_default_qconfig("x86")
    found = quantization.prepare(net.eval())
    found(torch.randn(8, 4))
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dynamic", "observed"])
def test_quantised_networks_are_refused(name: str) -> None:
    net = quantised(name)
    words = r"must be a float network, which is quantised after it is pruned, got torch\.ao\."
    with pytest.raises(ConfigError, match=words):
        check_model(net)
    with pytest.raises(ConfigError, match=words):
        nni_topo.shrink(net, [torch.randn(8, 4)], {"params": 0.5})


@pytest.mark.filterwarnings("ignore")
def test_float_networks_that_may_be_quantised_are_taken() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start, self.end = quantization.QuantStub(), quantization.DeQuantStub()
            self.one, self.other, self.add = nn.Linear(4, 8), nn.Linear(8, 4), torch.ao.nn.quantized.FloatFunctional()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.start(x)
            found: torch.Tensor = self.end(self.add.add(x, self.other(self.one(x).relu())))
            return found

    kept = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])[:, None].expand(8, 4)
    dense: Any = nni_topo.to_dense(Sum().eval(), torch.randn(2, 4), {"one": {"weight": kept}})
    assert (dense.one.out_features, dense.other.in_features) == (4, 4)


@pytest.mark.parametrize(
    ("name", "value", "is_refused"),
    [
        ("weight", math.nan, True),
        ("weight", math.inf, True),
        ("weight", -math.inf, True),
        ("running_var", math.nan, True),
        ("running_var", math.inf, False),
        ("running_mean", -math.inf, False),
    ],
)
def test_nan_is_refused_anywhere_and_infinity_in_parameters(name: str, value: float, is_refused: bool) -> None:
    model = nn.BatchNorm1d(3)
    check_model(model)
    with torch.no_grad():
        getattr(model, name)[1] = value
    expected: AbstractContextManager[Any] = nullcontext()
    if is_refused:
        expected = pytest.raises(DataError, match=rf"\({name}\)")
    with expected:
        check_model(model)


def test_infinite_sums_of_finite_values_are_no_infinite_values() -> None:
    model = nn.BatchNorm1d(3)
    nn.init.constant_(model.weight, 3e38)
    check_model(model)
    model.register_buffer("limits", torch.tensor([-math.inf, math.inf]))  # their sum is NaN, they aren't
    check_model(model)


def test_a_wrapped_model_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].add_module("_nni_wrapper", nn.Identity())
    with pytest.raises(NniTopoError, match=r"must be unwrapped .*\(0\)"):
        check_model(model)


def test_unknown_keys_are_told_with_the_nearest_and_those_of_nni_2_with_the_new_ones() -> None:
    for key, new in (("sparsity", "sparse_ratio"), ("exclude", "exclude_op_names")):
        with pytest.raises(ConfigError, match=rf"'{key}' is a key of NNI 2: write {new}.*\(here\)$"):
            check_entry({key: 0.5, "op_types": ["Conv2d"]}, "here")
    for key, near in (("sparse_ration", "sparse_ratio"), ("sparsityy", None), ("op_type", "op_types"), (3, None)):
        with pytest.raises(ConfigError, match=r"key of a config_list entry.*\(here\)$") as caught:
            check_entry({key: 0.5}, "here")
        assert near is None or f"{near!r}" in str(caught.value) or near in str(caught.value)
    with pytest.raises(ConfigError, match=r"key of a config_list entry.*\(here.target_settings.weight\)$"):
        check_entry({"target_settings": {"weight": {"op_names": ["a"]}}}, "here")
    check_entry({"own": 1}, "here", {"own": Rule("one", lambda value: value == 1)})
    with pytest.raises(ConfigError, match="own must be one"):
        check_entry({"own": 2}, "here", {"own": Rule("one", lambda value: value == 1)})
