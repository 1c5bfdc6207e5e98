"""Trace a model into a graph, with the shapes of its tensors."""
