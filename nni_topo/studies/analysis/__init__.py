"""Studies of a model, one file or folder per verb; :mod:`nni_topo.analysis` is their public interface."""
