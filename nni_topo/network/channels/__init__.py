"""Follow the channels of a network: which of them are coupled, and where each goes."""
