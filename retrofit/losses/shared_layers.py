"""The layers below the lowest gate compute the same with gates as without, so they run once."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from retrofit.adapters._family import GatedAttention


class SharedLayers:
    """The layers below the lowest gate, whose output is kept in the base's pass and used again in
    the gated pass over the same tokens.

    They run in both passes if anything is trained there, and in a compiled model, whose layers are
    more than their `forward`.

    Attributes:
        model: the gated model.
        output: the output of the last of these layers in the base's pass, or `None`.
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.output: Any = None

    @contextmanager
    def keep_output(self) -> Iterator[None]:
        """Keep the output of these layers while the base runs in this context."""
        layers = self._layers_below_gates()
        handles = [layers[-1].register_forward_hook(self._keep_output)] if layers else []
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def reuse_output(self) -> Iterator[None]:
        """Put the kept output in place of these layers while the gated model runs in this
        context."""
        output, self.output = self.output, None
        layers = [] if output is None else self._layers_below_gates()
        for layer in layers[:-1]:  # all but the last pass on what they are given
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
        for layer in layers[-1:]:
            # A reentrant checkpoint gives gradients only if its input requires one.
            layer.forward = lambda hidden_states, *args, **kwargs: output.detach().requires_grad_(
                hidden_states.requires_grad
            )
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _layers_below_gates(self) -> list[nn.Module]:
        """The layers that can be shared; none where they have to run in both passes."""
        decoder = self.model.base_model
        layers = list(decoder.layers)
        gated = [i for i, layer in enumerate(layers) if isinstance(layer.self_attn, GatedAttention)]
        below = layers[: min(gated, default=0)]
        trained = (p.requires_grad for m in (decoder.embed_tokens, *below) for p in m.parameters())
        patched = any("forward" in vars(m) or m._compiled_call_impl for m in below)
        return [] if any(trained) or patched else below

    def _keep_output(self, _layer, _args, output):
        self.output = output
