"""NNI pruners, one family a file."""
