"""Arrays in, arrays out: topology, clustering, search, least squares and signals; nothing here knows a network."""
