"""How a network was made smaller: a sentence and a table with notes, for a terminal, in Markdown, HTML and JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from nni_topo.context import advice
from nni_topo.disk import finite, plain
from nni_topo.errors import listed
from nni_topo.network.cost.measure import TimedPair
from nni_topo.network.runtime.reports import ModelReport, told_of_changes
from nni_topo.network.speedup.dense_report import DenseReport
from nni_topo.network.speedup.dependency import OUTPUT, by_reason
from nni_topo.pruners.budget import BudgetOutcome
from nni_topo.recovery.frozen import FROZEN, told_of_frozen
from nni_topo.recovery.outputs import ComparedOutputs
from nni_topo.recovery.report import CompensationReport
from nni_topo.recovery.verdict import Verdict
from nni_topo.runs.depth import DepthOutcome
from nni_topo.runs.expected import Expectation
from nni_topo.runs.headline import headline
from nni_topo.runs.measurements import Stage
from nni_topo.runs.pipeline import Tried
from nni_topo.runs.tolerance import ToleranceOutcome

if TYPE_CHECKING:
    import pandas

    from nni_topo.runs.page import Part

_NAMES = 8  # layers that a line names


_TABLES = {
    "widths": "Channels of each layer",
    "recovery by layer": "Recovery by layer",
    "distillation": "Course of the distillation",
    "widths tried": "Ways to distribute the budget",
    "blocks removed": "Blocks removed",
    "numbers of blocks tried": "Numbers of blocks tried",
    "networks tried": "Networks tried",
}
"""Tables below the notes: the entry of the document, and the title."""


@dataclass(frozen=True, repr=False)
class ShrinkReport(ModelReport):
    """How a network was made smaller; its ``repr`` is a sentence, a table and notes.

    ``to_markdown()``, ``to_html()`` and ``to_dict()`` (for JSON) have the same sentence, table and notes.
    """

    stages: tuple[Stage, ...]  # the unpruned network, and the network after each step
    layers: DenseReport  # channels of every layer before and after; reasons why channels to be removed are kept
    compensation: CompensationReport | None = None  # errors of each layer before and after weight reconstruction
    tried: tuple[Tried, ...] = ()  # with allocation="auto", the ways to distribute the budget
    budget: BudgetOutcome | None = None  # whether the budget was met, and why not
    images: int = 0  # calibration images: pruning, weight reconstruction and distillation use them
    # Held-out images, which give the figures and which no step uses. With fewer than eight images in all it is 0, and
    # the calibration images give the figures. With a tolerance these images confirm; others judged the candidates.
    held_out: int = 0
    # Images that judged: they decided which results were kept. 0 if the held-out images did, because there are so few.
    judges: int = 0
    warnings: tuple[str, ...] = ()  # reasons to doubt the figures, with advice
    # For each layer whose channels can't be removed, the reason; with `layers=` for the named layers only.
    whole: dict[str, str] = field(default_factory=dict)
    # Whether the distilled weights were kept, and the figures that decided; None without distillation.
    distillation: Verdict | None = None
    # Agreement that distillation was expected to reach, by recorded networks; None if no network is like this one.
    expectation: Expectation | None = None
    tolerance: ToleranceOutcome | None = None  # with a tolerance, the outcome of the search
    # With depth=True, the removed blocks by their names in the unpruned network; `layers` has names in the smaller one.
    depth: DepthOutcome | None = None
    outputs: ComparedOutputs | None = None  # names of the compared outputs of the model; empty with `outputs=`
    read_as: str = ""  # what the compared outputs hold, in words
    undescribed: str = ""  # what the config of a Transformers model can't describe; empty if from_pretrained loads it
    frozen: tuple[str, ...] = ()  # layers with parameters that don't require gradients, which no recovery changes
    # Changes by functions of the package after the figures were measured.
    changed_since: tuple[str, ...] = ()
    grouped: bool = False  # whether the calibration data said which samples come from one source
    sources: int = 0  # number of sources of the held-out images, none of which is in the calibration data
    # New images of the calibration data's sources, which no step uses: the second figures of each stage, `known_...`.
    known: int = 0
    time: TimedPair | None = None  # milliseconds of both networks, with time=True or a latency budget

    @property
    def sentence(self) -> str:
        """What is left of the cost, and how much of the unpruned network's answers, on the held-out samples."""
        unpruned, last = self.stages[0], self.stages[-1]
        is_of_params = self.budget is not None and self.budget.kind == "params"
        count, which = (self.held_out, "held-out") if self.held_out else (self.images, "calibration")
        return headline(
            time=math.nan if self.time is None else self.time.share[0],
            macs=last.macs / unpruned.macs if unpruned.macs else math.nan,
            params=last.params / unpruned.params if is_of_params else math.nan,
            answers=last.agreement,
            error=math.sqrt(last.distance) if math.isfinite(last.distance) else math.nan,
            measured_on=f"{count} {which} samples",
        )

    def to_frame(self) -> pandas.DataFrame:
        """Return the stages as a table, one row each."""
        import pandas

        return pandas.DataFrame([asdict(stage) for stage in self.stages])

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, and the sentences of the report, as values that JSON can hold."""
        document: dict[str, Any] = {
            "sentence": self.sentence,
            "stages": [asdict(stage) for stage in self.stages],
            "steps": self._rows(),
            "notes": [*self._notes(), *self._details()],
            "warnings": self.warnings,
            "time": self.time,
            "budget": self.budget,
            "tolerance": self.tolerance,
            "widths": self.layers.rows,
            "recovery by layer": self.compensation and self.compensation.to_frame().to_dict("records"),
            "widths tried": self.tried,
            "blocks removed": self.depth and self.depth.removed,
            "numbers of blocks tried": self.depth and self.depth.tried,
            "networks tried": self.tolerance and self.tolerance.candidates,
            "distillation": self.distillation and self.distillation.curve,
        }
        filled = {name: value for name, value in document.items() if value}
        values: dict[str, Any] = finite(plain(filled))
        return values

    def to_markdown(self, title: str = "") -> str:
        """Return the report in Markdown."""
        from nni_topo.runs.page import markdown_page

        return markdown_page(title, [self.sentence], parts_of(self.to_dict()))

    def to_html(self, title: str = "A smaller network") -> str:
        """Return the report as an HTML page that needs no other file."""
        from nni_topo.runs.page import html_page

        return html_page(title, [self.sentence], parts_of(self.to_dict()))

    @property
    def pruned_layers(self) -> tuple[str, ...]:
        """Names of the layers that lost channels."""
        return self.layers.pruned_layers

    def _measured_on(self, has_agreement: bool) -> str:
        """Return a sentence about the samples on which the figures are measured."""
        measured = "distance and agreement are" if has_agreement else "distance is"
        others = f"the {self.images} other samples are the calibration data"
        if self.judges:
            others = f"{self.judges} others judged, and {self.images} others are the calibration data"
        if self.tolerance is not None and self.tolerance.measure != "evaluate":
            others = f"{self.images} other samples are the calibration data, the rest judged the candidates"
        held_out = f"{self.held_out} held-out samples"
        if self.sources:
            held_out += f" of {self.sources} new {'source' if self.sources == 1 else 'sources'}"
        return f"{measured} measured on {held_out}, with 95 % intervals; {others}"

    @property
    def _on_known_sources(self) -> str:
        """A sentence with the figures on new samples of sources that the calibration data have."""
        last = self.stages[-1]
        distance = _with_interval(last.known_distance, last.known_distance_low, last.known_distance_high)
        agreement = _with_interval(last.known_agreement, last.known_agreement_low, last.known_agreement_high)
        told = f"on {self.known} new samples of the calibration data's sources: distance {distance}"
        return f"{told}, agreement {agreement}" if agreement else told

    def _rows(self) -> list[dict[str, Any]]:
        """Return the table's rows by the names of its columns, with numbers and intervals as text."""
        is_discarded = self.distillation is not None and not self.distillation.is_kept
        rows: list[dict[str, Any]] = []
        # Only the first and the last network are timed.
        timed = {} if self.time is None else {0: self.time.unpruned_ms, len(self.stages) - 1: self.time.ms}
        for place, stage in enumerate(self.stages):
            network = stage.network
            if network == "distilled" and is_discarded:
                network = "distilled (discarded)"
            cells = {
                "network": network,
                "MACs": str(stage.macs),
                "parameters": str(stage.params),
                "ms": _with_interval(*timed[place]) if place in timed else "",
                "distance": _with_interval(stage.distance, stage.distance_low, stage.distance_high),
                "agreement": _with_interval(stage.agreement, stage.agreement_low, stage.agreement_high),
                "accuracy": "" if math.isnan(stage.accuracy) else f"{stage.accuracy:.4g}",
                "seconds": f"{stage.seconds:.4g}",
            }
            rows.append(cells)
        filled = [name for name in rows[0] if any(row[name] for row in rows)]
        return [{name: row[name] for name in filled} for row in rows]

    def _notes(self) -> list[str]:
        """Return the sentences on how the figures came about and whether the request was met."""
        notes = []
        if self.held_out:
            notes.append(self._measured_on(not math.isnan(self.stages[-1].agreement)))
        if self.known:
            notes.append(self._on_known_sources)
        if self.read_as:
            notes.append(self.read_as)
        if self.held_out and not self.grouped:
            how = advice("nni_topo.Calibration(groups=...)", "a folder for each source of images")
            notes.append(
                f"if several samples come from one source, such as a speaker or a photo, {how} holds out whole "
                "sources: a network is worse on new sources than on new samples of known ones"
            )
        if self.outputs is not None and self.outputs.left_out:
            notes.append(str(self.outputs))
        outcomes = (self.tolerance, self.budget, self.time, self.depth, self.expectation, self.distillation)
        return [*notes, *(str(outcome) for outcome in outcomes if outcome is not None)]

    def _details(self) -> list[str]:
        """Return the sentences on layers that keep channels or weights, and on later changes."""
        lines = [repr(attempt) for attempt in self.tried]
        left_alone = self.compensation.left_alone if self.compensation else {}
        for reason, names in by_reason(left_alone).items():
            if reason == FROZEN:
                continue  # a line of its own names all frozen layers
            lines.append(f"the weights of {listed(names, _NAMES)} are not reconstructed: {reason}")
        if self.frozen:
            lines.append(told_of_frozen(self.frozen))
        # A layer that keeps all channels gets only the line below.
        held = {f"{row.name} {row.kept}": row.reason for row in self.layers.kept if row.name not in self.whole}
        for reason, names in by_reason(held).items():
            lines.append(f"channels that were to be removed are kept: {listed(names, _NAMES)} ({reason})")
        for reason, names in by_reason(self.whole).items():
            if reason != OUTPUT:
                keeps = "keeps" if len(names) == 1 else "keep"
                lines.append(f"{listed(names, _NAMES)} {keeps} all channels: {reason}")
        if self.undescribed:
            lines.append(
                f"from_pretrained can't build the network by its config, {self.undescribed}: use nni_topo.save and "
                "nni_topo.load"
            )
        if self.changed_since:
            lines.append(told_of_changes(self.changed_since))
        return lines

    def __repr__(self) -> str:
        import pandas

        table = pandas.DataFrame(self._rows()).to_string(index=False)
        warnings = [f"warning: {text}" for text in self.warnings]
        return "\n".join([self.sentence, table, *self._notes(), *warnings, *self._details()])


def parts_of(document: Mapping[str, Any]) -> list[Part]:
    """Return the parts of a report's page, in its order, for what :meth:`ShrinkReport.to_dict` returned."""
    from nni_topo.runs.page import Part, table_part

    steps = document["steps"]
    rows = [list(row.values()) for row in steps]
    parts = [Part("Steps", list(steps[0]), rows), Part(notes=document.get("notes", []))]
    if document.get("warnings"):
        parts.append(Part("Warnings", notes=document["warnings"]))
    for key, title in _TABLES.items():
        if document.get(key):
            parts.append(table_part(title, document[key], folded=True))
    return parts


def _with_interval(value: float, low: float, high: float) -> str:
    """Return a number and its interval as the table shows them; an empty text for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.4g}" if low == high else f"{value:.4g} ({low:.3g}-{high:.3g})"
