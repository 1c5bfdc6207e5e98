"""Calls that are varied, and work that starts again with fewer samples where memory is short."""

from __future__ import annotations

import pytest
import torch

from nni_topo.errors import DataError
from nni_topo.network.runtime.inputs import at_once, in_smaller_batches, varied


def test_numbers_are_shifted_and_scaled_and_tokens_and_masks_are_not():
    images, tokens, mask = torch.tensor([1.0, -2.0]), torch.tensor([3, 4]), torch.tensor([True, False])
    args, kwargs = varied(((images, tokens), {"mask": mask}), (10.0, 1.0))
    assert args[0].tolist() == [20.0, -10.0]
    assert args[1] is tokens
    assert kwargs["mask"] is mask


@pytest.mark.parametrize(("fits", "tried"), [(2, [8, 4, 2]), (1, [8, 4, 2, 1]), (8, [8])])
def test_work_starts_again_with_half_as_many_samples_down_to_one(fits, tried):
    seen = []

    @in_smaller_batches
    def work():
        seen.append(at_once(8))
        if seen[-1] > fits:
            raise torch.OutOfMemoryError("out of memory")
        return "done"

    assert work() == "done"
    assert seen == tried


def test_memory_for_less_than_one_sample_is_an_error():
    @in_smaller_batches
    def work():
        raise torch.OutOfMemoryError(f"{at_once(1)} is too many")

    with pytest.raises(DataError, match="must have memory for one sample at a time, got: 1 is too many"):
        work()
