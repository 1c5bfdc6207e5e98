"""Recurrent networks and transformers as PyTorch has them by default: (time, samples, features).

Where the inputs come with the time first, the package refuses to count time steps as samples and names the layer; the
same network in the module that the refusal describes is made smaller, and its report says what it says by hand. Where
a network has the time first only within, its samples are the first dimension, and nothing is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reliability.oracle import WrongError
from reliability.roads import Road
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import DataError

SAMPLES, BATCH = 32, 8


class WordModel(nn.Module):
    """The LSTM of PyTorch's example word_language_model: tokens (time, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.rnn, self.decoder = nn.Embedding(50, 16), nn.LSTM(16, 24, 2), nn.Linear(24, 50)

    def forward(self, tokens: Tensor) -> Tensor:
        scores: Tensor = self.decoder(self.rnn(self.encoder(tokens))[0])
        return scores.log_softmax(-1)


class DeepSpeech(nn.Module):
    """Deep Speech 2: convolutions over spectrograms (samples, 1, frequencies, time), then (time, samples, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(1, 8, (5, 3), (2, 1), (2, 1)), nn.BatchNorm2d(8), nn.Hardtanh(0, 20, inplace=True)
        )
        self.rnn, self.fc = nn.GRU(8 * 8, 24, bidirectional=True), nn.Linear(24, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).flatten(1, 2).permute(2, 0, 1)
        found: Tensor = self.rnn(x)[0]
        return self.fc(found.unflatten(2, (2, -1)).sum(2)).transpose(0, 1)  # type: ignore[no-any-return]


class Translator(nn.Module):
    """``nn.Transformer`` as PyTorch makes it: sources and targets (time, samples)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.scores = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.transformer = nn.Transformer(16, 2, 1, 1, 32, dropout=0.0)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        found: Tensor = self.scores(self.transformer(self.tokens(source), self.tokens(target)))
        return found


class SamplesFirst(nn.Module):
    """What the refusal says: the samples first, outside of the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> Tensor:
        found: Tensor = self.model(*(each.transpose(0, 1) for each in inputs))
        return found.transpose(0, 1)


def tokens(classes: int, *lengths: int) -> list[Tensor]:
    """Return token sequences with the samples first, (samples, length)."""
    return [torch.randint(classes, (SAMPLES, length)) for length in lengths]


def check_report(model: nn.Module, inputs: list[Tensor]) -> None:
    """Make a network smaller, and compute by hand the distance that its report gives."""
    batches = [(part,) for part in zip(*(each.split(BATCH) for each in inputs), strict=True)]
    small = nni_topo.shrink(model, batches, {"flops": 0.6}, distill=False, progress=False)
    with torch.no_grad():
        wanted, found = model(*inputs), small(*inputs)
    held_out = torch.arange(SAMPLES) % 16 == 15  # of an eighth, one half judges, the other reports
    variance = (wanted - wanted[held_out].mean(0))[held_out].square().flatten(1).sum(1).mean()
    distance = float((found - wanted)[held_out].square().flatten(1).sum(1).mean() / variance)
    report: Any = small.report
    last = report.stages[-1]
    if report.held_out != SAMPLES // 16 or abs(last.distance - distance) > 1e-3 * distance + 1e-9:
        raise WrongError(f"the report has {last.distance} of {report.held_out} samples, by hand it is {distance}")
    if not last.params < report.stages[0].params:
        raise WrongError("no parameters went")


def refused_then_turned(network: Callable[[], nn.Module], layer: str, inputs: Callable[[], list[Tensor]]) -> None:
    """The network is refused with the layer's name; within another module its report is right."""
    torch.manual_seed(0)
    model, given = network().eval(), inputs()
    turned = [(tuple(each.T for each in part),) for part in zip(*(each.split(BATCH) for each in given), strict=True)]
    for work in (
        lambda: nni_topo.shrink(model, turned, {"flops": 0.6}, progress=False),
        lambda: nni_topo.distill(model, model, turned, progress=False),
        lambda: nni_topo.compensate(model, {}, turned, progress=False),
    ):
        try:
            work()
        except DataError as error:
            if layer not in str(error) or "x.transpose(0, 1)" not in str(error):
                raise WrongError(f"the refusal doesn't say what to do: {error}") from error
        else:
            raise WrongError("time steps were taken for samples")
    check_report(SamplesFirst(model).eval(), given)


def taken_as_it_is(network: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    """The network's samples are first, whatever it has within: its report is right."""
    for length in (12, BATCH):
        torch.manual_seed(0)
        check_report(network().eval(), [torch.randn(SAMPLES, *shape, 2 * length)])


ROADS = [
    Road(
        "time_first",
        "word_language_model",
        lambda: refused_then_turned(WordModel, "LSTM 'rnn'", lambda: tokens(50, BATCH)),  # as many steps as samples
    ),
    Road(
        "time_first",
        "nn.Transformer",
        lambda: refused_then_turned(Translator, "Transformer 'transformer'", lambda: tokens(30, 7, 5)),
    ),
    Road("time_first", "Deep Speech 2", lambda: taken_as_it_is(DeepSpeech, (1, 16))),
]
