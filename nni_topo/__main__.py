"""``python -m nni_topo`` is ``nni-topo``."""

import sys

from nni_topo.cli import main

if __name__ == "__main__":
    sys.exit(main())
