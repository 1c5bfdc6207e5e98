"""Studies of a model, and comparisons of pruners with tables and pictures; the core works without them."""
