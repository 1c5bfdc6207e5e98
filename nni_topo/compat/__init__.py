"""Makes NNI 3.0 trace, wrap and speed up models on the installed PyTorch, without touching its files.

All patches to NNI are in this package. Each patch is one function whose docstring names the place and the cause, which
hold for all supported versions unless it says otherwise. A patch does nothing where NNI or PyTorch is already right,
and returns whether it changed anything. No patch that `enable` applies changes the result of a computation that was
right before. Four results of NNI count as wrong: it cut layers that share a weight by the wrong masks, masked the
inputs of transposed convolutions with the bias of the outputs, didn't mask the biases of norms, and dropped the factors
that ``SlimPruner`` trains.
"""

from __future__ import annotations

import importlib
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nni_topo.compat.importing import KNOWN_NNI_VERSIONS, keep_pytree_nodes
from nni_topo.errors import CompatibilityError

__all__ = [
    "KNOWN_NNI_VERSIONS",
    "LOOPBACK",
    "PAIRING",
    "CompatReport",
    "CompatibilityWarning",
    "enable",
]

LOOPBACK = Path(__file__).with_name("loopback.cjs")
"""Script that keeps NNI's manager off the network, preloaded by ``NODE_OPTIONS="--require=..."``; see
docs/compatibility.md."""

PAIRING = Path(__file__).with_name("pairing.cjs")
"""Script, preloaded likewise: each trial gets its own parameters, and a resumed experiment repeats none."""


class CompatibilityWarning(UserWarning):
    """The installed NNI isn't a known one, or a patch failed."""


@dataclass(frozen=True)
class CompatReport:
    """The outcome of all patches, named as their functions, in the order in which they ran.

    Parameters
    ----------
    nni, torch, python : str
        The versions found.
    applied : tuple of str
        Patches that changed something.
    unneeded : tuple of str
        Patches that NNI or PyTorch doesn't need.
    failed : mapping of str to str
        Patches that failed, with the error.
    """

    nni: str
    torch: str
    python: str
    applied: tuple[str, ...]
    unneeded: tuple[str, ...]
    failed: Mapping[str, str]

    def __str__(self) -> str:
        parts = [
            f"NNI {self.nni}, torch {self.torch}, Python {self.python}",
            f"applied: {', '.join(self.applied) or 'none'}",
            f"not needed: {', '.join(self.unneeded) or 'none'}",
        ]
        return "; ".join([*parts, *(f"failed: {name} ({reason})" for name, reason in self.failed.items())])


reports: list[CompatReport] = []
_IN_PLACE = "_nni_topo_patches"  # attribute of the module nni: names of the applied patches


def enable() -> CompatReport:
    """Patch NNI where the installed PyTorch and Python break it. Later calls do nothing.

    Returns
    -------
    CompatReport
        What was applied and what wasn't needed; the same object on every call.

    Raises
    ------
    CompatibilityError
        If NNI's compression can't be imported.

    Warns
    -----
    CompatibilityWarning
        Once, if NNI's version isn't a known one or a patch failed; the message is the report.

    Examples
    --------
    >>> from nni_topo import compat
    >>> compat.enable() is compat.enable()
    True
    """
    if reports:
        return reports[0]
    try:
        outcomes: dict[str, bool | str] = {keep_pytree_nodes.__name__: keep_pytree_nodes()}
        nni = importlib.import_module("nni")
    except ImportError as error:
        raise CompatibilityError(
            f"nni.compression must be importable, got {error!r} (torch {torch.__version__}); see docs/compatibility.md"
        ) from error
    in_place: set[str] = vars(nni).setdefault(_IN_PLACE, set())
    for patch in patches():
        name = patch.__name__
        try:
            outcomes[name] = name not in in_place and patch()
        except Exception as error:  # an unknown NNI or PyTorch may lack what a patch reads; the others still run
            outcomes[name] = repr(error)
        if outcomes[name] is True:
            in_place.add(name)
    applied, unneeded = (tuple(name for name, found in outcomes.items() if found is kind) for kind in (True, False))
    failed = {name: found for name, found in outcomes.items() if isinstance(found, str)}
    report = CompatReport(nni.__version__, torch.__version__, platform.python_version(), applied, unneeded, failed)
    reports.append(report)
    if report.nni not in KNOWN_NNI_VERSIONS or report.failed:
        known = " or ".join(KNOWN_NNI_VERSIONS)
        warnings.warn(f"nni_topo knows NNI {known}, found {report}", CompatibilityWarning, stacklevel=2)
    return report


def patches() -> tuple[Callable[[], bool], ...]:
    """List the patches; importing them imports NNI, which has to happen after `keep_pytree_nodes`."""
    from nni_topo.compat import evaluators, launching, sparse_gen, speedup, tracing, wrapping

    return (
        tracing.restore_tensor_methods,
        tracing.accept_purity_argument,
        tracing.postpone_annotations,
        tracing.name_class_of_super,
        tracing.run_leaves_with_classes,
        tracing.keep_apply_of_functions,
        tracing.write_stand_ins_as_types,
        tracing.wrap_functions_as_meant,
        tracing.index_code_units,
        tracing.restore_branch_opcodes,
        speedup.keep_size_whole,
        speedup.restore_randomized_output,
        speedup.untie_layers,
        wrapping.keep_shared_parameters,
        wrapping.keep_trained_factors,
        wrapping.wrap_modules_once,
        wrapping.unwrap_models_once,
        wrapping.call_layers_of_attention,
        wrapping.ask_for_blocks,
        wrapping.ask_for_targets,
        wrapping.ask_for_agreement,
        wrapping.undo_failed_constructors,
        sparse_gen.mask_biases_of_norms,
        speedup.keep_given_masks,
        speedup.keep_graph_for_all_outputs,
        evaluators.import_trainers_late,
        evaluators.run_lightning,
        evaluators.make_default_optimizer,
        evaluators.patch_trainer_steps,
        evaluators.pass_loss_arguments,
        launching.wait_for_manager,
    )
