"""The steps of NNI's BERT tutorial on today's PyTorch and Transformers: heads and neurons, then width; and no labels.

    python benchmarks/transformers/bench_bert.py --out runs/bert.json
    python benchmarks/transformers/bench_bert.py --model DIR --tokens tokens.pt --out runs/bert.json

Half of the heads of every layer and three quarters of the MLPs' neurons go, then a quarter of the hidden width; where
the tutorial distils on GLUE, `compensate` solves what is left of each, on token ids alone. Without ``--model``, a
folder that ``save_pretrained`` wrote, it is a BERT of base size with random weights, for what the steps cost;
``--tokens`` is what ``torch.save`` wrote of a dict of inputs, by default random ones, of which up to half is padding.
Seconds are those of the processor, on one thread.
``--times`` times dense networks with half, a third and a sixth of the heads, and half, a quarter and an eighth of the
neurons, in turns with the whole one instead, two sequences without padding at a time.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from nni_topo import compensate, create_pruner, dependency_groups, to_dense, zoo

SHARES = ((1 / 2, 1 / 2), (1 / 3, 1 / 4), (1 / 6, 1 / 8))
SIZES = {"vocab_size": 30522, "hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 3072}


def main() -> None:
    """Parse the command line, run the steps and print what they cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a trained BERT for sequence classification")
    parser.add_argument("--tokens", type=Path, help="file of a dict of inputs")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--places", type=int, default=128)
    parser.add_argument("--times", action="store_true", help="what dense networks take, and nothing else")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    net = transformers.BertForSequenceClassification
    model = net.from_pretrained(options.model) if options.model else random_bert(**SIZES)
    found = torch.load(options.tokens) if options.tokens else random_tokens(options.samples, options.places)
    batches = [{key: part[at : at + 32] for key, part in found.items()} for at in _starts(found)]
    record = times(model.eval(), found["input_ids"][:2]) if options.times else measure(model.eval(), batches)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))


def random_bert(**sizes: int) -> nn.Module:
    """Return a BERT of some sizes with heads of 64, or 8 of them, and random weights."""
    torch.manual_seed(0)
    heads = max(8, sizes["hidden_size"] // 64)
    config = transformers.BertConfig(**sizes, num_attention_heads=heads)
    model: nn.Module = transformers.BertForSequenceClassification(config).eval()
    return model


def random_tokens(samples: int, places: int, most: int = 30522) -> dict[str, Tensor]:
    """Draw token ids, ``(samples, places)``, of which some at the end are padding."""
    drawing = torch.Generator().manual_seed(1)
    lengths = torch.randint(places // 2, places + 1, (samples, 1), generator=drawing)
    ids = torch.randint(1, most, (samples, places), generator=drawing)
    return {"input_ids": ids, "attention_mask": (torch.arange(places) < lengths).long()}


def measure(
    model: nn.Module,
    batches: list[dict[str, Tensor]],
    heads: float = 0.5,
    neurons: float = 0.75,
    width: float = 0.25,
) -> Any:
    """Return seconds and GiB of each step, sizes, and how far logits are from the original's, as shares of variance."""
    record: dict[str, Any] = {"parameters": zoo.count_params(model)}
    wanted, net = _logits(model, batches), model
    for name, asked in (("heads and neurons", _asked(heads, neurons)), ("width", _asked_width(width))):
        net, record[name] = _shrunk(net, batches, asked, wanted)
    return record


def _shrunk(
    model: nn.Module, batches: list[dict[str, Tensor]], asked: list[dict[str, Any]], wanted: Tensor
) -> tuple[nn.Module, dict[str, float]]:
    """Take away what is asked for and solve what is left; return the network, and what the steps cost and leave."""
    record: dict[str, float] = {}

    def timed(step: str, work: Callable[[], Any]) -> Any:
        began = time.process_time()
        found = work()
        record[f"{step}, s"] = time.process_time() - began
        record[f"{step}, GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return found

    few = {key: each[:2] for key, each in batches[0].items()}
    groups = list(timed("groups", lambda: dependency_groups(model, few, asked)))
    masks = timed("choose", lambda: create_pruner("l1", copy.deepcopy(model), groups).compress()[1])
    reconstructed = timed("compensate", lambda: compensate(model, masks, batches))
    dense = timed("dense", lambda: to_dense(reconstructed, few, masks))
    for name, net in (("no recovery", to_dense(model, few, masks)), ("weight reconstruction", dense)):
        lost = (_logits(net, batches) - wanted).square().mean() / wanted.var(0).mean()
        record |= {f"{name}, lost": float(lost), f"{name}, parameters": zoo.count_params(net)}
    return dense, record


def times(model: nn.Module, ids: Tensor) -> Any:
    """Return the shares of the MACs and of the time, of so many sequences, that dense networks take of the whole's."""
    nets = {"whole": model}
    for heads, neurons in SHARES:
        groups = list(dependency_groups(model, ids, _asked(1.0 - heads, 1.0 - neurons)))
        masks = create_pruner("l1", copy.deepcopy(model), groups).compress()[1]
        nets[f"{heads:.2f} of the heads, {neurons:.2f} of the neurons"] = to_dense(model, ids, masks)
    taken = zoo.latencies(nets, ids, runs=15)
    macs = {name: zoo.count_macs(net, ids) for name, net in nets.items()}
    return {name: {"macs": macs[name] / macs["whole"], "time": taken[name] / taken["whole"]} for name in [*nets][1:]}


def _asked(heads: float, neurons: float) -> list[dict[str, Any]]:
    return [
        {"op_names_re": [r".*\.attention\.self$"], "granularity": "head", "sparse_ratio": heads},
        {"op_names_re": [r".*\.intermediate\.dense$"], "sparse_ratio": neurons},
    ]


def _asked_width(ratio: float) -> list[dict[str, Any]]:
    """Ask all that adds to the residual stream for a share of its channels."""
    return [{"op_names_re": [r".*_embeddings$", r".*\.output\.dense$"], "sparse_ratio": ratio}]


def _logits(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**batch).logits for batch in batches])


def _starts(tokens: dict[str, Tensor]) -> range:
    return range(0, len(tokens["input_ids"]), 32)


if __name__ == "__main__":
    main()
