"""Values of parameters that a forward or a user's function writes to."""

from __future__ import annotations

import ctypes
import threading
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import nni_topo
from nni_topo.errors import DataError
from nni_topo.network.runtime import values as values_module
from nni_topo.network.runtime.untouched import left_alone, lent
from nni_topo.network.runtime.values import ParameterValues


class Writing(nn.Module):
    """Writes to its layer's weight while it computes."""

    def __init__(self, write):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4)
        self.write = write

    def forward(self, rows):
        """Write, and map rows."""
        self.write(self.layer)
        return self.layer(rows)


def _in_place(write):
    def run(layer):
        with torch.no_grad():
            write(layer.weight)

    return run


def _halved(weight):
    weight.mul_(0.5)


_LIBRARY = torch.library.Library("nni_topo_tests", "DEF")
_LIBRARY.define("decay(Tensor(a!) weight) -> ()")
_LIBRARY.impl("decay", _halved, "CPU")


def _binarize(layer):
    if not hasattr(layer.weight, "org"):
        layer.weight.org = layer.weight.data.clone()
    layer.weight.data = layer.weight.org.sign()


def _step(layer):
    layer.weight.grad = torch.ones_like(layer.weight)
    torch.optim.AdamW(layer.parameters(), 0.1).step()


def _assign(weight):
    weight[0] = 0.0


def _halve_by_operator(weight):
    weight *= 0.5


def _from_numpy(layer):
    layer.weight.detach().numpy()[:] *= 0.5


def _as_array(layer):
    np.asarray(layer.weight.detach()).fill(1.0)


def _by_dlpack(layer):
    torch.from_dlpack(layer.weight.detach()).fill_(1.0)  # NumPy before 2.1 reads alone


def _transpose(layer):
    layer.weight.data = layer.weight.data.t()


WRITES = {
    "method": _in_place(lambda weight: weight.mul_(0.99)),
    "operator": _in_place(_halve_by_operator),
    "index": _in_place(_assign),
    "data": lambda layer: layer.weight.data.clamp_(-0.1, 0.1),
    "view": lambda layer: layer.weight.data.view(-1)[3:].zero_(),
    "out": lambda layer: torch.mul(layer.weight.data, 0.5, out=layer.weight.data),
    "foreach": lambda layer: torch._foreach_mul_([each.data for each in layer.parameters()], 0.5),
    "initialization": lambda layer: nn.init.normal_(layer.weight),
    "function of a layer": lambda layer: functional.relu(layer.weight.data, inplace=True),
    "max_norm": lambda layer: functional.embedding(torch.arange(4), layer.weight.data, max_norm=0.01),
    "operation": lambda layer: torch.ops.aten.mul_(layer.weight.data, 0.5),
    "overload": lambda layer: torch.ops.aten.mul_.Tensor(layer.weight.data, torch.tensor(0.5)),
    "operation of a library": lambda layer: torch.ops.nni_topo_tests.decay(layer.weight.data),
    "optimizer": _step,
    "other memory": lambda layer: setattr(layer.weight, "data", torch.zeros(4, 4)),
    "the same memory, transposed": _transpose,
    "BinaryNet": _binarize,
    "array of its memory": _from_numpy,
    "as an array": _as_array,
    "dlpack": _by_dlpack,
}


def _bits(model):
    return [each.detach().numpy().tobytes() for each in model.parameters()]


@pytest.mark.parametrize("name", WRITES)
def test_what_a_forward_writes_to_is_put_back_where_it_was(name):
    model = Writing(WRITES[name])
    weight, alias = model.layer.weight, model.layer.weight.detach().numpy()
    before, gradient = _bits(model), weight.grad
    with left_alone(model), torch.no_grad():
        model(torch.ones(1, 4))
        assert _bits(model) != before
    assert _bits(model) == before
    assert model.layer.weight is weight
    assert weight.grad is gradient
    assert not vars(weight)
    assert np.shares_memory(weight.detach().numpy(), alias)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.quick_every(3)
def test_public_functions_leave_parameters_as_they_are(name):
    model = nn.Sequential(Writing(WRITES[name]), nn.ReLU(), nn.Linear(4, 2)).eval()
    before, rows = _bits(model), torch.randn(2, 4)
    for call in (
        lambda: nni_topo.explain(model, rows, "0.layer"),
        lambda: nni_topo.dependency_groups(model, rows, [{"op_types": ["Linear"], "sparse_ratio": 0.5}]),
    ):
        with suppress(nni_topo.errors.NniTopoError):  # some of these can't be traced
            call()
        assert _bits(model) == before


def test_a_tied_weight_and_one_within_a_larger_memory_are_put_back():
    flat = torch.arange(20.0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = model[1].weight = nn.Parameter(flat[4:].view(4, 4))
    model[0].bias = nn.Parameter(flat[:4])
    model[0].register_forward_pre_hook(lambda module, args: module.bias.data.fill_(1.0) and None)
    model[1].register_forward_hook(lambda module, args, output: module.weight.data.fill_(1.0) and None)
    with left_alone(model), pytest.raises(RuntimeError):  # the hooks return tensors
        model(torch.ones(1, 4))
    assert flat.tolist() == list(range(20))


def test_numbers_are_compared_bit_by_bit():
    model = Writing(lambda layer: layer.weight.data.abs_())
    with torch.no_grad():
        model.layer.weight.fill_(-0.0)
        model.layer.weight[0] = float("nan")
    before = _bits(model)
    with left_alone(model):
        model(torch.ones(1, 4))
    assert _bits(model) == before


def test_parameters_that_nothing_writes_to_are_not_written_to_and_a_graph_from_before_still_goes_backward():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight[0] = float("nan")
    versions = [each._version for each in model.parameters()]
    loss = model(torch.ones(1, 4)).sum()
    nni_topo.explain(model, torch.ones(1, 4), "0")
    nni_topo.network.profile({"it": model}, torch.ones(1, 4), runs=1)
    assert [each._version for each in model.parameters()] == versions
    loss.backward()
    assert model[2].weight.grad is not None


def test_values_are_put_back_after_an_error_and_after_each_of_two_blocks():
    model = Writing(lambda layer: layer.weight.data.mul_(0.5))
    before = _bits(model)

    def fail():
        with left_alone(model):
            with left_alone(model):
                model(torch.ones(1, 4))
            assert _bits(model) == before
            model(torch.ones(1, 4))
            raise DataError("later")

    with pytest.raises(DataError, match="later"):
        fail()
    assert _bits(model) == before
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_forward_that_is_interrupted_leaves_no_mode_behind():
    def stop(layer):
        layer.weight.data.mul_(0.5)
        raise KeyboardInterrupt

    model = Writing(stop)
    before = _bits(model)
    with pytest.raises(KeyboardInterrupt), left_alone(model):
        model(torch.ones(1, 4))
    assert _bits(model) == before
    assert not torch.overrides._get_current_function_mode_stack()


def test_blocks_that_run_as_compiled_are_not_watched_and_put_back_too():
    model = Writing(lambda layer: layer.weight.data.mul_(0.5))
    before = _bits(model)
    with left_alone(nn.Linear(1, 1)), left_alone(model, as_compiled=True):
        model(torch.ones(1, 4))
        assert not torch.overrides._get_current_function_mode_stack()
    assert _bits(model) == before


def test_a_script_and_parameters_without_values_are_left_alone():
    class Decaying(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2), requires_grad=False)

        def forward(self, rows: torch.Tensor):
            """Write and compute."""
            self.weight.mul_(0.5)
            return rows * self.weight

    model = nn.Sequential(torch.jit.script(Decaying()), nn.LazyLinear(2), nn.Linear(2, 2, device="meta"))
    model.sparse = nn.Parameter(torch.eye(2).to_sparse(), requires_grad=False)
    model.none = nn.Parameter(torch.zeros(0))
    model.wide = nn.Parameter(torch.zeros(1).expand(3), requires_grad=False)
    with left_alone(model):
        model[0](torch.ones(1, 2))
        assert model[0].weight.tolist() == [0.5, 0.5]
    assert model[0].weight.tolist() == [1.0, 1.0]


def scripted(weight: torch.Tensor):
    """Halve."""
    weight.mul_(0.5)


def test_what_goes_past_torch_is_told_with_the_parameters_name(caplog):
    decay = torch.jit.script(scripted)

    model = Writing(lambda layer: decay(layer.weight.detach()))
    before = _bits(model)
    with left_alone(model), torch.no_grad():
        model(torch.ones(1, 4))
    assert _bits(model) != before
    assert "these keep their new values: layer.weight" in caplog.text


def test_a_copy_is_not_made_where_it_takes_more_than_a_quarter_of_the_free_memory(caplog):
    # Memory that is asked for and never touched takes no room.
    size = nni_topo.errors.free_memory() // 3
    weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
    values = ParameterValues()
    values.note(weight, weight.detach())
    assert values.copy(weight)
    weight.detach()[:1].zero_()
    assert values.put_back([]) == [weight]
    assert "a parameter outside of the model's modules" in caplog.text


def _trains(net):
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    return 0.0


def _halves(net):
    return float(net.half()[0].bias.detach().sum())


def _compiles(net):
    compiled = torch.compile(net, backend="eager")
    return float(compiled(torch.ones(2, 4)).sum().detach())


@pytest.mark.parametrize("change", [_trains, _halves, pytest.param(_compiles, marks=pytest.mark.slow)])
def test_what_a_users_function_does_to_a_network_is_put_back(change):
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    before = _bits(model)
    found = []

    def evaluate(net):
        values = _bits(net)
        found.append((net, values))
        return change(net)

    nni_topo.shrink(model, [torch.randn(32, 4)], {"params": 0.5}, evaluate=evaluate, distill=False)
    assert found[0][0] is model
    assert _bits(model) == before
    assert all(_bits(net) == values for net, values in found)


def test_a_lent_network_is_as_it_was():
    model = nn.Linear(4, 2)
    before = _bits(model)
    with lent(model):
        _trains(model)
        assert _bits(model) != before
    assert _bits(model) == before


def test_no_hook_and_no_mode_stays_whatever_blocks_are_within_each_other():
    model = nn.Linear(4, 2)
    before = _bits(model)
    hooks = nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks
    found = [len(each) for each in hooks]
    with left_alone(model):
        with lent(model), lent(model):
            with left_alone(model, as_compiled=True):
                assert [len(each) for each in hooks] == found
                assert not torch.overrides._get_current_function_mode_stack()
                _trains(model)
            assert _bits(model) == before
            _trains(model)
        assert _bits(model) == before
        assert [len(each) for each in hooks] == [number + 1 for number in found]
    assert [len(each) for each in hooks] == found
    assert not torch.overrides._get_current_function_mode_stack()


def test_a_small_copy_is_made_however_little_memory_is_free(monkeypatch, caplog):
    monkeypatch.setattr(values_module, "free_memory_of", lambda device: 0)
    for size, is_put_back in ((2**20, True), (2**20 + 8, False)):
        weight, values = nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False), ParameterValues()
        values.note(weight, weight.detach())
        assert values.copy(weight)
        weight.detach()[:1].fill_(1)
        assert values.put_back([]) == [weight]
        assert bool(weight.any()) != is_put_back
        assert ("these keep their new values" in caplog.text) != is_put_back


def test_copies_together_take_no_more_than_a_quarter_of_the_free_memory(monkeypatch):
    size = 2**21
    monkeypatch.setattr(values_module, "free_memory_of", lambda device: 4 * 2 * size - copied[0])
    copied = [0]
    weights = [nn.Parameter(torch.zeros(size, dtype=torch.uint8), requires_grad=False) for _ in range(3)]
    values = ParameterValues()
    for weight in weights:
        values.note(weight, weight.detach())
    for weight in weights:
        values.copy(weight)
        copied[0] = min(copied[0] + size, 2 * size)  # what the copies have taken isn't free any more
        weight.detach()[:1].fill_(1)
    values.put_back([])
    assert [bool(weight.any()) for weight in weights] == [False, False, True]


@pytest.mark.parametrize(("place", "is_its"), [(-1, False), (0, True), (1, True), (15, True), (16, False)])
def test_memory_is_a_parameters_from_its_first_to_its_last_byte(place, is_its):
    memory = torch.zeros(64, dtype=torch.uint8)
    own = memory.untyped_storage()
    weight = torch.empty(0, dtype=torch.uint8).set_(memory[16:32].clone().untyped_storage())
    del own
    around = np.ctypeslib.as_array((ctypes.c_uint8 * 64).from_address(weight.data_ptr() - 16))
    values = ParameterValues()
    values.note(weight, weight)
    seen = torch.from_numpy(around)[16 + place : 17 + place]
    assert seen.data_ptr() == weight.data_ptr() + place
    assert values.copy(seen) == is_its


def test_memory_that_was_taken_away_is_not_written_to():
    weight, values = torch.zeros(2**16), ParameterValues()
    values.note(weight, weight)
    assert values.copy(weight)
    storage = weight.untyped_storage()
    storage.resize_(0)
    others = [torch.ones(2**16) for _ in range(4)]  # which lie where it lay
    storage.resize_(4 * 2**16)
    weight.fill_(2.0)
    assert weight.data_ptr() in {storage.data_ptr()}
    assert values.put_back([]) == []
    assert bool((weight == 2.0).all())
    assert all(bool((each == 1.0).all()) for each in others)


class Recursive(nn.Module):
    """Calls itself, and writes to its layer's weight after calls of both."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, rows, depth=2):
        """Map rows."""
        rows = self.layer(rows)
        found = self(rows, depth - 1) if depth else rows
        self.layer.weight.data.mul_(0.5)
        return found


def test_forwards_within_a_forward_are_watched_up_to_its_end():
    model = Recursive()
    before, modes = _bits(model), torch.overrides._get_current_function_mode_stack
    with left_alone(model), torch.no_grad():
        for _ in range(2):
            model(torch.ones(1, 4))
            assert not modes()
        with pytest.raises(RuntimeError):
            model(torch.ones(1, 3))
        assert not modes()
        nn.Linear(4, 4)(torch.ones(1, 4))  # of another model
        assert not modes()
    assert _bits(model) == before


def test_other_threads_write_unseen():
    model = Writing(lambda layer: layer.weight.data.mul_(0.5))
    other = Writing(lambda layer: layer.weight.data.mul_(0.5))
    before = _bits(other)
    with left_alone(model), torch.no_grad():
        thread = threading.Thread(target=other, args=(torch.ones(1, 4),))
        thread.start()
        thread.join()
        assert not torch.overrides._get_current_function_mode_stack()
    assert _bits(other) != before
