"""PyTorch's transformer layers without their fast paths and checks, so that their linear layers can be followed.

``torch.nn.TransformerEncoderLayer`` and its kin are one node of a graph, or don't let themselves be traced: they
decide by values and shapes which way to go. What they compute is written here without choices. Attention itself stays
one node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.backends.mha
import torch.fx
from torch import nn

from nni_topo.network.attention import is_attention
from nni_topo.network.layers import HEAD, InnerCall, Within, forward_of, is_followed, is_one, is_scripted, trial_inputs


class UnfoldingTracer(torch.fx.Tracer):
    """A tracer that goes into PyTorch's transformer layers, and into no layer or norm of another's making."""

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> torch.fx.Graph:
        """Trace a model."""
        # Found out before: while it traces, parameters are no tensors.
        self._ones = {module for module in root.modules() if is_one(module)}
        self._followed = {module: trial_inputs(module)[0] for module in root.modules() if is_followed(module)}
        self._is_apart = False  # while what is run is no part of the graph
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Tell whether a module becomes one node."""
        if is_scripted(m) or is_attention(m) or m in self._ones:
            return True
        return type(m) not in UNFOLDED and super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call what a module computes instead of its forward."""
        if self._is_apart:
            return forward(*args, **kwargs)
        if m in self._followed:
            return self._follow(m, self.create_proxy("call_module", self.path_of_module(m), args, kwargs))
        plain = UNFOLDED.get(type(m))
        return super().call_module(m, partial(plain, m) if plain else forward, args, kwargs)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Return an attribute of a module, a parameter as a node."""
        return attr_val if self._is_apart else super().getattr(attr, attr_val, parameter_proxy_cache)

    def _follow(self, module: nn.Module, given: Any) -> Any:
        """Trace what a layer does with what its convolution gives; what is before that the layer's node does."""
        given.node.meta[HEAD] = True

        def meet(_: InnerCall) -> Any:
            self._is_apart = False
            return given

        self._is_apart = True
        try:
            with Within(meet):
                return forward_of(module, self._followed[module])
        finally:
            self._is_apart = False

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """Do the same for a model that is such a layer itself."""
        plain = UNFOLDED.get(type(self.root), root_fn)
        made: tuple[Any, list[Any]] = super().create_args_for_root(plain, is_module, concrete_args)
        return made


UNFOLDED: dict[type[nn.Module], Callable[..., Any]] = {}
"""What each of the layers computes."""


def _instead_of(kind: type[nn.Module]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function, which gets all arguments by name, stand for a layer's forward."""
    signature = inspect.signature(kind.forward)

    def register(compute: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(kind.forward)  # the tracer reads names and defaults of a model's arguments off what is wrapped
        def forward(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return compute(**bound.arguments)

        UNFOLDED[kind] = forward
        return compute

    return register


def _in_turn(x: Any, norm_first: bool, *blocks: tuple[nn.Module, Callable[[Any], Any]]) -> Any:
    """Add to a value what blocks make of it, one after the other, with a norm before or behind each."""
    for norm, block in blocks:
        x = x + block(norm(x)) if norm_first else norm(x + block(x))
    return x


def _stacked(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    for layer in self.layers:
        x = layer(x, *args, **kwargs)
    return x if self.norm is None else self.norm(x)


@_instead_of(nn.TransformerEncoderLayer)
def _encoder_layer(self: Any, src: Any, src_mask: Any, src_key_padding_mask: Any, is_causal: Any) -> Any:
    attend = partial(self._sa_block, attn_mask=src_mask, key_padding_mask=src_key_padding_mask, is_causal=is_causal)
    return _in_turn(src, self.norm_first, (self.norm1, attend), (self.norm2, self._ff_block))


@_instead_of(nn.TransformerEncoder)
def _encoder(self: Any, src: Any, mask: Any, src_key_padding_mask: Any, is_causal: Any) -> Any:
    # is_causal is a hint that the mask makes unnecessary
    return _stacked(self, src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)


@_instead_of(nn.TransformerDecoderLayer)
def _decoder_layer(
    self: Any, tgt: Any, memory: Any, tgt_mask: Any, tgt_key_padding_mask: Any, tgt_is_causal: Any, **others: Any
) -> Any:
    attend = partial(self._sa_block, attn_mask=tgt_mask, key_padding_mask=tgt_key_padding_mask, is_causal=tgt_is_causal)
    names = {"attn_mask": "memory_mask", "key_padding_mask": "memory_key_padding_mask", "is_causal": "memory_is_causal"}
    look = partial(self._mha_block, mem=memory, **{own: others[name] for own, name in names.items()})
    blocks = (self.norm1, attend), (self.norm2, look), (self.norm3, self._ff_block)
    return _in_turn(tgt, self.norm_first, *blocks)


@_instead_of(nn.TransformerDecoder)
def _decoder(self: Any, tgt: Any, memory: Any, tgt_is_causal: Any, **masks: Any) -> Any:
    return _stacked(self, tgt, memory, **masks)


@_instead_of(nn.Transformer)
def _transformer(
    self: Any, src: Any, tgt: Any, src_mask: Any, src_key_padding_mask: Any, src_is_causal: Any, **masks: Any
) -> Any:
    memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
    return self.decoder(tgt, memory, **masks)
