"""Comparisons of pruners that resume: cells of model x data x pruner x target x seed, one record each."""

from nni_topo.runs.compare import Comparison, RunFailure, compare
from nni_topo.runs.pictures import plot_accuracy, plot_convergence
from nni_topo.runs.plan import (
    Cell,
    CompensationChoice,
    DataChoice,
    DistillationChoice,
    ModelChoice,
    Plan,
    PrunerChoice,
    Target,
    load_plan,
)
from nni_topo.runs.records import read_records
from nni_topo.runs.tables import markdown_report, print_report, print_widths

__all__ = [
    "Cell",
    "Comparison",
    "CompensationChoice",
    "DataChoice",
    "DistillationChoice",
    "ModelChoice",
    "Plan",
    "PrunerChoice",
    "RunFailure",
    "Target",
    "compare",
    "load_plan",
    "markdown_report",
    "plot_accuracy",
    "plot_convergence",
    "print_report",
    "print_widths",
    "read_records",
]
