"""What `import nni_topo` loads."""

import subprocess
import sys

import pytest

# By themselves each takes a tenth of a second or more, and most users of the package need none of them.
HEAVY = {
    "gudhi",
    "joblib",
    "jsonargparse",
    "matplotlib",
    "pandas",
    "rich",
    "sklearn",
    "torchvision",
    "triton",
    "tyro",
    "yaml",
}
PROGRAM = """
import sys

class Recorder:
    def find_spec(self, name, path=None, target=None):
        asked.add(name.partition(".")[0])

asked = set()
# NNI looks for trainer libraries, which load half of the list.
sys.modules.update(dict.fromkeys(("pytorch_lightning", "transformers")))
import nni.compression.pruning, nni.compression.speedup
# What NNI has loaded the package would get without being seen to ask.
for name in {heavy}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Recorder())
import nni_topo
print(*asked)
import sklearn.cluster, pandas
print(*asked)
"""


@pytest.fixture(scope="module")
def asked_for() -> list[set[str]]:
    """Modules that a new Python is asked for: by the package, and by the package and two heavy libraries."""
    program = PROGRAM.format(heavy=sorted(HEAVY))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()[-2:]]


def test_heavy_libraries_are_not_loaded(asked_for):
    loaded, _ = asked_for
    assert "nni_topo" in loaded
    assert not loaded & HEAVY


def test_the_check_sees_what_is_loaded(asked_for):
    assert {"sklearn", "joblib", "pandas"} <= asked_for[1]
