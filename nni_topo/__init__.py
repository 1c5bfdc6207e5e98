"""Pruners for NNI that look at the shape of a layer; importing the package makes NNI 3.0 run on the installed PyTorch."""

