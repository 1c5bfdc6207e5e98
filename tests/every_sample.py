"""Weight reconstruction on all samples, none of which is left for distillation: what tests solve by hand, too."""

from __future__ import annotations

import nni_topo


def every(batches):
    """Return batches of which all samples are solved on."""
    return batches if isinstance(batches, nni_topo.Calibration) else nni_topo.Calibration(batches, hold_out=False)


def compensate(model, masks, batches, **knobs):
    return nni_topo.compensate(model, masks, every(batches), **knobs)


def compensation(model, masks, batches, **knobs):
    return nni_topo.compensation(model, masks, every(batches), **knobs)
