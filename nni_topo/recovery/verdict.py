"""What a distillation brought: whether the learned weights are kept, and the figures that decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from torch import nn

from nni_topo.recovery.clock import seconds_knob
from nni_topo.recovery.course import Look
from nni_topo.recovery.frozen import told_of_frozen
from nni_topo.recovery.lesson import MOST_DISTANCE
from nni_topo.recovery.outputs import ComparedOutputs
from nni_topo.recovery.rates import RateTrial

_FEW = 25  # with fewer held-out images, a kept result was often worse on other images
ROUNDING = 1e-11
"""Distance below which outputs differ by rounding, so that there is nothing to learn."""


@dataclass(frozen=True, repr=False)
class Verdict:
    """Whether learned weights are kept, and the held-out figures that decide; see `Distillation`."""

    objective: str
    is_kept: bool
    loss_before: float
    loss_after: float
    distance_before: float
    distance_after: float
    agreement_before: float
    agreement_after: float
    lr: float = math.nan
    steps: int = 0
    most_steps: int = 0
    rates: tuple[RateTrial, ...] = ()
    curve: tuple[Look, ...] = ()
    held_out: int = 0
    solved_on: int = 0
    is_out_of_time: bool = False
    weights_of: int = 0
    gains_nothing: bool = False
    discarded_lr: float = math.nan

    def __repr__(self) -> str:
        text = f"distillation is {'kept' if self.is_kept else 'discarded'}: on held-out samples the loss "
        text += f"({self.objective}) is {self.loss_after:.3g}, {self.loss_before:.3g} without it; the distance "
        text += f"{self.distance_after:.3g}, {self.distance_before:.3g} without it"
        if not math.isnan(self.agreement_before):
            text += f"; the agreement {self.agreement_after:.3g}, {self.agreement_before:.3g} without it"
        if not self.is_kept and self.loss_after < self.loss_before:
            text += f". The loss falls, but the distance grows to more than {MOST_DISTANCE:g} times its value"
        # How many steps were taken, and at which rate.
        if not self.has_anything_to_learn:
            return f"{text}. No step was taken: there is nothing to learn"
        if not math.isnan(self.lr):
            searched = sum(trial.steps for trial in self.rates)
            text += f". It took {self.steps} of at most {self.most_steps - searched} steps at a learning rate of up to "
            text += f"{self.lr:g}{f', which {searched} steps before these found' if searched else ''}"
            text += ", until the time limit" if self.is_out_of_time else ""
            text += ", and ended early because the loss hadn't fallen" if self.gains_nothing else ""
            if not math.isnan(self.discarded_lr):
                text += f", after what was learned at {self.discarded_lr:g} had been discarded"
            if self.is_kept and self.weights_of < self.steps:
                text += f"; the weights are those after {self.weights_of} steps"
                text += ", because those at the end are no better than without distillation"
        elif self.rates:
            tried = ", ".join(dict.fromkeys(f"{trial.lr:g}" for trial in self.rates))
            text += f". No step was taken: a few at each of the learning rates {tried} make the loss too large"
        else:
            text += f". No step was taken: {seconds_knob()} allows too few"
        if self.held_out < _FEW:
            text += f". {self.held_out} held-out samples are few for this decision: pass more"
        if self.solved_on:
            text += f". The network's weights were solved on {self.solved_on} of the {self.held_out} held-out samples, "
            text += "where it looks better than it is, and the learned weights look worse: pass others, held_out="
        return text

    @property
    def has_anything_to_learn(self) -> bool:
        """Whether the network without distillation has a loss."""
        return not (math.isnan(self.lr) and (self.loss_before == 0.0 or self.distance_before < ROUNDING))


@dataclass(frozen=True, kw_only=True, repr=False)
class Distillation(Verdict):
    """A distilled model with the figures of its distillation; its ``repr`` is a few sentences.

    Losses, agreements and distances are measured on the held-out images in evaluation mode, for the given model and for
    the learned weights.

    Attributes
    ----------
    model : torch.nn.Module
        The model that :func:`distill` returns.
    objective : str
        The loss that was minimized: "kl", "binary", "squares" or "cosine"; if outputs differ in kind, several of these,
        with "and" between them.
    is_kept : bool
        Whether ``model`` has the learned weights.
    loss_before, loss_after : float
        The loss.
    distance_before, distance_after : float
        Mean squared distance from the unpruned network's outputs, over their variance.
    agreement_before, agreement_after : float
        Share, in [0, 1], of the unpruned network's classes or decisions; NaN if outputs have none.
    images, held_out : int
        Number of all images, and of held-out images.
    solved_on : int
        Number of the held-out images on which weights of ``dense`` had been solved before.
    lr : float
        Highest learning rate; NaN if no step was taken.
    steps, most_steps : int
        Gradient steps at that rate, and the largest number of steps in all, with those of the range test.
    seconds : float
        Wall time.
    rates : tuple of RateTrial
        The range test, the highest rate first: the held-out loss after a few steps at each. Empty if ``lr`` was given,
        or the steps were too few. Where batch norms first took their statistics from the batches and then kept their
        own, it has rates twice.
    curve : tuple of Look
        Step, learning rate and held-out loss along the course.
    is_out_of_time : bool
        Whether ``seconds`` ended the steps.
    weights_of : int
        The step whose weights are kept, the last one or an earlier one; 0 if they are discarded.
    gains_nothing : bool
        Whether the steps ended early because the loss didn't fall.
    discarded_lr : float
        The rate of the range test, if the weights that it led to were discarded, and ``lr`` is a sixth of it; else NaN.
    outputs : ComparedOutputs or None
        Names of the model's outputs that were compared, and of the others.
    read_as : str
        What the compared outputs hold, in words.
    frozen : tuple of str
        Names of the layers with parameters that don't require gradients and weren't changed.
    """

    model: nn.Module
    images: int
    seconds: float
    outputs: ComparedOutputs | None = None
    read_as: str = ""
    frozen: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [super().__repr__()]
        if self.read_as:
            lines.append(self.read_as)
        if self.outputs is not None and self.outputs.left_out:
            lines.append(str(self.outputs))
        if self.frozen:
            lines.append(told_of_frozen(self.frozen))
        return "\n".join(lines)

    @property
    def verdict(self) -> Verdict:
        """The figures by which the learned weights were kept or discarded."""
        return Verdict(**{field.name: getattr(self, field.name) for field in fields(Verdict)})
