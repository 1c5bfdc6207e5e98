"""Random requests to the pruners: small networks, config_lists and knobs, good and bad, and what must come of them.

A request ends in masks that keep their promises, or in an error of this package; the model is byte-equal either way.
``python tests/fuzzing.py --cases 2000`` counts what came of so many, and prints what broke a promise.
"""

from __future__ import annotations

import argparse
import collections
import copy
import logging
import time
import traceback
import warnings
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import tree_map_only

import nni_topo
from nni_topo.errors import NniTopoError
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.testing import require_unchanged, snapshot

NAMES = [name for name in list_pruners() if pruner_info(name).origin == "nni_topo"]
NAN = float("nan")


class Net(nn.Module):
    """Convolutions, each with a norm, an activation and a skip if asked for, then two linear layers; 6x6 images.

    ``gates``, by layer the channels that are left, silence the others where they leave their block: what a network
    without them computes, worked out another way than by cutting it.
    """

    def __init__(self, widths: list[int], hidden: int, norm: str, bias: bool, skip: bool, kind: str) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for index, (inputs, outputs) in enumerate(zip([2, *widths], widths, strict=False)):
            make = nn.ConvTranspose2d if kind == "transposed" else nn.Conv2d
            groups = inputs if kind == "depthwise" and index and outputs == inputs else 1
            self.convs.append(make(inputs, outputs, 3, padding=1, bias=bias, groups=groups))
            self.norms.append(nn.BatchNorm2d(outputs) if norm == "batch" else nn.Identity())
        if kind == "tied" and len(set(widths)) == 1 and len(widths) > 2:
            self.convs[2].weight = self.convs[1].weight
        self.flat = kind == "flat"
        self.hidden = nn.Linear(widths[-1] * (36 if self.flat else 1), hidden, bias=bias)
        self.head = nn.Linear(hidden, 2)
        self.skip = skip
        self.gates: dict[str, torch.Tensor] = {}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Map images ``(n, 2, 6, 6)`` to ``(n, 2)``."""
        features = images
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            found = self._gated(f"convs.{index}", torch.relu(norm(conv(features))))
            features = features + found if self.skip and found.shape == features.shape else found
        rows = features.flatten(1) if self.flat else features.mean((2, 3))
        return self.head(self._gated("hidden", torch.relu(self.hidden(rows))))

    def _gated(self, name: str, found: torch.Tensor) -> torch.Tensor:
        if name not in self.gates:
            return found
        return found * self.gates[name].reshape(-1, *[1] * (found.dim() - 2))


def seldom(draw: Any, odds: int) -> bool:
    """Say yes once in so many times; of integers, hypothesis likes the ends."""
    return draw(st.sampled_from(range(odds))) == odds // 2


@st.composite
def networks(draw: Any) -> Net:
    """Draw a network, seeded, in some mode and with some parameters frozen."""
    width = st.integers(1, 6)
    same = draw(st.booleans())
    widths = [draw(width)] * draw(st.integers(1, 3)) if same else draw(st.lists(width, min_size=1, max_size=3))
    kind = draw(st.sampled_from(["plain", "plain", "flat", "depthwise", "transposed", "tied"]))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(draw(st.integers(0, 99)))
        norm, bias, skip = draw(st.sampled_from(["none", "batch"])), draw(st.booleans()), draw(st.booleans())
        net = Net(widths, draw(width), norm, bias, skip, kind)
    layer = draw(st.sampled_from([*net.convs, net.hidden]))
    change = draw(st.sampled_from(["none"] * 12 + ["zero", "tiny", "huge", "twins", "nan", "frozen"]))
    with torch.no_grad():
        if change == "twins":
            layer.weight[:] = layer.weight[:1].clone()
        elif change == "frozen":
            layer.weight.requires_grad_(False)
        elif change != "none":
            layer.weight.mul_({"zero": 0.0, "tiny": 1e-30, "huge": 1e30, "nan": NAN}[change])
    net.train(draw(st.booleans()))
    return net


# Values that hardly any key or knob takes; what they hold must differ from run to run in nothing, addresses neither.
_NUMBERS = (True, -1, 0, 3, 10**30, NAN, float("inf"), -0.5, 1.5, 1e308)
_WORDS = ("abc", "", b"x", "cover", [], {}, (), [[]], [None], ["("], {"a": 1}, {1: 2}, {"weight": None})
WILD = st.sampled_from([None, len, torch.ones(2), np.ones(3), *_NUMBERS, *_WORDS])
RATIOS = st.sampled_from([0.0, 0.25, 0.5, 0.5, 0.75, 0.99])
SETTINGS = {
    "sparse_threshold": st.sampled_from([0.1, 0.5, 5.0, -1.0]),
    "max_sparse_ratio": st.sampled_from([0.25, 0.5, 1.0]),
    "min_sparse_ratio": st.sampled_from([0.0, 0.25, 0.6]),
    "global_group_id": st.sampled_from([1, "a"]),
    "dependency_group_id": st.sampled_from([1, "b"]),
    "internal_metric_block": st.sampled_from([1, 2, 3]),
    "granularity": st.sampled_from(
        ["default", "out_channel", "in_channel", "per_channel", [1], [2, 2], [[1, 1], "back"]]
    ),
    "apply_method": st.sampled_from(["mul", "bypass", "add"]),
    "target_names": st.sampled_from([["weight"], ["weight", "bias"], ["bias"], ["_input_0"], ["foo"]]),
    "exclude_op_names": st.sampled_from([["head"], ["convs.0"], []]),
    "target_settings": st.sampled_from([{"weight": {"sparse_ratio": 0.5}}, {"bias": {"sparse_ratio": 0.5}}, {"x": {}}]),
}


SELECTED: list[dict[str, Any]] = [
    {"op_types": ["Conv2d"]},
    {"op_types": ["Conv2d", "Linear"]},
    {"op_names": ["hidden"]},
]
SELECTED += [{"op_names_re": [r"convs\.\d"]}, {"op_types": ["ConvTranspose2d"]}, {"op_types": ["BatchNorm2d"]}]
SELECTED += [{"op_names": ["convs.0", "hidden"]}, {"op_names": ["convs.0"]}]


@st.composite
def entries(draw: Any) -> Any:
    """Draw an entry of a config_list; one in five has a value that none should have."""
    entry: dict[str, Any] = draw(st.sampled_from(SELECTED))
    entry = {**entry, "sparse_ratio": draw(RATIOS)}
    for key in (
        draw(st.lists(st.sampled_from(sorted(SETTINGS)), max_size=2, unique=True)) if draw(st.booleans()) else ()
    ):
        entry[key] = draw(SETTINGS[key])
    if "sparse_threshold" in entry:
        del entry["sparse_ratio"]
    if seldom(draw, 6):
        entry[draw(st.sampled_from([*SETTINGS, *entry, "spare_ratio"]))] = draw(WILD)
    return entry


IMAGES = torch.randn(6, 2, 6, 6, generator=torch.Generator().manual_seed(0))
LABELLED = (IMAGES, torch.arange(6) % 2)
SEARCHES = st.sampled_from([None, {"generations": 2, "population_size": 4}])
KNOBS: dict[str, Any] = {
    "seed": st.integers(0, 3),
    "round_to": st.sampled_from([None, 1, 2, 4, 100]),
    "progress": st.sampled_from([None, False]),
    "n_jobs": st.just(1),
    "example_inputs": st.just(IMAGES[:2]),
    "calibration": st.sampled_from(
        [[IMAGES], [*IMAGES.split(2)], [LABELLED], [LABELLED], [IMAGES[:1]], [IMAGES[:, :1]]]
    ),
    "budget": st.sampled_from(
        [{"flops": 0.5}, {"params": 0.3}, {"memory": 0.9}, {"flops": 0.5, "allocation": "topological"}]
    ),
    "algorithm": st.sampled_from(["kmeans", "spectral", "ward", "dbscan", "gmm"]),
    "survivor": st.sampled_from(["auto", "weight", "bias", "center", "random", ["weight", "bias_norm"]]),
    "graph": st.sampled_from(["epsilon", "knn"]),
    "energy": st.sampled_from([0.1, 0.9, {"hidden": 0.5}]),
    "bias": st.booleans(),
    "growth": st.sampled_from([{"statistic": name} for name in ("dispersion", "trace", "max", "mean")]),
    "cloud": st.sampled_from(["auto", "weight", "functional"]),
    "criterion": st.sampled_from(["auto", "hausdorff", "cover", "bottleneck", "bottleneck_sum", "wasserstein"]),
    "homology_dimensions": st.sampled_from([(0,), (0, 1), (1,)]),
    "solver": st.sampled_from(["greedy", {"generations": 2, "population_size": 4}]),
    "search": SEARCHES,
    "combine": st.sampled_from(["max", "sum"]),
    "preprocess": st.sampled_from(["none", "center", "standardize", "unit"]),
    "sequential": st.booleans(),
    "norm": st.sampled_from([1, 2]),
    "signal": st.sampled_from([None, {"direction": "diagonal"}]),
    "on_subcritical": st.sampled_from(["raise", "clip"]),
    "conv_graph": st.sampled_from(["channel", "tensor", "unrolled"]),
    "validation": st.just([LABELLED]),
    "evaluate": st.just(lambda model: float(model(IMAGES.to(next(model.parameters()).dtype)).mean())),
}
# What a pruner needs, and what would take long, is given always.
ALWAYS = {"calibration": ("reconstruction", "cluster", "subcluster"), "validation": ("genetic_weight",)}
ALWAYS |= {"example_inputs": ("energy",), "search": ("genetic_weight", "perera2022")}


@st.composite
def requests(draw: Any) -> tuple[Net, str, list[Any], dict[str, Any]]:
    """Draw a network, a pruner's name, a config_list and knobs; one in six with a wild knob."""
    name = draw(st.sampled_from(NAMES))
    known = pruner_info(name).knobs()
    chosen = draw(st.lists(st.sampled_from(known), max_size=2, unique=True))
    chosen += [knob for knob, owners in ALWAYS.items() if name in owners and knob not in chosen]
    knobs = {knob: draw(KNOBS[knob]) for knob in chosen}
    if knobs.get("cloud") == "functional":
        knobs["calibration"] = [LABELLED]
    if {"cloud", "budget", "conv_graph"} & knobs.keys():
        knobs["example_inputs"] = IMAGES[:2]
    if name in ALWAYS["search"]:
        knobs["search"] = {"generations": 2, "population_size": 4}
    if seldom(draw, 7):
        knobs[draw(st.sampled_from(known))] = draw(WILD)
    config_list: Any = [draw(entries()) for _ in range(1 + seldom(draw, 6))]
    if knobs.get("budget") is not None and not seldom(draw, 5):
        config_list = [{"op_types": ["Conv2d", "Linear"], "exclude_op_names": ["head"]}]
    if seldom(draw, 40):
        config_list = draw(WILD)
    return draw(networks()), name, config_list, knobs


def check_masks(name: str, net: Net, config_list: list[Any], knobs: dict[str, Any], masks: Any) -> None:
    """Raise AssertionError unless masks are 0 and 1, of whole filters, empty no layer, and lose what was asked."""
    for module, targets in masks.items():
        layer, weight = net.get_submodule(module), targets.get("weight")
        for target, mask in targets.items():
            assert mask is None or set(mask.unique().tolist()) <= {0.0, 1.0}, f"a mask is 0 and 1 ({module}.{target})"
            assert mask is None or mask.shape == getattr(layer, target).shape, (
                f"a mask has its target's shape ({module})"
            )
        assert weight is None or bool(weight.any()), f"no layer is emptied ({module})"
    plain = {"op_types", "op_names", "op_names_re", "sparse_ratio"}
    masks = {module: targets for module, targets in masks.items() if not module.startswith("norms")}
    if len(config_list) > 1 or not config_list[0].keys() <= plain or not pruner_info(name).structured:
        return
    if name == "subcluster" or knobs.get("round_to") not in (None, 1) or knobs.get("budget") is not None:
        return
    for module, targets in masks.items():
        rows = channels(net.get_submodule(module), targets["weight"])
        wanted = len(rows) - int(len(rows) * config_list[0]["sparse_ratio"])
        # Clusters of neurons that put out the same are fewer than asked for.
        right = int(rows.sum()) <= wanted if name == "cluster" else int(rows.sum()) == wanted
        assert right, f"{wanted} channels stay, got {int(rows.sum())} ({module})"
        if targets.get("bias") is not None:
            assert torch.equal(targets["bias"], rows.float().to(targets["bias"])), (
                f"a bias follows its weight ({module})"
            )


def channels(layer: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    """Return the output channels, boolean ``(out,)``, that a mask leaves; AssertionError if some are left in part."""
    if mask.dim() == 1:
        return mask > 0
    transposed = isinstance(layer, nn.ConvTranspose2d)
    rows = (mask.movedim(1, 0) if transposed and layer.groups == 1 else mask).flatten(1)
    if transposed and layer.groups > 1:
        rows = mask.reshape(layer.out_channels, -1)
    assert bool((rows == rows[:, :1]).all()), "whole filters"
    return rows[:, 0] > 0


def check_dense(net: Net, masks: Any) -> bool:
    """Raise AssertionError unless the dense model computes what the gated one does; False where there is no gate."""
    tied = (
        net.skip
        or any(getattr(conv, "groups", 1) > 1 for conv in net.convs)
        or len({*net.parameters()}) < len(list(net.named_parameters(remove_duplicate=False)))
    )
    if tied or "head" in masks or any("norms" in name for name in masks):
        return False
    try:
        gates = {name: channels(net.get_submodule(name), targets["weight"]) for name, targets in masks.items()}
    except (AssertionError, KeyError):
        return False
    images = IMAGES.to(net.head.weight.dtype)
    dense = nni_topo.to_dense(net, images[:2], masks)
    gated = copy.deepcopy(net).eval()
    gated.gates = gates
    with torch.no_grad():
        wanted, found = gated(images), dense.eval()(images)
    scale = float(wanted.abs().max())
    assert float((wanted - found).abs().max()) <= 1e-4 * scale + 1e-30, "the dense model is the masked one"
    return True


def outcome(net: Net, name: str, config_list: Any, knobs: dict[str, Any]) -> str:
    """Serve a request; return what came of it, or raise what shouldn't have."""
    before, config = snapshot(net), str(config_list)
    came = "masks"
    try:
        pruner = nni_topo.create_pruner(name, net, config_list, **knobs)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        check_masks(name, net, config_list, knobs, masks)
        if pruner_info(name).structured and check_dense(net, masks):
            came = "masks and dense"
    except NniTopoError as error:
        came = type(error).__name__
    assert config == str(config_list), "the config_list stays as it was"
    require_unchanged(before, net)
    return came


def described(name: str, config_list: Any, knobs: dict[str, Any], net: Net) -> str:
    """Return a request in one line."""
    short = tree_map_only(torch.Tensor, lambda each: f"tensor{tuple(each.shape)}", knobs)
    return f"{name} {config_list} {short} {' '.join(str(net).split())} train={net.training}"[:1200]


def main() -> None:
    """Serve many requests and count what came of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    counts: collections.Counter[str] = collections.Counter()
    broken: dict[str, str] = {}
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    @seed(options.seed)
    @settings(
        max_examples=options.cases,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def serve(request: tuple[Net, str, Any, dict[str, Any]]) -> None:
        net, name, config_list, knobs = request
        line = described(name, config_list, knobs, net)
        try:
            came = outcome(net, name, config_list, knobs)
            counts[came] += 1
            if options.verbose:
                print(came, line, flush=True)
        except Exception as error:
            counts["broken"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            key = f"{type(error).__name__}: {str(error)[:120]} ({place.filename.rpartition('/')[2]}:{place.lineno})"
            if key not in broken:
                broken[key] = line
                print(key, line, "".join(traceback.format_tb(error.__traceback__)[-6:]), sep="\n    ", flush=True)

    begun = time.monotonic()
    try:
        serve()
    finally:  # also of a run that is ended before its time
        print(f"{sum(counts.values())} requests in {time.monotonic() - begun:.0f} s")
        for came, count in counts.most_common():
            print(f"{count:6d}  {came}")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
