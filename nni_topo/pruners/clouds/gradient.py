"""The gradient cloud: what removing a neuron does to the loss of each sample, to first order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.layers.kinds import feature_dimension
from nni_topo.network.runtime.calibration import calibration_of
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.fits import structure_call, structure_of
from nni_topo.network.runtime.hooks import called, watched
from nni_topo.network.runtime.inputs import arguments_of, batch_size, copied, inputs_of, parts
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.clouds.functional import ChannelReader, check_read, readers_of
from nni_topo.pruners.clouds.moments import ChannelMoments, points_of_gram
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.rules import checked, whole

Loss = Callable[[Any, Any], Tensor]


class GradientCollector(DataCollector):
    """The gradient cloud: gradients times activations over labelled samples, one coordinate per sample.

    A neuron's coordinate for a sample is the derivative of the sample's loss by a gate that scales the neuron's output
    wherever it is read: its values there times their gradients, summed over positions and readers. To first order this
    is what the loss falls by when the neuron is pruned. So a neuron that no loss depends on lies at the origin, and two
    are near each other if they help and harm the same samples.

    Parameters
    ----------
    calibration : iterable or None
        Batches ``(inputs, targets)``; a list or DataLoader, iterated once per collection. None: the pruner's evaluator
        trains instead, see Notes.
    loss : callable, default=torch.nn.functional.cross_entropy
        Maps the model's output and the targets to a scalar tensor, the mean over the batch.
    steps : int, default=8
        Training steps of the evaluator, at least 1; calibration batches are all used.

    Raises
    ------
    ConfigError
        If the loss isn't callable or ``steps`` isn't at least 1.
    DataError
        If the calibration is a list, tuple or other sequence and holds no batch, or one without targets.

    Notes
    -----
    Everything runs on a copy: no gradient, hook, mode or statistic of the model itself changes. Calibration batches run
    in evaluation mode. An evaluator's training runs as it is written, with the weights put back after every step (so
    all gradients are those of the given weights), its loss taken as the mean over the batch.

    Only inner products are summed up, batch by batch: memory is that of the copy, of one batch's activations and of
    ``blocks**2`` numbers. As in the functional cloud, a dependency group's first member carries the joint cloud, the
    others none.

    References
    ----------
    .. [1] P. Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019: the squared norm of a
       point is their importance, equation 8.
    """

    @checked(steps=whole(1))
    def __init__(
        self,
        calibration: Iterable[Any] | None = None,
        *,
        loss: Loss = cross_entropy,
        steps: int = 8,
    ) -> None:
        self.calibration = calibration_of(calibration)
        for _ in _labelled(self.calibration) if self.calibration is not None else ():
            pass
        self.loss = loss
        self.steps = steps

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Check that every layer is read, unless an evaluator has the batches."""
        if self.calibration is not None:
            check_read(model, modules, structure_call(model, self.calibration))

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, blocks)``, and ``(blocks, 0)`` for a group's other members.

        Raises
        ------
        ConfigError
            If there is neither calibration data nor an evaluator that is free, a unit isn't pruned by output channel,
            no layer reads it, or the loss isn't a scalar.
        SpeedupError
            If the model can't be traced.
        DataError
            If no batch came, one has no targets or targets that don't fit, or the loss or a gradient isn't finite.
        """
        model = detached_copy(context.model)
        gates = _Gates(context, model)
        with gates.hooks:
            if self.calibration is None:
                self._train(context, model)
            else:
                self._run(model, self.calibration, gates)
        gates.flush()
        grams = {name: moments.gram(center=False, what="gradient") for name, moments in gates.moments.items()}
        return context.collected_jointly(lambda unit: points_of_gram(grams[unit.name]))

    def _run(self, model: nn.Module, calibration: Iterable[Any], gates: _Gates) -> None:
        """Differentiate the loss of every batch, in evaluation mode."""
        evaluating(model)
        model.requires_grad_(False)
        device = device_of(model)
        for index, (inputs, targets) in enumerate(part for batch in _labelled(calibration) for part in parts(batch)):
            call, targets = copied((arguments_of(inputs, model), targets), device)
            with torch.enable_grad():
                outputs = model(*call[0], **call[1])
                try:
                    loss: Any = self.loss(outputs, targets)
                except (IndexError, RuntimeError, TypeError, ValueError) as error:
                    raise DataError(f"targets must fit the loss, got: {error} (calibration batch {index})") from error
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise ConfigError(f"a loss must be a scalar tensor, got {found} (calibration batch {index})")
            if not bool(torch.isfinite(loss)):
                raise DataError(f"the loss must be finite, got {float(loss.detach())} (calibration batch {index})")
            if not loss.requires_grad or not gates.opened:
                raise DataError(
                    f"the loss must depend on the pruned layers, got a constant (calibration batch {index})"
                )
            # Not backward(): a loss may have parameters of its own, which would gather gradients.
            torch.autograd.grad(loss, gates.opened, allow_unused=True)

    def _train(self, context: PruningContext, model: nn.Module) -> None:
        """Let the evaluator train the copy, its weights put back after every step."""
        evaluator = context.evaluator
        if evaluator is None:
            raise ConfigError("a gradient cloud needs calibration data or an evaluator, got neither (calibration)")
        if getattr(evaluator, "model", None) is not None:
            raise ConfigError(
                "a gradient cloud needs calibration data while the evaluator trains, got none (calibration)"
            )
        weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

        def restore() -> None:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    parameter.copy_(weights[name])

        evaluator.bind_model(model, dict(context.parameter_names))
        try:
            evaluator.patch_optimizer_step(before_step_tasks=[], after_step_tasks=[restore])
            evaluator.train(max_steps=self.steps)
        finally:
            evaluator.unbind_model()


class _Gates:
    """Derivatives of each sample's loss by a gate on every channel, as hooks of a copy of the context's model."""

    def __init__(self, context: PruningContext, model: nn.Module) -> None:
        # What was read in the latest call, with gradients: the gates to differentiate by.
        self.opened: list[Tensor] = []
        self.moments = {unit.name: ChannelMoments(unit.name) for unit in context.units}
        self._context = dataclasses.replace(context, model=model)
        self._original = context.model
        self._samples = 0
        self._batch: dict[str, Tensor] = {}
        self._watching = False
        self.hooks = ExitStack()
        self.hooks.enter_context(called(model, self._begin))

    def flush(self) -> None:
        """Add the latest batch's derivatives to the running sums."""
        for name, derivatives in self._batch.items():
            self.moments[name].add(derivatives * self._samples)
        self._batch = {}

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.flush()
        self.opened = []
        self._samples = batch_size((args, kwargs))
        if self._watching:
            return
        call = structure_of(self._original, (args, kwargs))
        flow = Analysis(self._original, call, self._context.facts).flow
        readers = [(unit.name, each) for unit in self._context.units for each in readers_of(unit, flow, self._context)]
        self.hooks.enter_context(watched([(reader.module, self._gate(name, reader)) for name, reader in readers]))
        self._watching = True

    def _gate(self, name: str, reader: ChannelReader) -> Callable[[Tensor], Tensor | None]:
        places = torch.from_numpy(reader.places)
        channel_dim = feature_dimension(reader.module)

        def gate(values: Tensor) -> Tensor | None:
            if not torch.is_grad_enabled():
                return None
            samples = self._samples
            if len(values) % samples:
                raise ConfigError(
                    f"a gradient cloud needs the batch in the first dimension, got {len(values)} ({name})"
                )
            # An alias of its own, so that the gradient holds this reader's share alone.
            opened = values.view_as(values) if values.requires_grad else values.detach().requires_grad_()

            def record(gradient: Tensor) -> None:
                products = (values.detach() * gradient).movedim(channel_dim, 0)
                by_sample = products.reshape(len(products), samples, -1).sum(2, dtype=torch.float64)
                found = by_sample[places.to(by_sample.device)]
                effect = found.masked_fill((places < 0)[..., None].to(found.device), 0.0).sum(1)
                self._batch[name] = self._batch[name] + effect if name in self._batch else effect

            opened.register_hook(record)
            self.opened.append(opened)
            return opened

        return gate


def _labelled(calibration: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets, or raise :class:`~nni_topo.errors.DataError`."""
    for index, batch in enumerate(calibration):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or batch[1] is None:
            raise DataError(
                f"a gradient cloud needs batches (inputs, targets), got no targets (calibration batch {index})"
            )
        yield inputs_of(batch, index), batch[1]
