"""Maps a base with gates to `Qwen3_5ForCausalLM`, which transformers and vLLM already ship.

The attention of that architecture is G1 with a plain sigmoid: `q_proj` holds the rows
`[query; gate]` of each head, and `Y * sigmoid(gate)` goes to `o_proj`
(`transformers.models.qwen3_5.modeling_qwen3_5`). A mixture of experts becomes
`Qwen3NextForCausalLM`, which has the same attention and a shared expert, whose weights are zero.
The architecture differs from the supported families in four ways. All scaling is by powers of two,
which is exact in float32 and bfloat16:

- Trained gates are `2 * sigmoid`, so `o_proj` is multiplied by the 2. A layer without gates gets
  gate rows of zeros, where `2 * sigmoid(0) = 1`.
- Norms are `1 + w`. Weights below 1/2 would lose bits in `w - 1`, so they are scaled up to
  [1/2, 1), and the input columns of their consumers are scaled down.
- vLLM and llama.cpp read no bias of `o_proj`, and vLLM ignores it silently. If a layer has one, or
  centered gates need one, a further key-value head adds it: its values are the same for all tokens,
  and its columns of `o_proj` hold the bias.
- q and k pass an RMSNorm that cannot be switched off. For families without one, q and k are scaled
  down until eps dominates their mean square. The norm is then a constant, which its weight undoes.
  The residual stream is scaled up, and its eps with it, so that a small scaling of q and k suffices
  and survives weight quantization.
"""

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedConfig

from retrofit.adapters._family import sliding_window_of
from retrofit.export.base_layers import (
    Tensors,
    copied_settings,
    has_bias,
    has_qk_norm,
    read_layer,
)
from retrofit.export.constant_head import add_center, add_constant_head
from retrofit.export.exact_norms import (
    Scales,
    add_constant_qk_norms,
    balance_qk_norms,
    fold_norm,
    scale,
)
from retrofit.models.base_config import head_dim_of

_MAPPED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_NO_TARGET = {
    "gemma3_text": "no stock architecture has both gates and Gemma's four norms a layer",
    "gpt_oss": "no stock architecture has both gates and learned sinks",
}

# Qwen3_5TextRotaryEmbedding computes these RoPE scalings as the families of the bases do.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def refusal(config: PreTrainedConfig) -> str | None:
    """Returns why a base cannot become `Qwen3_5ForCausalLM`, or `None` if it can."""
    window = sliding_window_of(config)
    rope_type = config.rope_parameters.get("rope_type", "default")
    if config.model_type not in _MAPPED:
        return _NO_TARGET.get(config.model_type, f"there is no mapping from {config.model_type!r}")
    if window is not None:
        return f"Qwen3_5ForCausalLM has no sliding window; the base has one of {window} tokens"
    if rope_type not in _ROPE_TYPES:
        return f"Qwen3_5ForCausalLM is not known to scale RoPE by {rope_type!r} as the base does"
    if config.hidden_act != "silu":
        return f"Qwen3_5ForCausalLM runs on silu in every engine; the base uses {config.hidden_act}"
    if getattr(config, "mlp_bias", False):
        return "Qwen3_5ForCausalLM has no bias in its MLP; the base has one"
    return None


_DENSE = {"architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text"}
_SHARED_EXPERT = 16  # width of the shared expert of zeros


def native_config(
    config: PreTrainedConfig, centered: bool = False, scales: Scales | None = None
) -> dict:
    """Returns the `config.json` of the native checkpoint, without its `dtype`.

    It is a plain dict because engines read the same setting under different names: vLLM reads
    `qkv_bias` where transformers reads `attention_bias`, and SGLang and MLX read top-level RoPE
    fields and `full_attention_interval`. A missing `partial_rotary_factor` would silently be 0.25.

    Args:
        config: the config of the base.
        centered: whether the gates have centers.
        scales: the scales that `native_tensors` is given.
    """
    shift = _residual_shift(config, scales or Scales())
    rope = dict(config.rope_parameters) | {"partial_rotary_factor": 1.0}
    constant = _adds_constant(config, centered)
    biased = constant or has_bias(config)
    return {
        **(_experts_config(config) if _has_experts(config) else _DENSE),
        **copied_settings(config),
        "num_attention_heads": config.num_attention_heads + constant * _groups(config),
        "num_key_value_heads": config.num_key_value_heads + constant,
        "head_dim": head_dim_of(config),
        "rms_norm_eps": _eps(config, shift),
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "full_attention_interval": 1,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": 1.0,
        "attention_bias": biased,
        "qkv_bias": biased,
        "attn_output_gate": True,
        "tie_word_embeddings": _stays_tied(config),
        # Only `retrofit measure` reads these two: the ratio of this checkpoint's activations to
        # those of its base, and the number of last heads of each layer that hold a constant.
        "retrofit_residual_scale": 2**shift,
        "retrofit_constant_heads": constant * _groups(config),
    }


def native_tensors(
    config: PreTrainedConfig,
    base: Mapping[str, torch.Tensor],
    gates: Mapping[int, torch.Tensor],
    centers: Mapping[int, torch.Tensor],
    dtype: torch.dtype,
    scales: Scales | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the tensors of the native checkpoint, with one layer of the base in memory at a time.

    Args:
        config: the config of the base; `refusal(config)` must be `None`.
        base: the base's tensors by name, each read when it is asked for.
        gates: `W_g` by layer, `[num_heads, hidden_size]` or `[num_heads * head_dim, hidden_size]`.
        centers: the centers by layer, `[num_key_value_heads, head_dim]`; empty for gates that are
            not centered.
        dtype: the dtype of the result. float16 cannot hold the scaled weights: see the module's
            docstring.
        scales: the scales for dtypes with a smaller range than bfloat16.
    """
    scales = scales or Scales()
    shift = _residual_shift(config, scales)
    yield "model.embed_tokens.weight", base["model.embed_tokens.weight"].to(dtype) * 2.0**shift
    constant = _adds_constant(config, bool(centers))
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = read_layer(config, base, prefix, dtype, with_bias=has_bias(config) or constant)
        if index in centers:
            add_center(layer, centers[index], dtype)
        if constant:
            add_constant_head(layer, head_dim_of(config), _groups(config), dtype)
        for name, tensor in _map_layer(config, layer, gates.get(index), dtype, scales).items():
            yield prefix + name, tensor.to(dtype).contiguous()
    yield from _map_head(config, base, dtype)


def _experts_config(config: PreTrainedConfig) -> dict:
    copied = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob",
              "decoder_sparse_step", "mlp_only_layers", "router_aux_loss_coef")  # fmt: skip
    return {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        **{name: getattr(config, name) for name in copied},
        "shared_expert_intermediate_size": _SHARED_EXPERT,
    }


def _has_experts(config: PreTrainedConfig) -> bool:
    return config.model_type == "qwen3_moe"


def _adds_constant(config: PreTrainedConfig, centered: bool) -> bool:
    """Tells whether the output of attention needs a constant part.

    The `attention_bias` of Llama and Qwen3 includes a bias of `o_proj`; Qwen2 has none there.
    """
    return centered or (config.model_type != "qwen2" and getattr(config, "attention_bias", False))


def _groups(config: PreTrainedConfig) -> int:
    """Returns the number of query heads of each key-value head."""
    return config.num_attention_heads // config.num_key_value_heads


def _residual_shift(config: PreTrainedConfig, scales: Scales) -> int:
    return 0 if has_qk_norm(config) else scales.residual_shift


def _eps(config: PreTrainedConfig, shift: int) -> float:
    """Returns the eps that keeps norms the same if the residual stream is scaled by `2**shift`."""
    return config.rms_norm_eps * 4**shift


def _stays_tied(config: PreTrainedConfig) -> bool:
    """Tells whether the input and output embeddings stay tied.

    Scaling the residual stream scales only the input embeddings, which unties them.
    """
    return config.tie_word_embeddings and has_qk_norm(config)


def _map_layer(
    config: PreTrainedConfig,
    layer: Tensors,
    gate: torch.Tensor | None,
    dtype: torch.dtype,
    scales: Scales,
) -> Tensors:
    """Returns the tensors of one layer of `Qwen3_5ForCausalLM`.

    Args:
        config: the config of the base.
        layer: the tensors of the base's layer, changed in place.
        gate: `W_g` of the layer, `None` for a layer without gates.
        dtype: the dtype that the weights will be stored in.
        scales: the scales of a family without q and k norms.
    """
    shift = _residual_shift(config, scales)
    if has_qk_norm(config):
        balance_qk_norms(layer)
    else:
        add_constant_qk_norms(layer, head_dim_of(config), _eps(config, shift), scales, dtype)
    _pack_gate(config, layer, gate)
    scale(layer, shift + 1, "self_attn.o_proj.weight")  # plus 1 for the 2 of `2 * sigmoid`
    down = [name for name in layer if name.endswith("down_proj.weight")]
    scale(layer, shift, *down)
    attention = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    mlp = [name for name in layer if name.startswith("mlp.") and name not in down]
    fold_norm(layer, "input_layernorm.weight", attention)
    fold_norm(layer, "post_attention_layernorm.weight", mlp)
    for name in layer:
        if "norm" in name:
            layer[name] = layer[name] - 1
    if "mlp.gate.weight" in layer:
        _add_shared_expert(layer)
    return layer


def _add_shared_expert(layer: Tensors) -> None:
    hidden_size = layer["mlp.gate.weight"].shape[1]
    for name in ("gate", "up"):
        layer[f"mlp.shared_expert.{name}_proj.weight"] = torch.zeros(_SHARED_EXPERT, hidden_size)
    layer["mlp.shared_expert.down_proj.weight"] = torch.zeros(hidden_size, _SHARED_EXPERT)
    layer["mlp.shared_expert_gate.weight"] = torch.zeros(1, hidden_size)


def _map_head(
    config: PreTrainedConfig, base: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the final norm and `lm_head`. A tied `lm_head` cannot take a part of the norm."""
    head = {"norm": base["model.norm.weight"].float()}
    if not _stays_tied(config):
        tied = config.tie_word_embeddings
        stored = base["model.embed_tokens.weight" if tied else "lm_head.weight"]
        head["lm_head"] = stored.to(dtype)
        fold_norm(head, "norm", ["lm_head"])
        yield "lm_head.weight", head["lm_head"]
    yield "model.norm.weight", (head["norm"] - 1).to(dtype)


def _pack_gate(config: PreTrainedConfig, layer: Tensors, gate: torch.Tensor | None) -> None:
    """Packs `q_proj` as `[num_heads, 2, head_dim, hidden_size]`: each head's query, then its gate.

    A headwise gate is repeated over the channels of its head. Heads without a gate get zeros, where
    `2 * sigmoid` is 1.
    """
    head_dim, query = head_dim_of(config), layer["self_attn.q_proj.weight"]
    gate_rows = torch.zeros_like(query)
    if gate is not None:
        elementwise = gate.shape[0] != config.num_attention_heads
        rows = gate if elementwise else gate.repeat_interleave(head_dim, dim=0)
        gate_rows[: len(rows)] = rows
    layer["self_attn.q_proj.weight"] = _interleave(query, gate_rows, head_dim)
    if (bias := layer.get("self_attn.q_proj.bias")) is not None:
        layer["self_attn.q_proj.bias"] = _interleave(bias, torch.zeros_like(bias), head_dim)


def _interleave(query: torch.Tensor, gate: torch.Tensor, head_dim: int) -> torch.Tensor:
    pair = [rows.unflatten(0, (-1, head_dim)) for rows in (query, gate)]
    return torch.cat(pair, dim=1).flatten(0, 1)
