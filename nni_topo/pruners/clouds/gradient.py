"""The gradient cloud: what removing a neuron does to the loss of each sample, to first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nni_topo.errors import ConfigError, DataError
from nni_topo.network.layers.kinds import feature_dimension
from nni_topo.network.runtime.calibration import Calibration
from nni_topo.network.runtime.copies import detached_copy, evaluating
from nni_topo.network.runtime.fits import structure_call, structure_of
from nni_topo.network.runtime.hooks import watched
from nni_topo.network.runtime.inputs import Call, arguments_of, batch_size, inputs_of, on_device, parts
from nni_topo.network.runtime.modules import device_of
from nni_topo.network.speedup.analysis import Analysis
from nni_topo.pruners.clouds.functional import ChannelReader, check_read, readers_of
from nni_topo.pruners.clouds.moments import ChannelMoments, points_of_gram
from nni_topo.pruners.hooks import Data, DataCollector, PruningContext
from nni_topo.rules import checked

Loss = Callable[[Any, Any], Tensor]


class GradientCollector(DataCollector):
    """The gradient cloud: gradients times activations over labelled samples, one coordinate per sample.

    A neuron's coordinate for a sample is the derivative of the sample's loss by a gate that scales the neuron's output
    wherever it is read: its values there times their gradients, summed over positions and readers. To first order this
    is what the loss falls by when the neuron is pruned. So a neuron that no loss depends on lies at the origin, and two
    are near each other if they help and harm the same samples.

    Parameters
    ----------
    calibration : iterable
        Batches ``(inputs, targets)``; a list or DataLoader, read once per collection.
    loss : callable, default=torch.nn.functional.cross_entropy
        Maps the model's output and the targets to a scalar tensor, the mean over the batch.

    Notes
    -----
    Everything runs on a copy, in evaluation mode: no gradient, hook, mode or statistic of the model itself changes.

    Only inner products are summed up, batch by batch: memory is that of the copy, of one batch's activations and of
    ``blocks**2`` numbers. As in the functional cloud, a dependency group's first member carries the joint cloud, the
    others none.

    References
    ----------
    .. [1] P. Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019: the squared norm of a
       point is their importance, equation 8.
    """

    @checked()
    def __init__(self, calibration: Iterable[Any], *, loss: Loss = cross_entropy) -> None:
        self.calibration = Calibration.of(calibration)
        for _ in _labelled(self.calibration):
            pass
        self.loss = loss

    def check(self, model: nn.Module, modules: dict[str, nn.Module]) -> None:
        """Check that every layer is read."""
        check_read(model, modules, structure_call(model, self.calibration))

    def collect(self, context: PruningContext) -> Data:
        """Return float64 clouds ``(blocks, blocks)``, and ``(blocks, 0)`` for a group's other members."""
        model = evaluating(detached_copy(context.model)).requires_grad_(False)
        device, copied_context = device_of(model), replace(context, model=model)
        moments = {unit.name: ChannelMoments(unit.name) for unit in context.units}
        # Of the current batch: what was read, with gradients, and by unit the derivatives of its loss by a gate on each
        # channel, (blocks, samples).
        opened: list[Tensor] = []
        derivatives: dict[str, Tensor] = {}
        samples = 0

        def open_gate(name: str, reader: ChannelReader, values: Tensor) -> Tensor:
            if len(values) % samples:
                raise ConfigError(
                    f"a gradient cloud needs the batch in the first dimension, got {len(values)} ({name})"
                )
            # An alias of its own, so that the gradient holds this reader's share alone.
            gate = values.view_as(values) if values.requires_grad else values.detach().requires_grad_()

            def record(gradient: Tensor) -> None:
                products = (values.detach() * gradient).movedim(feature_dimension(reader.module), 0)
                by_sample = products.reshape(len(products), samples, -1).sum(2, dtype=torch.float64)
                places = torch.from_numpy(reader.places).to(by_sample.device)
                effect = by_sample[places].masked_fill((places < 0)[..., None], 0.0).sum(1)
                derivatives[name] = derivatives[name] + effect if name in derivatives else effect

            gate.register_hook(record)
            opened.append(gate)
            return gate

        with ExitStack() as hooks:
            labelled = (part for batch in _labelled(self.calibration) for part in parts(batch))
            for index, (inputs, targets) in enumerate(labelled):
                call, targets = on_device((arguments_of(inputs, model), targets), device, copy=True)
                if index == 0:
                    flow = Analysis(context.model, structure_of(context.model, call), context.facts).flow
                    for unit in copied_context.units:
                        readers = readers_of(unit, flow, copied_context)
                        gates = [(reader.module, partial(open_gate, unit.name, reader)) for reader in readers]
                        hooks.enter_context(watched(gates))
                samples = batch_size(call)
                opened.clear()
                derivatives.clear()
                self._differentiate(model, call, targets, opened, index)
                for name, found in derivatives.items():
                    moments[name].add(found * samples)
        grams = {name: each.gram(center=False, what="gradient") for name, each in moments.items()}
        return context.collected_jointly(lambda unit: points_of_gram(grams[unit.name]))

    def _differentiate(self, model: nn.Module, call: Call, targets: Any, opened: list[Tensor], index: int) -> None:
        """Differentiate the loss of a batch by what its forward pass opened."""
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
        if not loss.requires_grad or not opened:
            raise DataError(f"the loss must depend on the pruned layers, got a constant (calibration batch {index})")
        # Not backward(): a loss may have parameters of its own, which would gather gradients.
        torch.autograd.grad(loss, opened, allow_unused=True)


def _labelled(calibration: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """Yield inputs and targets, or raise :class:`~nni_topo.errors.DataError`."""
    for index, batch in enumerate(calibration):
        if not isinstance(batch, (tuple, list)) or len(batch) < 2 or batch[1] is None:
            raise DataError(
                f"a gradient cloud needs batches (inputs, targets), got no targets (calibration batch {index})"
            )
        yield inputs_of(batch, index), batch[1]
