"""What all families share: the gated forward, and the record that each family's file fills in.

`retrofit merge --format remote-code` copies this file into checkpoints, where the rest of the
package is missing.
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

# Since transformers 5.24 `past_key_values` is called `cache`, and attention updates a paged cache
# like any other. Before, `cache` was only the paged one, which the kernel filled.
_CACHE_IS_UPDATED_HERE = "cache" in inspect.signature(LlamaAttention.forward).parameters


@dataclass(frozen=True)
class Family:
    """The classes of one supported architecture.

    Attributes:
        model_type: `config.model_type` of the base.
        attention: the attention class that transformers builds.
        gated: the subclass that replaces it where there is a gate.
        decoder: the model class without the language-model head.
        causal_lm: the model class with the language-model head.
        packs: whether transformers keeps the documents of a packed row apart with every kernel.

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
        unknown = _argument_names(self.attention.forward) - _argument_names(self.gated.forward)
        if unknown:
            raise ImportError(
                f"transformers {transformers.__version__} calls {self.attention.__name__} with "
                f"{min(unknown)!r}, which gates do not know yet; install a version that retrofit's "
                "pyproject.toml allows"
            )


def _argument_names(function: Callable) -> set[str]:
    """The names of a function's arguments, without its `**kwargs`."""
    parameters = inspect.signature(function).parameters.values()
    return {
        parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD
    }


class GatedAttention(nn.Module):
    """Attention whose softmax may have a sink and whose output passes the gate `attn_gate` before
    `o_proj`.

    It is a mixin that comes before a transformers attention class. Its forward is that of the
    class, operation by operation, plus the gate. The tests hold the output of a zero gate bitwise
    equal to the original, so that they notice a change in transformers. A family sets the two
    functions of its own modeling file and overrides the methods that differ.

    Attributes:
        apply_rotary_pos_emb: the family's function that applies RoPE.
        eager_attention_forward: the family's eager attention function.
        observer: a function that is given what the layer computes and returns the gated output. In
            training it reads the base before the first step, and adds losses on attention, whose
            gradients start at that output. `None` everywhere else.
    """

    apply_rotary_pos_emb: Callable
    eager_attention_forward: Callable
    observer: Callable | None = None

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Project to queries, keys and values before RoPE, `[batch, seq_len, heads, head_dim]`."""
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        return tuple(
            projection(hidden_states).view(shape)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )

    def attention_kwargs(self) -> dict:
        """The arguments that the family passes to its attention function besides the common
        ones."""
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
        """Compute gated attention; the arguments are those of transformers' attention classes.

        Returns:
            The output of `o_proj`, `[batch, seq_len, hidden_size]`, and the attention weights if
            the attention function returns them.

        Raises:
            ValueError: if both names of the cache are given.
        """
        # The cache comes under either name, depending on the version of transformers.
        if past_key_values is not None and cache is not None:
            raise ValueError("attention was given past_key_values and cache, which are one thing")
        kv_cache = past_key_values if cache is None else cache
        update_kwargs = {"kwargs": kwargs}  # a paged cache adds to `kwargs` what the kernel needs
        if not _CACHE_IS_UPDATED_HERE:
            kv_cache, update_kwargs = past_key_values, {}
            if cache is not None:  # a paged cache, which the kernel fills
                kwargs["cache"] = cache

        # Projections, [batch, seq_len, heads, head_dim]; the keys may get a bias.
        query_states, key_states, value_states = self.project(hidden_states)
        key_states = self.attn_gate.bias_keys(key_states)
        # RoPE and the cache work on [batch, heads, seq_len, head_dim].
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in (query_states, key_states, value_states)
        )
        cos, sin = position_embeddings
        query_states, key_states = self.apply_rotary_pos_emb(query_states, key_states, cos, sin)
        if kv_cache is not None:
            key_states, value_states = kv_cache.update(
                key_states, value_states, self.layer_idx, **update_kwargs
            )

        # Softmax attention, with a slot in each head's softmax if the gate has sinks.
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

        # The gate scales [batch, seq_len, heads, head_dim]; vLLM's attention returns heads and
        # channels in one dimension.
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1, self.head_dim)
        attn_output = self.attn_gate(attn_output, hidden_states)
        if self.observer is not None:
            attn_output = self.observer(
                self, hidden_states, query_states, key_states, sink, attn_output
            )

        # The output projection, from [batch, seq_len, heads * head_dim].
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class NormedGatedAttention(GatedAttention):
    """`GatedAttention` for families with an RMSNorm on each query and key head."""

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        query_states, key_states, value_states = super().project(hidden_states)
        return self.q_norm(query_states), self.k_norm(key_states), value_states

    def attention_kwargs(self) -> dict:
        return {"sliding_window": self.sliding_window}


def sliding_window_of(config: PreTrainedConfig) -> int | None:
    """The sliding window in tokens, or `None` if no layer of the model uses one. The attention of a
    Llama does not read the setting, which its config may have all the same."""
    if config.model_type in ("llama", "gated_llama"):
        return None
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(config, "sliding_window", None)
