"""PyTorch Geometric: what ``torch_geometric.nn.models`` exports and ``test/nn/models`` builds.

Models that hold no layer but embeddings of nodes (LabelPropagation, CorrectAndSmooth, InnerProductDecoder, LightGCN,
Node2Vec, MetaPath2Vec, MaskLabel) have no channels, and aren't listed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.packages.examples import Build

NODES = 20


def graph(features: int = 16, edges: int = 60) -> dict[str, Tensor]:
    """Return a random graph's features, ``(20, features)``, and edges, ``(2, edges)``."""
    return {"x": torch.randn(NODES, features), "edge_index": torch.randint(NODES, (2, edges))}


def graph_of_degrees(features: int = 16, most: int = 10) -> dict[str, Tensor]:
    """Return a graph's features and edges, with a node for each number of neighbours up to ``most``."""
    arriving = torch.arange(NODES).repeat_interleave(torch.arange(NODES) % (most + 1))
    return {
        "x": torch.randn(NODES, features),
        "edge_index": torch.stack([torch.randint(NODES, arriving.shape), arriving]),
    }


def halves() -> Tensor:
    """Return to which of two graphs each node belongs."""
    return torch.arange(NODES) // (NODES // 2)


def atoms() -> dict[str, Tensor]:
    """Return the numbers and places of atoms."""
    return {"z": torch.randint(1, 10, (NODES,)), "pos": torch.randn(NODES, 3)}


class EdgeModel(nn.Module):
    """The edges' part of the example of ``MetaLayer``."""

    def __init__(self) -> None:
        super().__init__()
        self.edge_mlp = nn.Sequential(nn.Linear(2 * 16 + 4 + 8, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, src: Tensor, dst: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        """Return new features of the edges."""
        return self.edge_mlp(torch.cat([src, dst, edge_attr, u[batch]], 1))


class NodeModel(nn.Module):
    """The nodes' part of the example of ``MetaLayer``."""

    def __init__(self) -> None:
        super().__init__()
        self.node_mlp_1 = nn.Sequential(nn.Linear(16 + 4, 32), nn.ReLU(), nn.Linear(32, 32))
        self.node_mlp_2 = nn.Sequential(nn.Linear(16 + 32 + 8, 32), nn.ReLU(), nn.Linear(32, 16))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        """Return new features of the nodes."""
        from torch_geometric.utils import scatter

        row, col = edge_index
        out = self.node_mlp_1(torch.cat([x[row], edge_attr], dim=1))
        out = scatter(out, col, dim=0, dim_size=x.size(0), reduce="mean")
        return self.node_mlp_2(torch.cat([x, out, u[batch]], dim=1))


class GlobalModel(nn.Module):
    """The graph's part of the example of ``MetaLayer``."""

    def __init__(self) -> None:
        super().__init__()
        self.global_mlp = nn.Sequential(nn.Linear(8 + 16, 32), nn.ReLU(), nn.Linear(32, 8))

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, u: Tensor, batch: Tensor) -> Tensor:
        """Return new features of the graphs."""
        from torch_geometric.utils import scatter

        return self.global_mlp(torch.cat([u, scatter(x, batch, dim=0, reduce="mean")], dim=1))


class VariationalEncoder(nn.Module):
    """An encoder of a mean and a log of a deviation, as the examples of ``VGAE`` have it."""

    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GCNConv

        self.conv1, self.conv_mu, self.conv_logstd = GCNConv(16, 32), GCNConv(32, 8), GCNConv(32, 8)

    def forward(self, x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return both."""
        x = self.conv1(x, edge_index).relu()
        return self.conv_mu(x, edge_index), self.conv_logstd(x, edge_index)


def classes() -> dict[str, Build]:
    """Return what builds each class with its example."""
    import torch_geometric.nn as gnn
    from torch_geometric.data import Batch, Data
    from torch_geometric.nn import models
    from torch_geometric.nn.models.tgn import IdentityMessage, LastAggregator

    def basic(kind: Any, **knobs: Any) -> Build:
        return lambda: (kind(16, 32, num_layers=3, out_channels=4, **knobs), graph())

    def infomax() -> nn.Module:
        return models.DeepGraphInfomax(
            32,
            models.GCN(16, 32, num_layers=2),
            lambda z, *args, **kwargs: z.mean(dim=0).sigmoid(),
            lambda x, edge_index: (x.flip(0), edge_index),
        )

    def lpformer() -> Any:
        model, data = models.LPFormer(16, 32), graph()
        matrix = model.calc_sparse_ppr(data["edge_index"], NODES, eps=1e-4)
        return model, {"batch": torch.randint(NODES, (2, 10)), **data, "ppr_matrix": matrix}

    def gpse() -> Any:
        data = Data(**graph(20), y=torch.randn(NODES, 51), y_graph=torch.randn(11))
        return models.GPSE(dim_inner=32, layers_mp=2, multi_head_dim_inner=8, virtual_node=False), {
            "batch": Batch.from_data_list([data])
        }

    def tgn() -> Any:
        memory = models.TGNMemory(NODES, 16, 16, 16, IdentityMessage(16, 16, 16), LastAggregator())
        ends = torch.randint(NODES, (2, 10))
        memory.update_state(ends[0], ends[1], torch.arange(10), torch.randn(10, 16))
        return memory, {"n_id": torch.arange(NODES)}

    def renet() -> Any:
        model = models.RENet(16, 8, hidden_channels=16, seq_len=4)
        entries: dict[str, Tensor] = {
            "sub": torch.randint(16, (4,)),
            "rel": torch.randint(8, (4,)),
            "obj": torch.randint(16, (4,)),
        }
        for side in ("sub", "obj"):
            entries[f"h_{side}"] = torch.randint(16, (12,))
            entries[f"h_{side}_t"] = torch.randint(4, (12,))
            entries[f"h_{side}_batch"] = torch.arange(12) // 3
        return model, {"data": Data(**entries)}

    return {
        "ARGA": lambda: (models.ARGA(models.GCN(16, 32, 2, 8), models.MLP([8, 16, 1])), graph()),
        "ARGVA": lambda: (models.ARGVA(VariationalEncoder(), models.MLP([8, 16, 1])), graph()),
        "ARLinkPredictor": lambda: (models.ARLinkPredictor(16, 32), graph()),
        "AttentiveFP": lambda: (
            models.AttentiveFP(16, 32, 4, edge_dim=3, num_layers=2, num_timesteps=2),
            {**graph(), "edge_attr": torch.randn(60, 3), "batch": halves()},
        ),
        "DeepGCNLayer": lambda: (
            models.DeepGCNLayer(gnn.GENConv(16, 16), gnn.LayerNorm(16), nn.ReLU()),
            (graph()["x"], graph()["edge_index"]),
        ),
        "DeepGraphInfomax": lambda: (infomax(), graph()),
        "DimeNet": lambda: (models.DimeNet(16, 1, 2, 3, 5, 5), atoms()),
        "DimeNetPlusPlus": lambda: (models.DimeNetPlusPlus(16, 1, 2, 8, 4, 16, 5, 5), atoms()),
        "EdgeCNN": basic(models.EdgeCNN),
        "GAE": lambda: (models.GAE(models.GCN(16, 32, 2, 8)), graph()),
        "GAT": basic(models.GAT, heads=4),
        "GCN": basic(models.GCN),
        "GIN": basic(models.GIN),
        "GNNFF": lambda: (models.GNNFF(16, 16, 2), atoms()),
        "GPSE": gpse,
        "GPSENodeEncoder": lambda: (
            models.GPSENodeEncoder(32, 16, 16, dim_in=8, expand_x=True),
            {"x": torch.randn(NODES, 8), "pos_enc": torch.randn(NODES, 16)},
        ),
        "GraphSAGE": basic(models.GraphSAGE),
        "GraphUNet": lambda: (models.GraphUNet(16, 32, 8, depth=3), graph()),
        "GroupAddRev": lambda: (
            models.GroupAddRev(gnn.SAGEConv(16, 16), num_groups=2),
            (graph(32)["x"], graph()["edge_index"]),
        ),
        "HeteroJumpingKnowledge": lambda: (
            models.HeteroJumpingKnowledge(["author", "paper"], "lstm", 16, 3),
            {"xs_dict": {kind: [torch.randn(NODES, 16) for _ in range(3)] for kind in ("author", "paper")}},
        ),
        "JumpingKnowledge": lambda: (
            models.JumpingKnowledge("lstm", 16, 3),
            {"xs": [torch.randn(NODES, 16) for _ in range(3)]},
        ),
        "LINKX": lambda: (models.LINKX(NODES, 16, 32, 8, num_layers=2), graph()),
        "LPFormer": lpformer,
        "MLP": lambda: (models.MLP([16, 32, 32, 4]), {"x": graph()["x"]}),
        "MetaLayer": lambda: (
            models.MetaLayer(EdgeModel(), NodeModel(), GlobalModel()),
            {**graph(), "edge_attr": torch.randn(60, 4), "u": torch.randn(2, 8), "batch": halves()},
        ),
        "NeuralFingerprint": lambda: (models.NeuralFingerprint(16, 32, 5, num_layers=3), graph_of_degrees()),
        "PMLP": lambda: (models.PMLP(16, 32, 4, num_layers=3), graph()),
        "PNA": basic(
            models.PNA, aggregators=["mean", "max"], scalers=["identity"], deg=torch.ones(5, dtype=torch.long)
        ),
        "Polynormer": lambda: (
            models.Polynormer(16, 32, 4, local_layers=2, heads=2),
            {**graph(), "batch": halves()},
        ),
        "RECT_L": lambda: (models.RECT_L(16, 32), graph()),
        "RENet": renet,
        "SGFormer": lambda: (models.SGFormer(16, 32, 4), {**graph(), "batch": halves()}),
        "SchNet": lambda: (models.SchNet(16, 16, 2, 10, cutoff=6.0), atoms()),
        "SignedGCN": lambda: (
            models.SignedGCN(16, 32, num_layers=2),
            {
                "x": torch.randn(NODES, 16),
                "pos_edge_index": torch.randint(NODES, (2, 40)),
                "neg_edge_index": torch.randint(NODES, (2, 40)),
            },
        ),
        "TGNMemory": tgn,
        "VGAE": lambda: (models.VGAE(VariationalEncoder()), graph()),
        "ViSNet": lambda: (
            models.ViSNet(num_heads=4, num_layers=2, hidden_channels=32, num_rbf=8),
            {**atoms(), "batch": halves()},
        ),
    }
