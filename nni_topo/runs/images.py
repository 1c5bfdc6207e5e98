"""The images for making a network smaller: those that every step may use, and those held out of all steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from nni_topo.errors import ConfigError, DataError, raised
from nni_topo.network.runtime.calibration import HELD_OUT, Calibration
from nni_topo.network.runtime.fits import check_samples_first, failure_on, structure_call
from nni_topo.network.runtime.inputs import calls


@dataclass(frozen=True)
class ImageParts:
    """The images, split into calibration data and held-out images.

    No step uses the held-out images, because a network looks better than it is on images that it was fitted to.
    """

    all: Calibration
    learned: Calibration
    judges: Calibration | None  # decide between networks; None if images are too few
    held_out: Calibration | None  # give the report's figures; None if images are too few
    example: Any  # example inputs; only their shapes matter

    def judging(self, what: str) -> Calibration:
        """Return the images that judge; without any, a DataError says that ``what`` needs them."""
        if self.judges is None:
            raise DataError(
                f"{what} needs at least {HELD_OUT} samples, of which one judges, got {self.all.samples} (images)"
            )
        return self.judges

    @classmethod
    def of(
        cls, calibration: Calibration, model: nn.Module, parts: tuple[Calibration | None, ...] | None = None
    ) -> ImageParts:
        """Hold out every eighth image, or take three parts in the order of the fields; make example inputs.

        ConfigError for a model that runs only on whole batches, because no image can be held out.
        """
        args, kwargs = structure_call(model, calibration)
        check_samples_first(model, calibration)
        if parts is None:
            known, rest = calibration.split()
            parts = known, rest, rest
        learned, judges, held_out = parts
        assert learned is not None  # the first sample is in it
        error = None if held_out is None else failure_on(model, next(calls(model, learned)))
        if error is not None:
            raise ConfigError(
                "a model must run on any number of samples, because every eighth one is held out: of "
                f"{calibration.sizes[0]} samples it got {learned.sizes[0]} and raised {raised(error)} (model); "
                "samples must be the first dimension of every input, also of the states of recurrent layers. Nodes "
                "of a graph are no samples: create_pruner, compensate and to_dense take whole graphs"
            ) from error
        return cls(calibration, learned, judges, held_out, kwargs or args)
