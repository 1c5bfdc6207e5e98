"""Small nets in which one tensor, or one module, stands in several places, and buffers that no file holds."""

from __future__ import annotations

import torch
from speedup_nets import lively
from torch import nn
from torch.nn import functional


class TiedConvolutions(nn.Module):
    """Two convolutions with one weight and one bias."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.one = nn.Conv2d(6, 6, 3, padding=1)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.tail = nn.Conv2d(6, 4, 1)
        self.two.weight, self.two.bias = self.one.weight, self.one.bias

    def forward(self, x):
        x = torch.relu(self.one(torch.relu(self.stem(x))))
        return self.tail(torch.relu(self.two(x))).mean((2, 3))


class TiedNorms(nn.Module):
    """Two batch norms of one weight, one bias and one buffer each of statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.tail = nn.Conv2d(6, 4, 1)
        lively(self)
        self.norm2.weight, self.norm2.bias = self.norm1.weight, self.norm1.bias
        self.norm2.running_mean, self.norm2.running_var = self.norm1.running_mean, self.norm1.running_var

    def forward(self, x):
        x = torch.relu(self.norm1(self.one(x)))
        return self.tail(torch.relu(self.norm2(self.two(x)))).mean((2, 3))


class Rotation(nn.Module):
    """Scales by frequencies that no state_dict holds, as rotary embeddings do."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("frequencies", torch.linspace(0.5, 1.5, size), persistent=False)

    def forward(self, x):
        return x * self.frequencies.cos()


class LanguageModel(nn.Module):
    """Embedding, non-persistent buffers, a gated layer and a head that is the embedding.

    Parameters
    ----------
    head : {"tied", "functional", "free"}
        A linear layer of the embedding's weight, that weight used as it is, or a layer of its own.
    """

    def __init__(self, head="tied"):
        super().__init__()
        torch.manual_seed(2)
        self.e = nn.Embedding(11, 8)
        self.rotation = Rotation(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        if head != "functional":
            self.o = nn.Linear(8, 11, bias=False)
        if head == "tied":
            self.o.weight = self.e.weight

    def forward(self, tokens):
        x = self.rotation(self.e(tokens))
        x = x + self.down(torch.relu(self.up(x)))
        return self.o(x) if hasattr(self, "o") else functional.linear(x, self.e.weight)


class TwoNames(nn.Module):
    """One convolution under two names, each of which is called."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.first = nn.Conv2d(6, 6, 3, padding=1)
        self.second = self.first
        self.tail = nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = torch.relu(self.first(torch.relu(self.stem(x))))
        return self.tail(torch.relu(self.second(x))).mean((2, 3))


class TwoBlocks(nn.Module):
    """One block of two layers under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.first = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 6))
        self.second = self.first
        self.tail = nn.Linear(6, 3)

    def forward(self, x):
        return self.tail(self.second(torch.relu(self.first(x))))


class Mirrored(nn.Module):
    """An autoencoder whose transposed convolutions have the weights of its convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.outer, self.inner = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, padding=1)
        self.opening, self.last = nn.ConvTranspose2d(12, 8, 3, padding=1), nn.ConvTranspose2d(8, 3, 3, padding=1)
        self.opening.weight, self.last.weight = self.inner.weight, self.outer.weight

    def forward(self, x):
        return self.last(torch.relu(self.opening(torch.relu(self.inner(torch.relu(self.outer(x)))))))


class Bottleneck(nn.Module):
    """A language model whose embedding is also its head, though no residual connection joins the two."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.e, self.up, self.down = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.o = nn.Linear(8, 11, bias=False)
        self.o.weight = self.e.weight

    def forward(self, tokens):
        return self.o(torch.relu(self.down(torch.relu(self.up(self.e(tokens))))))


class TwoStreams(nn.Module):
    """An encoder, whose residual stream is an output, and a decoder of the same embedding with a stream of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.read, self.write = nn.Embedding(11, 8), nn.Embedding(11, 8)
        self.write.weight = self.read.weight
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.up2, self.down2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens):
        encoded = self.read(tokens)
        encoded = encoded + self.down(torch.relu(self.up(encoded)))
        decoded = self.write(tokens)
        decoded = decoded + self.down2(torch.relu(self.up2(decoded)))
        return self.head(decoded), encoded


def untied(model):
    """Give every layer tensors of its own; the independent way, module by module."""
    for module in model.modules():
        for name, tensor in list(module._parameters.items()):
            if tensor is not None:
                setattr(module, name, nn.Parameter(tensor.detach().clone()))
        for name, tensor in list(module._buffers.items()):
            if tensor is not None:
                module._buffers[name] = tensor.clone()
    return model


class TiedReaders(nn.Module):
    """Two layers with one weight and one bias, of which each reads a layer of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.other = nn.Linear(4, 8), nn.Linear(4, 8)
        self.second, self.third = nn.Linear(8, 5), nn.Linear(8, 5)
        self.third.weight, self.third.bias = self.second.weight, self.second.bias

    def forward(self, rows):
        return self.second(self.first(rows).sigmoid()) + 2 * self.third(self.other(rows).relu())


def zeroed(model, masks):
    """An untied model with masked weights at zero, and the biases of channels that have none left."""
    untied(model)
    with torch.no_grad():
        for name, targets in masks.items():
            layer = model.get_submodule(name)
            mask = targets["weight"].expand_as(layer.weight)
            layer.weight.mul_(mask)
            if getattr(layer, "bias", None) is not None:
                layer.bias.mul_(mask.flatten(1).any(1))
    return model.eval()
