"""The images for making a network smaller: calibration data, images that judge, and images of the report alone.

Where images come from sources, such as photos or speakers, the images of the report are of new sources. A few others,
new images of the sources of the calibration data, show how much of the loss is due to the sources.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from nni_topo.errors import DataError
from nni_topo.network.runtime.calibration import HELD_OUT, Calibration
from nni_topo.network.runtime.fits import check_samples_first, structure_call, with_whole_batches


@dataclass(frozen=True)
class ImageParts:
    """The images, split into calibration data, images that judge, and held-out images.

    No step uses the held-out images, because a network looks better than it is on images that it was fitted to or
    chosen by.
    """

    all: Calibration
    learned: Calibration
    judges: Calibration | None  # decide between networks; None if images are too few
    held_out: Calibration | None  # give the report's figures; None if images are too few
    example: Any  # example inputs; only their shapes matter
    known: Calibration | None = None  # new images of the sources in `learned`, which no step uses either

    def judging(self, what: str) -> Calibration:
        """Return the images that judge; without any, a DataError says that ``what`` needs them."""
        if self.judges is None:
            raise DataError(
                f"{what} needs at least {self.all.least_to_hold_out}, of which one judges, got {self.all.counted} "
                "(images)"
            )
        return self.judges

    def with_known_sources(self) -> ImageParts:
        """Return the parts with a sixteenth of the calibration data as new images of its sources, if it has any."""
        if not self.all.has_sources or self.judges is self.held_out:
            return self
        learned, known = self.learned.new_samples(2 * HELD_OUT)
        return replace(self, learned=learned, known=known)

    @classmethod
    def of(
        cls, calibration: Calibration, model: nn.Module, parts: tuple[Calibration | None, ...] | None = None
    ) -> ImageParts:
        """Hold out every eighth image, or take three parts in the order of the fields; make example inputs.

        Half of the images that are held out judge, and the others give the report's figures. For a model that runs on
        whole batches only, these are held out: two, or one of two batches.
        """
        args, kwargs = structure_call(model, calibration)
        check_samples_first(model, calibration)
        if parts is None:
            calibration = with_whole_batches(model, calibration, calibration.judging_pattern)
            parts = calibration.in_parts(calibration.judging_pattern)
        # Of too few samples those that are held out also judge.
        learned, judges, held_out = parts if len(parts) == 3 else (parts[0], parts[-1], parts[-1])
        assert learned is not None  # the first sample is in it
        return cls(calibration, learned, judges, held_out, kwargs or args)
