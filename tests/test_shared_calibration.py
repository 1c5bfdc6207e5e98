"""Two and three processes share calibration data: the networks and figures of one that has all, and no hang."""

from __future__ import annotations

import copy
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import shared_data_nets as nets
import torch
import torch.distributed as dist
from torch import nn

import nni_topo
from nni_topo import Calibration
from nni_topo.errors import ConfigError
from nni_topo.network.runtime.processes import digest
from nni_topo.recovery.reconstruct import Reconstruct, ReconstructTask

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed")

SIZES = (8, 8, 5, 8, 3, 8, 8)
# By number of processes, which batches each has.
SHARES = {2: (slice(0, 4), slice(4, 7)), 3: (slice(0, 2), slice(2, 4), slice(4, 7))}
FEW = {2: (slice(0, 2), slice(2, 3)), 3: (slice(0, 1), slice(1, 2), slice(2, 3))}
FEW_SIZES = (6, 4, 2)  # of twelve samples the fifth and the tenth are held out: none of the last batch
FIGURES = ("layer", "place", "unknowns", "samples", "ridge", "error_before", "error_after", "error_held_out")
STAGE = ("network", "macs", "params", "distance", "distance_low", "distance_high", "agreement", "agreement_low")
STAGE += ("agreement_high", "calibration_distance", "calibration_agreement", "accuracy")


@dataclass
class Made:
    """What one process made: masks, weights, figures."""

    masks: dict[str, Any]
    weights: dict[str, torch.Tensor]
    figures: list[tuple[Any, ...]]
    off: float = 1e-6  # by how much weights may differ from those of one process


def layers_of(kind: type[nn.Module]) -> list[dict[str, Any]]:
    if kind is nets.Transformer:
        return [{"op_names": ["body.linear1"], "sparse_ratio": 0.5}]
    return [{"op_types": ["Linear"] if kind is nets.Wide else ["Conv2d"], "sparse_ratio": 0.5}]


def pruned(kind: type[nn.Module], data: Any, method: str = "reconstruct", **knobs: Any) -> Made:
    """Choose channels and reconstruct the weights."""
    model = nets.made(kind)
    config_list = layers_of(kind)
    if "budget" in knobs:
        config_list = [{name: value for name, value in entry.items() if name == "op_types"} for entry in config_list]
    groups = nni_topo.dependency_groups(model, nets.batches(kind, (2,))[0], config_list)
    masks = nni_topo.ReconstructionPruner(copy.deepcopy(model), groups, calibration=data, **knobs).compress()[1]
    found = nni_topo.compensation(model, masks, data, method=method)
    figures = [tuple(getattr(layer, name) for name in FIGURES) for layer in found.report.layers]
    return Made(masks, found.model.state_dict(), [*figures, (found.report.images,)])


def shrunk(kind: type[nn.Module], data: Any, rank: int) -> Made:
    """Run the whole pipeline without distillation; what `evaluate` returns differs between processes."""
    small = nni_topo.shrink(nets.made(kind), data, {"flops": 0.5}, distill=False, evaluate=lambda _: float(rank))
    stages = [tuple(getattr(stage, name) for name in STAGE) for stage in small.report.stages]
    counts = (small.report.images, small.report.held_out)
    return Made({}, small.state_dict(), [*stages, counts, *small.report.warnings])


def recalibrated(kind: type[nn.Module], data: Any) -> Made:
    return Made({}, nni_topo.recalibrate_batch_norm(nets.made(kind), data).state_dict(), [])


LEARNED = ("objective", "is_kept", "images", "lr", "steps", "most_steps", "held_out")
MEASURED = ("loss_before", "loss_after", "distance_before", "distance_after", "agreement_before", "agreement_after")


def distilled(kind: type[nn.Module], data: Any, held_out: Any = None, **knobs: Any) -> Made:
    """Distil a network that was disturbed; rounding of another order shows in more digits the longer it learns."""
    model = nets.made(kind)
    dense = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter *= 0.8
    done = nni_topo.distillation(dense, model, data, held_out=held_out, blend=False, **knobs)
    counts = tuple(getattr(done, name) for name in LEARNED)
    measured = tuple(f"{getattr(done, name):.4g}" for name in MEASURED)
    curve = tuple((look.step, f"{look.loss:.4g}") for look in done.curve)
    assert done.is_kept
    # AdamW divides by the size of a gradient: rounding counts where that is small.
    return Made({}, done.model.state_dict(), [counts, measured, curve], off=1e-3)


BY_PHOTO = [index // 4 % 9 for index in range(sum(SIZES))]  # a photo's crops are with several processes


def cases(data: Any, rank: int = 0) -> dict[str, Made]:
    """Make everything that is compared; ``data`` returns calibration data from batches, groups and shares."""
    images = nets.batches(nets.Convolutions, SIZES)
    found = {
        "CNN": pruned(nets.Convolutions, data(images)),
        "residual": pruned(nets.Residual, data(nets.batches(nets.Residual, SIZES))),
        "transformer": pruned(nets.Transformer, data(nets.batches(nets.Transformer, SIZES))),
        "images of two sizes": pruned(nets.Convolutions, data(nets.batches(nets.Convolutions, SIZES, mixed=True))),
        "few samples": pruned(nets.Wide, data(nets.batches(nets.Wide, FEW_SIZES), shares=FEW)),
        "groups": pruned(nets.Convolutions, data(images, groups=BY_PHOTO)),
        "shrink": shrunk(nets.Convolutions, data(images), rank),
        "recalibrate": recalibrated(nets.Convolutions, data(images)),
    }
    return found


def slow_cases(data: Any, rank: int = 0) -> dict[str, Made]:
    images = nets.batches(nets.Residual, SIZES)
    found = {
        "sequential": pruned(nets.Residual, data(images), sequential=True),
        "widths by error": pruned(nets.Residual, data(images), budget={"params": 0.5, "allocation": "error"}),
        "shrink": shrunk(nets.Residual, data(images), rank),
        "distilled, groups": distilled(
            nets.Wide, data(nets.batches(nets.Wide, SIZES), groups=BY_PHOTO), steps=20, lr=1e-3, objective="squares"
        ),
        "distilled, padding": distilled(
            nets.Transformer,
            data(nets.batches(nets.Transformer, SIZES)),
            steps=5,
            lr=1e-3,
            batch_size=5,
            objective="kl",
        ),
        "distilled, held out": distilled(
            nets.Wide,
            data(nets.batches(nets.Wide, SIZES)),
            data(nets.batches(nets.Wide, FEW_SIZES), shares=FEW),
            steps=20,
            lr=3e-4,
            batch_size=3,
            objective="squares",
        ),
    }
    found["pair"] = pruned(nets.Convolutions, data(images), "pair")
    return found


def share(rank: int, count: int) -> Any:
    """Return a function that gives a process its share of batches."""

    def make(batches: list[Any], groups: list[int] | None = None, shares: Any = SHARES) -> Calibration:
        own = shares[count][rank]
        sizes = FEW_SIZES if shares is FEW else SIZES
        first, size = sum(sizes[: own.start]), sum(sizes[own])
        labels = None if groups is None else groups[first : first + size]
        return Calibration(batches[own], groups=labels, process_group=dist.group.WORLD)

    return make


def alone(batches: list[Any], groups: list[int] | None = None, shares: Any = SHARES) -> Calibration:
    del shares
    return Calibration(batches, groups=groups)


def errors(rank: int) -> dict[str, tuple[str, str]]:
    """What can't be done; the group is used again after each."""
    group = dist.group.WORLD
    model, images = nets.made(nets.Convolutions), nets.batches(nets.Convolutions, SIZES)
    mine = Calibration(images[SHARES[2][rank]], process_group=group)
    masks = {"first": {"weight": torch.ones(12, 1, 1, 1).index_fill_(0, torch.arange(4), 0.0)}}
    before = digest(model.state_dict().items())
    wide = nets.made(nets.Wide)

    large = [image.clone() for image in images[SHARES[2][rank]]]
    if rank == 1:
        large[0][:] = 3e38  # sums overflow within the network
    huge = Calibration(large, process_group=group)
    found = {
        "too few to judge": nets.told(
            lambda: nni_topo.shrink(
                model,
                Calibration(images[3:4] if rank == 0 else [images[0][:3]], process_group=group),
                {"flops": 0.5},
                distill=False,
            )
        ),
        "overflow": nets.told(lambda: nni_topo.compensate(model, masks, huge)),
        "knobs": nets.told(lambda: nni_topo.compensate(model, masks, mine, seed=rank)),
        "blocks": nets.told(lambda: nni_topo.remove_blocks(nets.made(nets.Convolutions), ["no", "block"][rank:], mine)),
        "groups": nets.told(
            lambda: nni_topo.compensate(
                model, masks, Calibration(images[:1], groups=[0] * 8 if rank else None, process_group=group)
            )
        ),
        "distill": nets.told(lambda: nni_topo.shrink(model, mine, {"flops": 0.5})),
        "distill batch norms": nets.told(
            lambda: nni_topo.shrink(model, mine, {"flops": 0.5}, distill={"blend": False})
        ),
        "nothing to learn": nets.told(
            lambda: nni_topo.distill(
                wide, wide, Calibration([torch.ones(1, 40)], process_group=group), blend=False, seed=2
            )
        ),
        "time": nets.told(lambda: nni_topo.shrink(model, mine, {"latency": 0.5}, distill=False)),
        "frontier": nets.told(lambda: nni_topo.frontier(model, mine)),
        "in one process": nets.told(lambda: nni_topo.compensate(model, masks, images[:2])),
    }
    found["model"] = ("", "same" if digest(model.state_dict().items()) == before else "changed")
    found["wrapped"] = ("", "no" if type(model.first) is nn.Conv2d else "yes")
    return found


def make_all(rank: int, count: int, folder: Path, case: str) -> None:
    makers = {"cases": cases, "slow": slow_cases}
    made = makers[case](share(rank, count), rank)
    torch.save((made, errors(rank) if count == 2 and case == "cases" else {}), folder / f"{case}-{count}-{rank}.pt")


def run(case: str, count: int, folder: Path) -> list[Any]:
    """Return what each process made."""
    ended = nets.start(make_all, count, folder, case)
    assert [process.exitcode for process in ended] == [0] * count
    return [torch.load(folder / f"{case}-{count}-{rank}.pt", weights_only=False) for rank in range(count)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run("cases", 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def whole() -> dict[str, Made]:
    # With as many threads as each process has: with others convolutions round their sums in another way.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return cases(alone)
    finally:
        torch.set_num_threads(threads)


def check(found: list[Made], wanted: Made) -> None:
    """Compare what processes made with one another, and with one process that has all data."""
    for each in found:
        assert each.masks.keys() == wanted.masks.keys()
        for module, targets in wanted.masks.items():
            for target, mask in targets.items():
                assert mask is None or torch.equal(each.masks[module][target], mask)
        assert each.weights.keys() == wanted.weights.keys()
        for name, values in wanted.weights.items():
            assert torch.equal(each.weights[name], found[0].weights[name])
            torch.testing.assert_close(each.weights[name], values, rtol=1e-5, atol=wanted.off)
        assert each.figures == found[0].figures or str(each.figures) == str(found[0].figures)  # with NaN
        assert [printed(row) for row in each.figures] == [printed(row) for row in wanted.figures]


def printed(row: Any) -> Any:
    """Return a row of figures as the report's table shows them."""
    if isinstance(row, str):
        return row
    return [f"{each:.4g}" if isinstance(each, float) else each for each in row]


NAMES = ["CNN", "residual", "transformer", "images of two sizes", "few samples", "groups", "shrink", "recalibrate"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_make_what_one_makes_of_all_data(two: Any, whole: Any, name: str) -> None:
    check([made[name] for made, _ in two], whole[name])


@pytest.mark.slow
@pytest.mark.parametrize(("case", "count"), [("cases", 3), ("slow", 2)])
def test_further_cases(case: str, count: int, tmp_path: Path) -> None:
    found = run(case, count, tmp_path)
    wanted = {"cases": cases, "slow": slow_cases}[case](alone)
    assert found[0][0].keys() == wanted.keys()
    for name, each in wanted.items():
        check([made[name] for made, _ in found], each)


@pytest.mark.slow
def test_neither_errors_nor_refusals_change_the_model(two: Any) -> None:
    for _, found in two:
        assert found["model"] == ("", "same")
        assert found["wrapped"] == ("", "no")
        # other processes are left alone where nobody asks for them
        assert found["in one process"] == ("", "no error")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("overflow", "DataError", "activations must be finite, got NaN or infinity (head)"),
        ("knobs", "ConfigError", "must be equal in all processes, got different ones: seed (compensate)"),
        ("blocks", "ConfigError", "must be equal in all processes, got different ones: names (remove_blocks)"),
        ("groups", "ConfigError", "groups must be given in all processes or in none, got [False, True]"),
        ("too few to judge", "DataError", "samples to solve on and samples to judge by, got [1, 0] by process"),
        ("distill", "ConfigError", "got blend=True, BatchNorm2d: pass blend=False"),
        ("distill batch norms", "ConfigError", "batch norms, got BatchNorm2d"),
        ("time", "ConfigError", "a budget of latency must have a latency_table"),
        ("frontier", "ConfigError", "images must be in one process here, got batches that 2 processes share"),
        ("nothing to learn", "DataError", "each process must have images to learn from, got ["),
    ],
)
def test_an_error_of_all_is_that_of_each(two: Any, what: str, kind: str, words: str) -> None:
    for _, found in two:
        assert found[what][0] == kind
        assert words in found[what][1]


@dataclass(frozen=True)
class Mortal(Reconstruct):
    """Reconstruction that the victim doesn't survive: its process is killed at the second layer."""

    victim: int = 0

    def tasks(self, plan: Any, networks: Any) -> Any:
        tasks = super().tasks(plan, networks)
        at = next(index for index, task in enumerate(tasks) if task.layer.name != tasks[0].layer.name)
        tasks[at] = MortalTask(plan.equations[1], networks.pruned, networks.result)
        tasks[at].victim = self.victim
        return tasks


class MortalTask(ReconstructTask):
    victim = 0

    def fit(self, *args: Any) -> Any:
        if dist.get_rank() == self.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().fit(*args)


def die(rank: int, count: int, folder: Path, victim: int) -> None:
    model = nets.made(nets.Convolutions)
    before = digest(model.state_dict().items())
    masks = {"first": {"weight": torch.ones(12, 1, 1, 1).index_fill_(0, torch.arange(4), 0.0)}}
    data = share(rank, count)(nets.batches(nets.Convolutions, SIZES))
    began = time.monotonic()
    kind, words = nets.told(lambda: nni_topo.compensate(model, masks, data, method=Mortal(victim=victim)))
    seconds = time.monotonic() - began
    same = digest(model.state_dict().items()) == before
    torch.save((kind, words, seconds, same, torch.initial_seed()), folder / f"dead-{rank}.pt")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills in another way")
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_survive_a_process_that_is_killed(victim: int, tmp_path: Path) -> None:
    ended = nets.start(die, 3, tmp_path, victim)
    assert [process.exitcode for process in ended] == [-signal.SIGKILL if rank == victim else 0 for rank in range(3)]
    for rank in {0, 1, 2} - {victim}:
        kind, words, seconds, same, _ = torch.load(tmp_path / f"dead-{rank}.pt", weights_only=False)
        assert kind == "ProcessError"
        assert "processes must reach the same place, but one has ended" in words
        assert seconds < 2 * nets.TIMEOUT
        assert same


def fall_silent(rank: int, count: int, folder: Path) -> None:
    model = nets.made(nets.Convolutions)
    data = share(rank, count)(nets.batches(nets.Convolutions, SIZES))
    if rank == 1:
        time.sleep(3 * SILENCE)
        return
    began = time.monotonic()
    found = nets.told(lambda: nni_topo.recalibrate_batch_norm(model, data))
    torch.save((*found, time.monotonic() - began), folder / f"silent-{rank}.pt")


SILENCE = 5  # seconds


@pytest.mark.slow
def test_a_process_that_does_not_answer_ends_the_others_after_the_timeout_of_the_group(tmp_path: Path) -> None:
    ended = nets.start(fall_silent, 3, tmp_path, timeout=SILENCE)
    assert [process.exitcode for process in ended] == [0, 0, 0]
    told_by = [torch.load(tmp_path / f"silent-{rank}.pt", weights_only=False) for rank in (0, 2)]
    assert all(kind == "ProcessError" and seconds < 2 * SILENCE for kind, _, seconds in told_by)
    assert all("didn't answer within the group's timeout" in words for _, words, _ in told_by)


@pytest.mark.parametrize("group", ["gloo", 0, dist.GroupMember.NON_GROUP_MEMBER])
def test_what_is_no_group_is_refused(group: Any) -> None:
    with pytest.raises(ConfigError, match=r"process_group must be a group of torch\.distributed that this process"):
        Calibration([torch.zeros(1, 2)], process_group=group)
