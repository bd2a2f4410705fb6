"""What every family shares: the gated forward and the record that a family file fills in.

This file, a family's and `modeling_gated.py` also lie in the checkpoints that `retrofit merge
--format remote-code` writes, where nothing else of this package is to be had.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention

from ._sink_attention import sink_attention

# From transformers 5.24 on `past_key_values` is called `cache`, and a paged one is no exception.
_CACHE_IS_UPDATED_HERE = "cache" in inspect.signature(LlamaAttention.forward).parameters


@dataclass(frozen=True)
class Family:
    """One supported architecture.

    Attributes:
        model_type: `config.model_type` of the base.
        attention: the attention class that transformers builds.
        gated: the subclass it is swapped for.
        decoder: the model without its language-model head.
        causal_lm: the model with it.
        packs: whether transformers keeps the documents of a packed row apart, beside any kernel.

    Raises:
        ImportError: if the installed transformers calls attention with an argument that the gated
            forward does not know, which would be lost among its `**kwargs`.
    """

    model_type: str
    attention: type[nn.Module]
    gated: type[nn.Module]
    decoder: type[PreTrainedModel]
    causal_lm: type[PreTrainedModel]
    packs: bool = True

    def __post_init__(self):
        unknown = _named(self.attention.forward) - _named(self.gated.forward)
        if unknown:
            raise ImportError(
                f"transformers {transformers.__version__} calls {self.attention.__name__} with "
                f"{min(unknown)!r}, which gates do not know yet; install a version that retrofit's "
                "pyproject.toml allows"
            )


def _named(forward: Callable) -> set[str]:
    """The arguments that a function takes by name, and not among its `**kwargs`."""
    parameters = inspect.signature(forward).parameters.values()
    return {each.name for each in parameters if each.kind is not each.VAR_KEYWORD}


class GatedAttention(nn.Module):
    """Softmax attention with a slot for a sink logit, whose output passes the gate `attn_gate`
    before `o_proj`.

    A mixin before a transformers attention class. Its forward is that class's forward, operation
    by operation, plus the gate; the tests hold a zero gate bitwise equal to the original, so that
    a change upstream is noticed. A family sets the two functions of its own modeling file and
    overrides what differs.
    """

    apply_rotary_pos_emb: Callable
    eager_attention_forward: Callable
    # Sees what the layer computes, and returns the gated output. Training sets it, to read the base
    # before the first step, and for losses on attention, whose gradient starts at that output.
    observer: Callable | None = None

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query, key and value `[batch, seq_len, heads, head_dim]`, before RoPE."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return tuple(
            projection(hidden_states).view(shape)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

    def attention_kwargs(self) -> dict:
        """What the family passes to its attention function beyond the common arguments."""
        return {}

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Any = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if past_key_values is not None and cache is not None:
            raise ValueError("attention was given past_key_values and cache, which are one thing")
        cached = past_key_values if cache is None else cache
        update = {"kwargs": kwargs}  # where a paged cache leaves what the kernel needs
        if not _CACHE_IS_UPDATED_HERE:
            cached, update = past_key_values, {}
            if cache is not None:  # pages, which the kernel fills
                kwargs["cache"] = cache
        query_states, key_states, value_states = self.project(hidden_states)
        key_states = self.attn_gate.bias_keys(key_states)
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in (query_states, key_states, value_states)
        )
        cos, sin = position_embeddings
        query_states, key_states = self.apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if cached is not None:
            key_states, value_states = cached.update(
                key_states, value_states, self.layer_idx, **update
            )

        attention_interface = ALL_ATTENTION_FUNCTIONS.get(
            self.config._attn_implementation, self.eager_attention_forward
        )
        sink = self.attn_gate.sink(hidden_states)
        if sink is not None:
            attention_interface = partial(sink_attention, attention_interface, sink)
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.attention_kwargs(),
            **kwargs,
        )
        # That of vLLM comes with heads and channels in one.
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1, self.head_dim)
        attn_output = self.attn_gate(attn_output, hidden_states)
        if self.observer is not None:
            attn_output = self.observer(
                self, hidden_states, query_states, key_states, sink, attn_output
            )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class NormedGatedAttention(GatedAttention):
    """The same for families with an RMSNorm on each query and key head."""

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_states, key_states, value_states = super().project(hidden_states)
        return self.q_norm(query_states), self.k_norm(key_states), value_states

    def attention_kwargs(self) -> dict:
        return {"sliding_window": self.sliding_window}


def sliding_window_of(config: PreTrainedConfig) -> int | None:
    """The sliding window that some layer of the model really uses, in tokens."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)
