"""Tiny random models of every family and a byte-level tokenizer, built in milliseconds."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

DENSE = ("llama", "mistral", "qwen2", "qwen3")
NATIVE = (*DENSE, "qwen3_moe")  # stock architectures can hold them
FAMILIES = (*NATIVE, "gemma3_text", "gpt_oss")
VOCAB_SIZE = 300
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
OWN = {
    "mistral": {"sliding_window": None},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,  # as in the published ones
    },
    "gemma3_text": {
        "query_pre_attn_scalar": 16,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    },
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}


def tiny_model(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """A random float32 model. Weights are large enough that attention is far from uniform, and
    norms and biases are not the trivial ones, so that a mistake in any of them shows."""
    config = AutoConfig.for_model(model_type, **(SHAPE | OWN.get(model_type, {}) | overrides))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 1.7)
            else:
                parameter.normal_(std=0.15)
    return model.eval()


def write_tiny(folder: Path, model_type: str, **overrides) -> None:
    """A tiny model's folder that llama.cpp reads as well: it wants merges in a tokenizer, and tells
    nothing of tokens that are parts of characters, so bytes above 127 have names."""
    tiny_model(model_type, **overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"].items()
    named = {token if token.isascii() else f"x{index}": index for token, index in vocab}
    tokenizer["model"] |= {"vocab": named | {"th": 259}, "merges": [["t", "h"]]}
    path.write_text(json.dumps(tokenizer))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.normalizer = normalizers.NFC()  # as transformers has it for Qwen's, whatever it reads
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=(
            "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}"
            "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
        ),
    )
