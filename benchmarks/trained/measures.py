"""How like the unpruned network's answers are those of a smaller one, with intervals over the photos or sentences.

Nothing here is accuracy: no label is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import stdtrit
from scipy.stats import spearmanr
from torch import Tensor, nn

from benchmarks.trained.photos import Crops
from benchmarks.trained.pretrained import embedding

_TAIL = 0.975
NEIGHBOURS = 10
_PARTS = 10


@dataclass(frozen=True)
class Figure:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float


def clustered(values: Tensor, groups: Tensor) -> Figure:
    """Return the mean of values and its interval where values of one group aren't independent of each other.

    The interval is that of a ratio of sums over groups (Cochran, Sampling Techniques, 1977, chapter 6), by Student's t.
    """
    kinds = groups.unique()
    sums = torch.stack([values[groups == kind].double().sum() for kind in kinds])
    sizes = torch.stack([(groups == kind).double().sum() for kind in kinds])
    mean = float(sums.sum() / sizes.sum())
    count = len(kinds)
    if count < 2:
        return Figure(mean, -math.inf, math.inf)
    spread = float(((sums - mean * sizes) / sizes.mean()).square().sum() / (count - 1) / count)
    half = float(stdtrit(count - 1, _TAIL)) * math.sqrt(spread)
    return Figure(mean, mean - half, mean + half)


def answers(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """Return a classifier's logits for batches of images, on the CPU wherever it runs."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(batch.to(device)).cpu() for batch in batches])


def like_classifier(mine: Tensor, theirs: Tensor, crops: Crops) -> dict[str, Figure]:
    """Compare logits with the unpruned network's: agreement of the first class, of the first five, and divergence.

    The agreement of the first five is the share of crops whose first class of the unpruned network is among them.
    """
    best = theirs.argmax(1)
    same = (mine.argmax(1) == best).double()
    among = (mine.topk(5, dim=1).indices == best[:, None]).any(1).double()
    divergence = nn.functional.kl_div(mine.log_softmax(1), theirs.log_softmax(1), reduction="none", log_target=True)
    found = {"top 1": same, "top 5": among, "KL": divergence.sum(1)}
    return {name: clustered(values, crops.photos) for name, values in found.items()}


def kept_by_photo(mine: Tensor, theirs: Tensor, crops: Crops) -> list[float]:
    """Return the share of each photo's crops whose first class is the unpruned network's, to compare networks by it."""
    same = (mine.argmax(1) == theirs.argmax(1)).double()
    return [float(same[crops.photos == photo].mean()) for photo in crops.photos.unique()]


def embeddings(model: nn.Module, batches: Iterable[dict[str, Tensor]]) -> Tensor:
    """Return the embeddings of batches of sentences, on the CPU wherever the model runs."""
    device = next(model.parameters()).device
    found = []
    with torch.no_grad():
        for batch in batches:
            placed = {name: each.to(device) for name, each in batch.items()}
            found.append(embedding(model(**placed), placed["attention_mask"]).cpu())
    return torch.cat(found)


def like_encoder(mine: Tensor, theirs: Tensor) -> dict[str, Figure]:
    """Compare embeddings with the unpruned network's: cosine, neighbours that are the same, order of similarities.

    Each sentence asks among all others. Intervals are over the sentences as they ask; those of the order are of ten
    parts of the sentences.
    """
    cosine = (mine * theirs).sum(1)
    near, wanted = _neighbours(mine @ mine.T), _neighbours(theirs @ theirs.T)
    recall = (near[:, :, None] == wanted[:, None, :]).any(2).double().mean(1)
    each = torch.arange(len(mine))
    orders = torch.tensor(
        [_order(one, other) for one, other in zip(mine.chunk(_PARTS), theirs.chunk(_PARTS), strict=True)]
    )
    return {
        "cosine": clustered(cosine, each),
        f"recall@{NEIGHBOURS}": clustered(recall, each),
        "Spearman": clustered(orders, torch.arange(len(orders))),
    }


def _neighbours(similar: Tensor) -> Tensor:
    return similar.fill_diagonal_(-math.inf).topk(NEIGHBOURS, dim=1).indices


def _order(mine: Tensor, theirs: Tensor) -> float:
    """Return Spearman's rank correlation of all pairs' similarities."""
    pairs = np.triu_indices(len(mine), 1)
    return float(spearmanr((mine @ mine.T).numpy()[pairs], (theirs @ theirs.T).numpy()[pairs]).statistic)
