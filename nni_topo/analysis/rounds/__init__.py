"""Rounds of pruning and retraining: T-IMP against magnitude pruning."""
