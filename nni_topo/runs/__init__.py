"""One run: a network is pruned, made smaller, tried by an NNI experiment, or streamed block by block."""
