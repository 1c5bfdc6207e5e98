"""Requests to the package for one case, and what comes of each."""

from __future__ import annotations

import copy
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reliability.cases import LAYERS, Case, call, doubled, scaled
from reliability.oracle import WrongError, is_depthwise, kept_of, like_rows, masked_by_hand, require_only_asked, rows_of
from torch import nn

import nni_topo
from nni_topo.errors import NniTopoError
from nni_topo.network.runtime.copies import detached_copy
from nni_topo.testing import snapshot
from tools.must_go import channels_left, read_table

MUST_GO = read_table()
"""By case what must go, and which layers may stay."""

CONDITIONS = [(1.0, 0.0), (0.01, 0.0), (100.0, 0.0), (1.0, 3.0), (1.0, -3.0), (100.0, 500.0)]
"""Scales and shifts of inputs."""

BAD = ("wrong", "changed", "raw", "hang", "unsaid", "lost")


@dataclass(frozen=True)
class Outcome:
    """What came of a request: ``right``, ``whole``, ``refused``, or one of ``BAD``."""

    case: str
    request: str
    kind: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.kind:8}{self.case} / {self.request}: {self.text}"


class ChangedError(AssertionError):
    """The user's model isn't as it was."""


class UnsaidError(AssertionError):
    """Channels stay, and nothing says why."""


class LostError(AssertionError):
    """Channels stay that must go."""


class HangError(BaseException):
    """A request took too long; not an Exception, which the package may catch."""


class WholeError(Exception):
    """Nothing went, and it says why."""


def serve(case: Case, request: str, *, seconds: int = 60) -> Outcome:
    """Serve one request of :data:`REQUESTS`."""
    model = case.network()
    # Users prune networks that they have just trained, too.
    model.train(request == "random" and not case.noisy)
    before = state(model)
    kind, text = outcome_of(lambda: REQUESTS[request](case, model), seconds)
    after = state(model)
    if kind in ("whole", "refused") and not MUST_GO[case.name].may_change_nothing(request):
        kind, text = "lost", f"{kind}: {text}"
    if kind != "changed" and before != after:
        kind, text = "changed", f"the model after it: {changes(before, after)[:3]}; {kind} {text}"
    return Outcome(case.name, request, kind, " ".join(text.split())[:600])


def outcome_of(work: Callable[[], None], seconds: int) -> tuple[str, str]:
    """Do some work; return the kind of its outcome and what it says."""
    try:
        with at_most(seconds):
            work()
    except NniTopoError as error:
        return "refused", f"{type(error).__name__}: {error}"
    except WholeError as error:
        return "whole", str(error)
    except (ChangedError, LostError, UnsaidError, WrongError) as error:
        return type(error).__name__.removesuffix("Error").lower(), str(error)
    except HangError:
        return "hang", f"over {seconds} s"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)
        lines = [f"{each.filename.rpartition('/')[2]}:{each.lineno}" for each in place[-4:]]
        return "raw", f"{type(error).__name__}: {error} ({' '.join(lines)})"
    return "right", ""


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    """Raise :class:`HangError` once so many seconds are over."""

    def stop(number: int, frame: Any) -> None:
        raise HangError

    if not hasattr(signal, "SIGALRM"):  # on Windows nothing is stopped
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def state(model: nn.Module) -> dict[str, Any]:
    """Return all that mustn't change of a model, and beside it."""
    found = snapshot(model)
    # where a recurrent layer's weights lie in memory is PyTorch's own affair
    found["attributes"] = {key: value for key, value in found["attributes"].items() if "._flat_weight" not in key}
    return found


def changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Name what differs."""
    found = []
    for part, value in before.items():
        if value != after[part]:
            keys = sorted(value.keys() | after[part].keys()) if isinstance(value, dict) else []
            found += [f"{part}: {key}" for key in keys if value.get(key) != after[part].get(key)] or [part]
    return found


@contextmanager
def unchanged(model: nn.Module, what: str) -> Iterator[None]:
    """Raise :class:`ChangedError` if a model isn't as it was, also behind an error."""
    before = state(model)
    try:
        yield
    finally:
        after = state(model)
        if before != after:
            raise ChangedError(f"{what}: {changes(before, after)}")


def groups(case: Case, model: nn.Module) -> Any:
    """Ask for groups of all layers but those that nobody selects."""
    config = [{"op_types": types_of(model), "sparse_ratio": 0.5, "exclude_op_names": list(case.whole)}]
    with unchanged(model, "dependency_groups"):
        found = nni_topo.dependency_groups(model, case.example(), config)
    chosen = {name for entry in found for name in entry["op_names"]}
    for name, module in model.named_modules():
        is_left_out = type(module).__name__ in LAYERS and name not in {*case.whole, *chosen}
        # A depth-wise convolution without an entry follows the layers before it.
        if is_left_out and not found.skipped.get(name) and not is_depthwise(module):
            raise UnsaidError(f"dependency_groups leaves {name} out, and doesn't say why")
    if not found:
        raise WholeError(f"dependency_groups: {found.skipped}")
    return found


def types_of(model: nn.Module) -> list[str]:
    """Return the types of layers that a model has."""
    return sorted({type(module).__name__ for module in model.modules()} & {*LAYERS}) or ["Conv2d"]


def pruned(case: Case, model: nn.Module, pruner: str, **knobs: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Let a pruner choose, in the groups that the package makes."""
    config_list = groups(case, model)
    wrapped = nni_topo.create_pruner(pruner, model, config_list, **knobs)
    _, masks = wrapped.compress()
    wrapped.unwrap_model()
    return masks


def by_hand(case: Case, model: nn.Module, seed: int = 3) -> dict[str, dict[str, torch.Tensor]]:
    """Mask random halves of all layers but the last ones, as somebody who knows of no groups would."""
    generator = torch.Generator().manual_seed(seed)
    masks: dict[str, dict[str, torch.Tensor]] = {}
    last = outputs_of(case, model)
    for name, module in model.named_modules():
        if type(module).__name__ not in LAYERS or name in {*case.whole, *last} or "weight" not in module._parameters:
            continue
        channels = len(rows_of(module, module.weight))
        if channels > 1:
            rows = torch.ones(channels)
            rows[torch.randperm(channels, generator=generator)[: channels // 2]] = 0
            masks[name] = {"weight": like_rows(module, rows)}
    if not masks:
        raise WholeError("no layer to mask by hand")
    return masks


def outputs_of(case: Case, model: nn.Module) -> set[str]:
    """Name the layers whose channels are the output's, as the package sees it."""
    config = [{"op_types": types_of(model), "sparse_ratio": 0.5}]
    skipped = nni_topo.dependency_groups(model, case.example(), config).skipped
    return {name for name, reason in skipped.items() if "gives the model's output" in reason}


def made_dense(case: Case, model: nn.Module, masks: Any, **options: Any) -> nn.Module:
    """Make a network dense and compare it with masks by hand, and with the package's masked model."""
    with unchanged(model, "to_dense"):
        dense = nni_topo.to_dense(model, case.example(), masks, **options)
    check(case, model, masks, dense)
    return dense


def require_gone(case: Case, model: nn.Module, dense: nn.Module) -> None:
    """Raise LostError if channels stay that must go when half of every layer's are asked for in groups.

    Networks of a road have no row in the table: the road counts what goes.
    """
    if case.name not in MUST_GO:
        return
    shapes = {name: parameter.shape for name, parameter in dense.named_parameters(remove_duplicate=False)}
    counts = channels_left(model, shapes, types_of(model))
    problems = MUST_GO[case.name].problems({name: row for name, row in counts.items() if name not in case.whole})
    if problems:
        raise LostError("; ".join(problems))


def check(case: Case, model: nn.Module, masks: Any, dense: nn.Module) -> None:
    """Raise unless a dense network computes what the masked one does, now and after a step, or say what stayed."""
    kept = kept_of(model, dense)
    require_only_asked(model, masks, kept)
    oracle = masked_by_hand(model, kept, masks)
    compare(case, "dense", oracle.model, dense)
    # The package's own masked model is told the same channels.
    with unchanged(model, "masked_model"):
        reference = nni_topo.masked_model(model, case.example(), oracle.masks)
    compare(case, "masked_model", oracle.model, reference)
    if oracle.may_train and not case.noisy:
        expected = stepped(case, oracle.model)
        try:
            found = stepped(case, dense)
        except Exception as error:
            raise WrongError(f"dense doesn't train: {type(error).__name__}: {error}") from error
        oracle.hold(expected, dense)
        compare(case, "dense after a step", expected, found)
    said = {row.name: row.reason for row in dense.report.rows}
    for name, targets in masks.items():
        rows = kept.rows(name)
        if rows is not None and targets.get("weight") is not None:
            asked = rows_of(model.get_submodule(name), targets["weight"]).any(1)
            if bool((rows & ~asked).any()) and not said.get(name):
                raise UnsaidError(f"to_dense keeps channels of {name} that are masked, and report doesn't say why")
    if not kept.removed:
        raise WholeError(f"to_dense: { ({name: why for name, why in said.items() if why}) }")


def compare(case: Case, what: str, expected: nn.Module, found: nn.Module) -> None:
    """Compare two networks at scales and shifts, batches and sizes, in double precision."""
    first, second = (copy.deepcopy(each).eval().double() for each in (expected, found))
    for size in case.sizes:
        for scale, shift in CONDITIONS:
            batch = {1.0: 2, 0.01: 1, 100.0: 3}[scale]
            inputs = doubled(scaled(case.example(batch, size, seed=size + 1), scale, shift))
            with torch.no_grad():
                wanted = call(first, inputs)
                where = f"{what} at scale {scale:g}, shift {shift:g}, batch {batch}, size {size}"
                try:
                    got = call(second, inputs)
                except Exception as error:
                    raise WrongError(f"{where}: {type(error).__name__}: {error}") from error
            for mine, theirs in zip(wanted, got, strict=True):
                if mine.shape != theirs.shape:
                    raise WrongError(f"{where}: shape {tuple(theirs.shape)} instead of {tuple(mine.shape)}")
                largest = float(mine.abs().max())
                gap = float((mine - theirs).abs().max()) / (largest or 1.0)
                if not gap <= 1e-4:
                    raise WrongError(f"{where}: {gap:.2g} of the largest output")


def stepped(case: Case, model: nn.Module) -> nn.Module:
    """Train a copy by one step of SGD."""
    trained = copy.deepcopy(model).double().train()
    inputs = doubled(case.example(4, seed=5))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = call(trained, inputs)
        loss = sum((each.float().double() - 1).square().mean() for each in found if each.is_floating_point())
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    loss.backward()
    torch.nn.utils.clip_grad_value_(trained.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():  # weights that hooks compute are tensors of the last pass
        call(trained.eval(), inputs)
    return trained


def with_l1(case: Case, model: nn.Module) -> None:
    require_gone(case, model, made_dense(case, model, pruned(case, model, "l1")))


def with_random(case: Case, model: nn.Module) -> None:
    require_gone(case, model, made_dense(case, model, pruned(case, model, "random", seed=1)))


def without_groups(case: Case, model: nn.Module) -> None:
    made_dense(case, model, by_hand(case, model))


def rounded(case: Case, model: nn.Module) -> None:
    made_dense(case, model, by_hand(case, model, seed=9), round_to=3)


def kept_constants(case: Case, model: nn.Module) -> None:
    masks = pruned(case, model, "random", seed=2)
    with unchanged(model, "to_dense"):
        dense = nni_topo.to_dense(model, case.example(), masks, constants="keep")
    require_same_shapes(case, model, dense)


def require_same_shapes(case: Case, model: nn.Module, dense: nn.Module) -> None:
    """Raise WrongError if a network's outputs don't have another's shapes."""
    for size in case.sizes:
        inputs = case.example(3, size)
        with torch.no_grad():
            # deepcopy refuses a weight that a hook has computed, as the older weight norm leaves it
            wanted, found = (call(detached_copy(each).eval(), inputs) for each in (model, dense))
        if [each.shape for each in wanted] != [each.shape for each in found]:
            raise WrongError(f"the shape of the output changes at size {size}")


def compensated(case: Case, model: nn.Module) -> None:
    masks = pruned(case, model, "random", seed=4)
    batches = [wrapped(case.example(4, seed=seed)) for seed in range(3)]
    with unchanged(model, "compensate"):
        full = nni_topo.compensate(model, masks, batches, progress=False)
    require_gone(case, model, made_dense(case, full, masks))


def wrapped(inputs: Any) -> Any:
    """Return a batch that can't be taken for inputs and labels."""
    return (inputs,) if isinstance(inputs, tuple) else inputs


def shrunk(case: Case, model: nn.Module) -> None:
    batches = [wrapped(case.example(8, seed=seed)) for seed in range(2)]
    with unchanged(model, "shrink"):
        dense = nni_topo.shrink(model, batches, {"flops": 0.6}, pruner="l1", distill={"steps": 2}, progress=False)
    require_same_shapes(case, model, dense)
    if nni_topo.zoo.count_params(dense) >= nni_topo.zoo.count_params(model):
        said = str({row.name: row.reason for row in dense.report.layers.rows if row.reason})
        if said == "{}" and " than asked, because" not in repr(dense.report):
            raise UnsaidError("shrink makes nothing smaller, and report doesn't say why")
        raise WholeError(said)


def filed(case: Case, model: nn.Module) -> None:
    masks = by_hand(case, model)
    dense = nni_topo.to_dense(model, case.example(), masks)
    with tempfile.TemporaryDirectory() as folder, unchanged(model, "load"), unchanged(dense, "save"):
        path = Path(folder) / "dense.safetensors"
        nni_topo.save(dense, path)
        read = nni_topo.load(path, model)
    for batch, size in enumerate(case.sizes, start=1):
        inputs = case.example(batch, size)
        with torch.no_grad():
            wanted, found = call(dense.eval(), inputs), call(read.eval(), inputs)
        if not all(torch.equal(mine, theirs) for mine, theirs in zip(wanted, found, strict=True)):
            raise WrongError(f"what was saved and loaded computes something else (batch {batch}, size {size})")


def measured(case: Case, model: nn.Module) -> None:
    batches = [wrapped(case.example(4, seed=seed)) for seed in range(2)]
    works: list[tuple[str, Callable[[], Any]]] = [
        ("count_macs", lambda: nni_topo.zoo.count_macs(model, case.example())),
        ("as_torch_layers", lambda: nni_topo.as_torch_layers(model)),
        ("recalibrate_batch_norm", lambda: nni_topo.recalibrate_batch_norm(model, batches)),
    ]
    refused = None
    for name, work in works:
        with unchanged(model, name):
            try:
                work()
            except NniTopoError as error:
                refused = error
    if refused:
        raise refused


REQUESTS: dict[str, Callable[[Case, nn.Module], None]] = {
    "l1": with_l1,
    "random": with_random,
    "without groups": without_groups,
    "rounded": rounded,
    "constants kept": kept_constants,
    "compensated": compensated,
    "shrunk": shrunk,
    "filed": filed,
    "measured": measured,
}
