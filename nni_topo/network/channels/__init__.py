"""Which channels of a network go together, and where they go."""
