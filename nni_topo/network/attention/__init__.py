"""Attention: its heads, their sizes, and attention without fused kernels."""
