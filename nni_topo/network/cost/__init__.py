"""Costs of a network: multiply-accumulates, parameters, time."""
