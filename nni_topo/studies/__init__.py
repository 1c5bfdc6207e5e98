"""Studies of a model, and comparisons of pruners with tables and pictures; pruning doesn't import them."""
