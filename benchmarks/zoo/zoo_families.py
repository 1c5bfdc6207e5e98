"""Ask for half of the channels of single networks of `zoo_transformers`, and print what is removed and kept, and why.

    python -m benchmarks.zoo.zoo_families olmo2 squeezebert dpt pvt

prints for each the share of the channels that are removed, the largest difference of the dense network from the masked
one, relative to the largest output, and the layers that keep their channels by reason; see `zoo.measure`.
"""

from __future__ import annotations

import argparse
import logging

import torch

from benchmarks.networks import zoo_transformers
from benchmarks.zoo import zoo


def main() -> None:
    """Measure the networks that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*zoo_transformers.NETS, []], default=[])
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # the reasons are printed below
    for name in options.names or zoo_transformers.NETS:
        record = zoo.measure(f"transformers/{name}", {})
        share = record["gone"] / max(record["asked"], 1)
        kept = f"{len(record['skipped'])} of {record['layers']} layers keep their channels"
        print(f"{name}: {share:.2f} removed, difference {record['difference']:.0e}, {kept}", flush=True)
        by_reason: dict[str, list[str]] = {}
        for layer, why in record["skipped"].items():
            by_reason.setdefault(why, []).append(layer)
        for why, layers in by_reason.items():
            print(f"    {', '.join(layers)}: {why}", flush=True)


if __name__ == "__main__":
    main()
