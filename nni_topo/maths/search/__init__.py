"""Evolutionary searches: for subsets of points, and for single weights of a layer."""
