"""What an attention mask says is padding counts neither in a choice nor in what distillation learns."""

from __future__ import annotations

import copy

import nni
import pytest
import torch
from nni.compression.utils import TorchEvaluator
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from nni_topo.network.runtime.hooks import batches_of
from nni_topo.pruners.clouds.features import FeatureCollector
from nni_topo.pruners.clouds.functional import FunctionalCollector
from nni_topo.pruners.random import RandomPruner
from nni_topo.pruners.reconstruction.problems import ReconstructionProblems
from nni_topo.recovery import distillation


class Words(nn.Module):
    """Gives logits for each token, whatever stands beside it."""

    def __init__(self, width=6):
        super().__init__()
        torch.manual_seed(width)
        self.embedding = nn.Embedding(9, 4)
        self.fc1, self.fc2 = nn.Linear(4, width), nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask=None):
        return self.fc2(torch.relu(self.fc1(self.embedding(input_ids))))


IDS = torch.randint(0, 8, (12, 7), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(7) < torch.arange(12)[:, None] % 6 + 2).long()
PADDED = [{"input_ids": IDS[at : at + 4], "attention_mask": MASK[at : at + 4]} for at in (0, 4, 8)]
REAL = [{"input_ids": IDS[MASK == 1][:, None]}]


def products(collector):
    def found(batches):
        pruner = RandomPruner(Words(), [{"op_names": ["fc1"], "sparse_ratio": 0.5}])
        points = collector(batches).collect(pruner.context)["fc1"]["weight"]
        return points @ points.T

    return found


def sums(batches):
    context = RandomPruner(Words(), [{"op_names": ["fc1"], "sparse_ratio": 0.5}]).context
    ((_, problem),) = ReconstructionProblems(batches).unit_problems(context, {})
    return torch.from_numpy(problem.layers[0].gram)


LOOKS = {
    "functional": products(FunctionalCollector),
    "features": products(FeatureCollector),
    "reconstruction": sums,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_a_padded_batch_says_what_its_tokens_say(look):
    torch.testing.assert_close(look(PADDED), look(REAL))
    everything = look([{"input_ids": IDS}])
    assert not torch.allclose(look(PADDED), everything)
    torch.testing.assert_close(look([{"input_ids": IDS, "attention_mask": torch.ones_like(MASK)}]), everything)


def test_nor_does_padding_that_an_evaluator_evaluates_on():
    def evaluate(model):
        for batch in PADDED:
            model(**batch)

    sgd = nni.trace(torch.optim.SGD)(Words().parameters(), lr=0.1)
    evaluator = TorchEvaluator(lambda *_: None, sgd, None, evaluating_func=evaluate)
    found = products(FunctionalCollector)
    torch.testing.assert_close(found(batches_of(evaluator, Words())), found(REAL))


@pytest.mark.parametrize("objective", ["kl", "squares"])
def test_distillation_learns_nothing_of_padding(objective):
    original, small = Words(16), Words(4)
    others = [{**each, "input_ids": each["input_ids"].masked_fill(each["attention_mask"] == 0, 8)} for each in PADDED]
    learned = [
        distillation(copy.deepcopy(small), original, each, held_out=each, steps=20, lr=0.05, objective=objective)
        for each in (PADDED, others)
    ]
    assert learned[0].is_kept
    assert learned[0].loss_before == pytest.approx(learned[1].loss_before, rel=1e-5)
    assert learned[0].agreement_after == pytest.approx(learned[1].agreement_after, nan_ok=True)
    for name, tensor in learned[0].model.state_dict().items():
        torch.testing.assert_close(learned[1].model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    if objective == "kl":
        mine, theirs = (log_softmax(net(IDS)[MASK == 1] / 2, -1) for net in (small, original))
        wanted = 4 * kl_div(mine, theirs, reduction="batchmean", log_target=True)
        assert learned[0].loss_before == pytest.approx(wanted.item(), rel=1e-4)
