"""Base + gates as `Qwen3_5ForCausalLM`, an architecture that transformers and vLLM already ship.

Its attention is G1 with a plain sigmoid: `q_proj` holds `[query; gate]` rows a head, and
`Y * sigmoid(gate)` goes to `o_proj` (`transformers.models.qwen3_5.modeling_qwen3_5`). A mixture of
experts becomes `Qwen3NextForCausalLM`, with the same attention and one expert more, shared and
zero. Four things differ from the families here. What is scaled is scaled by powers of two, which is
exact in float32 and bfloat16:

- Trained gates are `2 * sigmoid`: `o_proj` takes the 2. A layer without gates gets gate rows 0,
  where `2 * sigmoid(0) = 1`.
- Norms are `1 + w`: weights below 1/2 would lose bits in `w - 1`, so they are scaled up to
  [1/2, 1) and the consumers' input columns scaled down.
- vLLM and llama.cpp read no bias of `o_proj`, and vLLM does not say so. Where a layer has one, or
  centered gates need a constant, a further key-value head adds it: its values are the
  same in all tokens, and the columns of its `o_proj` hold the constant.
- q and k pass an RMSNorm that cannot be switched off. Families without one scale q and k down
  until the norm's eps swamps their mean square; the norm is then a constant, which its weight
  undoes. The residual stream is scaled up, and its eps with it, so that this needs only a small
  shift of q and k and survives weight quantization.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from retrofit.adapters._family import sliding_window_of

Tensors = dict[str, torch.Tensor]

_MAPPED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe")
_NO_TARGET = {
    "gemma3_text": "no stock architecture has both gates and Gemma's four norms a layer",
    "gpt_oss": "no stock architecture has both gates and learned sinks",
}

# RoPE scalings that Qwen3_5TextRotaryEmbedding computes as the source families do.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# A constant head's values, and the numbers that its constant is the sum of: three of bfloat16 hold
# all the bits of a float32. Large, because the constant may be 100 times the usual weight of
# `o_proj`; no larger, because caches are kept in 8 bits too.
_CONSTANT, _PARTS = 64.0, 3


@dataclass(frozen=True)
class Scales:
    """What a family without q and k norms is scaled by, so that norms are constant.

    Attributes:
        residual_shift: the residual stream is multiplied by 2 to this power. The more, the less q
            and k are scaled down: by about 2**-12 at 14.
        dominance: the share of eps that the mean squares of q and k stay below. The norm is then
            constant to within half of it.
    """

    residual_shift: int = 14
    dominance: float = 2.0**-26


def refusal(config: PreTrainedConfig) -> str | None:
    """Why a base with this config cannot become `Qwen3_5ForCausalLM`, or `None` if it can."""
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
_SHARED_EXPERT = 16  # width of the expert that all tokens share, which the target has: zeros


def native_config(
    config: PreTrainedConfig, centered: bool = False, scales: Scales | None = None
) -> dict:
    """`config.json` of the native checkpoint, without its `dtype`.

    Args:
        config: of the base.
        centered: whether the gates have centers.
        scales: as for `native_tensors`.

    Written as a plain dict because engines read the same fact under different names: vLLM takes
    `qkv_bias` where transformers takes `attention_bias`, SGLang and MLX take top-level RoPE fields
    and `full_attention_interval`. `partial_rotary_factor` is silently 0.25 where it is absent.
    """
    shift = _residual_shift(config, scales or Scales())
    rope = dict(config.rope_parameters) | {"partial_rotary_factor": 1.0}
    constant = _adds_constant(config, centered)
    biased = constant or _has_bias(config)
    copied = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "hidden_act",
        "max_position_embeddings", "initializer_range", "use_cache", "attention_dropout",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {
        **(_experts_config(config) if _has_experts(config) else _DENSE),
        **{name: getattr(config, name) for name in copied if hasattr(config, name)},
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
        # Ours, for `retrofit measure`: activations of this checkpoint over those of its base, and
        # the last heads of each layer that hold a constant.
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
    """The tensors of the native checkpoint, one layer of the base in memory at a time.

    Args:
        config: of the base; `refusal(config)` must be `None`.
        base: its tensors by name, read when asked for.
        gates: `W_g` by layer, `[num_heads, hidden_size]` or `[num_heads * head_dim, hidden_size]`.
        centers: of centered gates by layer, `[num_key_value_heads, head_dim]`; else empty.
        dtype: of the result. float16 cannot hold it: see the module's docstring.
        scales: for formats that hold less than bfloat16.
    """
    scales = scales or Scales()
    shift = _residual_shift(config, scales)
    yield "model.embed_tokens.weight", base["model.embed_tokens.weight"].to(dtype) * 2.0**shift
    constant = _adds_constant(config, bool(centers))
    for index in range(config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        layer = read_layer(config, base, prefix, dtype, with_bias=_has_bias(config) or constant)
        if index in centers:
            add_center(layer, centers[index], dtype)
        if constant:
            _add_constant_head(config, layer, dtype)
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


def _has_qk_norm(config: PreTrainedConfig) -> bool:
    return config.model_type in ("qwen3", "qwen3_moe")


def _has_bias(config: PreTrainedConfig) -> bool:
    return config.model_type == "qwen2" or getattr(config, "attention_bias", False)


def _adds_constant(config: PreTrainedConfig, centered: bool) -> bool:
    """Whether a layer's attention output has a constant part; `attention_bias` is that of Llama and
    Qwen3, which have a bias on `o_proj`, unlike Qwen2."""
    return centered or (config.model_type != "qwen2" and getattr(config, "attention_bias", False))


def _groups(config: PreTrainedConfig) -> int:
    """Query heads to each key-value head."""
    return config.num_attention_heads // config.num_key_value_heads


def head_dim_of(config: PreTrainedConfig) -> int:
    """Width of a head, which not every config states."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _residual_shift(config: PreTrainedConfig, scales: Scales) -> int:
    return 0 if _has_qk_norm(config) else scales.residual_shift


def _eps(config: PreTrainedConfig, shift: int) -> float:
    """The norms of a residual stream scaled by 2**k are unchanged if eps is scaled by 4**k."""
    return config.rms_norm_eps * 4**shift


def _stays_tied(config: PreTrainedConfig) -> bool:
    """Only the input embeddings are scaled with the residual stream, so that unties the head."""
    return config.tie_word_embeddings and _has_qk_norm(config)


def read_layer(
    config: PreTrainedConfig,
    base: Mapping[str, torch.Tensor],
    prefix: str,
    dtype: torch.dtype,
    with_bias: bool,
) -> Tensors:
    """One layer: matrices in `dtype`, where powers of two scale them exactly and in half of
    float32's time, and vectors, whose sums and quotients are not exact, in float32.

    What the base stores in `dtype` is not copied, and must not be changed in place.
    """
    names = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    # The gate, up and down projections, or those of many experts and their router.
    names += [name.removeprefix(prefix) for name in base if name.startswith(f"{prefix}mlp.")]
    names += [f"self_attn.{name}_proj.weight" for name in "qkvo"]
    if _has_qk_norm(config):
        names += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"]
    layer = {}
    for name in names:
        layer[name] = base[prefix + name].to(torch.float32 if "norm" in name else dtype)
    if with_bias:
        for name in (f"self_attn.{name}_proj.bias" for name in "qkvo"):
            # Qwen2 has none on o_proj, Llama none at all, and Qwen3_5 has all four or none.
            zeros = torch.zeros(len(layer[name.replace("bias", "weight")]))
            layer[name] = base.get(prefix + name, zeros).float()
    return layer


def _map_layer(
    config: PreTrainedConfig,
    layer: Tensors,
    gate: torch.Tensor | None,
    dtype: torch.dtype,
    scales: Scales,
) -> Tensors:
    shift = _residual_shift(config, scales)
    if _has_qk_norm(config):
        _balance_qk_norms(layer)
    else:
        _add_constant_qk_norms(layer, head_dim_of(config), _eps(config, shift), scales, dtype)
    _pack_gate(config, layer, gate)
    _scale(layer, shift + 1, "self_attn.o_proj.weight")  # with the 2 of `2 * sigmoid`
    down = [name for name in layer if name.endswith("down_proj.weight")]
    _scale(layer, shift, *down)
    attention = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    mlp = [name for name in layer if name.startswith("mlp.") and name not in down]
    _fold_norm(layer, "input_layernorm.weight", attention)
    _fold_norm(layer, "post_attention_layernorm.weight", mlp)
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
    """The final norm and `lm_head`. Tied embeddings leave no consumer to fold the norm into."""
    head = {"norm": base["model.norm.weight"].float()}
    if not _stays_tied(config):
        tied = config.tie_word_embeddings
        stored = base["model.embed_tokens.weight" if tied else "lm_head.weight"]
        head["lm_head"] = stored.to(dtype)
        _fold_norm(head, "norm", ["lm_head"])
        yield "lm_head.weight", head["lm_head"]
    yield "model.norm.weight", (head["norm"] - 1).to(dtype)


def _scale(tensors: Tensors, exponent: int, *names: str) -> None:
    for name in names:
        if name in tensors:
            tensors[name] = tensors[name] * 2.0**exponent


def _pack_gate(config: PreTrainedConfig, layer: Tensors, gate: torch.Tensor | None) -> None:
    """`q_proj` becomes `[num_heads, 2, head_dim, hidden_size]`: a head's query, then its gate.

    A headwise gate is repeated over the channels of its head; heads without one get zeros, where `2
    * sigmoid` is 1.
    """
    head_dim, query = head_dim_of(config), layer["self_attn.q_proj.weight"]
    packed = torch.zeros_like(query)
    if gate is not None:
        elementwise = gate.shape[0] != config.num_attention_heads
        rows = gate if elementwise else gate.repeat_interleave(head_dim, dim=0)
        packed[: len(rows)] = rows
    layer["self_attn.q_proj.weight"] = _interleave(query, packed, head_dim)
    if (bias := layer.get("self_attn.q_proj.bias")) is not None:
        layer["self_attn.q_proj.bias"] = _interleave(bias, torch.zeros_like(bias), head_dim)


def add_center(layer: Tensors, center: torch.Tensor, dtype: torch.dtype) -> None:
    """`v + g * (Y - v)`: attention sums to 1, so the bias of `v_proj` moves every `Y` by `-v`, and
    a constant behind the gate, for now the bias of `o_proj`, puts `v` back.

    What is put back is what `dtype` lets the first bias take away, so that an open gate is exact.
    """
    weight, bias = layer["self_attn.o_proj.weight"], layer["self_attn.v_proj.bias"]
    groups = weight.shape[1] // center.numel()
    layer["self_attn.v_proj.bias"] = (bias - center.flatten()).to(dtype).float()
    taken = (bias - layer["self_attn.v_proj.bias"]).view(center.shape)
    put_back = weight.float() @ taken.repeat_interleave(groups, 0).flatten()
    layer["self_attn.o_proj.bias"] = layer["self_attn.o_proj.bias"] + put_back


def _add_constant_head(config: PreTrainedConfig, layer: Tensors, dtype: torch.dtype) -> None:
    """One more key-value head, and its query heads, in place of the bias of `o_proj`.

    Its values are the same in all tokens, whatever it attends to, and its gate is that of zero
    weights, so `o_proj` adds three of its columns: the bias and what `dtype` rounds off it.
    """
    head_dim, groups = head_dim_of(config), _groups(config)
    rows = {"q": groups * head_dim, "k": head_dim, "v": head_dim}
    for name, added in rows.items():
        for kind in ("weight", "bias"):
            tensor = layer[f"self_attn.{name}_proj.{kind}"]
            zeros = tensor.new_zeros(added, *tensor.shape[1:])
            layer[f"self_attn.{name}_proj.{kind}"] = torch.cat([tensor, zeros])
    layer["self_attn.v_proj.bias"][-head_dim:][:_PARTS] = _CONSTANT
    bias = layer["self_attn.o_proj.bias"]
    left = bias / _CONSTANT
    columns = bias.new_zeros(len(bias), groups * head_dim)
    for part in range(_PARTS):
        columns[:, part] = left.to(dtype)
        left = left - columns[:, part]
    weight = layer["self_attn.o_proj.weight"]
    layer["self_attn.o_proj.weight"] = torch.cat([weight, columns.to(dtype)], dim=1)
    layer["self_attn.o_proj.bias"] = torch.zeros_like(bias)


def _interleave(query: torch.Tensor, gate: torch.Tensor, head_dim: int) -> torch.Tensor:
    pair = [rows.unflatten(0, (-1, head_dim)) for rows in (query, gate)]
    return torch.cat(pair, dim=1).flatten(0, 1)


def _fold_norm(tensors: Tensors, norm: str, consumers: list[str]) -> None:
    """Move powers of two from a norm into its consumers until `w - 1` keeps every bit of `w`.

    That is so for `w >= 1/2` (and 0). Smaller and negative weights, often 0.02 to 0.5 in Llama,
    would be rounded by up to 9% in bfloat16; they are divided by `p = +-2**e` into [1/2, 1).
    """
    weight = tensors[norm]
    mantissa, exponent = torch.frexp(weight)
    exact = (weight >= 0.5) | (weight == 0)
    power = torch.where(exact, 1.0, mantissa.sign() * _power_of_two(exponent))
    tensors[norm] = weight / power
    if not exact.all():
        for name in consumers:
            tensors[name] = tensors[name] * power.to(tensors[name].dtype)


def _balance_qk_norms(layer: Tensors) -> None:
    """Move powers of two between q_norm and k_norm so that both reach 1/2 where they can.

    `q . k` is unchanged exactly: RoPE mixes channels i and i + head_dim/2, so a pair shares its
    factor. Where both are small, `w - 1` still rounds.
    """
    smallest = []
    for name in ("self_attn.q_norm.weight", "self_attn.k_norm.weight"):
        pairs = layer[name].abs().view(2, -1)
        smallest.append(torch.where(pairs == 0, 1.0, pairs).amin(dim=0))
    shift = torch.round(torch.log2(smallest[1] / smallest[0]) / 2)
    power = _power_of_two(shift).repeat(2)
    layer["self_attn.q_norm.weight"] = layer["self_attn.q_norm.weight"] * power
    layer["self_attn.k_norm.weight"] = layer["self_attn.k_norm.weight"] / power


def _add_constant_qk_norms(
    layer: Tensors, head_dim: int, eps: float, scales: Scales, dtype: torch.dtype
) -> None:
    """Scale q and k by `2**-m` and add norms that scale them back.

    `RMSNorm(x * 2**-m) * g = x * g * 2**-m / sqrt(eps + mean(x**2) * 4**-m)`, and with the mean
    far below `eps` this is `x` for `g = sqrt(eps) * 2**m`.
    """
    needed = _largest_qk(layer) / math.sqrt(eps * scales.dominance)
    m = max(0, math.ceil(math.log2(max(needed, 1.0))))
    for name in "qk":
        _scale(layer, -m, f"self_attn.{name}_proj.weight", f"self_attn.{name}_proj.bias")
    for name, value in zip("qk", _factor(eps * 4.0**m, dtype), strict=True):
        layer[f"self_attn.{name}_norm.weight"] = torch.full((head_dim,), value)


def _factor(target: float, dtype: torch.dtype) -> tuple[float, float]:
    """`a * b = target`, where `a - 1` and `b - 1` are numbers of `dtype`.

    No single bfloat16 number is close to `sqrt(eps) * 2**m`. Over one octave of `a` the best pair
    is within 1e-4, an error of the attention logits far below bfloat16's own.
    """
    a = 1 + (math.sqrt(target) * torch.linspace(1, 2, 129).double()).to(dtype).double()
    b = 1 + (target / a - 1).to(dtype).double()
    best = (a * b / target - 1).abs().argmin()
    return a[best].item(), b[best].item()


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """Exactly `2**exponent` in float32, from its bits; `exp2` and `pow` may round."""
    return ((exponent.int() + 127) << 23).view(torch.float32)


def _largest_qk(layer: Tensors) -> float:
    """A bound on every entry of q and k: `|W (w * x)| <= |W w| sqrt(n)` for a normed `x`."""
    norm = layer["input_layernorm.weight"]
    bounds = []
    for name in ("self_attn.q_proj", "self_attn.k_proj"):
        rows = (layer[f"{name}.weight"] * norm).norm(dim=1) * len(norm) ** 0.5  # in float32
        if f"{name}.bias" in layer:
            rows = rows + layer[f"{name}.bias"].abs()
        bounds.append(rows.max().item())
    return max(bounds)
