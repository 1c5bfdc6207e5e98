"""The ``nni-topo`` command: each verb parses, calls one library function and prints."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

import nni_topo
from nni_topo.analysis.topology_study import print_topology, topology_study
from nni_topo.cli.arguments import add_data as _data_arguments
from nni_topo.cli.arguments import add_model as _model
from nni_topo.cli.arguments import add_out as _out
from nni_topo.cli.arguments import add_verb as _verb
from nni_topo.cli.arguments import data_choice as _data
from nni_topo.cli.arguments import hand_over
from nni_topo.cli.energy import add_energy_arguments, run_energy_study
from nni_topo.cli.experiment import add_experiment
from nni_topo.cli.magnitude import add_magnitude_studies
from nni_topo.cli.theory import add_theory_studies
from nni_topo.cli.weights import add_weight_studies
from nni_topo.errors import ConfigError, DataError, NniTopoError
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.runs import compare
from nni_topo.runs.demo import DEMO
from nni_topo.runs.plan import (
    Cell,
    CompensationChoice,
    DistillationChoice,
    ModelChoice,
    Plan,
    PrunerChoice,
    Target,
    load_plan,
    load_prune_config,
)
from nni_topo.runs.prune import prune_checkpoint
from nni_topo.runs.records import read_records
from nni_topo.runs.rivals import is_rival
from nni_topo.runs.tables import markdown_report, plot_accuracy, plot_convergence, print_report, print_widths
from nni_topo.zoo import list_data, list_models

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if some cells failed, 2 if it can't be carried out, 130 if interrupted."""
    options = _parser().parse_args(arguments)
    # With --json, standard output holds the document and nothing else.
    console = Console(stderr=options.json, soft_wrap=False, width=None if sys.stdout.isatty() else 160)
    try:
        return int(options.run(options, console))
    except NniTopoError as error:
        Console(stderr=True).print(f"nni-topo {options.verb}: {error}", style="red", markup=False, highlight=False)
        return 2
    except OSError as error:
        reason = f"files must be such that they can be read and written, got {error}"
        Console(stderr=True).print(f"nni-topo {options.verb}: {reason}", style="red", markup=False, highlight=False)
        return 2
    except KeyboardInterrupt as interruption:
        way_on = next(iter(interruption.args), "the same command goes on from here")
        Console(stderr=True).print(f"nni-topo {options.verb}: interrupted; {way_on}", markup=False, soft_wrap=True)
        return _INTERRUPTED


def _list(options: argparse.Namespace, console: Console) -> int:
    names = list_pruners(options.pattern)
    if options.json:
        pruners = {name: {"summary": pruner_info(name).summary, "knobs": pruner_info(name).knobs()} for name in names}
        print(json.dumps({"pruners": pruners, "models": list_models(), "data": list_data()}, indent=1))
        return 0
    table = Table("pruner", "from", "keeps", "knobs", title=f"nni_topo {nni_topo.__version__}", title_justify="left")
    for name in names:
        info = pruner_info(name)
        table.add_row(name, info.origin, info.summary, ", ".join(info.knobs()))
    console.print(table)
    console.print("models:", ", ".join(list_models()), "· torchvision/NAME · package.module:factory")
    console.print("data:  ", ", ".join(list_data()), "· an .npz file · a folder of images")
    return 0


def _demo(options: argparse.Namespace, console: Console) -> int:
    return _run_plan(DEMO, options, console, isolate=False)


def _compare(options: argparse.Namespace, console: Console) -> int:
    plan = load_plan(options.plan) if options.plan else _plan(options)
    if options.plan and options.data_dir:
        folder = str(options.data_dir)
        plan = replace(plan, data=tuple(replace(choice, data_dir=folder) for choice in plan.data))
    return _run_plan(plan, options, console, isolate=not options.in_process)


def _run_plan(plan: Plan, options: argparse.Namespace, console: Console, *, isolate: bool) -> int:
    def announce(cell: Cell, number: int, count: int) -> None:
        what = f"{cell.model.label} on {cell.data.name}, seed {cell.seed}: {cell.pruner.row}, {cell.target.label}"
        console.print(f"[{number}/{count}] {what}", markup=False, highlight=False)

    records, failures = compare(plan, options.out, isolate=isolate, on_cell=announce)
    if records:
        picture = plot_accuracy(records, options.out / "accuracy.png")
        plot_convergence(records, options.out / "convergence.png")
        print_report(records, console)
        console.print(f"records: {options.out / 'results.json'} · picture: {picture}", markup=False)
    for failure in failures:
        console.print(f"failed: {failure.cell.pruner.row}, seed {failure.cell.seed}\n{failure.reason}", markup=False)
    if options.json:
        print(json.dumps(records, indent=1, sort_keys=True))
    return 1 if failures else 0


def _report(options: argparse.Namespace, console: Console) -> int:
    records = [record for folder in options.folders for record in read_records(folder / "results.jsonl")]
    if not records:
        raise DataError(f"a report needs records, got none in {', '.join(map(str, options.folders))} (results.jsonl)")
    if options.out is not None:
        console.print(f"picture: {plot_accuracy(records, options.out)}", markup=False)
    if options.json:
        print(json.dumps(records, indent=1, sort_keys=True))
    elif options.markdown:
        print(markdown_report(records))
    else:
        print_report(records, console)
    if options.widths:
        print_widths(records, console)
    return 0


def _prune(options: argparse.Namespace, console: Console) -> int:
    record = prune_checkpoint(
        ModelChoice(options.model, options.width),
        options.checkpoint,
        load_prune_config(options.config),
        _data(options),
        options.out,
        seed=options.seed,
        device=options.device,
        progress=not options.json and sys.stderr.isatty(),
    )
    if options.json:
        print(json.dumps(record, indent=1, sort_keys=True))
        return 0
    table = Table("", "before", "after", title=f"{record['model']}, {record['pruner']}", title_justify="left")
    table.add_row("MACs (M)", f"{record['flops_before'] / 1e6:.2f}", f"{record['flops'] / 1e6:.2f}")
    table.add_row("parameters (k)", f"{record['params_before'] / 1e3:.1f}", f"{record['params'] / 1e3:.1f}")
    if record["weights_left"] < record["params"]:
        left = f"{record['weights_left_before'] / 1e3:.1f}", f"{record['weights_left'] / 1e3:.1f}"
        table.add_row("weights that aren't zero (k)", *left)
    table.add_row("accuracy %", f"{100 * record['accuracy_before']:.1f}", f"{100 * record['accuracy_oneshot']:.1f}")
    if "accuracy_compensated" in record:
        table.add_row("compensated %", "", f"{100 * record['accuracy_compensated']:.1f}")
    if "accuracy_distilled" in record:
        table.add_row("distilled %", "", f"{100 * record['accuracy_distilled']:.1f}")
    if "accuracy_retrained" in record:
        table.add_row("retrained %", "", f"{100 * record['accuracy_retrained']:.1f}")
    console.print(table)
    console.print(f"dense model: {options.out / 'dense.pt'} (nni_topo.load)", markup=False)
    return 0


def _analyze_topology(options: argparse.Namespace, console: Console) -> int:
    study = topology_study(
        ModelChoice(options.model, options.width),
        options.checkpoint,
        _data(options),
        _target(options),
        degrees=tuple(options.degrees),
        calibration=options.calibration,
        seed=options.seed,
        device=options.device,
    )
    return hand_over(study, options, console, lambda: print_topology(study, f"topology of {options.model}", console))


def _target(options: argparse.Namespace) -> Target:
    return Target("ratio", options.ratio) if options.flops is None else Target("flops", options.flops)


def _plan(options: argparse.Namespace) -> Plan:
    if options.model is None:
        raise ConfigError("a comparison must have --model or --plan, got neither (nni-topo compare)")
    targets = [Target("ratio", value) for value in options.ratio] + [Target("flops", value) for value in options.flops]
    train = {} if options.train_epochs is None else {"epochs": options.train_epochs}
    return Plan(
        models=(ModelChoice(options.model, options.width),),
        data=(_data(options),),
        pruners=tuple(PrunerChoice(name) for name in _known_pruners(options.pruners)),
        targets=tuple(targets or [Target("ratio", 0.5)]),
        seeds=options.seeds,
        first_seed=options.seed,
        train=train,
        retrain={"epochs": options.retrain_epochs},
        device=options.device,
        compensate=CompensationChoice(options.compensate) if options.compensate else None,
        distill=DistillationChoice(options.distill) if options.distill else None,
    )


def _known_pruners(names: str) -> list[str]:
    found = [name.strip() for name in names.split(",") if name.strip()]
    return [name if name == "scratch" or is_rival(name) else pruner_info(name).name for name in found]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nni-topo", description="Topological pruning for NNI on current PyTorch.")
    parser.add_argument("--version", action="version", version=f"nni_topo {nni_topo.__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    listing = _verb(verbs, "list", _list, "pruners, models and data by name")
    listing.add_argument("pattern", nargs="?", default="*", help="shell pattern of pruner names")

    demo = _verb(verbs, "demo", _demo, "train a small net on digits, prune it by every data-free pruner, compare")
    _out(demo, Path("demo"))

    comparison = _verb(verbs, "compare", _compare, "compare pruners at equal cost; resumes where it was stopped")
    comparison.add_argument("--plan", type=Path, help="YAML file with the whole comparison; see configs/")
    _model(comparison, required=False)
    _data_arguments(comparison)
    comparison.add_argument("--pruners", default="topological,l1,l2,fpgm,random", help="names, separated by commas")
    comparison.add_argument("--ratio", type=float, action="append", default=[], help="sparse_ratio of every layer")
    comparison.add_argument("--flops", type=float, action="append", default=[], help="share of the MACs to be left")
    comparison.add_argument("--seeds", type=int, default=1, help="number of seeds (default 1)")
    comparison.add_argument("--train-epochs", type=int, help="default: the model's recipe")
    comparison.add_argument("--retrain-epochs", type=int, default=1, help="after pruning (default 1)")
    comparison.add_argument(
        "--compensate", type=int, default=0, metavar="IMAGES", help="compensate every row on so many unlabelled images"
    )
    comparison.add_argument(
        "--distill",
        type=int,
        default=0,
        metavar="IMAGES",
        help="then distil every row on so many unlabelled images",
    )
    comparison.add_argument("--in-process", action="store_true", help="don't start a process per cell")
    _out(comparison, None)

    report = _verb(verbs, "report", _report, "tables of comparisons that ran, also while they run")
    report.add_argument("folders", type=Path, nargs="+", help="output folders of nni-topo compare")
    report.add_argument("--markdown", action="store_true", help="as Markdown on standard output")
    report.add_argument("--widths", action="store_true", help="also the layers' widths")
    report.add_argument("--out", type=Path, help="picture of accuracy against MACs")

    studies = verbs.add_parser("analyze", help="studies of one model").add_subparsers(
        dest="study", required=True, metavar="STUDY"
    )
    topology = _verb(studies, "topology", _analyze_topology, "persistence diagrams, death curves and the search")
    _model(topology, required=True)
    topology.add_argument("--checkpoint", type=Path, help="state dict of the trained model; default: train it first")
    topology.add_argument("--ratio", type=float, default=0.5, help="sparse_ratio of every layer (default 0.5)")
    topology.add_argument("--flops", type=float, help="instead: MACs to be left, dealt out by death times")
    topology.add_argument("--degrees", type=int, nargs="+", default=[0, 1], help="homology degrees (default 0 1)")
    topology.add_argument("--calibration", type=int, default=0, help="images for the functional cloud")
    _data_arguments(topology)
    _out(topology, None)

    energy = _verb(
        studies, "energy", partial(run_energy_study, data_choice=_data), "filters by energy share: what goes"
    )
    _model(energy, required=True)
    add_energy_arguments(energy)
    _data_arguments(energy)
    _out(energy, None)

    add_weight_studies(studies)
    add_theory_studies(studies)
    add_magnitude_studies(studies)
    add_experiment(verbs)

    prune = _verb(verbs, "prune", _prune, "prune one trained model as a YAML file says")
    _model(prune, required=True)
    prune.add_argument("--checkpoint", type=Path, help="state dict of the trained model; default: train it first")
    prune.add_argument("--config", type=Path, required=True, help="YAML file: pruner, knobs, config_list; see configs/")
    _data_arguments(prune)
    _out(prune, None)
    return parser


if __name__ == "__main__":
    sys.exit(main())
