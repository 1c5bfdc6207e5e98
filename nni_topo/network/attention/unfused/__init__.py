"""Attention step by step, whatever number of heads and channels is kept."""
