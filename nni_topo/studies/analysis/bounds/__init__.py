"""Bounds on the error that pruning causes: to first order, and for changes of any size."""
