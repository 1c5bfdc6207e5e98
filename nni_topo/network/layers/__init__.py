"""Layers: their kinds, where they hold channels, and how channels are removed."""
