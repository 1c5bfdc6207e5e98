"""Networks that take their state and return it, for the next call, on published architectures.

The report is that of single steps, and says so; ``evaluate`` judges whole streams, in which each network gets its own
states back. Both are computed by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from reliability.oracle import WrongError
from reliability.roads import Road
from reliability.serving import UnsaidError
from torch import Tensor, nn

import nni_topo
from nni_topo.errors import ConfigError

STREAMS, STEPS, BATCH = 8, 8, 16


class Speech(nn.Module):
    """A GRU that hears a frame (samples, 1, features) and its state (samples, levels, units)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16))
        self.gru, self.head = nn.GRU(16, 20, 2, batch_first=True), nn.Linear(20, 4)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        found, state = self.gru(self.enter(x), state.transpose(0, 1).contiguous())
        return self.head(found[:, -1]), state.transpose(0, 1)


class RawSpeech(Speech):
    """The same with the state as PyTorch has it, (levels, samples, units)."""

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        found, state = self.gru(self.enter(x), state)
        return self.head(found[:, -1]), state


class ConvLSTM(nn.Module):
    """A cell of ConvLSTM (https://arxiv.org/abs/1506.04214): a tuple of two maps is the state."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gates, self.head = nn.Conv2d(2, 8, 3, 1, 1), nn.Conv2d(12, 16, 3, 1, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        hidden, cell = state
        enter, forget, leave, new = self.gates(torch.cat([torch.relu(self.stem(x)), hidden], 1)).chunk(4, 1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        hidden = leave.sigmoid() * cell.tanh()
        return self.head(hidden), (hidden, cell)


def stream(net: nn.Module, frames: Tensor, state: Any) -> tuple[Tensor, list[Any]]:
    """Run a network over frames (samples, steps, ...); return its answers and the states before each step."""
    answers, states = [], []
    with torch.no_grad():
        for frame in frames.unbind(1):
            states.append(state)
            answer, state = net(frame, state)
            answers.append(answer)
    return torch.stack(answers, 1), states


def variance(answers: Tensor) -> Tensor:
    return (answers - answers.mean(0)).square().flatten(1).sum(1).mean()


def check_stream(network: Callable[[], nn.Module], shape: tuple[int, ...], start: Callable[[int], Any]) -> None:
    """Shrink a network on the steps of streams; check the report's distances, of single steps and of streams."""
    torch.manual_seed(0)
    model = network().eval()
    frames = torch.randn(STREAMS, STEPS, *shape)
    first = start(STREAMS)
    _, states = stream(model, frames, first)
    is_tuple = isinstance(first, tuple)
    flat = [torch.stack(each, 1).flatten(0, 1) for each in (zip(*states, strict=True) if is_tuple else [states])]
    inputs = frames.flatten(0, 1)
    batches = []
    for part in torch.arange(STREAMS * STEPS).split(BATCH):
        own = [each[part] for each in flat]
        batches.append(((inputs[part], tuple(own) if is_tuple else own[0]),))
    new = torch.randn(5, 2 * STEPS, *shape)  # other streams, longer and fewer

    def off(net: nn.Module) -> float:
        wanted, found = (stream(each, new, start(5))[0] for each in (model, net))
        return float((found - wanted).square().mean() / wanted.var())

    small = nni_topo.shrink(
        model,
        batches,
        {"flops": 0.6},
        outputs=lambda output, inputs: output[0],
        distill={"steps": 20, "lr": 1e-3},
        evaluate=off,
        progress=False,
    )
    report: Any = small.report
    with torch.no_grad():
        given = tuple(flat) if is_tuple else flat[0]
        wanted, found = model(inputs, given)[0], small(inputs, given)[0]
    held_out = torch.arange(len(inputs)) % 16 == 15  # of an eighth, one half judges, the other reports
    distance = float((found - wanted)[held_out].square().flatten(1).sum(1).mean() / variance(wanted[held_out]))
    last = report.stages[-1]
    measured = report.stages[-2] if report.distillation is not None and not report.distillation.is_kept else last
    if abs(measured.distance - distance) > 1e-3 * distance + 1e-9:
        raise WrongError(f"the report has a distance of {measured.distance}, by hand it is {distance}")
    if abs(measured.accuracy - off(small)) > 1e-3 * off(small) + 1e-9:
        raise WrongError(f"the report has {measured.accuracy} over streams, by hand it is {off(small)}")
    if not any("one step at a time" in each for each in report.warnings):
        raise UnsaidError("the report doesn't say that it is of single steps")
    if not last.params < report.stages[0].params:
        raise WrongError("no parameters went")


def refuses_samples_second() -> None:
    """A state of (levels, samples, units) can't be cut into samples: a single batch, which stays whole, is refused."""
    torch.manual_seed(0)
    batches = [((torch.randn(BATCH, 1, 6), torch.zeros(2, BATCH, 20)),)]
    try:
        nni_topo.shrink(RawSpeech().eval(), batches, {"flops": 0.6}, progress=False)
    except ConfigError as error:
        if "samples must be the first dimension of every input" not in str(error):
            raise UnsaidError(str(error)) from error
    else:
        raise WrongError("samples of a state were counted along its levels")


ROADS = [
    Road(
        "streams",
        "GRU",
        lambda: check_stream(Speech, (1, 6), lambda count: torch.zeros(count, 2, 20)),
    ),
    Road("streams", "GRU, samples second", refuses_samples_second),
    Road(
        "streams",
        "ConvLSTM",
        lambda: check_stream(ConvLSTM, (2, 6, 6), lambda count: (torch.zeros(count, 4, 6, 6),) * 2),
    ),
]
