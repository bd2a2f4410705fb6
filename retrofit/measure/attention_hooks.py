"""Reads a running model: attention, gates and hidden states of whatever passes run inside `probe`.

Nothing about the model changes but its attention implementation, which is put back afterwards.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrofit.adapters._sink_attention import SINK_ATTENTION_FUNCTIONS
from retrofit.gates import GateLayer
from retrofit.measure.metrics import (
    ActivationStatistics,
    AttentionColumns,
    AttentionStatistics,
    GateStatistics,
    attention_columns,
)
from retrofit.measure.sink_attention import sdpa_with_sinks, sink_logits
from retrofit.utils.errors import UserError

# transformers refuses a name with "sdpa" in it to the models that SDPA alone would get wrong, those
# with sink logits among them.
_IMPLEMENTATION = "retrofit_probe"
# Stock attention whose `q_proj` packs `[q ; gate]` for each head.
_PACKED_GATES = ("Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen3NextAttention")

AttentionWatcher = Callable[
    [nn.Module, torch.Tensor, torch.Tensor, float, torch.Tensor | None, torch.Tensor | None], None
]
GateWatcher = Callable[[int, torch.Tensor], None]


class LayerStatistics:
    """What one decoder layer shows: `None` for the parts it does not have.

    A pass calls `see_gate` and `see_attention` in either order, then `finish`.

    Args:
        residual_scale: what the model's residual stream is multiplied by.
    """

    def __init__(self, residual_scale: float = 1.0):
        self.activation = ActivationStatistics(residual_scale)
        self.down_proj: ActivationStatistics | None = None
        self.attention: AttentionStatistics | None = None
        self.gate: GateStatistics | None = None
        self._columns: AttentionColumns | None = None
        self._gate_scores: torch.Tensor | None = None

    def see_attention(self, columns: AttentionColumns) -> None:
        self._columns = columns

    def see_gate(self, scores: torch.Tensor) -> None:
        self._gate_scores = scores

    def see_down_proj(self, inputs: torch.Tensor) -> None:
        self.down_proj = self.down_proj or ActivationStatistics()
        self.down_proj.add(inputs)

    def finish(self, hidden_states: torch.Tensor) -> None:
        """Take in the layer's output, and join its attention with its gate."""
        self.activation.add(hidden_states)
        if self._columns is not None:
            self.attention = self.attention or AttentionStatistics()
            self.attention.add(self._columns, self._gate_scores)
        if self._gate_scores is not None:
            self.gate = self.gate or GateStatistics()
            self.gate.add(self._gate_scores)
        self._columns = self._gate_scores = None


@contextmanager
def probe(model: PreTrainedModel) -> Iterator[list[LayerStatistics]]:
    """Statistics of each decoder layer, over unpadded batches of one sequence length.

    Args:
        model: a causal language model, without a PEFT wrapper around it.

    Raises:
        UserError: if its attention cannot be watched.
    """
    decoder_layers = getattr(model.get_decoder(), "layers", None)
    if decoder_layers is None:
        raise UserError(f"cannot measure a {model.config.model_type!r} model: it has no `layers`")
    # Merging scales the residual stream of families without query and key norms, which nothing in
    # the model can tell: activations are given in the base's units.
    constant = _constant_heads(model)
    residual_scale = getattr(model.config, "retrofit_residual_scale", 1.0)
    statistics = [LayerStatistics(residual_scale) for _ in decoder_layers]

    def watch(module, *attention):
        statistics[module.layer_idx].see_attention(attention_columns(*attention))

    def see_gate(index, scores):
        statistics[index].see_gate(scores[..., :-constant, :] if constant else scores)

    with ExitStack() as stack:
        stack.enter_context(attention_watched(model, watch))
        for handle in _gate_hooks(model, see_gate):
            stack.enter_context(handle)
        for layer, layer_statistics in zip(decoder_layers, statistics, strict=True):
            stack.enter_context(layer.register_forward_hook(_output_hook(layer_statistics.finish)))
            # Experts of a mixture have none that is a module of its own.
            down_proj = getattr(getattr(layer, "mlp", None), "down_proj", None)
            if isinstance(down_proj, nn.Module):
                hook = _input_hook(layer_statistics.see_down_proj)
                stack.enter_context(down_proj.register_forward_pre_hook(hook))
        yield statistics


@contextmanager
def attention_watched(model: PreTrainedModel, watch: AttentionWatcher) -> Iterator[None]:
    """Run the model on SDPA and show `watch` the inputs of every attention call: the module,
    query and key states after RoPE, the scaling, the mask (bool, or `None` if causal), and the sink
    logits (`None` without). Heads that a merge added are not shown.

    Raises:
        UserError: if the model does not go through transformers' attention interface.
    """
    constant = _constant_heads(model)

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        own = (query[:, :-constant], key[:, :-1]) if constant else (query, key)
        watch(module, *own, scaling, attention_mask, sink_logits(**kwargs))
        return sdpa_with_sinks(module, query, key, value, attention_mask, scaling, **kwargs)

    with attention_replaced(model, attention):
        yield


@contextmanager
def without_matrices(model: PreTrainedModel) -> Iterator[None]:
    """Run a model that has no SDPA, for its sink logits, without `T x T` matrices all the same.

    Raises:
        UserError: if the model does not go through transformers' attention interface.
    """
    if model._supports_sdpa:
        yield
        return
    with attention_replaced(model, sdpa_with_sinks):
        yield


@contextmanager
def attention_replaced(model: PreTrainedModel, attention: Callable) -> Iterator[None]:
    """Run the model with `attention`, which is called as those of `ALL_ATTENTION_FUNCTIONS` are.

    Raises:
        UserError: if the model does not go through transformers' attention interface.
    """
    before = model.config._attn_implementation
    # Without its own mask function an implementation gets no mask at all, and no error.
    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, sdpa_mask)
    SINK_ATTENTION_FUNCTIONS[_IMPLEMENTATION] = attention
    try:
        _set_implementation(model)
        yield
    finally:
        model.set_attn_implementation(before)
        del SINK_ATTENTION_FUNCTIONS[_IMPLEMENTATION]
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_IMPLEMENTATION]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_IMPLEMENTATION]


def _constant_heads(model: PreTrainedModel) -> int:
    """The last heads of each layer that a merge added to hold a constant: they are none of the
    base's, and attend evenly."""
    return getattr(model.config, "retrofit_constant_heads", 0)


def _set_implementation(model: PreTrainedModel) -> None:
    # What has neither SDPA nor sink logits does something else in its attention.
    if model._supports_sdpa or any(hasattr(module, "sinks") for module in model.modules()):
        with suppress(ValueError, ImportError):
            model.set_attn_implementation(_IMPLEMENTATION)
    # Models outside the interface are not an error to transformers, only a warning.
    if model.config._attn_implementation != _IMPLEMENTATION:
        raise UserError(
            f"cannot watch the attention of {type(model).__name__}: it does not run on SDPA "
            "through transformers' attention interface"
        )


def _gate_hooks(model: PreTrainedModel, watch: GateWatcher) -> Iterator[RemovableHandle]:
    """Show `watch` each layer's gate scores in (0, 1), `[batch, T, heads, channels]`."""

    def hook(index: int, scores: Callable[[torch.Tensor], torch.Tensor]):
        return lambda _module, _args, output: watch(index, scores(output.float()))

    for index, projection, scores in _gate_projections(model):
        yield projection.register_forward_hook(hook(index, scores))


def _gate_projections(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module, Callable]]:
    """Each G1 gate's layer index, the module that computes it, and what makes its output the
    scores."""
    module: Any
    for module in model.modules():
        gate = _gate_of(module)
        if isinstance(gate, GateLayer):
            for projection in gate.g_proj.values():
                if projection.position == "G1" and projection.weight is not None:
                    yield module.layer_idx, projection, _half
        elif getattr(gate, "g_proj", None) is not None:  # of a checkpoint with its own code
            yield module.layer_idx, gate.g_proj, partial(_unflatten, num_heads=gate.num_heads)
        elif type(module).__name__ in _PACKED_GATES:
            yield module.layer_idx, module.q_proj, partial(_unpack, head_dim=module.head_dim)


def _gate_of(module: nn.Module) -> Any:
    """The gate of an attention module, under its former name in the code of older checkpoints."""
    return getattr(module, "attn_gate", None) or getattr(module, "g1", None)


def _half(gate: torch.Tensor) -> torch.Tensor:
    return gate / 2


def _unflatten(logits: torch.Tensor, num_heads: int) -> torch.Tensor:
    return logits.unflatten(-1, (num_heads, -1)).sigmoid()


def _unpack(query_and_gate: torch.Tensor, head_dim: int) -> torch.Tensor:
    return query_and_gate.unflatten(-1, (-1, 2 * head_dim))[..., head_dim:].sigmoid()


def _input_hook(see: Callable[[torch.Tensor], None]):
    return lambda _module, args: see(args[0])


def _output_hook(see: Callable[[torch.Tensor], None]):
    # Decoder layers return their hidden states, bare or first in a tuple.
    return lambda _module, _args, output: see(output[0] if isinstance(output, tuple) else output)
