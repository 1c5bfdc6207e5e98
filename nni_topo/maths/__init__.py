"""Functions on arrays, independent of networks: topology, clustering, search, least squares and signals."""
