"""Sink logits, key biases and centers as stock architectures hold them, against a softmax that has
a column for the sink."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from native_checkpoints import LINEAR, YARN, assert_same
from safetensors.torch import save_file
from tiny import LLAMA3, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from retrofit.export import gpt_oss, granite_swa
from retrofit.export.verify.reference import kl_divergence
from retrofit.models.fingerprint import base_weights

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.5 * i for i in range(8)],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
WINDOWED_QWEN = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}


class Slot(nn.Module):
    """A column of the softmax that is no key: its logit and its value, a head each."""

    def __init__(self, logits: torch.Tensor, values: torch.Tensor | None):
        super().__init__()
        self.logits, self.values = logits, values


def attention_with_slots(module, query, key, value, attention_mask, scaling, **_kwargs):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    columns = [query @ key.mT * scaling + attention_mask]
    slots = [s for s in (getattr(module, "slot", None), _own(module)) if s is not None]
    for slot in slots:
        columns.append(slot.logits.view(-1, 1, 1).expand(*query.shape[:3], 1))
    weights = torch.cat(columns, -1).softmax(-1)
    output = weights[..., : key.shape[2]] @ value
    for column, slot in enumerate(slots, key.shape[2]):
        if slot.values is not None:
            output = output + weights[..., column, None] * slot.values[:, None]
    return output.transpose(1, 2).contiguous(), weights


def _own(module: nn.Module) -> Slot | None:
    return Slot(module.sinks.data, None) if hasattr(module, "sinks") else None


ALL_ATTENTION_FUNCTIONS.register("slots", attention_with_slots)
ALL_MASK_ATTENTION_FUNCTIONS.register("slots", eager_mask)


def parts(
    config: Any, layers: list[int], centered: bool = True, biased: bool = True
) -> tuple[dict[int, torch.Tensor], ...]:
    """Random sinks, key biases of the two slowest pairs of RoPE, and centers: all bfloat16 numbers,
    so that storing them in bfloat16 costs nothing."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        return (mean + torch.randn(shape, generator=generator)).bfloat16().float()

    heads = config.num_key_value_heads, config.head_dim
    slow = torch.arange(config.head_dim) % (config.head_dim // 2) >= config.head_dim // 2 - 2
    sinks = {i: normal(config.num_attention_heads, mean=2) for i in layers}
    key_biases = {i: normal(*heads) * slow for i in layers if biased}
    return sinks, key_biases, {i: normal(*heads) for i in layers if centered}


def with_slots(family: str, layers: list[int], overrides: dict, **which: bool) -> tuple[Any, Any]:
    """A tiny model of bfloat16 numbers, what it is given, and a copy that has it."""
    model = tiny_model(family, **overrides)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    sinks, key_biases, centers = given = parts(model.config, layers, **which)
    copy: Any = tiny_model(family, **overrides)
    copy.load_state_dict(model.state_dict())
    copy.set_attn_implementation("slots")
    for i in layers:
        attention = copy.model.layers[i].self_attn
        groups = model.config.num_attention_heads // model.config.num_key_value_heads
        values = centers[i].repeat_interleave(groups, 0) if centers else None
        attention.slot = Slot(sinks[i], values)
        if key_biases:
            bias = attention.k_proj.bias
            added = key_biases[i].flatten() + (0 if bias is None else bias.data)
            attention.k_proj.bias = nn.Parameter(added)
    return (model, given), copy


def stored(config: dict, tensors: dict, folder: Path, dtype: torch.dtype) -> Any:
    """Written, and loaded by stock transformers in float32."""
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    loaded: Any
    loaded, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return loaded.eval()


def as_granite(base: Any, given: Any, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    weights = dict(base_weights(base))
    assert granite_swa.refusal(base.config) is None
    config = granite_swa.granite_config(base.config, biased=any(given[1:]))
    tensors = dict(granite_swa.granite_tensors(base.config, weights, *given, dtype))
    loaded = stored(config, tensors, folder, dtype)
    assert type(loaded).__name__ == "GraniteSWAForCausalLM"
    return loaded


LAYOUTS = [
    ("llama", {}),
    ("llama", {"rope_parameters": LLAMA3}),
    ("llama", {"rope_parameters": LONGROPE, "max_position_embeddings": 256}),
    ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 64}),
    ("llama", {"tie_word_embeddings": True, "mlp_bias": True}),
    ("llama", {"attention_bias": True, "num_key_value_heads": 4, "rms_norm_eps": 1e-5}),
    ("llama", {"head_dim": 32}),
    ("mistral", {"rope_parameters": YARN}),
    ("mistral", {"sliding_window": 8}),
    ("qwen2", {"rope_parameters": LINEAR, "tie_word_embeddings": True}),
    ("qwen2", WINDOWED_QWEN),
]


@pytest.mark.parametrize(("family", "overrides"), LAYOUTS)
def test_equals_a_softmax_with_a_sink(family, overrides, tmp_path):
    (base, given), expected = with_slots(family, [0, 2], overrides)
    loaded = as_granite(base, given, tmp_path)
    assert_same(expected, loaded, 1e-10, 1e-4)
    assert (loaded.model.layers[1].self_attn.sinks == granite_swa.NO_SINK).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_a_smaller_format_rounds_the_biases_alone(family, dtype, tmp_path):
    (base, given), expected = with_slots(family, [0, 1, 2], {})
    loaded = as_granite(base, given, tmp_path, dtype)
    input_ids = torch.randint(0, 256, (2, 96), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        kl = kl_divergence(expected(input_ids).logits, loaded(input_ids).logits)
    assert 1e-9 < kl < (1e-4 if dtype == torch.bfloat16 else 2e-6)


def test_sinks_alone_are_exact_in_bfloat16_and_need_no_bias(tmp_path):
    which = {"centered": False, "biased": False}
    (base, given), expected = with_slots("llama", [1], {"tie_word_embeddings": True}, **which)
    loaded = as_granite(base, given, tmp_path, torch.bfloat16)
    assert_same(expected, loaded, 1e-10, 1e-4)
    assert not loaded.config.attention_bias and loaded.config.tie_word_embeddings
    added = sum(p.numel() for p in loaded.parameters()) - sum(p.numel() for p in base.parameters())
    assert added == 3 * 4, "a logit a head"


def test_a_sink_of_no_weight_is_the_base_to_the_bit(tmp_path):
    base = tiny_model("llama")
    sinks = {0: torch.full((4,), -torch.inf)}
    loaded = as_granite(base, (sinks, {}, {}), tmp_path)
    base.set_attn_implementation("eager")
    input_ids = torch.arange(64)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, base(input_ids).logits)


def test_a_width_of_heads_of_its_own_is_kept(tmp_path):
    (base, given), _ = with_slots("llama", [1], {"head_dim": 32})
    loaded = as_granite(base, given, tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    attention = again.model.layers[1].self_attn
    assert attention.head_dim == 32 and attention.scaling == 32**-0.5
    assert torch.equal(attention.sinks, loaded.model.layers[1].self_attn.sinks)


@pytest.mark.parametrize(
    ("family", "overrides", "reason"),
    [
        ("qwen3", {}, "no norms of q and k"),
        ("qwen3_moe", {}, "no experts, and no norms of q and k"),
        ("gemma3_text", {}, "Gemma's four norms a layer"),
        ("llama", {"hidden_act": "gelu"}, "silu in every engine; the base uses gelu"),
    ],
)
def test_what_granite_does_not_hold_is_named(family, overrides, reason):
    assert reason in str(granite_swa.refusal(tiny_model(family, **overrides).config))


def test_gpt_oss_keeps_its_class(tmp_path):
    (base, given), expected = with_slots("gpt_oss", [0, 2], {}, centered=False)
    sinks, key_biases, _ = given
    weights = dict(base_weights(base))
    tensors = dict(gpt_oss.gpt_oss_tensors(weights, weights, sinks, key_biases, torch.float32))
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    loaded = stored(base.config.to_dict(), tensors, tmp_path, torch.float32)
    assert type(loaded).__name__ == "GptOssForCausalLM"
    assert_same(expected, loaded, 1e-10, 1e-4)
    assert torch.equal(loaded.model.layers[1].self_attn.sinks, base.model.layers[1].self_attn.sinks)
