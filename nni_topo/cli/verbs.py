"""The verbs list, demo, compare, report, shrink and prune."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from torch import Tensor
from torch.utils._pytree import tree_map_only

import nni_topo
from nni_topo.disk import check_output_file, finite, output_folder, plain, write_figure, write_json
from nni_topo.errors import ConfigError, DataError
from nni_topo.network.io.exporting import FORMATS
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.pruners.budget import BUDGETS
from nni_topo.pruners.registry import list_pruners, pruner_info
from nni_topo.recovery import list_recoveries, recovery_info
from nni_topo.recovery.registry import RECOVERIES
from nni_topo.rules import NONE, check_knobs, number, one_of, whole
from nni_topo.runs.choices import Cell, CompensationChoice, DistillationChoice, PrunerChoice, Target, load_prune_config
from nni_topo.runs.headline import headline_of_records, percent_in_words
from nni_topo.runs.provenance import provenance
from nni_topo.runs.prune import empty_folder, prune_checkpoint
from nni_topo.runs.run import distillation_knobs, resolve_device, weighted_model
from nni_topo.runs.settings import TOLERANCE, Settings
from nni_topo.runs.shrink import KNOBS, asked_budget, shrink
from nni_topo.studies.baselines import is_baseline
from nni_topo.studies.compare import compare
from nni_topo.studies.demo import DEMO, show_gain
from nni_topo.studies.pictures import comparison_figures, plot_distillation
from nni_topo.studies.plan import SCRATCH, ComparisonPlan, load_plan
from nni_topo.studies.records import compared_records
from nni_topo.studies.report import GAIN, prune_costs, sentences_of, write_report
from nni_topo.studies.study import DataVerb, Names, TrainedVerb, Verb, save_figures
from nni_topo.studies.tables import NumberTable, as_markdown, tables_of
from nni_topo.zoo import list_data, list_models
from nni_topo.zoo.external import pretrained_preprocessing
from nni_topo.zoo.labelled import Preprocessing
from nni_topo.zoo.unlabelled import fitting_texts, has_labels, read_inputs, shape_of

_OR_MACS = tyro.conf.arg(aliases=("--macs",))
_Costs = Annotated[tyro.conf.UseAppendAction[tuple[float, ...]], _OR_MACS]


@dataclass(frozen=True, kw_only=True)
class List(Verb):
    """List pruners, recovery methods, models and data by name."""

    pattern: tyro.conf.Positional[str] = "*"  # shell pattern of pruner names

    def run(self, console: Console) -> int:
        """Print tables of pruners and recovery methods, models and data, or the same as JSON."""
        infos = {name: pruner_info(name) for name in list_pruners(self.pattern)}
        pruners = {name: {"summary": info.summary, "knobs": info.knobs()} for name, info in infos.items()}
        methods = {name: recovery_info(name) for name in list_recoveries()}
        recoveries = {name: {"summary": info.summary, "knobs": info.knobs()} for name, info in methods.items()}
        document = {"pruners": pruners, "recoveries": recoveries, "models": list_models(), "data": list_data()}
        rows = [(name, info.origin, info.summary, ", ".join(info.knobs())) for name, info in infos.items()]
        head, title = ("pruner", "from", "keeps", "knobs"), f"nni_topo {nni_topo.__version__}"
        models = f"models: {', '.join(list_models())} · torchvision/NAME · timm/NAME · package.module:factory"
        data = f"data:   {', '.join(list_data())} · an .npz file · a folder of images"
        lines = [(name, info.origin, info.summary, ", ".join(info.knobs())) for name, info in methods.items()]
        table = NumberTable("recovery methods", ("method", "from", "does", "settings"), lines, text_columns=4)
        self.put_out(console, document, [NumberTable(title, head, rows, text_columns=4), table, models, data])
        return 0


@dataclass(frozen=True, kw_only=True)
class Demo(Verb):
    """Train a small network on digits, make it smaller, and compare several pruners."""

    out: Path = Path("demo")  # output folder

    def run(self, console: Console) -> int:
        """Say how long the demonstration takes, and run it; the last lines say what was gained."""
        cells = len(DEMO.pruners) * len(DEMO.targets)
        console.print(
            f"a small network is trained on digits and shrunk. Then {DEMO.seeds} networks are each pruned {cells} "
            f"times: some two minutes on two cores. Tables follow here, pictures and report.html in {self.out}/"
        )
        report = show_gain(DEMO, self.out)
        first, last = report.stages[0], report.stages[-1]
        gain = (
            f"shrink: {report.sentence}; {percent_in_words(last.accuracy)} of the test images are right, "
            f"{percent_in_words(first.accuracy)} before"
        )
        steps = report.to_dict()["steps"]
        table = NumberTable(None, list(steps[0]), [list(row.values()) for row in steps])
        for part in (gain, table):
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
        status = _run_plan(DEMO, self.out, console, as_json=self.json)
        console.print(f"{gain} · picture: {self.out / GAIN}", markup=False, highlight=False, soft_wrap=True)
        return status


@dataclass(frozen=True, kw_only=True)
class Compare(DataVerb):
    """Compare pruners at equal cost; a comparison resumes where it was stopped."""

    model: str = ""  # a listed name, torchvision/NAME, timm/NAME or package.module:factory; or give --plan instead
    plan: Path | None = None  # YAML file with the whole comparison; see configs/
    network: str = ""  # name of one of the plan's networks, if it has several
    pruners: Names = ("topological", "l1", "l2", "fpgm", "random")  # registered names
    ratio: tyro.conf.UseAppendAction[tuple[float, ...]] = ()  # sparse_ratio of every layer, in [0, 1); may be repeated
    flops: _Costs = ()  # share of the MACs to keep, in (0, 1]; may be repeated
    params: tyro.conf.UseAppendAction[tuple[float, ...]] = ()  # share of the parameters to keep, in (0, 1]
    latency: tyro.conf.UseAppendAction[tuple[float, ...]] = ()  # share of a batch's time to keep, in (0, 1]
    memory: tyro.conf.UseAppendAction[tuple[float, ...]] = ()  # share of parameters' and activations' bytes, in (0, 1]
    seeds: int = 1  # number of seeds, at least 1
    train_epochs: int | None = None  # epochs of training; None: as in the model's recipe
    retrain_epochs: int = 1  # epochs of fine-tuning after pruning, at least 0
    calibration: int = 512  # unlabelled images for the pruners that need calibration data
    compensate: int = 0  # unlabelled images for weight reconstruction of every pruned network; 0: no reconstruction
    method: str = "reconstruct"  # a listed recovery method, or package.module:Class
    distill: int = 0  # unlabelled images for distillation after weight reconstruction; 0: no distillation
    test_limit: int | None = None  # test images used, the set's first ones, at least 1; None: all, whatever --limit is
    n_jobs: int | None = None  # cells to run at a time, at least 1; -1: one per core; None: as in the plan, or 1

    def run(self, console: Console) -> int:
        """Run the comparison's cells and print its tables."""
        plan = load_plan(self.plan, self.network) if self.plan else self._plan()
        if self.plan and self.data_dir:
            folder = str(self.data_dir)
            plan = replace(plan, data=tuple(replace(choice, data_dir=folder) for choice in plan.data))
        if self.n_jobs is not None:
            plan = replace(plan, n_jobs=self.n_jobs)
        return _run_plan(plan, self.out, console, as_json=self.json)

    def _plan(self) -> ComparisonPlan:
        if not self.model:
            raise ConfigError("a comparison must have --model or --plan, got neither (nni-topo compare)")
        whole(0).check("calibration", self.calibration, "nni-topo compare")
        kinds: tuple[Any, ...] = ("ratio", *BUDGETS)
        targets = [Target(kind, value) for kind in kinds for value in getattr(self, kind)]
        return ComparisonPlan(
            models=(self.model_choice,),
            data=(self.data_choice(self.test_limit),),
            pruners=tuple(map(self._choice, self.pruners)),
            targets=tuple(targets or [Target("ratio", 0.5)]),
            seeds=self.seeds,
            first_seed=self.seed,
            train={} if self.train_epochs is None else {"epochs": self.train_epochs},
            retrain={"epochs": self.retrain_epochs},
            device=self.device,
            compensate=CompensationChoice(self.compensate, self.method) if self.compensate else None,
            distill=DistillationChoice(self.distill) if self.distill else None,
        )

    def _choice(self, name: str) -> PrunerChoice:
        if name == SCRATCH or is_baseline(name):
            return PrunerChoice(name)
        info = pruner_info(name)
        if any(need.startswith("calibration") for need in info.needs):
            return PrunerChoice(info.name, calibration=self.calibration)
        return PrunerChoice(info.name, calibration=0)


def _run_plan(plan: ComparisonPlan, out: Path, console: Console, *, as_json: bool) -> int:
    def announce(cell: Cell, number: int, count: int) -> None:
        network = f"{cell.model.label} on {cell.data.name}, seed {cell.seed}"
        line = f"[{number}/{count}] {network}: {cell.pruner.row}, {cell.target.label}"
        console.print(line, markup=False, highlight=False)

    records, failures = compare(plan, out, on_cell=announce)
    if records:
        picture = save_figures(out, comparison_figures(records))[0]
        for part in (*sentences_of(records), *tables_of(records)):
            console.print(part, markup=False, highlight=False, soft_wrap=isinstance(part, str))
        console.print(
            f"records: {out / 'results.json'} · picture: {picture} · report: {out / 'report.html'}", markup=False
        )
    for failure in failures:
        console.print(f"failed: {failure['pruner']}, seed {failure['seed']}\n{failure['reason']}", markup=False)
    if as_json:
        print(json.dumps(records, indent=1))
    return 1 if failures else 0


@dataclass(frozen=True, kw_only=True)
class Report(Verb):
    """Write report.html in folders of finished or running runs, and print the tables of comparisons."""

    folders: tyro.conf.Positional[tuple[Path, ...]]  # output folders of nni-topo
    markdown: bool = False  # print the tables as Markdown
    widths: bool = False  # also print the layers' widths
    out: Path | None = None  # file for a picture of accuracy against MACs

    def run(self, console: Console) -> int:
        """Write the folders' reports and print the tables of their records."""
        if self.out is not None:
            check_output_file(self.out)
        for folder in self.folders:
            console.print(f"report: {write_report(folder)}", markup=False, soft_wrap=True)
        records = [record for folder in self.folders for record in compared_records(folder / "results.jsonl")]
        if self.out is not None and records:
            write_figure(self.out, comparison_figures(records)["accuracy"], dpi=150)
            console.print(f"picture: {self.out}", markup=False)
        parts: list[NumberTable | str] = [*sentences_of(records), *tables_of(records, widths=self.widths)]
        if self.markdown and not self.json:
            print(as_markdown(parts))
        else:
            self.put_out(console, records, parts)
        return 0


@dataclass(frozen=True, kw_only=True)
class Shrink(TrainedVerb):
    """Make one model smaller from inputs without labels: select channels, reconstruct weights, distil.

    --data: a folder of images in any subfolders, an .npz, .npy or .safetensors file of inputs (several arrays: by the
    names of the model's arguments), .txt or .jsonl lines of text with --tokenizer, or package.module:function, which
    returns batches. Where it has labels (a listed data set, an .npz file with y_train, a folder for each class), a
    column tells the accuracy. --model may also be an .onnx or .pt2 file.
    """

    pruner: str = "reconstruction"  # registered name
    method: str = "reconstruct"  # how weights are reconstructed: a listed recovery method, or package.module:Class
    flops: Annotated[float | None, _OR_MACS] = None  # share of the MACs to keep, in (0, 1]; 0.25 if nothing is asked
    params: float | None = None  # share of the parameters to keep, in (0, 1]
    latency: float | None = None  # share of a batch's time to keep, in (0, 1]
    memory: float | None = None  # share of the bytes of parameters and activations to keep, in (0, 1]
    tolerance: float | None = None  # share of answers that may change, in (0, 1); finds the smallest such network
    cost: str | None = None  # with --tolerance, the cost to minimise: flops, params, latency or memory
    measure: str = "outputs"  # measure of --tolerance: outputs (changed answers; else distance) or distance
    allocation: str | None = None  # how layers share the budget: uniform, topological, error or auto; None: uniform
    layers: Names = ()  # layers to prune, by name; none: all that can lose channels
    equal_blocks: bool = False  # keep the same widths in all blocks, so that a config of Transformers describes them
    no_equal_blocks: bool = False  # let layers and heads of a model of Transformers keep any width
    runtime: str = "pytorch"  # where --latency is timed: pytorch or onnxruntime
    round_to: int | None = None  # layers keep a multiple of so many channels, 1: any number; None: as the budget allows
    depth: bool = False  # let blocks compete with channels for the budget
    images: int = 1024  # samples of the data that are used, without labels, at least 2
    unlabelled: bool = False  # use the data without its labels, e.g. folders of images that aren't classes
    mean: tuple[float, ...] = ()  # of each channel of images in files, in [0, 1]; none: the model's, else ImageNet's
    std: tuple[float, ...] = ()  # standard deviation of each channel, above 0; none: the model's, else ImageNet's
    crop: float | None = None  # side of the middle square that is scaled, as a share of the image's, in (0, 1]
    transform: str | None = None  # package.module:function from a Pillow image to a tensor, in place of all scaling
    classes: int | None = None  # logits of a model that is built for data without labels; None: its factory's default
    tokenizer: str | None = None  # folder or name of a tokenizer of Transformers, for lines of text
    export: Literal["onnx", "pt2"] | None = None  # also write the smaller network as small.onnx or small.pt2
    test_limit: int | None = None  # test images used, the set's first ones, at least 1; None: all, whatever --limit is
    objective: Literal["auto", "kl", "binary", "cosine", "squares"] = "auto"  # how outputs are compared; auto: by them
    no_distill: bool = False  # leave distillation out
    distill_seconds: float | None = None  # time of distillation, above 0; None: until the held-out loss stops falling

    def run(self, console: Console) -> int:
        """Write the dense model and print what each step did, with labels also the accuracy on the test images."""
        with empty_folder(self.out):
            budget = self._budget()
            self._check(budget)
            is_file = Path(self.model).suffix.lower() in FORMATS
            network, images, how = self._inputs(console, is_file=is_file)
            dense = shrink(
                network,
                images,
                budget,
                tolerance=self.tolerance,
                measure="auto" if self.tolerance is None else self.measure,
                time=True,
                pruner=self.pruner,
                compensate=self.method,
                depth=self.depth,
                layers=list(self.layers) or None,
                round_to=self.round_to,
                seed=self.seed,
                progress=False if self.json else None,
                **how,
            )
            report: Any = dense.report
            output_folder(self.out)
            if is_file:
                written = nni_topo.export(dense, self.out / f"small{Path(self.model).suffix.lower()}").path
                files = f"smaller file: {written}"
            else:
                nni_topo.save(dense, self.out / "dense.safetensors")
                files = f"dense model: {self.out / 'dense.safetensors'} (nni_topo.load)"
                if self.export is not None:
                    written = nni_topo.export(dense, self.out / f"small.{self.export}", images[0]).path
                    files += f" · {self.export}: {written}"
            settings = {
                "model": self.model,
                "data": self.data,
                "pruner": self.pruner,
                "method": self.method,
                "budget": budget,
            }
            figures = report.to_dict()
            outcome = {"outcome of the budget": figures.pop("budget", None)}
            document = finite(plain({**settings, **figures, **outcome, **provenance()}))
            write_json(self.out / "shrink.json", document, sort=False)
            if "distillation" in document:
                write_figure(self.out / "distillation.png", plot_distillation(report.distillation), 110)
            files += f" · report: {write_report(self.out)}"
            self.put_out(console, document, [repr(report), files])
            return 0

    def _inputs(self, console: Console, *, is_file: bool) -> tuple[Any, Calibration, dict[str, Any]]:
        """Return the model, batches of inputs, and arguments of `shrink` that depend on both."""
        if not is_file and has_labels(self.data) and (not self.unlabelled or self.data in list_data()):
            try:
                start = self.start(self.test_limit)
            except DataError as error:
                if not Path(self.data).is_dir():
                    raise
                raise DataError(f"{error}; --unlabelled uses the images without their folders as classes") from error
            choice = DistillationChoice(self.images, seconds=self.distill_seconds)
            knobs = {**distillation_knobs(start, choice), "objective": self.objective}
            how = {"distill": not self.no_distill and knobs, "evaluate": start.tested}
            return start.net, start.calibration(self.images), how
        pretrained = None if is_file else pretrained_preprocessing(self.model)
        defaults = pretrained or Preprocessing()
        crop = defaults.crop if self.crop is None else self.crop
        scaling = replace(defaults, mean=self.mean or defaults.mean, std=self.std or defaults.std, crop=crop)
        images = read_inputs(
            self.data,
            self.images,
            image_size=self.image_size,
            preprocessing=scaling,
            workers=self.workers,
            tokenizer=self.tokenizer,
            transform=self.transform,
        )
        if Path(self.data).is_dir() and self.transform is None:
            tell = "; --mean and --std change it" if not (self.mean or self.std) else ""
            console.print(
                f"images: as shares of the largest value, less mean {list(scaling.mean)}, divided by "
                f"{list(scaling.std)}{tell}",
                markup=False,
                highlight=False,
            )
        distill: dict[str, Any] | bool = {"objective": self.objective}
        if self.distill_seconds is not None:
            distill = {"objective": self.objective, "seconds": self.distill_seconds}
        if self.no_distill:
            distill = False
        if is_file:
            return self.model, images, {"distill": distill}
        network = weighted_model(
            self.model_choice,
            shape_of(images[0]),
            checkpoint=self.checkpoint,
            classes=self.classes,
            device=self.device,
        )
        if self.checkpoint is None:
            console.print(f"weights: those that {self.model} has; --checkpoint reads others", markup=False)
        images = images.with_batches(fitting_texts(images, network, self.data))
        place = resolve_device(self.device)
        on_device = [tree_map_only(Tensor, lambda tensor: tensor.to(place), batch) for batch in images]
        return network, images.with_batches(on_device), {"distill": distill}

    def _check(self, budget: str | dict[str, Any] | None) -> None:
        """Check all flags before anything is loaded or trained."""
        place = "nni-topo shrink"
        one_of(("outputs", "distance")).check("measure", self.measure, place)
        RECOVERIES.info(self.method, place, "method")
        (whole(1) | NONE).check("round_to", self.round_to, place)
        (whole(1) | NONE).check("classes", self.classes, place)
        for name, values, rule in (("mean", self.mean, number(0, 1)), ("std", self.std, number(0, closed="neither"))):
            if len(values) not in (0, 3):
                raise ConfigError(f"--{name} must be three numbers (red, green, blue), got {len(values)} ({place})")
            for value in values:
                rule.check(name, value, place)
        if self.export is not None and Path(self.model).suffix.lower() in FORMATS:
            raise ConfigError(f"--export can't be combined with a file, whose format stays, got {self.model} ({place})")
        (number(0, 1, "right") | NONE).check("crop", self.crop, place)
        for flag, excluded in (("transform", "crop"), ("transform", "mean"), ("transform", "std")):
            if getattr(self, flag) and getattr(self, excluded):
                raise ConfigError(
                    f"--{flag} replaces all scaling of images, so --{excluded} must be left out ({place})"
                )
        if self.equal_blocks and self.no_equal_blocks:
            raise ConfigError(f"--equal-blocks and --no-equal-blocks exclude each other, got both ({place})")
        if self.no_distill and self.distill_seconds is not None:
            raise ConfigError(f"--distill-seconds must be left out with --no-distill, got both ({place})")
        DistillationChoice(self.images, seconds=self.distill_seconds)
        check_knobs(place, {"tolerance": self.tolerance}, KNOBS)
        settings = Settings(pruner=self.pruner, compensate=self.method, depth=self.depth, place=place)
        why_several = "" if self.tolerance is None else TOLERANCE
        settings.check_together(asked_budget(budget, self.tolerance), why_several)

    def _budget(self) -> str | dict[str, Any] | None:
        """Return the shares to keep; with a tolerance the name of the cost to minimise, or None."""
        shares: dict[str, Any] = {kind: getattr(self, kind) for kind in BUDGETS if getattr(self, kind) is not None}
        if self.tolerance is None and self.cost is not None:
            raise ConfigError("--cost needs --tolerance, got none (nni-topo shrink)")
        if self.tolerance is not None and shares:
            flag = f"--{next(iter(shares))}"
            raise ConfigError(f"--tolerance can't be combined with a share to keep, got {flag} (nni-topo shrink)")
        how: dict[str, Any] = {}
        if self.allocation is not None:
            how["allocation"] = self.allocation
        if self.equal_blocks or self.no_equal_blocks:
            how["equal_blocks"] = self.equal_blocks
        if self.runtime != "pytorch":
            how["runtime"] = self.runtime
        if self.tolerance is not None:
            return {self.cost or "flops": None, **how} if how else self.cost
        return {**(shares or {"flops": 0.25}), **how}


@dataclass(frozen=True, kw_only=True)
class Prune(TrainedVerb):
    """Prune one trained model by a YAML file."""

    config: Path  # YAML file: pruner, knobs, config_list; see configs/
    test_limit: int | None = None  # test images used, the set's first ones, at least 1; None: all, whatever --limit is

    def run(self, console: Console) -> int:
        """Prune, write the dense model, and print costs and accuracies before and after."""
        record = prune_checkpoint(
            self.model_choice,
            self.checkpoint,
            load_prune_config(self.config),
            self.data_choice(self.test_limit),
            self.out,
            seed=self.seed,
            device=self.device,
            progress=False if self.json else None,
        )
        table = NumberTable(
            f"{record['model']}, {record['pruner']}", ("", "before", "after"), prune_costs(record), text_columns=3
        )
        files = f"dense model: {self.out / 'dense.safetensors'} (nni_topo.load) · report: {write_report(self.out)}"
        self.put_out(console, record, [headline_of_records([record]), table, files])
        return 0
