"""Bounds on the error that pruning causes: first order, and one that always holds."""
