"""Serve all requests of all cases, and print what came of them: `python tests/reliability/report.py --only gates`."""

from __future__ import annotations

import argparse
import collections
import logging
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from reliability.networks import NETWORKS
from reliability.operators import OPERATORS
from reliability.roads import all_roads, follow
from reliability.serving import BAD, REQUESTS, serve


def main() -> None:
    """Print bad outcomes, and a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose names hold this")
    parser.add_argument("--kind", default="all", choices=["all", "operators", "networks", "roads"])
    parser.add_argument("--requests", nargs="*", default=list(REQUESTS), choices=list(REQUESTS))
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    kinds = {"operators": OPERATORS, "networks": NETWORKS}
    bad = 0
    begun = time.monotonic()
    for kind, cases in kinds.items():
        if options.kind not in ("all", kind):
            continue
        counts: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in options.requests}
        for case in cases:
            if options.only not in case.name:
                continue
            for request in options.requests:
                outcome = serve(case, request)
                counts[request][outcome.kind] += 1
                bad += outcome.kind in BAD
                if options.verbose or outcome.kind in BAD:
                    print(outcome, flush=True)
        print_table(f"{kind}: request", counts)
    if options.kind in ("all", "roads"):
        by_topic: dict[str, collections.Counter[str]] = {}
        for road in all_roads():
            if options.only in f"{road.topic} {road.name}":
                outcome = follow(road)
                by_topic.setdefault(road.topic, collections.Counter())[outcome.kind] += 1
                bad += outcome.kind in BAD
                if options.verbose or outcome.kind in BAD:
                    print(outcome, flush=True)
        print_table("roads: topic", by_topic)
    print(f"{time.monotonic() - begun:.0f} s")
    raise SystemExit(1 if bad else 0)


def print_table(title: str, counts: dict[str, collections.Counter[str]]) -> None:
    """Print a table of how many requests ended in which outcome."""
    columns = ("right", "whole", "refused", *BAD)
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---:|' * len(columns)}")
    for name, count in counts.items():
        print(f"| {name} | {' | '.join(str(count[column]) for column in columns)} |")
    total = sum(counts.values(), collections.Counter())
    print(f"| all | {' | '.join(str(total[column]) for column in columns)} |", flush=True)


if __name__ == "__main__":
    main()
