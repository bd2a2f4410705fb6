"""Layers below the lowest gate compute the same with gates and without: they run once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from retrofit.adapters._family import GatedAttention


class SharedLayers:
    """What the base's pass leaves below the lowest gate, for the gated pass over the same tokens.

    Only where nothing is trained there, and not in a compiled model, whose layers are more than
    their `forward`.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.output: Any = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Inside, the base runs."""
        layers = self._below()
        handles = [layers[-1].register_forward_hook(self._keep)] if layers else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reused(self) -> Iterator[None]:
        """Inside, the gated model runs."""
        output, self.output = self.output, None
        layers = [] if output is None else self._below()
        for layer in layers[:-1]:  # what goes in comes out, until the last
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        for layer in layers[-1:]:
            # Reentrant checkpoints let a gradient through only where their input has one.
            layer.forward = lambda hidden_states, *args, **kwargs: output.detach().requires_grad_(
                hidden_states.requires_grad
            )
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _below(self) -> list[nn.Module]:
        decoder = self.model.base_model
        layers = list(decoder.layers)
        gated = [i for i, layer in enumerate(layers) if isinstance(layer.self_attn, GatedAttention)]
        below = layers[: min(gated, default=0)]
        trained = (p.requires_grad for m in (decoder.embed_tokens, *below) for p in m.parameters())
        patched = any("forward" in vars(m) or m._compiled_call_impl for m in below)
        return [] if any(trained) or patched else below

    def _keep(self, _layer, _args, output):
        self.output = output
