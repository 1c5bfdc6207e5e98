"""Running models: inputs, batches, hooks, evaluation mode, copies."""
