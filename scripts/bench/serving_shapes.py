"""Counts what serving headwise gates must cost: the matrices that a token passes through.

Decoding is limited by the bytes of these matrices, prefill by their multiplications. The stock
architecture with gates has a gate for each channel, and so a `q_proj` of twice the height, which
adds `hidden_size * num_heads * head_dim` weights per layer. Centers add a key-value head with its
group of query heads and their gates: `hidden_size * head_dim * (2 + 3 * group)`. A narrow gate, as
in `remote-code`, adds `hidden_size * num_heads`. Constant sink logits, key biases and their centers
add no matrix.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen3Config

from merge_size import LLAMA_31_8B
from retrofit.export.qwen3_5 import native_config

QWEN3_8B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def shapes(base: str) -> str:
    """Returns a table of what each form of headwise gates adds to the matrices that a token passes
    through."""
    configs = {
        Path(base).name: AutoConfig.from_pretrained(base),
        "Llama 3.1 8B": LlamaConfig(**LLAMA_31_8B),
        "Qwen3 8B": Qwen3Config(**QWEN3_8B),
    }
    lines = [
        "| | matrices of the base | native: decoding, prefill | native, centered | narrow |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, config in configs.items():
        layers, head = passed(config)
        cells = [f"{(layers + head) / 1e6:,.0f} M"]
        for added in added_weights(config).values():
            decoding, prefill = added / (layers + head), added / layers
            cells.append(f"{decoding:+.2%}, {prefill:+.2%}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def added_weights(config) -> dict[str, int]:
    """Returns how many numbers each form of headwise gates adds to the matrices of all layers."""
    layers, _ = passed(config)
    plain, centered = (
        passed(AutoConfig.for_model(**native_config(config, centered=centered)))[0] - layers
        for centered in (False, True)
    )
    narrow = config.num_hidden_layers * config.num_attention_heads * config.hidden_size
    return {"native": plain, "native, centered": centered, "narrow": narrow}


def passed(config) -> tuple[int, int]:
    """Returns how many numbers are in the matrices of a dense model's layers, and in its head.

    Only the last token of a prompt passes through the head. The embedding is only looked up, and
    not counted.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    return layers, model.lm_head.weight.numel()
