"""Reads attention, gates and hidden states from a running model.

`collect_layer_statistics` reads every forward pass that runs inside it. It changes nothing about
the model except its attention implementation, which it restores afterwards.
"""

import sys
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

# The name must not contain "sdpa": transformers refuses such a name for models that plain SDPA
# would compute wrongly, which includes those with sink logits.
_IMPLEMENTATION = "retrofit_watched"
# In these stock attention classes, `q_proj` packs `[q ; gate]` for each head.
_PACKED_GATES = ("Qwen3_5Attention", "Qwen3_5MoeAttention", "Qwen3NextAttention")

AttentionWatcher = Callable[
    [nn.Module, torch.Tensor, torch.Tensor, float, torch.Tensor | None, torch.Tensor | None], None
]
GateWatcher = Callable[[int, torch.Tensor], None]


class LayerStatistics:
    """Statistics of one decoder layer, `None` for the parts that the layer does not have.

    A forward pass calls `record_gate` and `record_attention` in either order, then `finish`.

    Args:
        residual_scale: the factor that the model's residual stream is multiplied by.

    Attributes:
        activation: statistics of the hidden states that the layer puts out.
        down_proj: statistics of the inputs of the MLP's `down_proj`.
        attention: statistics of the attention matrix.
        gate: statistics of the gate scores.
    """

    def __init__(self, residual_scale: float = 1.0):
        self.activation = ActivationStatistics(residual_scale)
        self.down_proj: ActivationStatistics | None = None
        self.attention: AttentionStatistics | None = None
        self.gate: GateStatistics | None = None
        self._columns: AttentionColumns | None = None
        self._gate_scores: torch.Tensor | None = None

    def record_attention(self, columns: AttentionColumns) -> None:
        self._columns = columns

    def record_gate(self, scores: torch.Tensor) -> None:
        self._gate_scores = scores

    def record_down_proj(self, inputs: torch.Tensor) -> None:
        self.down_proj = self.down_proj or ActivationStatistics()
        self.down_proj.add(inputs)

    def finish(self, hidden_states: torch.Tensor) -> None:
        """Record the layer's output, and combine its attention with its gate."""
        self.activation.add(hidden_states)
        if self._columns is not None:
            self.attention = self.attention or AttentionStatistics()
            self.attention.add(self._columns, self._gate_scores)
        if self._gate_scores is not None:
            self.gate = self.gate or GateStatistics()
            self.gate.add(self._gate_scores)
        self._columns = self._gate_scores = None


@contextmanager
def collect_layer_statistics(model: PreTrainedModel) -> Iterator[list[LayerStatistics]]:
    """Collect the statistics of each decoder layer while the model runs.

    All batches must be unpadded and have the same sequence length.

    Args:
        model: a causal language model, without a PEFT wrapper around it.

    Yields:
        One entry for each decoder layer, filled by the forward passes.

    Raises:
        UserError: if the model's attention cannot be watched.
    """
    decoder_layers = getattr(model.get_decoder(), "layers", None)
    if decoder_layers is None:
        raise UserError(f"cannot measure a {model.config.model_type!r} model: it has no `layers`")
    # Merging scales the residual stream of families without query and key norms. The scale is
    # divided out here, so that activations are in the base's units.
    constant_heads = _constant_heads(model)
    residual_scale = getattr(model.config, "retrofit_residual_scale", 1.0)
    statistics = [LayerStatistics(residual_scale) for _ in decoder_layers]

    def record_attention(module, *attention_inputs):
        statistics[module.layer_idx].record_attention(attention_columns(*attention_inputs))

    def record_gate(layer_idx, scores):  # [batch, T, heads, channels]
        base_scores = scores[..., :-constant_heads, :] if constant_heads else scores
        statistics[layer_idx].record_gate(base_scores)

    with ExitStack() as stack:
        stack.enter_context(attention_watched(model, record_attention))
        for handle in _gate_hooks(model, record_gate):
            stack.enter_context(handle)
        for layer, layer_statistics in zip(decoder_layers, statistics, strict=True):
            stack.enter_context(layer.register_forward_hook(_output_hook(layer_statistics.finish)))
            # A mixture of experts has no `down_proj` that is a module of its own.
            down_proj = getattr(getattr(layer, "mlp", None), "down_proj", None)
            if isinstance(down_proj, nn.Module):
                hook = _input_hook(layer_statistics.record_down_proj)
                stack.enter_context(down_proj.register_forward_pre_hook(hook))
        yield statistics


@contextmanager
def attention_watched(model: PreTrainedModel, watch: AttentionWatcher) -> Iterator[None]:
    """Run the model on SDPA and call `watch` with the inputs of every attention call.

    Heads that a merge added are left out.

    Args:
        model: the model that runs.
        watch: receives the module, the query states `[batch, heads, T, head_dim]` and key states
            `[batch, kv_heads, T, head_dim]` after RoPE, the scaling, the mask (bool, or `None` if
            causal), and the sink logits (`None` if there are none).

    Raises:
        UserError: if the model does not go through transformers' attention interface.
    """
    constant_heads = _constant_heads(model)

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        # The constant heads share one key head, the last.
        base_states = (query[:, :-constant_heads], key[:, :-1]) if constant_heads else (query, key)
        watch(module, *base_states, scaling, attention_mask, sink_logits(**kwargs))
        return sdpa_with_sinks(module, query, key, value, attention_mask, scaling, **kwargs)

    with attention_replaced(model, attention):
        yield


@contextmanager
def without_matrices(model: PreTrainedModel) -> Iterator[None]:
    """Run the model without `T x T` matrices, even if its sink logits keep it from using SDPA.

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
    """Run the model with another attention function.

    Args:
        model: the model that runs.
        attention: a function with the signature of those in `ALL_ATTENTION_FUNCTIONS`.

    Raises:
        UserError: if the model does not go through transformers' attention interface.
    """
    before = model.config._attn_implementation
    # Without a mask function of its own, an implementation gets no mask at all, and no error.
    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, sdpa_mask)
    registries = _sink_registries(model)
    for registry in registries:
        registry[_IMPLEMENTATION] = attention
    try:
        _set_implementation(model)
        yield
    finally:
        model.set_attn_implementation(before)
        for registry in registries:
            del registry[_IMPLEMENTATION]
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_IMPLEMENTATION]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_IMPLEMENTATION]


def _sink_registries(model: PreTrainedModel) -> list[dict[str, Callable]]:
    """Returns the registries in which attention with a sink looks up an implementation.

    One is this package's. A checkpoint that brings its own code brings a copy of that module, and
    so a registry of its own.
    """
    code = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    functions = (getattr(sys.modules.get(name), "sink_attention", None) for name in code)
    copies = [
        function.__globals__["SINK_ATTENTION_FUNCTIONS"] for function in functions if function
    ]
    return [SINK_ATTENTION_FUNCTIONS, *(c for c in copies if c is not SINK_ATTENTION_FUNCTIONS)]


def _constant_heads(model: PreTrainedModel) -> int:
    """Returns how many heads a merge added to each layer to hold a constant.

    They are the layer's last query heads, do not belong to the base, and attend evenly.
    """
    return getattr(model.config, "retrofit_constant_heads", 0)


def _set_implementation(model: PreTrainedModel) -> None:
    # A model with neither SDPA nor sink logits computes something else in its attention.
    if model._supports_sdpa or any(hasattr(module, "sinks") for module in model.modules()):
        with suppress(ValueError, ImportError):
            model.set_attn_implementation(_IMPLEMENTATION)
    # transformers only warns about a model that does not go through the interface.
    if model.config._attn_implementation != _IMPLEMENTATION:
        raise UserError(
            f"cannot watch the attention of {type(model).__name__}: it does not run on SDPA "
            "through transformers' attention interface"
        )


def _gate_hooks(model: PreTrainedModel, watch: GateWatcher) -> Iterator[RemovableHandle]:
    """Register hooks that call `watch` with each layer's index and its gate scores in (0, 1),
    `[batch, T, heads, channels]`."""

    def hook(layer_idx: int, to_scores: Callable[[torch.Tensor], torch.Tensor]):
        return lambda _module, _args, output: watch(layer_idx, to_scores(output.float()))

    for layer_idx, projection, to_scores in _gate_projections(model):
        yield projection.register_forward_hook(hook(layer_idx, to_scores))


def _gate_projections(model: PreTrainedModel) -> Iterator[tuple[int, nn.Module, Callable]]:
    """Yields, for each G1 gate, the layer index, the module that computes the gate, and the
    function that turns the module's output into scores."""
    module: Any
    for module in model.modules():
        gate = _gate_of(module)
        if isinstance(gate, GateLayer):
            for projection in gate.g_proj.values():
                if projection.position == "G1" and projection.weight is not None:
                    yield module.layer_idx, projection, _scores_of_doubled_gate
        elif getattr(gate, "g_proj", None) is not None:  # in a checkpoint with its own code
            to_scores = partial(_scores_of_logits, num_heads=gate.num_heads)
            yield module.layer_idx, gate.g_proj, to_scores
        elif type(module).__name__ in _PACKED_GATES:
            to_scores = partial(_scores_of_packed, head_dim=module.head_dim)
            yield module.layer_idx, module.q_proj, to_scores


def _gate_of(module: nn.Module) -> Any:
    """Returns the gate of an attention module, which older checkpoints' own code calls `g1`."""
    return getattr(module, "attn_gate", None) or getattr(module, "g1", None)


def _scores_of_doubled_gate(gate: torch.Tensor) -> torch.Tensor:
    return gate / 2  # [batch, T, heads, channels]


def _scores_of_logits(logits: torch.Tensor, num_heads: int) -> torch.Tensor:
    # [batch, T, heads * channels] -> [batch, T, heads, channels]
    return logits.unflatten(-1, (num_heads, -1)).sigmoid()


def _scores_of_packed(query_and_gate: torch.Tensor, head_dim: int) -> torch.Tensor:
    # [batch, T, heads * 2 * head_dim] -> [batch, T, heads, head_dim]
    return query_and_gate.unflatten(-1, (-1, 2 * head_dim))[..., head_dim:].sigmoid()


def _input_hook(record: Callable[[torch.Tensor], None]):
    return lambda _module, args: record(args[0])


def _output_hook(record: Callable[[torch.Tensor], None]):
    # A decoder layer returns its hidden states by themselves or first in a tuple.
    return lambda _module, _args, output: record(output[0] if isinstance(output, tuple) else output)
