"""Studies of a model, a file or folder for each verb; :mod:`nni_topo.analysis` hands on what is public."""
