"""From masks to a smaller dense model: dependency groups, the dry run, the masked and the dense model."""
