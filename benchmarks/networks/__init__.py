"""Networks that the scripts of ``benchmarks/`` prune, and what makes and checks them."""
