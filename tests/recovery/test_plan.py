from __future__ import annotations

import pytest
import torch
from every_sample import compensation
from torch import nn

from nni_topo.network.speedup.analysis import Analysis
from nni_topo.recovery import plan

BETWEEN = {
    "nothing": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "dropout": nn.Dropout(),
    "function": lambda x: nn.functional.dropout(x, training=False),
    "identity": nn.Identity(),
    "batch norm": nn.BatchNorm1d(3),
    "tanh": torch.tanh,
    "double": lambda x: 2.0 * x,
}


class Branch(nn.Module):
    """A branch of two layers, something between, and a sum."""

    def __init__(self, between):
        super().__init__()
        self.up, self.down, self.between = nn.Linear(3, 4), nn.Linear(4, 3), between

    def forward(self, x):
        return self.between(self.down(torch.relu(self.up(x)))) + x


@pytest.mark.parametrize("between", BETWEEN)
def test_errors_are_measured_at_the_sum_where_all_before_it_hands_on(between):
    torch.manual_seed(0)
    model = Branch(BETWEEN[between]).eval()
    masks = {"up": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    report = compensation(model, masks, [torch.randn(40, 3)]).report
    places = [(layer.layer, layer.place) for layer in report.layers]
    assert places == [("down", "down" if between in ("tanh", "double") else "add")]


@pytest.mark.parametrize(
    ("add", "place"),
    [
        (lambda y, x: y.add(x), "add"),
        (lambda y, x: torch.add(y, x), "add"),
        (lambda y, x: torch.add(y, x, alpha=0.5), "down"),
        (lambda y, x: y + y, "down"),
    ],
)
def test_a_sum_is_one_of_two_values_however_it_is_written(add, place):
    class Adding(Branch):
        def forward(self, x):
            return add(self.down(torch.relu(self.up(x))), x)

    torch.manual_seed(0)
    masks = {"up": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    report = compensation(Adding(nn.Identity()).eval(), masks, [torch.randn(40, 3)]).report
    assert [(layer.layer, layer.place) for layer in report.layers] == [("down", place)]


class Hooked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_forward_hook(lambda *_: None)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2.0 * super().forward(x)


class Looking(nn.Linear):
    def forward(self, x):
        return super().forward(x) * x.mean()


def solved_by_class(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), kind(4, 4), nn.Linear(4, 2)).eval()
    masks = {"0": {"weight": torch.tensor([1.0, 0, 1, 1])[:, None]}}
    return compensation(model, masks, [torch.randn(40, 3)]).report


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Looking, "of type Looking, which does more than a convolution"), (Hooked, "it has forward hooks")],
)
def test_layers_that_do_more_than_a_product_are_left_alone(kind, reason):
    left_alone = solved_by_class(kind).left_alone
    assert left_alone["1"].startswith(reason)


def test_a_layer_whose_forward_goes_on_with_its_product_is_solved():
    report = solved_by_class(Doubling)
    assert report.left_alone == {}
    assert [(each.layer, each.place) for each in report.layers] == [("1", "_1"), ("2", "_2")]


def traced(net, *shape):
    """Return a graph whose shapes are known, and where channels go."""
    analysis = Analysis(net.eval(), ((torch.zeros(shape),), {}))
    return analysis.graph(net)[0], analysis.flow


@pytest.mark.parametrize(
    ("entering", "leaving", "masked", "solved"),
    [
        ([1, 3], [], None, ([[0], [2]], [[0, 1, 2], [3, 4, 5]])),
        ([1], [], None, None),  # one of the first group, none of the second
        ([0, 1], [], None, ([[2, 3]], [[3, 4, 5]])),  # nothing is left of a group
        ([], [0, 3], None, ([[0, 1], [2, 3]], [[1, 2], [4, 5]])),
        ([1, 3], [0, 3], [], ([[0], [2]], [[1, 2], [4, 5]])),  # its own mask names neither
        ([], [], [(0,), (4,)], ([[0, 1], [2, 3]], [[1, 2], [3, 5]])),
        ([], [], [(slice(0, 3), 0), (slice(3, 6), 1)], ([[1], [2]], [[0, 1, 2], [3, 4, 5]])),
        ([1], [2], [(slice(3, 6), 0), (4,)], ([[0], [3]], [[0, 1], [3, 5]])),
    ],
)
def test_what_is_left_of_each_group_is_solved(entering, leaving, masked, solved):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(6, 2, 1))
    graph, flow = traced(net, 1, 3, 5, 5)
    node = next(node for node in graph.graph.nodes if node.target == "1")
    pruned = {*flow.entering_group_ids("1")[entering].tolist(), *flow.group_ids_of("1")[leaving].tolist()}
    masks = {}
    if masked is not None:
        masks["1"] = {"weight": torch.ones_like(net[1].weight)}
        for index in masked:
            masks["1"]["weight"][index] = 0
    found = plan._solvable(graph, node, flow, masks, pruned)
    assert (found and (found.columns.tolist(), found.rows.tolist())) == solved


def test_groups_that_keep_different_numbers_are_named():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1, groups=2), nn.Conv2d(4, 2, 1)).eval()
    masks = {
        "0": {"weight": torch.tensor([0.0, 1, 1, 1] * 2)[:, None, None, None]},
        "1": {"weight": torch.ones(4, 4, 1, 1)},
    }
    masks["1"]["weight"][:2, 1] = 0  # the first group reads a channel less
    report = compensation(net, masks, [torch.randn(20, 3, 4, 4)]).report
    assert report.left_alone == {"1": "its groups keep different numbers of channels"}
    assert [each.layer for each in report.layers] == ["2"]


class Detour(nn.Module):
    """A sum of a layer and two others after each other, which are called later."""

    def __init__(self):
        super().__init__()
        self.stem, self.shortcut, self.up, self.down = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, values):
        hidden = torch.relu(self.stem(values))
        around = self.shortcut(hidden)
        return around + self.down(torch.tanh(self.up(hidden)))


def test_equations_are_solved_in_the_order_of_their_places():
    torch.manual_seed(0)
    masks = {"stem": {"weight": torch.tensor([1.0, 0, 0, 1, 1, 0])[:, None]}}
    masks["up"] = {"weight": torch.tensor([1.0, 1, 1, 1, 1, 0])[:, None]}
    report = compensation(Detour().eval(), masks, [torch.randn(60, 6)]).report
    places = [(each.layer, each.place) for each in report.layers]
    assert places == [("shortcut", "shortcut"), ("up", "up"), ("down", "add"), ("shortcut", "add")]


def test_that_attention_stays_as_it_is_is_reported_without_a_warning(caplog):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "num_hidden_layers": 2}
    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes)).eval()
    masks = {"encoder.layer.0.intermediate.dense": {"weight": (torch.arange(12) < 6).float()[:, None].expand(12, 8)}}
    report = compensation(model, masks, [torch.randint(0, 20, (40, 5))]).report
    assert report.left_alone == {"encoder.layer.1.attention.self": plan.ATTENTION}
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("nni_topo")]
    assert not any("attention" in message for message in ours)


@pytest.mark.parametrize(
    ("module", "gone", "is_by_channel"),
    [
        (nn.Linear(3, 4), [], True),
        (nn.Linear(3, 4), [(slice(1, 3), slice(None))], True),
        (nn.Linear(3, 4), [(slice(None), 1)], True),
        (nn.Linear(3, 4), [(slice(None), 1), (2, slice(None))], True),
        (nn.Linear(3, 4), [(slice(None),)], True),
        (nn.Linear(3, 4), [(2, 1)], False),
        (nn.Linear(3, 4), [(slice(1, 3), 1)], False),
        (nn.Conv2d(4, 4, 2, groups=2), [(slice(0, 2), 1)], True),  # a channel of the first group
        (nn.Conv2d(4, 4, 2, groups=2), [(slice(1, 3), 1)], False),
        (nn.Conv2d(4, 4, 2, groups=2), [(3,)], True),
        (nn.Conv2d(4, 4, 2), [(slice(0, 2), 1)], False),
        (nn.Conv2d(4, 4, 2), [(slice(None), slice(None), 1)], False),
        (nn.Conv2d(4, 4, 2), [(slice(None), slice(None), 1, 0)], False),
        (nn.ConvTranspose2d(4, 2, 2), [(1,)], True),
        (nn.ConvTranspose2d(4, 2, 2), [(slice(None), 1)], True),
        (nn.ConvTranspose2d(4, 2, 2), [(1, 1)], False),
    ],
)
def test_masks_by_channel_remove_rows_and_columns_of_a_group(module, gone, is_by_channel):
    mask = torch.ones_like(module.weight)
    for index in gone:
        mask[index] = 0
    assert plan._goes_by_channel(module, mask) is is_by_channel
