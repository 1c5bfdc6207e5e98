"""Processes prune a folder of Transformers block by block together, each with samples of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import shared_data_nets as nets
import torch
import torch.distributed as dist
from safetensors.torch import load_file

import nni_topo
from nni_topo import Calibration
from nni_topo.runs.streaming import shrinking

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_available(), reason="this build of PyTorch has no torch.distributed"),
]

VOCABULARY, LENGTH, BATCHES = 50, 6, 4
KNOBS: dict[str, Any] = {"distill": False, "progress": False}
LEARNED: dict[str, Any] = {"distill": {"steps": 30}}
# By name, whether samples have padding, and knobs.
CASES: dict[str, tuple[bool, dict[str, Any]]] = {
    "plain": (False, {}),
    "padded": (True, {}),
    "distilled": (False, LEARNED),
    "padded, distilled": (True, LEARNED),
}


def make_source(folder: Path) -> Path:
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).save_pretrained(folder / "source")
    return folder / "source"


def tokens(*, padded: bool = False, mask: bool = True) -> list[dict[str, torch.Tensor]]:
    """Return batches of samples; padding is in the last batch alone."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(BATCHES):
        ids = torch.randint(1, VOCABULARY, (8 if number else 5, LENGTH), generator=generator)
        real = torch.ones_like(ids)
        if padded and number == BATCHES - 1:
            real[:3, -2:] = 0
        found.append({"input_ids": ids, "attention_mask": real} if mask else {"input_ids": ids})
    return found


def share(batches: list[Any], rank: int) -> Calibration:
    own = batches[:2] if rank == 0 else batches[2:]
    return Calibration(own, process_group=dist.group.WORLD)


def figures(report: Any) -> list[Any]:
    """Return what a report says, as its table prints it, without the seconds."""
    rows = [
        (row.block, row.params, f"{row.distance:.4g}", f"{row.calibration_distance:.4g}", row.is_distilled)
        for row in report.blocks
    ]
    distance, agreement = report.likeness.distance, report.likeness.agreement
    seen = [distance.value, distance.low, distance.high, agreement.value, agreement.low, agreement.high]
    counts = (report.samples, report.held_out, report.params, report.budget.left, report.widths)
    return [*rows, [f"{each:.4g}" for each in seen], counts]


def prune_together(rank: int, count: int, folder: Path) -> None:
    source = folder / "source"
    budget = {"params": 0.8}
    found: dict[str, Any] = {}
    for name, (padded, knobs) in CASES.items():
        data = share(tokens(padded=padded), rank)
        found[name] = figures(nni_topo.shrink_pretrained(source, data, folder / name, budget, **KNOBS | knobs))
    data = share(tokens(padded=True), rank)
    found["again"] = figures(nni_topo.shrink_pretrained(source, data, folder / "padded", budget, **KNOBS))

    data = share(tokens(), rank)
    prune, pruned = shrinking._Run.prune, []

    def stopping(run: Any, number: int) -> None:
        if number == 1:
            raise MemoryError("for once")
        prune(run, number)

    shrinking._Run.prune = stopping  # type: ignore[method-assign]
    try:
        nni_topo.shrink_pretrained(source, data, folder / "stopped", budget, **KNOBS)
    except MemoryError as error:
        found["stopped"] = ("MemoryError", str(error))

    def counting(run: Any, number: int) -> None:
        pruned.append(number)
        prune(run, number)

    shrinking._Run.prune = counting  # type: ignore[method-assign]
    found["went on"] = figures(nni_topo.shrink_pretrained(source, data, folder / "stopped", budget, **KNOBS))
    shrinking._Run.prune = prune  # type: ignore[method-assign]
    found["blocks after the stop"] = pruned
    target = folder / "refused"
    no_mask = share(tokens(mask=rank == 0), rank)
    found["refused"] = {
        "distill": nets.told(
            lambda: nni_topo.shrink_pretrained(source, data, target, budget, distill={"seconds": 5.0, "blocks": 0.1})
        ),
        "budget": nets.told(
            lambda: nni_topo.shrink_pretrained(source, data, target, {"params": 0.8 - 0.1 * rank}, **KNOBS)
        ),
        "inputs": nets.told(lambda: nni_topo.shrink_pretrained(source, no_mask, target, budget, **KNOBS)),
    }
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder, threads = tmp_path_factory.mktemp("streaming"), torch.get_num_threads()
    source = make_source(folder)
    torch.set_num_threads(1)  # as each of the processes has, so that all round alike
    for name, (padded, knobs) in CASES.items():
        report = nni_topo.shrink_pretrained(
            source, tokens(padded=padded), folder / f"{name}-1", {"params": 0.8}, **KNOBS | knobs
        )
        torch.save(figures(report), folder / f"{name}-1.pt")
    torch.set_num_threads(threads)
    ended = nets.start(prune_together, 2, folder)
    assert [process.exitcode for process in ended] == [0, 0]
    return folder, [torch.load(folder / f"found-{rank}.pt", weights_only=False) for rank in range(2)]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_what_one_makes_of_all_samples(made: Any, name: str) -> None:
    folder, found = made
    wanted = torch.load(folder / f"{name}-1.pt", weights_only=False)
    assert found[0][name] == found[1][name] == wanted
    assert any(row[-1] for row in wanted[:-2]) == ("distill" in CASES[name][1])
    assert sum(wanted[-1][:2]) == sum(len(batch["input_ids"]) for batch in tokens())
    whole, mine = weights_of(folder / f"{name}-1"), weights_of(folder / name)
    assert whole.keys() == mine.keys()
    # AdamW divides gradients by their size, and so makes rounding of the small ones as large as that of others
    most = 1e-4 if "distill" in CASES[name][1] else 1e-5
    for key, values in whole.items():
        torch.testing.assert_close(mine[key], values, rtol=0.0, atol=most * float(values.abs().max()))
    files = [sorted(path.name for path in (folder / each).iterdir()) for each in (name, f"{name}-1")]
    assert files[0] == files[1]  # nothing is left of the states
    assert found[0]["again"] == found[1]["again"] == found[0]["padded"]


def test_a_run_goes_on_after_an_error(made: Any) -> None:
    folder, found = made
    for each in found:
        assert each["stopped"] == ("MemoryError", "for once")
        assert each["blocks after the stop"] == [1, 2]
        assert each["went on"] == found[0]["plain"]
    whole = weights_of(folder / "plain")
    assert all(torch.equal(values, whole[key]) for key, values in weights_of(folder / "stopped").items())


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("distill", "got seconds, blocks"),
        ("budget", "models, masks and knobs must be equal in all processes, got different ones: budget"),
        ("inputs", "all batches must have the same inputs"),
    ],
)
def test_what_cannot_be_done_is_told(made: Any, case: str, words: str) -> None:
    folder, found = made
    kinds = {each["refused"][case][0] for each in found}
    assert kinds <= {"ConfigError", "DataError", "ProcessError"}
    assert any(words in each["refused"][case][1] for each in found), [each["refused"][case] for each in found]
    assert not list((folder / "refused").glob("*.safetensors"))
