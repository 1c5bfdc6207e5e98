"""Published topological pruning methods, written anew from their papers, as rows of comparisons.

They aren't part of the package; what doesn't win stays out of it. A plan of ``nni-topo compare`` names one by its
path, where ``benchmarks`` is in PYTHONPATH::

    pruners:
      - {name: "published_pruners.topology_hole:TopologyHolePruner", label: TopologyHole, calibration: 1024}

Of the three papers only the abstracts, summaries and parts of the text could be read. Each file says what is the
paper's and what is our reading. All rank a layer's channels and keep as many as the ratio says: the papers' own
thresholds would give every row other widths.
"""
