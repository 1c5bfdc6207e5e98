"""Seconds of selecting channels, reconstructing weights and distilling, as multiples of a pass over the data.

A pass is one forward and one backward run over all calibration batches, in the same process and with one thread; on
the CPU seconds are those of the processor. Two versions of the package are compared by running the same file with each
checkout in PYTHONPATH:

    OMP_NUM_THREADS=1 PYTHONPATH=CHECKOUT python benchmarks/speed/bench_seconds.py --networks pitch resnet18 --out OUT

A line per network goes to OUT's ``seconds.jsonl``, with the checkout's commit. Kept in benchmarks/records/ they make
the table of a page:

    python benchmarks/speed/bench_seconds.py --into benchmarks/results/speed.md
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import nni_topo
from benchmarks.tables import with_tables
from nni_topo.runs.provenance import provenance
from nni_topo.runs.run import resolve_device
from nni_topo.studies.records import append_record, read_records
from nni_topo.studies.tables import markdown_table

RECORDS = Path(__file__).parents[1] / "records" / "seconds.jsonl"
SOURCE = "benchmarks/speed/bench_seconds.py"  # as the comments around the page's table say


def pitch(inputs: int) -> tuple[nn.Module, list[Tensor]]:
    """Six convolutions of 512x1 and 64x1, batch norms after ReLU, poolings by 2; 0.49 M parameters."""

    def block(entering: int, leaving: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv1d(entering, leaving, kernel, stride=stride, padding=kernel // 2)
        return [convolution, nn.ReLU(), nn.BatchNorm1d(leaving), nn.MaxPool1d(2)]

    widths = [1, 128, 16, 16, 16, 32, 64]
    layers = block(1, 128, 512, stride=4)
    for entering, leaving in itertools.pairwise(widths[1:]):
        layers += block(entering, leaving, 64)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * 64, 360)), list(torch.randn(inputs, 1, 1024).split(64))


def resnet18(inputs: int) -> tuple[nn.Module, list[Tensor]]:
    """torchvision's, on images of 96 pixels."""
    import torchvision

    return torchvision.models.resnet18(num_classes=100), list(torch.randn(inputs, 3, 96, 96).split(32))


def resnet50(inputs: int) -> tuple[nn.Module, list[Tensor]]:
    """torchvision's, on images of 224 pixels."""
    import torchvision

    return torchvision.models.resnet50(), list(torch.randn(inputs, 3, 224, 224).split(32))


def bert(inputs: int) -> tuple[nn.Module, list[Any]]:
    """Four layers of width 128 on 32 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512)
    batches = [{"input_ids": tokens} for tokens in torch.randint(0, 1000, (inputs, 32)).split(32)]
    return BertModel(config), batches


def minilm(inputs: int) -> tuple[nn.Module, list[Any]]:
    """The sizes of MiniLM-L6, on 32 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    batches = [{"input_ids": tokens} for tokens in torch.randint(0, 1000, (inputs, 32)).split(32)]
    return BertModel(config), batches


NETWORKS: dict[str, tuple[Callable[[int], tuple[nn.Module, list[Any]]], int, list[dict[str, Any]]]] = {
    "pitch": (pitch, 1024, [{"op_types": ["Conv1d"], "sparse_ratio": 0.5}]),
    "resnet18": (resnet18, 128, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]),
    "resnet18, 1,024 images": (resnet18, 1024, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]),
    "bert": (bert, 256, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]),
    "resnet50": (resnet50, 256, [{"op_types": ["Conv2d"], "sparse_ratio": 0.5}]),
    "minilm": (minilm, 1024, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]),
}


def settle_norms(model: nn.Module, batches: list[Any]) -> None:
    """Let batch norms see the data, so that all layers get values of an ordinary size."""
    model.train()
    with torch.no_grad():
        for batch in batches[:4]:
            called(model, batch)
    model.eval()


def called(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, which is moved to the model's device."""
    device = next(model.parameters()).device
    if isinstance(batch, dict):
        return model(**{name: value.to(device) for name, value in batch.items()})
    return model(batch.to(device))


def first_output(found: Any) -> Tensor:
    """Return the tensor that a model puts out first."""
    return found if isinstance(found, Tensor) else found[0]


def error_on(batch: Any, net: nn.Module, model: nn.Module) -> float:
    """Return the mean squared error of a network's outputs on a batch, over the variance of the model's."""
    with torch.no_grad():
        wanted = first_output(called(model, batch))
        return float((first_output(called(net, batch)) - wanted).square().mean() / wanted.var())


def timed(
    device: torch.device, work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter
) -> tuple[float, Any]:
    """Return the seconds until a device has done its work, and the result."""
    began = clock()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - began, result


def torch_pruning_seconds(model: nn.Module, example: Any, device: torch.device) -> float | None:
    """Return how long Torch-Pruning takes to remove half of all channels by group norms; None if it can't."""
    import torch_pruning

    def prune() -> None:
        importance = torch_pruning.importance.GroupMagnitudeImportance()
        ignored = [module for module in small.modules() if isinstance(module, nn.Linear)][-1:]
        knobs = {"pruning_ratio": 0.5, "ignored_layers": ignored}
        torch_pruning.pruner.BasePruner(small, example.to(device), importance, **knobs).step()

    small = copy.deepcopy(model)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    return timed(device, prune, clock)[0] if isinstance(example, Tensor) else None


def measure(name: str, device: torch.device, *, distil: bool = True) -> dict[str, float | None]:
    """Return the seconds of a pass, and what selection, reconstruction and distillation take in passes."""
    # other programs of the machine don't count
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    make, inputs, config_list = NETWORKS[name]
    torch.manual_seed(0)
    model, batches = make(inputs)
    model.to(device)
    settle_norms(model, batches)

    def backwards(some: list[Any]) -> None:
        for batch in some:
            first_output(called(model, batch)).square().mean().backward()

    def select() -> Any:
        pruner = nni_topo.ReconstructionPruner(model, grouped, calibration=batches)
        _, masks = pruner.compress()
        pruner.unwrap_model()
        return masks

    # the first call of a GPU loads its libraries
    timed(device, lambda: backwards(batches[:1]))
    seconds, _ = timed(device, lambda: backwards(batches), clock)
    model.zero_grad()
    grouped = nni_topo.dependency_groups(model, batches[0], config_list)
    selecting, masks = timed(device, select, clock)
    solving, found = timed(device, lambda: nni_topo.compensate(model, masks, batches), clock)
    masked = nni_topo.to_dense(model, batches[0], masks)
    solved = nni_topo.to_dense(found, batches[0], masks)
    distilling, distilled = 0.0, None
    if distil:
        distilling, distilled = timed(device, lambda: nni_topo.distillation(solved, model, batches), clock)
    pruning = torch_pruning_seconds(model, batches[0][:2] if isinstance(batches[0], Tensor) else None, device)
    nets = [masked, solved] + ([] if distilled is None else [distilled.model])
    errors = [error_on(batches[0], net, model) for net in nets]
    fresh = make(inputs)[1][0]
    measured: dict[str, float | None] = {
        "pass s": seconds,
        "select, passes": selecting / seconds,
        "reconstruct, passes": solving / seconds,
        "error, no recovery": errors[0],
        "error, weight reconstruction": errors[1],
        "error, weight reconstruction, fresh inputs": error_on(fresh, solved, model),
        "Torch-Pruning, passes": None if pruning is None else pruning / seconds,
    }
    if distilled is not None:
        measured |= {
            "distil, passes": distilling / seconds,
            "steps": distilled.steps,
            "loss, before": distilled.loss_before,
            "loss, after": distilled.loss_after,
            "error, distilled": errors[2],
        }
    return measured


def table(records: list[dict[str, Any]]) -> str:
    """Return a row for each network and commit, in the order in which they were measured."""
    head = [
        "network",
        "commit",
        "a pass, CPU s",
        "select: passes",
        "reconstruct: passes",
        "distil: passes (steps)",
        "Torch-Pruning: passes",
        "error: no recovery",
        "reconstructed",
        "distilled",
        "reconstructed, fresh inputs",
    ]
    rows = []
    for name in NETWORKS:
        for each in records:
            if each["network"] == name:
                pruning, is_distilled = each["Torch-Pruning, passes"], "steps" in each
                fresh = each.get("error, weight reconstruction, fresh inputs")
                rows.append(
                    [
                        name,
                        each["commit"],
                        f"{each['pass s']:.2f}",
                        f"{each['select, passes']:.2f}",
                        f"{each['reconstruct, passes']:.2f}",
                        f"{each['distil, passes']:.1f} ({each['steps']})" if is_distilled else "not run",
                        "not run" if pruning is None else f"{pruning:.3f}",
                        f"{each['error, no recovery']:.3g}",
                        f"{each['error, weight reconstruction']:.3g}",
                        f"{each['error, distilled']:.3g}" if is_distilled else "not run",
                        "not measured" if fresh is None else f"{fresh:.3g}",
                    ]
                )
    return markdown_table(head, rows)


def main() -> None:
    """Measure networks, or write the table of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks", nargs="+", choices=list(NETWORKS), default=["pitch", "resnet18", "bert"], help="default three"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-distillation", action="store_true", help="leave it out: it takes most of the time")
    parser.add_argument("--out", type=Path, help="folder for the records")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="page whose table is replaced by that of the records")
    options = parser.parse_args()
    if options.into is not None:
        page = options.into.read_text(encoding="utf-8")
        options.into.write_text(with_tables(page, SOURCE, table(read_records(RECORDS))), encoding="utf-8")
        return
    device = resolve_device(options.device)
    torch.set_num_threads(1)
    records = []
    for name in options.networks:
        records.append(
            {
                "network": name,
                "commit": provenance()["revision"],
                **measure(name, device, distil=not options.no_distillation),
            }
        )
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            append_record(options.out / "seconds.jsonl", records[-1])
        print(table(records[-1:]), flush=True)


if __name__ == "__main__":
    main()
