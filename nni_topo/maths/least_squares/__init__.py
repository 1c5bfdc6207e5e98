"""Least squares on covariances: normal equations with a ridge, and greedy choice of columns."""
