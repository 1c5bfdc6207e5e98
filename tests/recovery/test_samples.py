from __future__ import annotations

import torch

from nni_topo.recovery.samples import Sampler, _Chunk


def test_samples_are_kept_for_refinements_as_long_as_they_just_fit():
    chunk = _Chunk(torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), torch.zeros(1, 4, 3), torch.zeros(4, dtype=torch.bool))
    assert chunk.nbytes == 4 * 4 * (2 + 3 + 3)
    for cache_bytes, is_refined, kept in [(256, True, 2), (255, True, None), (256, False, None)]:
        sampler = Sampler(None, (), 0, cache_bytes)
        assert len(list(sampler._keep(iter([chunk, chunk]), is_refined))) == 2
        assert (sampler._chunks and len(sampler._chunks)) == kept
