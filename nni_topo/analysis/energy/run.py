"""The energy study of one model by name: the library function behind ``nni-topo analyze energy``."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.utils.data import TensorDataset

from nni_topo import zoo
from nni_topo.analysis.energy.dropout import with_dropout
from nni_topo.analysis.energy.parts import PARTS, Subject
from nni_topo.analysis.energy.plots import energy_record, save_energy_study
from nni_topo.analysis.energy.study import THRESHOLDS, EnergyStudy, Quality, masks_of, study_energy
from nni_topo.errors import unknown_name
from nni_topo.network.dense import to_dense
from nni_topo.pruners.hooks import Masks
from nni_topo.runs.plan import DataChoice, ModelChoice
from nni_topo.runs.records import Record
from nni_topo.runs.run import trained
from nni_topo.runs.widths import inner_layers
from nni_topo.zoo import count_macs


@dataclass(frozen=True)
class EnergyPlan:
    """What an energy study does: at ascending energy shares, with further parts by name (see ``PARTS``).

    Attributes
    ----------
    max_drop : float
        Accuracy, a fraction, that the suggestion lets each layer cost by itself.
    layer : str or None
        Which layer ``replacement`` and ``selection`` look at. None: the one that is costliest to prune.
    calibration : int
        Training images whose energy is measured instead of the chirp's; 0: the chirp.
    knobs : mapping
        Of :class:`~nni_topo.EnergyFilterPruner`: plain values only.
    """

    thresholds: Sequence[float] = THRESHOLDS
    max_drop: float = 0.01
    parts: Sequence[str] = ()
    layer: str | None = None
    calibration: int = 0
    knobs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for part in self.parts:
            if part not in PARTS:
                raise unknown_name("part of an energy study", part, PARTS)


def energy_study(
    model: ModelChoice,
    checkpoint: str | Path | None,
    data: DataChoice,
    plan: EnergyPlan,
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> Record:
    """Study a model's pruning by energy; write what was found to ``out``, return ``energy.json`` and the ``files``."""
    start = trained(model, data, checkpoint=checkpoint, seed=seed, device=device)
    net, example = start.net, start.example
    if "dropout" in plan.parts:
        with_dropout(net, 0.0)  # says at once that there is none
    layers = [name for name in inner_layers(net, example) if not isinstance(net.get_submodule(name), nn.Linear)]
    knobs = dict(plan.knobs)
    if plan.calibration:
        knobs |= {"signal": "data", "calibration": start.images(plan.calibration)}

    def quality(candidate: nn.Module, images: TensorDataset) -> Quality:
        return Quality(*zoo.loss_and_accuracy(candidate, images, device=next(candidate.parameters()).device))

    # layers, thresholds and all parts are judged on validation images; the test images see what was chosen
    validation = TensorDataset(*start.data.validation[: data.test_limit])
    evaluate = partial(quality, images=validation)
    study = study_energy(net, layers, example, evaluate, thresholds=plan.thresholds, **knobs)
    thresholds = study.suggestion(plan.max_drop)
    more: Record = {"model": model.label, "data": data.name, "seed": seed}
    if thresholds:
        more["suggested"] = _suggested(study, thresholds, net, example, partial(quality, images=start.data.test))
    files = save_energy_study(study, out, more)
    subject = Subject(start, study, evaluate, knobs, plan.layer, Path(out))
    for part in plan.parts:  # minutes each: what is known is on the disk before the next one begins
        more[part] = PARTS[part](subject)
        save_energy_study(study, out, more)
    files += subject.files
    if thresholds:
        # without a layer that can spare a filter there is no suggestion, and no file of it
        command = _prune_command(model, checkpoint, data)
        files.append(_write_suggestion(Path(out) / "suggested.yaml", more, plan, command))
    return {**energy_record(study), **more, "files": [str(path) for path in files]}


def _suggested(study: EnergyStudy, thresholds: dict[str, float], net: nn.Module, example: Any, evaluate: Any) -> Record:
    """Try the suggestion, all layers at once, on the test images."""
    masks: Masks = {}
    for name, threshold in thresholds.items():
        masks |= masks_of([name], study.masks[threshold])
    dense = to_dense(net, example, masks)
    share = count_macs(dense, example[:1]) / count_macs(net, example[:1])
    before = evaluate(net)._asdict()
    return {"thresholds": thresholds, "macs": share, "quality": evaluate(dense)._asdict(), "quality_before": before}


def _prune_command(model: ModelChoice, checkpoint: str | Path | None, data: DataChoice) -> str:
    """Return the command that prunes the same network, without what it takes its configuration from."""
    values: dict[str, Any] = {
        "--model": model.name,
        "--data": data.name,
        "--data-dir": data.data_dir,
        "--checkpoint": checkpoint,
    }
    values |= {"--width": None if model.width == 1.0 else f"{model.width:g}", "--limit": data.limit}
    given = [word for knob, value in values.items() if value is not None for word in (knob, str(value))]
    return shlex.join(["nni-topo", "prune", *given])


def _write_suggestion(path: Path, record: Record, plan: EnergyPlan, command: str) -> Path:
    thresholds: dict[str, float] = record["suggested"]["thresholds"]
    levels = sorted(set(thresholds.values()))
    content: dict[str, Any] = {
        "pruner": "energy",
        "config_list": [
            {"op_names": [name for name in thresholds if thresholds[name] == level], "sparse_threshold": level}
            for level in levels
        ],
    }
    knobs = {**plan.knobs, **({"signal": "data"} if plan.calibration else {})}
    content |= {"knobs": knobs} if knobs else {}
    content |= {"calibration": plan.calibration} if plan.calibration else {}
    found = record["suggested"]
    before, accuracy = (100.0 * found[key]["accuracy"] for key in ("quality_before", "quality"))
    comment = (
        f"# {record['model']} on {record['data']}: per layer the highest energy threshold that, alone, costs at most "
        f"{100.0 * plan.max_drop:g} points\n# on validation images. All at once, without retraining, on test images: "
        f"{accuracy:.1f} % ({before:.1f} % before) at {100.0 * found['macs']:.1f} % of the MACs.\n"
        f"#   {command} --config {path.name} --out DIR\n\n"
    )
    path.write_text(comment + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
