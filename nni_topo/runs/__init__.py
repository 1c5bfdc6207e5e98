"""Comparisons of pruners that resume: cells of model x data x pruner x target x seed, one record each."""
