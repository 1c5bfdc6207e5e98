"""Layers: what kinds there are, where they hold channels, and how they lose some."""
