"""Small nets whose layers share some of their channels, as no dependency group can state."""

from __future__ import annotations

import torch
from speedup_nets import lively
from torch import nn


class Block(nn.Module):
    """A convolution, a batch norm and a ReLU."""

    def __init__(self, ins, outs, size=1, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(ins, outs, size, padding=size // 2, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outs)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)))


class Headed(nn.Module):
    """A network with a stem and a head; what lies between is a subclass's."""

    def __init__(self, width, last):
        super().__init__()
        self.stem = Block(3, width, 3)
        self.head = nn.Linear(last, 4)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).mean((2, 3)))


class SplitResidual(Headed):
    """CSP: one half of a layer's channels goes through residual blocks, the other by them."""

    def __init__(self):
        super().__init__(12, 20)
        self.half = 16
        self.expand = Block(12, 32)
        self.inner = nn.ModuleList(nn.Sequential(Block(16, 8), Block(8, 16, 3)) for _ in range(2))
        self.join = Block(32, 20)

    def body(self, x):
        one, other = self.expand(x).split(self.half, dim=1)
        for block in self.inner:
            other = other + block(other)
        return self.join(torch.cat([one, other], dim=1))


class Hierarchical(Headed):
    """Res2Net: each quarter of a layer's channels but the first meets what a convolution made of the one before."""

    def __init__(self):
        super().__init__(12, 16)
        self.width = 8
        self.enter = Block(12, 32)
        self.convs = nn.ModuleList(Block(8, 8, 3) for _ in range(3))
        self.leave = Block(32, 16)
        self.short = Block(12, 16)

    def body(self, x):
        parts = torch.split(self.enter(x), self.width, 1)
        made = [self.convs[0](parts[0])]
        for place in (1, 2):
            made.append(self.convs[place](made[-1] + parts[place]))
        return self.leave(torch.cat([*made, parts[3]], dim=1)) + self.short(x)


class Wider(nn.Module):
    """A block whose input meets the first of its channels."""

    def __init__(self, ins, outs):
        super().__init__()
        self.ins = ins
        self.made = Block(ins, outs, 3)

    def forward(self, x):
        made = self.made(x)
        return torch.cat([made[:, : self.ins] + x, made[:, self.ins :]], dim=1)


class Widening(Headed):
    """ReXNet: each block is wider than the one before, which meets its first channels."""

    def __init__(self):
        super().__init__(12, 30)
        self.blocks = nn.Sequential(Wider(12, 18), Wider(18, 24), Wider(24, 30))

    def body(self, x):
        return self.blocks(x)


class Ghost(nn.Module):
    """Half of the channels are made by a convolution, the other half from these one by one."""

    def __init__(self, ins, outs):
        super().__init__()
        self.primary = Block(ins, outs // 2)
        self.cheap = Block(outs // 2, outs // 2, 3, groups=outs // 2)

    def forward(self, x):
        made = self.primary(x)
        return torch.cat([made, self.cheap(made)], dim=1)


class Ghosts(Headed):
    """GhostNet: what ghost modules make meets what one convolution makes."""

    def __init__(self):
        super().__init__(16, 24)
        self.same = nn.Sequential(Ghost(16, 40), Ghost(40, 16))
        self.wider = nn.Sequential(Ghost(16, 40), Ghost(40, 24))
        self.short = Block(16, 24)

    def body(self, x):
        x = x + self.same(x)
        return self.wider(x) + self.short(x)


class DualPath(Headed):
    """DPN: of each block's channels the first are added to the block's input, the others are joined to it."""

    def __init__(self):
        super().__init__(24, 48)
        self.width = 16
        self.blocks = nn.ModuleList(Block(24 + 8 * place, 24) for place in range(3))

    def body(self, x):
        for block in self.blocks:
            made = block(x)
            x = torch.cat(
                [x[:, : self.width] + made[:, : self.width], x[:, self.width :], made[:, self.width :]], dim=1
            )
        return x


NETS = {net.__name__: net for net in (SplitResidual, Hierarchical, Widening, Ghosts, DualPath)}


def make(name):
    """Make one of the nets, in double precision, with batch norms that aren't trivial."""
    torch.manual_seed(0)
    return lively(NETS[name]()).double().eval()
