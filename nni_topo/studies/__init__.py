"""What the core does without: studies of networks, and comparisons of pruners with their tables and pictures."""
