"""Unfused attention: layer by layer, for any number of kept heads and channels."""
