"""Studies of energy-based filter pruning."""
