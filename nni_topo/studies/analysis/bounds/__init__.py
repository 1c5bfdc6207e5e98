"""Bounds of the error that pruning causes: to first order, and for changes of any size."""
