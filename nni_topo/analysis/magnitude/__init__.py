"""The magnitude study: iterative against direct pruning, sizes and times of sparse and dense networks."""
