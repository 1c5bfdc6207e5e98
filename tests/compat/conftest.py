"""NNI is patched before these tests import it."""

import nni_topo  # noqa: F401
