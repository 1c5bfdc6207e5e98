"""What `import nni_topo` loads."""

import subprocess
import sys
from pathlib import Path

import nni_topo

# By themselves each takes a tenth of a second or more, and most users of the package need none of them.
HEAVY = {
    "gudhi", "joblib", "jsonargparse", "matplotlib", "pandas", "rich", "sklearn", "torchvision", "triton", "tyro",
    "yaml",
}  # fmt: skip
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


def test_neither_heavy_libraries_nor_trainers_are_loaded():
    program = PROGRAM.format(heavy=sorted(HEAVY), package=str(Path(nni_topo.__file__).parent))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # What the package asks for, what is there then, and what is asked for after two heavy libraries.
    loaded, there, more = [set(line.split()) for line in done.stdout.splitlines()[-3:]]
    assert "nni_topo" in loaded
    assert not loaded & HEAVY
    # NNI imports no trainer before an evaluator is made.
    assert "nni.compression.utils.evaluator" in there
    assert not there & {"pytorch_lightning", "transformers"}
    assert {"sklearn", "joblib", "pandas"} <= more


def test_no_compiler_is_loaded_to_make_a_model_smaller(bare_python):
    program = """
import sys
import torch
import nni_topo
model, images = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 2, 3)), torch.rand(4, 1, 8, 8)
small = nni_topo.shrink(model, [images, images], {"flops": 0.5}, distill=False)
print(sum(each.numel() for each in small.parameters()), "torch._dynamo" in sys.modules, "sympy" in sys.modules)
"""
    assert bare_python(program) == "58 False False\n"
