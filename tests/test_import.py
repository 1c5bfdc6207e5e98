"""What `import nni_topo` loads."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import nni_topo

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
TRAINERS = {"pytorch_lightning", "transformers"}
PROGRAM = """
import sys
import types

class Recorder:
    def find_spec(self, name, path=None, target=None):
        asked.add(name.partition(".")[0])

asked = set()
# NNI as the package imports it, but without the package: its other modules come after it.
package = sys.modules["nni_topo"] = types.ModuleType("nni_topo")
package.__path__ = [{package!r}]
from nni_topo.compat.importing import keep_pytree_nodes
keep_pytree_nodes()
for name in [name for name in sys.modules if name.partition(".")[0] == "nni_topo"]:
    del sys.modules[name]
# What NNI has loaded the package would get without being seen to ask.
for name in {heavy}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Recorder())
import nni_topo
print(*asked)
print(*sys.modules)
import sklearn.cluster, pandas
print(*asked)
"""


@pytest.fixture(scope="module")
def asked_for() -> list[set[str]]:
    """Modules that a new Python is asked for by the package, has then, and is asked for after two heavy libraries."""
    program = PROGRAM.format(heavy=sorted(HEAVY), package=str(Path(nni_topo.__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [set(line.split()) for line in done.stdout.splitlines()[-3:]]


def test_heavy_libraries_are_not_loaded(asked_for):
    loaded, _, _ = asked_for
    assert "nni_topo" in loaded
    assert not loaded & HEAVY


def test_nni_imports_no_trainer_library_before_an_evaluator_is_made(asked_for):
    _, there, _ = asked_for
    assert "nni.compression.utils.evaluator" in there
    assert not there & TRAINERS
    assert all(importlib.util.find_spec(name) is not None for name in TRAINERS)


def test_the_check_sees_what_is_loaded(asked_for):
    assert {"sklearn", "joblib", "pandas"} <= asked_for[2]


def test_no_compiler_is_loaded_to_make_a_model_smaller(bare_python):
    program = """
import sys
import torch
import nni_topo
model, images = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3)), torch.rand(4, 1, 8, 8)
small = nni_topo.shrink(model, [images, images], {"flops": 0.5}, distill=False)
print(small.report.parameters_left, "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    assert bare_python(program) == "58 False False\n"
